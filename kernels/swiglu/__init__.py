"""SwiGLU's gate: silu(gate) * up. The formula is in `reference.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..dispatch import Impl, Op, apply, lazy, needs_grad, once, once_differentiable
from ..spec import Spec
from . import bindings, reference

_TRITON = f"{__name__}.triton_swiglu"

IMPLS = {
    "triton": Impl(lazy(f"{_TRITON}:swiglu_fwd"), lazy(f"{_TRITON}:swiglu_bwd"), triton_support.why_not),
    "cuda": bindings.CUDA,
    "cpu": bindings.CPU,
    "eager": reference.EAGER,
}
PACKED_IMPLS = {
    "triton": Impl(lazy(f"{_TRITON}:swiglu_packed_fwd"), lazy(f"{_TRITON}:swiglu_packed_bwd"), triton_support.why_not),
    "cuda": bindings.CUDA_PACKED,
    "cpu": bindings.CPU_PACKED,
    "eager": reference.EAGER_PACKED,
}


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """SwiGLU's gate, element by element: silu(gate) * up, where silu(g) = g / (1 + exp(-g)).

    Args:
        gate: (..., F), floating point; any strides, such as a chunk of a wider tensor.
        up: (..., F), in gate's dtype.
        backend: "triton", "cuda", "cpu", "eager", or None to choose.
    Returns:
        (..., F) in gate's dtype, contiguous. Computed in float32 and rounded once.
    Raises:
        ValueError: gate is not floating point, or up differs in shape, dtype or device.
        BackendError: a named backend can't run this; its reasons are listed.
    Source: Shazeer 2020, arXiv:2002.05202. Backward recomputes from gate and up: nothing else is kept.
    """
    if not gate.is_floating_point():
        raise ValueError(f"swiglu: gate must be floating point, got {gate.dtype}")
    if up.shape != gate.shape:
        raise ValueError(f"swiglu: up must have gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if up.dtype != gate.dtype:
        raise ValueError(f"swiglu: up must have gate's dtype {gate.dtype}, got {up.dtype}")
    if up.device != gate.device:
        raise ValueError(f"swiglu: up must be on gate's device {gate.device}, got {up.device}")
    chosen = SWIGLU.select(backend, gate.device, gate, up)
    if chosen == "eager":
        return reference.swiglu(*once(gate, up))
    if needs_grad(gate, up):
        return apply(_SwiGLU, gate, up, chosen)
    return SWIGLU.fwd(gate, up, chosen)


def swiglu_packed(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """`swiglu` of the two halves of the last dimension, neither of which is copied; one gradient tensor for both.

    Args:
        gate_up: (..., 2F), floating point: gate in the first half, up in the second; any strides.
        backend: as in `swiglu`.
    Returns:
        (..., F) in gate_up's dtype, contiguous.
    Raises:
        ValueError: gate_up is not floating point, or its last dimension is odd or missing.
        BackendError: as `swiglu`.
    """
    if not gate_up.is_floating_point():
        raise ValueError(f"swiglu_packed: gate_up must be floating point, got {gate_up.dtype}")
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu_packed: gate_up must have an even last dimension, got {tuple(gate_up.shape)}")
    chosen = SWIGLU_PACKED.select(backend, gate_up.device, gate_up)
    if chosen == "eager":
        return reference.swiglu_packed(*once(gate_up))
    if needs_grad(gate_up):
        return apply(_SwiGLUPacked, gate_up, chosen)
    return SWIGLU_PACKED.fwd(gate_up, chosen)


def _fwd_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _bwd_fake(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _packed_fwd_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _packed_bwd_fake(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


SWIGLU = Op(
    "swiglu",
    "(Tensor gate, Tensor up) -> Tensor",
    _fwd_fake,
    IMPLS,
    bwd_schema="(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    bwd_fake=_bwd_fake,
)
SWIGLU_PACKED = Op(
    "swiglu_packed",
    "(Tensor gate_up) -> Tensor",
    _packed_fwd_fake,
    PACKED_IMPLS,
    bwd_schema="(Tensor dy, Tensor gate_up) -> Tensor",
    bwd_fake=_packed_bwd_fake,
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return SWIGLU.fwd(gate, up, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *SWIGLU.bwd(dy, gate, up, ctx.backend), None


class _SwiGLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.backend = backend
        return SWIGLU_PACKED.fwd(gate_up, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        return SWIGLU_PACKED.bwd(dy, gate_up, ctx.backend), None


SPECS = {
    "swiglu": Spec(
        swiglu,
        reference.swiglu,
        reference.swiglu,
        SWIGLU,
        reference.CASES,
        reference.swiglu_inputs,
        ("gate", "up"),
        reference.swiglu_cost,
        reference.one,
    ),
    "swiglu_packed": Spec(
        swiglu_packed,
        reference.swiglu_packed,
        reference.swiglu_packed,
        SWIGLU_PACKED,
        reference.CASES,
        reference.swiglu_packed_inputs,
        ("gate_up",),
        reference.swiglu_packed_cost,
        reference.one,
    ),
}
