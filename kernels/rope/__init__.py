"""Rotary position embedding. The formula is in `reference.py`; its fusion with the norms before it in `qk_norm.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..dispatch import Impl, Op, apply, lazy, needs_grad, once, once_differentiable
from ..spec import Spec
from . import bindings, bindings_cuda, qk_norm, reference
from .checks import MAX_TRITON_HEAD, check, outside
from .qk_norm import qk_norm_rope as qk_norm_rope

_TRITON = f"{__name__}.triton_rope"


def _why_not_triton(q: Tensor, k: Tensor, *_: Any) -> list[str]:
    if q.shape[-1] > MAX_TRITON_HEAD:
        return [f"head_dim {q.shape[-1]} is above {MAX_TRITON_HEAD}"]
    return triton_support.why_not(q, k)


IMPLS = {
    "triton": Impl(lazy(f"{_TRITON}:rope_fwd"), lazy(f"{_TRITON}:rope_bwd"), _why_not_triton),
    "cuda": bindings_cuda.CUDA,
    "cpu": bindings.CPU,
    "eager": reference.EAGER,
}


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates the pairs of every head of q and k by their token's angles: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin.

    Args:
        q: (B, T, H, D), or packed (T, H, D); any strides, so Hugging Face's (B, H, T, D) is `q.transpose(1, 2)`.
        k: (B, T, Hkv, D), packed (T, Hkv, D), in q's dtype.
        cos, sin: used as float32 whatever their dtype; one row per token, of R columns (every angle twice, as Hugging
            Face makes them; only its first copy is read) or R/2 (every angle once, as FlashAttention takes them):
            2-D (T, R/2) or (T, R), where the first T rows are used, or all that `position_ids` points to;
            3-D (B, T, R), where B may be 1. No gradient flows to them.
        position_ids: integers (B, T), (1, T) or (T,): the row of a 2-D table for every token. None: token t has row t.
        interleaved: pairs are neighbours (GPT-J) instead of half a head apart (Llama in Hugging Face).
        rotary_dim: R, the leading elements of a head that are rotated; the others pass. None reads it off the table:
            a 2-D table of at most D/2 columns is a half table, every other one is full. Say it when that is not so.
        backend: "triton", "cuda", "cpu", "eager", or None to choose.
    Returns:
        q and k rotated, in their shapes and dtype, contiguous. Computed in float32 and rounded once.
    Raises:
        ValueError: shapes or dtypes don't fit, a table is shorter than T, or, on CPU, a position is outside the table.
            Triton and GPUs, where to ask would stall the stream, clamp it to the table instead.
        BackendError: a named backend can't run this; its reasons are listed.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    R = check("apply_rope", q, k, cos, sin, position_ids, rotary_dim)
    cos, sin = (reference.half_table(t, q.shape[-1], R, interleaved) for t in (cos, sin))
    packed = q.dim() == 3
    if packed:
        q, k = q.unsqueeze(0), k.unsqueeze(0)
    try:
        q, k = _rotate(q, k, cos, sin, position_ids, interleaved, backend)
    except IndexError as error:
        raise outside("apply_rope", cos, position_ids) from error
    return (q.squeeze(0), k.squeeze(0)) if packed else (q, k)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    chosen = ROPE.select(backend, q.device, q, k, cos, sin, position_ids, interleaved)
    if chosen == "eager":
        q, k = once(q, k)
        return reference.rotate_both(q, k, cos, sin, position_ids, interleaved)
    if needs_grad(q, k):
        return apply(_Rope, q, k, cos, sin, position_ids, interleaved, chosen)
    return ROPE.fwd(q, k, cos, sin, position_ids, interleaved, chosen)


def _fwd_fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


ROPE = Op(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved) -> (Tensor, Tensor)",
    _fwd_fake,
    IMPLS,
    bwd_schema="(Tensor dq, Tensor dk, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved)"
    " -> (Tensor, Tensor)",
    bwd_fake=_fwd_fake,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        interleaved: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.interleaved, ctx.backend = interleaved, backend
        return ROPE.fwd(q, k, cos, sin, position_ids, interleaved, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = ROPE.bwd(dq, dk, *ctx.saved_tensors, ctx.interleaved, ctx.backend)
        return dq, dk, None, None, None, None, None


SPECS = {
    "apply_rope": Spec(
        apply_rope,
        reference.apply_rope,
        reference.apply_rope,
        ROPE,
        reference.CASES,
        reference.rope_inputs,
        ("q", "k"),
        reference.rope_cost,
        reference.pair,
    ),
    **qk_norm.SPECS,
}
