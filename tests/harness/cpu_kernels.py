"""For tests that call the compiled CPU kernels directly, in every instruction set that this CPU has."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pyllm.kernels import extension

ISAS = ("base", "avx2", "avx512")
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)
SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 1000, 4099)
CODE = extension.DTYPE_CODES
GUARD = 64


def load(isa: str) -> ModuleType:
    """A copy of the module of its own, in the given instruction set: it chooses when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYLLM_CPU_ISA", isa)
        # pybind11 keeps one module per full name, hence a name for each.
        spec = importlib.util.spec_from_file_location(f"cpu_{isa or 'best'}._cpu", extension.cpu.module.__file__)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


class Out:
    """An output poisoned with NaN between two guard bands. `checked()` gives it after a look at what lies around."""

    def __init__(self, *shape: int, dtype: torch.dtype):
        n = torch.Size(shape).numel()
        self.buffer = torch.full((n + 2 * GUARD,), 12345.0, dtype=dtype)
        # One element off, so that nothing is aligned to more than an element.
        self.tensor = self.buffer[GUARD - 1 : GUARD - 1 + n].fill_(float("nan")).view(shape)

    def checked(self) -> Tensor:
        n = self.tensor.numel()
        around = torch.cat((self.buffer[: GUARD - 1], self.buffer[GUARD - 1 + n :]))
        assert (around == torch.tensor(12345.0, dtype=around.dtype)).all(), "written outside of the output"
        return self.tensor


def rows(n: int, cols: int, dtype: torch.dtype, pad: int = 3) -> Tensor:
    """(n, cols) with padded, unaligned rows; the padding is NaN, so that reading it shows."""
    buffer = torch.full((n, cols + pad), float("nan"), dtype=dtype)
    view = buffer[:, 1 : 1 + cols]
    return view.copy_(torch.randn(n, cols))


def ptrs(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def assert_rounded(got: Tensor, true: Tensor, ulps: float = 4.0, scale: Tensor | None = None) -> None:
    """got is `true` (float64) rounded once: half a unit of its dtype, and `ulps` of its float32 (float64) arithmetic.

    The arithmetic's error is relative to `scale`, the magnitude of the terms that were added up.
    """
    assert got.isfinite().all()
    scale = true.abs() if scale is None else scale
    # A half's unit in the last place is that of the binade; its subnormal numbers are all equally far apart.
    info = torch.finfo(got.dtype)
    tiny = info.smallest_normal * info.eps
    unit = torch.exp2(torch.floor(torch.log2(true.abs().clamp_min(info.smallest_normal)))) * info.eps
    allowed = 0.5 * unit.clamp_min(tiny) + ulps * torch.finfo(acc(got.dtype)).eps * scale
    excess = ((got.double() - true).abs() / allowed).max().item()
    assert excess <= 1.0, f"error is {excess:.3g} times the allowed one"
