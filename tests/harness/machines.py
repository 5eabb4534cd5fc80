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


@contextlib.contextmanager
def machine(backend: str) -> Iterator[str]:
    """Inside the block the backend takes tensors on the yielded device."""
    if backend == "cuda" and DEVICE == "cpu":
        before = extension.cuda.module, extension.cuda.device_type, extension.cuda.reason
        extension.cuda.module, extension.cuda.device_type, extension.cuda.reason = simt(), "cpu", ""
        try:
            yield "cpu"
        finally:
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
