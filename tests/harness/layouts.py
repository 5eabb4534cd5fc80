"""Tensors that lie in memory as a large model's would, without its memory; and counts of a kernel module's launches."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor


def far_apart(x: Tensor) -> Tensor:
    """The same values in rows so far apart that the last one starts past 2^31 elements.

    The storage is gigabytes of address space, of which only the pages with a row are ever touched.
    """
    rows, cols = x.shape
    stride = -(-(2**31) // (rows - 1)) // 16 * 16 + 16
    try:
        storage = torch.empty((rows - 1) * stride + cols, dtype=x.dtype)
    except RuntimeError as error:  # an allocator that commits what it gives
        pytest.skip(f"no address space for {2 * stride * rows} bytes: {error}")
    return storage.as_strided(x.shape, (stride, 1)).copy_(x)


class Launches:
    """Stands in for a Triton kernel, and notes every launch in `seen`."""

    def __init__(self, kernel: object, name: str, seen: list[str]):
        self.kernel, self.name, self.seen = kernel, name, seen

    def __getitem__(self, grid: object) -> object:
        self.seen.append(self.name)
        return self.kernel[grid]  # type: ignore[index]


def counted(module: ModuleType, patch: pytest.MonkeyPatch) -> list[str]:
    """The names of the module's kernels, as they are launched from now on."""
    seen: list[str] = []
    for name in [n for n in vars(module) if n.endswith("_kernel")]:
        patch.setattr(module, name, Launches(getattr(module, name), name, seen))
    return seen
