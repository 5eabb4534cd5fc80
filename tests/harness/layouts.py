"""Tensors that lie in memory as a large model's would, without its memory; and counts of a kernel module's launches."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def far_apart(x: Tensor, dim: int = 0) -> Tensor:
    """The same values, those of the last quarter along `dim` more than 2^31 elements from the first.

    The stride itself fits 32 bits where there are three or more: it is its product with an index that doesn't. The
    storage is gigabytes of address space, of which only the pages with an element are ever touched.
    """
    return _FarApart.apply(x, dim)


class _FarApart(torch.autograd.Function):
    """Its gradient is in the usual place: as_strided's own would fill gigabytes with zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        step = 2**31 // math.ceil(0.75 * (x.shape[dim] - 1)) // 16 * 16 + 16
        strides = list(x.contiguous().stride())
        strides[dim] = step
        try:
            memory = torch.empty(step * x.shape[dim] + x.numel(), dtype=x.dtype, device=x.device)
        except RuntimeError as error:  # an allocator that commits what it gives
            pytest.skip(f"no room for 2^31 elements: {error}")
        return memory.as_strided(x.shape, strides).copy_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Launches:
    """Stands in for a Triton kernel, and notes every launch in `seen`."""

    def __init__(self, kernel: object, name: str, seen: list[str]):
        self.kernel, self.name, self.seen = kernel, name, seen

    def __getitem__(self, grid: object) -> object:
        self.seen.append(self.name)
        return self.kernel[grid]  # type: ignore[index]


def counted(patch: pytest.MonkeyPatch, *modules: ModuleType) -> list[str]:
    """The names of the modules' kernels, as they are launched from now on."""
    seen: list[str] = []
    for module in modules:
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            patch.setattr(module, name, Launches(getattr(module, name), name, seen))
    return seen
