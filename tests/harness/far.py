"""Tensors whose elements are far apart in memory that is reserved, but hardly ever touched."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor


def far_apart(x: Tensor, dim: int) -> Tensor:
    """The same values, those of the last quarter along `dim` more than 2^31 elements from the first.

    The stride itself fits 32 bits where there are three or more: it is its product with an index that doesn't.
    """
    step = 2**31 // math.ceil(0.75 * (x.shape[dim] - 1)) + 1
    strides = list(x.contiguous().stride())
    strides[dim] = step
    try:
        memory = torch.empty(step * x.shape[dim] + x.numel(), dtype=x.dtype, device=x.device)
    except RuntimeError as error:
        pytest.skip(f"no room for 2^31 elements: {error}")
    return memory.as_strided(x.shape, strides).copy_(x)
