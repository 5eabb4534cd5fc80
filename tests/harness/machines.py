"""How each backend runs on the machine at hand.

cpu    the compiled C++ kernels
triton on a GPU, else by Triton's interpreter on CPU tensors (TRITON_INTERPRET is set in conftest.py)
cuda   on a GPU, else the same .cu sources by the SIMT machine of tests/simt on CPU tensors
eager  the reference
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pyllm.kernels import OPS, extension

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def simt() -> Any:
    """The CUDA sources compiled for the CPU; built at first use, then cached under build/simt."""
    builder = _load("simt_builder", Path(__file__).parents[1] / "simt" / "simt_builder.py")
    if reason := builder.why_not():
        pytest.skip(reason)
    return builder.build_simt()


def _load(name: str, path: Path) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


class Checked:
    """A SIMT module whose kernels run under its memory checker: they may touch the tensors whose address the op's
    adapter has asked for, from their first element to their last, and nothing else; they may not race.

    Every tensor that a kernel is given passes through `Tensor.data_ptr`, so that is where this listens.
    """

    def __init__(self, module: Any):
        self.module = module
        self.asked: list[torch.Tensor] = []
        self.plain = torch.Tensor.data_ptr

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)

        def checked(*arguments: Any) -> Any:
            asked, self.asked = self.asked, []
            for low, size in spans([t for t in asked if t.numel()], self.plain):
                self.module.add_buffer(low, size, f"an argument of {name}")
            self.module.configure(check=True)
            try:
                return function(*arguments)
            finally:
                self.module.configure()
                self.module.clear_buffers()

        return checked

    def listen(self) -> None:
        def data_ptr(tensor: torch.Tensor) -> int:
            self.asked.append(tensor)
            return self.plain(tensor)

        torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]

    def stop(self) -> None:
        del torch.Tensor.data_ptr  # the base class's shows again


def spans(tensors: list[torch.Tensor], data_ptr: Any) -> list[tuple[int, int]]:
    """(address, bytes) that these tensors reach over; those that overlap become one."""
    found: list[tuple[int, int]] = []
    waiting = list(tensors)
    while waiting:
        t = waiting.pop()
        last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
        if last * t.element_size() > 1 << 26:  # rows far apart: each by itself, or the checker would want gigabytes
            waiting += t.unbind(max(range(t.dim()), key=lambda d, t=t: t.stride(d) if t.shape[d] > 1 else -1))
        else:
            found.append((data_ptr(t), data_ptr(t) + (last + 1) * t.element_size()))
    joined: list[list[int]] = []
    for low, high in sorted(found):
        if joined and low < joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], high)
        else:
            joined.append([low, high])
    return [(low, high - low) for low, high in joined]


@contextlib.contextmanager
def machine(backend: str) -> Iterator[str]:
    """Inside the block the backend takes tensors on the yielded device."""
    if backend == "cuda" and DEVICE == "cpu":
        before = extension.cuda.module, extension.cuda.device_type, extension.cuda.reason
        module = Checked(simt())
        extension.cuda.module, extension.cuda.device_type, extension.cuda.reason = module, "cpu", ""
        module.listen()
        try:
            yield "cpu"
        finally:
            module.stop()
            extension.cuda.module, extension.cuda.device_type, extension.cuda.reason = before
    else:
        yield "cpu" if backend == "cpu" else DEVICE


def arguments(inputs: dict[str, Any], op: Any) -> list[Any]:
    """The inputs in the order of the op's schema, as its `why_not` takes them; absent ones None."""
    return [inputs.get(argument.name) for argument in op.fwd._schema.arguments[:-1]]


def served(name: str, backend: str) -> None:
    """Skips the test, with its reason, when an op has no such backend."""
    if backend not in OPS[name].op.impls:
        pytest.skip(f"{name} has no {backend} kernel yet")


def prepared(name: str, backend: str, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs of an op's first case; skips with the backend's reasons when it can't run them."""
    served(name, backend)
    spec = OPS[name]
    case = spec.cases[next(iter(spec.cases))]
    inputs = spec.inputs(**case, dtype=dtype, device=device, generator=torch.Generator().manual_seed(3))
    if reasons := spec.op.why_not(backend, *arguments(inputs, spec.op)):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    return inputs
