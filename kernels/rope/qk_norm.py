"""RMSNorm of q's and k's heads fused with their rotation. The formulas are in `qk_norm_reference.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..dispatch import Impl, Op, apply, lazy, needs_grad, once, once_differentiable
from ..spec import Spec
from . import bindings, bindings_cuda
from . import qk_norm_reference as reference
from .checks import MAX_TRITON_HEAD, check, check_weight, outside
from .reference import half_table

_TRITON = f"{__package__}.triton_qk_norm_rope"


def _why_not_triton(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *_: Any) -> list[str]:
    if q.shape[-1] > MAX_TRITON_HEAD:
        return [f"head_dim {q.shape[-1]} is above {MAX_TRITON_HEAD}"]
    return triton_support.why_not(q, k, q_weight, k_weight)


IMPLS = {
    "triton": Impl(lazy(f"{_TRITON}:qk_norm_rope_fwd"), lazy(f"{_TRITON}:qk_norm_rope_bwd"), _why_not_triton),
    "cuda": bindings_cuda.CUDA_QK_NORM,
    "cpu": bindings.CPU_QK_NORM,
    "eager": reference.EAGER,
}


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS-normalises every head of q and k over its D elements, then rotates it: Qwen3's attention before its scores.

    Args:
        q: (B, T, H, D), or packed (T, H, D); any strides.
        k: (B, T, Hkv, D), packed (T, Hkv, D), in q's dtype.
        q_weight, k_weight: (D,), floating point; may differ from q in dtype.
        cos, sin, position_ids, interleaved, rotary_dim: as in `apply_rope`. All D elements are normalised, R rotated.
        eps, offset: as in `rms_norm`.
        backend: "triton", "cuda", "cpu", "eager", or None to choose.
    Returns:
        q and k, in their shapes and dtype, contiguous. Computed in float32 and rounded once, after the rotation:
        `rms_norm` and `apply_rope`, one after the other, round twice.
    Raises:
        ValueError, BackendError: as `apply_rope`.
    Source: Henry et al. 2020, arXiv:2010.04245; Yang et al. 2025, arXiv:2505.09388.
    """
    R = check("qk_norm_rope", q, k, cos, sin, position_ids, rotary_dim)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_weight("qk_norm_rope", name, weight, q)
    cos, sin = (half_table(t, q.shape[-1], R, interleaved) for t in (cos, sin))
    packed = q.dim() == 3
    if packed:
        q, k = q.unsqueeze(0), k.unsqueeze(0)
    try:
        q, k = _run(q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved, backend)
    except IndexError as error:
        raise outside("qk_norm_rope", cos, position_ids) from error
    return (q.squeeze(0), k.squeeze(0)) if packed else (q, k)


def _run(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    eps: float, offset: float, interleaved: bool, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rest = (cos, sin, position_ids, eps, offset, interleaved)
    chosen = QK_NORM_ROPE.select(backend, q.device, q, k, q_weight, k_weight, *rest)
    if chosen == "eager":
        q, k, q_weight, k_weight = once(q, k, q_weight, k_weight)
        return reference.norm_and_rotate(q, k, q_weight, k_weight, *rest)[:2]
    if needs_grad(q, k, q_weight, k_weight):
        return apply(_QKNormRope, q, k, q_weight, k_weight, *rest, chosen)
    return QK_NORM_ROPE.fwd(q, k, q_weight, k_weight, *rest, chosen)[:2]


def _fwd_fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, ...]:
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    outputs = q.new_empty(q.shape), k.new_empty(k.shape)
    return *outputs, q.new_empty(q.shape[:-1], dtype=acc), k.new_empty(k.shape[:-1], dtype=acc)


def _bwd_fake(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, q_weight, k_weight))


QK_NORM_ROPE = Op(
    "qk_norm_rope",
    "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? position_ids, float eps,"
    " float offset, bool interleaved) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    IMPLS,
    bwd_schema="(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor rstd_q,"
    " Tensor rstd_k, Tensor cos, Tensor sin, Tensor? position_ids, float offset, bool interleaved)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    bwd_fake=_bwd_fake,
)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        eps: float,
        offset: float,
        interleaved: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        rest = (cos, sin, position_ids, eps, offset, interleaved)
        q_out, k_out, rstd_q, rstd_k = QK_NORM_ROPE.fwd(q, k, q_weight, k_weight, *rest, backend)
        ctx.save_for_backward(q, k, q_weight, k_weight, rstd_q, rstd_k, cos, sin, position_ids)
        ctx.offset, ctx.interleaved, ctx.backend = offset, interleaved, backend
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        grads = QK_NORM_ROPE.bwd(dq, dk, *ctx.saved_tensors, ctx.offset, ctx.interleaved, ctx.backend)
        return *grads, None, None, None, None, None, None, None


SPECS = {
    "qk_norm_rope": Spec(
        qk_norm_rope,
        reference.qk_norm_rope,
        reference.qk_norm_rope,
        QK_NORM_ROPE,
        reference.CASES,
        reference.qk_norm_rope_inputs,
        ("q", "k", "q_weight", "k_weight"),
        reference.qk_norm_rope_cost,
        reference.columns,
        {"q_weight": reference.q_rows, "k_weight": reference.k_rows},
    )
}
