"""The linear layer's C++ kernels (`csrc/linear/linear_cpu.cpp`), by way of `products.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import cpu
from ..products import column_sums, product


def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    N, (F, C) = x.shape[:-1].numel(), weight.shape
    y = torch.empty((*x.shape[:-1], F), dtype=x.dtype)
    product(x.reshape(N, C), weight.t(), y.view(N, F), bias=None if bias is None else bias.float().contiguous())
    return y


def _bwd(
    dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, (F, C) = x.shape[:-1].numel(), weight.shape
    rows, inputs = dy.reshape(N, F), x.reshape(N, C)
    dx = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype)
    dweight = torch.empty((F, C) if needs_weight else (0,), dtype=weight.dtype)
    dbias = torch.empty((F if needs_bias else 0,), dtype=torch.float32)
    if needs_x:
        product(rows, weight, dx.view(N, C))
    if needs_weight:
        product(rows.t(), inputs, dweight)
    if needs_bias:
        column_sums(rows if rows.stride(-1) == 1 else rows.contiguous(), dbias)
    return dx, dweight, dbias.to(dy.dtype)


def _why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    reasons = cpu.why_not(x, weight, bias)
    if not reasons and x.dtype == torch.float64:
        reasons = ["float64 products are torch's"]
    return reasons


CPU = Impl(_fwd, _bwd, _why_not)
