"""A linear layer, y = x W^T + b, in eager PyTorch.

Backward: dx = dy W, dW = dy^T x, db = sum of dy's rows.
Shapes: x (..., C), weight (F, C), bias (F,), y (..., F). C inputs, F outputs, N rows.
Rounding: sums in float32 (float64 for float64), each result rounded once.
Source: torch.nn.functional.linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Impl
from ..spec import Cost, draw


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y, in float32 and rounded once; differentiable."""
    acc = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc)).to(x.dtype)


# The eager backend is torch's own product, at the tensors' dtype.
def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), empty where not needed."""
    rows, inputs = dy.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
    dx = (rows @ weight).view(x.shape) if needs_x else x.new_empty(0)
    dweight = rows.t() @ inputs if needs_weight else weight.new_empty(0)
    dbias = rows.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(dy.dtype)
    return dx, dweight, dbias if needs_bias else weight.new_empty(0)


def why_not(*_: Any) -> list[str]:
    return []


EAGER = Impl(linear_fwd, linear_bwd, why_not)


# For tests and benchmarks.
CASES: Mapping[str, Mapping[str, Any]] = {
    "9x32-50": dict(shape=(9, 32), outputs=50),
    "2x7x24-33-bias": dict(shape=(2, 7, 24), outputs=33, bias=True),
    "13x401-7": dict(shape=(13, 401), outputs=7),
    "150x20-70-bias": dict(shape=(150, 20), outputs=70, bias=True),
    "7x16-1040": dict(shape=(7, 16), outputs=1040),
}


def linear_inputs(
    shape: tuple[int, ...],
    outputs: int,
    bias: bool = False,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    variant: str = "plain",
) -> dict[str, Any]:
    """Keyword arguments of `linear`."""
    how: dict[str, Any] = dict(dtype=dtype, device=device, generator=generator)
    inputs = dict(x=draw(*shape, variant=variant, **how), weight=draw(outputs, shape[-1], **how) * shape[-1] ** -0.5)
    if bias:
        inputs["bias"] = draw(outputs, **how)
    return inputs


def linear_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """One product forward, two backward; every tensor once."""
    x, w, bias = inputs["x"], inputs["weight"], inputs.get("bias")
    N, outputs = x.numel() // x.shape[-1], w.shape[0]
    y, b = N * outputs, 0 if bias is None else bias.numel()
    elements = (2 * x.numel() + 2 * w.numel() + y + b) if backward else (x.numel() + w.numel() + y + b)
    return Cost(elements * x.element_size(), 2 * x.numel() * outputs * (2 if backward else 1) + (y if b else 0))


def longest(inputs: dict[str, Any]) -> int:
    """Terms of the longest sum: inputs of an output, outputs of a dx."""
    return max(int(n) for n in inputs["weight"].shape)


def rows(inputs: dict[str, Any]) -> int:
    """Terms of a sum over rows, which gradients of weight and bias are."""
    x = inputs["x"]
    return max(1, x.numel() // max(1, x.shape[-1]))
