"""The compiled modules `_cpu` and `_cuda`: whether they are there, why not, and what their functions expect.

Both take raw pointers, sizes, strides in elements and dtype codes: they know nothing of torch, so that one build
serves every torch. They must be imported after torch: `_cpu` then finds torch's OpenMP runtime already loaded and
shares its threads (torch.set_num_threads governs both).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # csrc/common/dtype.h

_NOT_BUILT = {
    "_cpu": "pyllm.kernels._cpu is not built: reinstall with a C++17 compiler (`pip install .`)",
    "_cuda": "pyllm.kernels._cuda is not built: no nvcc at installation (set CUDA_HOME, PYLLM_BUILD=cuda, reinstall)",
}


class Extension:
    """A compiled module, or the reason why there is none.

    Attributes:
        module: None when it can't be used; `reason` then says why.
        device_type: of the tensors whose pointers it takes. Tests that run the CUDA sources on the CPU's SIMT machine
            put that machine's module in `module` and "cpu" here.
    """

    def __init__(self, name: str, device_type: str):
        self.name = name
        self.device_type = device_type
        self.module: Any = None
        self.reason = ""
        self.dtypes = frozenset(DTYPE_CODES) - ({torch.float64} if name == "_cuda" else set())
        full = f"pyllm.kernels.{name}"
        try:
            self.module = importlib.import_module(full)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == full
            self.reason = _NOT_BUILT[name] if missing else f"{full} does not import: {error}"

    def why_not(self, *tensors: torch.Tensor | None) -> list[str]:
        """Reasons against these tensors that hold for every op: module missing, device, dtype."""
        if self.module is None:
            return [self.reason]
        on_cpu = self.device_type == "cpu"
        for t in tensors:
            if t is None:
                continue
            if not (t.is_cpu if on_cpu else t.is_cuda):  # device.type makes a string: ten times slower
                return [f"a tensor is on {t.device}, these kernels take {self.device_type} tensors"]
            if t.dtype not in self.dtypes:
                return [f"dtype {t.dtype} is not served"]
        return []


cpu = Extension("_cpu", "cpu")
cuda = Extension("_cuda", "cuda")


def pointer(t: torch.Tensor | None) -> int:
    """Address of a tensor's first element, 0 for None: what the bindings take."""
    return 0 if t is None else t.data_ptr()


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute a dtype in, and what rstd, weights and tables come in: float64's own, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_acc(x: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """x in `acc`, contiguous: itself where it is so already, as a check is cheaper than a call that does nothing."""
    return x if x.dtype == acc and x.is_contiguous() else x.to(acc).contiguous()


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of x's shape, for a kernel to fill. As fast as torch has it, which no other way is."""
    if x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def new_empty(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """x.new_empty(shape), whose parser likes numbers better than a tuple of them: a third of the time."""
    return x.new_empty(*shape) if shape else x.new_empty(shape)


def stream(t: torch.Tensor) -> int:
    """Handle of the CUDA stream that work on this tensor's device belongs to; 0 on the CPU's SIMT machine."""
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(x, row stride) such that the last dimension is dense and row n of all leading ones starts at n * stride.

    x itself wherever its strides allow, which includes padded rows, chunks of a wider tensor and expanded rows
    (stride 0); otherwise a contiguous copy.
    """
    cols = x.shape[-1]
    if x.is_contiguous():
        return x, cols
    if x.stride(-1) == 1 or cols <= 1:
        stride = expected = None
        for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
            if size == 1:
                continue
            if stride is None:
                stride = step
            elif step != expected:
                return x.contiguous(), cols
            expected = step * size
        return x, cols if stride is None else stride
    return x.contiguous(), cols


def optional_rows(x: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """as_rows of a tensor that may be absent."""
    return (None, 0) if x is None else as_rows(x)
