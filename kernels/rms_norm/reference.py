"""RMSNorm, and the residual addition before it, in eager PyTorch.

    h = x + residual                            (add form: rounded to the residual's dtype, as Hugging Face does)
    rstd = 1 / sqrt(mean(h^2 over C) + eps)
    y = h * rstd * (offset + weight)            (offset 1 is Gemma's spelling)

Backward, with g = dy * (offset + weight) and ^ for the normalised row h * rstd:

    dh = rstd * (g - h^ * mean(g * h^)) + dh_out      dweight = sum over rows of dy * h^

Shapes: x, residual, y (..., C), weight (C,), rstd (...). N rows, C hidden.
Rounding: computed in float32 (float64 for float64), y rounded once to x's dtype. Hugging Face rounds h^ before it
multiplies by the weight; we don't.
Source: Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..spec import Cost, draw


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0) -> Tensor:
    """y, by the formula above."""
    return _norm(x, weight, eps, offset, x.dtype)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(y, h), by the formula above."""
    h = _add(x, residual)
    return _norm(h, weight, eps, offset, x.dtype)[0], h


def _add(x: Tensor, residual: Tensor) -> Tensor:
    acc = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    return (x.to(acc) + residual.to(acc)).to(residual.dtype)


def _norm(h: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(h.dtype, torch.float32)
    wide = h.to(acc)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * (weight.to(acc) + offset)).to(dtype), rstd.squeeze(-1)


# What a backend owes the two ops; here by autograd of the functions above, from the tensors that the contract saves.
def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return _norm(x, weight, eps, offset, x.dtype)


def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    dh, dweight = _bwd(dy, None, x, weight, rstd, offset)
    return dh, dweight


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    h = _add(x, residual)
    y, rstd = _norm(h, weight, eps, offset, x.dtype)
    return y, h, rstd


def add_rms_norm_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    return _bwd(dy, dh, h, weight, rstd, offset)


def _bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    # eps isn't saved: the gradient of 1/sqrt(mean(h^2) + eps) is known from its value, rstd.
    acc = rstd.dtype
    g = dy.to(acc) * (weight.to(acc) + offset)
    unit = h.to(acc) * rstd.unsqueeze(-1)
    grad = (g - unit * (g * unit).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    if dh is not None:
        grad = grad + dh.to(acc)
    rows = tuple(range(dy.dim() - 1))
    dweight = dy.to(acc) * unit
    return grad.to(h.dtype), (dweight.sum(rows) if rows else dweight).to(weight.dtype)


def why_not(*_: Any) -> list[str]:
    return []


EAGER = Impl(rms_norm_fwd, rms_norm_bwd, why_not)
EAGER_ADD = Impl(add_rms_norm_fwd, add_rms_norm_bwd, why_not)


# For tests and benchmarks.
CASES: Mapping[str, Mapping[str, Any]] = {
    "8x64": dict(shape=(8, 64)),
    "3x5x1000-offset1": dict(shape=(3, 5, 1000), offset=1.0),
    "17x129": dict(shape=(17, 129)),
    "33x7": dict(shape=(33, 7)),
    "1d-40": dict(shape=(40,)),
    "7x4097": dict(shape=(7, 4097)),
    "21x2048": dict(shape=(21, 2048)),
}
ADD_CASES: Mapping[str, Mapping[str, Any]] = {
    "8x64": dict(shape=(8, 64)),
    "3x5x1000-offset1": dict(shape=(3, 5, 1000), offset=1.0),
    "17x129": dict(shape=(17, 129)),
    "7x4097": dict(shape=(7, 4097)),
    "21x2048": dict(shape=(21, 2048)),
    "13x8195-offset1": dict(shape=(13, 8195), offset=1.0),  # wider than a Triton program's registers, rows in turns
}


def rms_norm_inputs(
    shape: tuple[int, ...],
    offset: float = 0.0,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    variant: str = "plain",
) -> dict[str, Any]:
    """Keyword arguments of `rms_norm`."""
    x = draw(*shape, dtype=dtype, device=device, generator=generator, variant=variant)
    weight = draw(shape[-1], dtype=dtype, device=device, generator=generator)
    return dict(x=x, weight=weight, eps=eps, offset=offset)


def add_rms_norm_inputs(shape: tuple[int, ...], offset: float = 0.0, eps: float = 1e-6, **how: Any) -> dict[str, Any]:
    """Keyword arguments of `add_rms_norm`."""
    inputs = rms_norm_inputs(shape, offset, eps, **how)
    return dict(x=inputs.pop("x"), residual=draw(*shape, **how), **inputs)


def rms_norm_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """Forward reads x, writes y; backward reads dy and x, writes dx. The weight, its gradient and rstd besides."""
    x, weight = inputs["x"], inputs["weight"]
    rows = x.numel() // max(1, x.shape[-1])
    rstd = rows * 4
    moved = x.numel() * x.element_size() * (3 if backward else 2)
    weights = weight.numel() * weight.element_size() * (2 if backward else 1)
    return Cost(moved + weights + rstd, x.numel() * (9 if backward else 4))


def add_rms_norm_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """As rms_norm; forward also reads the residual and writes the sum, backward also reads the sum's gradient."""
    plain, residual = rms_norm_cost(inputs, backward), inputs["residual"]
    moved = residual.numel() * residual.element_size() * (1 if backward else 2)
    return Cost(plain.bytes + moved, plain.flops + residual.numel())


def columns(inputs: dict[str, Any]) -> int:
    """Terms of a row's sum of squares."""
    return int(inputs["x"].shape[-1])


def rows(inputs: dict[str, Any]) -> int:
    """Terms of a weight gradient's sum."""
    return int(inputs["x"].numel() // max(1, inputs["x"].shape[-1]))
