"""RMSNorm and its fusion with the residual addition before it. The formula is in `reference.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..dispatch import Impl, Op, apply, lazy, needs_grad, once, once_differentiable
from ..extension import acc_dtype
from ..spec import Spec
from . import bindings, reference

_TRITON = f"{__name__}.triton_rms_norm"


def _why_not_triton(x: Tensor, weight: Tensor, eps: float, offset: float) -> list[str]:
    return triton_support.why_not(x, weight)


def _why_not_triton_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> list[str]:
    return triton_support.why_not(x, residual, weight)


IMPLS = {
    "triton": Impl(lazy(f"{_TRITON}:rms_norm_fwd"), lazy(f"{_TRITON}:rms_norm_bwd"), _why_not_triton),
    "cuda": bindings.CUDA,
    "cpu": bindings.CPU,
    "eager": reference.EAGER,
}
ADD_IMPLS = {
    "triton": Impl(lazy(f"{_TRITON}:add_rms_norm_fwd"), lazy(f"{_TRITON}:add_rms_norm_bwd"), _why_not_triton_add),
    "cuda": bindings.CUDA_ADD,
    "cpu": bindings.CPU_ADD,
    "eager": reference.EAGER_ADD,
}


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, backend: str | None = None
) -> Tensor:
    """Root-mean-square normalisation of the last dimension: y = x / sqrt(mean(x^2) + eps) * (offset + weight).

    Args:
        x: (..., C), floating point; any strides.
        weight: (C,), floating point; may differ from x in dtype.
        eps: added inside the root; 1e-6 in Llama 2, 1e-5 in Llama 3.
        offset: added to the weight in float32; 1 for Gemma's zero-centred weights.
        backend: "triton", "cuda", "cpu", "eager", or None to choose.
    Returns:
        (..., C) in x's dtype, contiguous. Computed in float32 and rounded once.
    Raises:
        ValueError: x has no dimension, or dtypes or shapes don't fit.
        BackendError: a named backend can't run this; its reasons are listed.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467. Hugging Face's Llama rounds before the weight; this doesn't.
    """
    _check("rms_norm", x, weight)
    chosen = RMS_NORM.select(backend, x.device, x, weight, eps, offset)
    if chosen == "eager":
        x, weight = once(x, weight)
        return reference.rms_norm(x, weight, eps, offset=offset)
    if needs_grad(x, weight):
        return apply(_RMSNorm, x, weight, eps, offset, chosen)
    return RMS_NORM.fwd(x, weight, eps, offset, chosen)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream's step between two blocks: h = x + residual, y = rms_norm(h). Saves a pass over memory.

    Args:
        x: (..., C), what the block before computed; any strides.
        residual: (..., C), the stream; any strides, its dtype may differ from x's.
        weight, eps, offset, backend: as in `rms_norm`.
    Returns:
        y (..., C) in x's dtype, and h (..., C) in the residual's dtype. h is rounded before it is normalised, as in
        Hugging Face's models, so the two agree.
    Raises:
        ValueError, BackendError: as `rms_norm`.
    """
    _check("add_rms_norm", x, weight)
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if not residual.is_floating_point():
        raise ValueError(f"add_rms_norm: residual must be floating point, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"add_rms_norm: residual must be on x's device {x.device}, got {residual.device}")
    chosen = ADD_RMS_NORM.select(backend, x.device, x, residual, weight, eps, offset)
    if chosen == "eager":
        x, residual, weight = once(x, residual, weight)
        return reference.add_rms_norm(x, residual, weight, eps, offset=offset)
    if needs_grad(x, residual, weight):
        return apply(_AddRMSNorm, x, residual, weight, eps, offset, chosen)
    return ADD_RMS_NORM.fwd(x, residual, weight, eps, offset, chosen)[:2]


def _check(name: str, x: Tensor, weight: Tensor) -> None:
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"{name}: x and weight must be floating point, got {x.dtype} and {weight.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{name}: x must have at least one dimension, got a scalar")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{name}: weight must have shape ({x.shape[-1]},), the last dimension of x, got {tuple(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"{name}: weight must be on x's device {x.device}, got {weight.device}")


def _fwd_fake(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=acc_dtype(x.dtype))


def _bwd_fake(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _add_fwd_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), residual.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=acc_dtype(residual.dtype))


def _add_bwd_fake(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


RMS_NORM = Op(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
    _fwd_fake,
    IMPLS,
    bwd_schema="(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset) -> (Tensor, Tensor)",
    bwd_fake=_bwd_fake,
)
ADD_RMS_NORM = Op(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    _add_fwd_fake,
    ADD_IMPLS,
    bwd_schema="(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, float offset) -> (Tensor, Tensor)",
    bwd_fake=_add_bwd_fake,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, backend: str) -> Tensor:
        y, rstd = RMS_NORM.fwd(x, weight, eps, offset, backend)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.backend = offset, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = RMS_NORM.bwd(dy, x, weight, rstd, ctx.offset, ctx.backend)
        return dx, dweight, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        y, h, rstd = ADD_RMS_NORM.fwd(x, residual, weight, eps, offset, backend)
        ctx.save_for_backward(h, weight, rstd)
        ctx.offset, ctx.backend, ctx.x_dtype = offset, backend, x.dtype
        ctx.set_materialize_grads(False)  # the last layer's h has no gradient: no zeros are made and added for it
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, rstd = ctx.saved_tensors
        if dy is None:  # only the sum was used
            grad, dweight = dh, None
        else:
            grad, dweight = ADD_RMS_NORM.bwd(dy, dh, h, weight, rstd, ctx.offset, ctx.backend)
        return None if grad is None else grad.to(ctx.x_dtype), grad, dweight, None, None, None


SPECS = {
    "rms_norm": Spec(
        rms_norm,
        reference.rms_norm,
        reference.rms_norm,
        RMS_NORM,
        reference.CASES,
        reference.rms_norm_inputs,
        ("x", "weight"),
        reference.rms_norm_cost,
        reference.columns,
        {"weight": reference.rows},
    ),
    "add_rms_norm": Spec(
        add_rms_norm,
        reference.add_rms_norm,
        reference.add_rms_norm,
        ADD_RMS_NORM,
        reference.ADD_CASES,
        reference.add_rms_norm_inputs,
        ("x", "residual", "weight"),
        reference.add_rms_norm_cost,
        reference.columns,
        {"weight": reference.rows},
    ),
}
