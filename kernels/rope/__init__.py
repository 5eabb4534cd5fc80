"""Rotary position embedding. The formula is in `reference.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import Op, needs_grad, once
from ..spec import Spec
from . import bindings, reference

IMPLS = {"cpu": bindings.CPU, "eager": reference.EAGER}


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
            On a GPU, where to ask would stall the stream, it is clamped to the table instead.
        BackendError: a named backend can't run this; its reasons are listed.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    R = _check(q, k, cos, sin, position_ids, rotary_dim)
    cos, sin = (reference.half_table(t, q.shape[-1], R, interleaved) for t in (cos, sin))
    packed = q.dim() == 3
    if packed:
        q, k = q.unsqueeze(0), k.unsqueeze(0)
    try:
        q, k = _rotate(q, k, cos, sin, position_ids, interleaved, backend)
    except IndexError as error:  # told by whoever reads the positions: to look for it beforehand would be another pass
        raise ValueError(
            f"apply_rope: position_ids must be in [0, {cos.shape[-2]}), the rows of cos and sin, got {position_ids}"
        ) from error
    return (q.squeeze(0), k.squeeze(0)) if packed else (q, k)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    chosen = ROPE.select(backend, q.device, q, k, cos, sin, position_ids, interleaved)
    if chosen == "eager":
        q, k = once(q, k)
        return reference.rotate_both(q, k, cos, sin, position_ids, interleaved)
    if needs_grad(q, k):
        return _Rope.apply(q, k, cos, sin, position_ids, interleaved, chosen)
    return ROPE.fwd(q, k, cos, sin, position_ids, interleaved, chosen)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, rotary_dim: int | None) -> int:
    if q.dim() not in (3, 4):
        raise ValueError(f"apply_rope: q must be (B, T, H, D) or packed (T, H, D), got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"apply_rope: q must be floating point, got {q.dtype}")
    if k.dtype != q.dtype:
        raise ValueError(f"apply_rope: k must have q's dtype {q.dtype}, got {k.dtype}")
    if k.dim() != q.dim() or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"apply_rope: k must agree with q {tuple(q.shape)} in all but the number of heads, got {tuple(k.shape)}"
        )
    T, D = q.shape[-3], q.shape[-1]
    B = q.shape[0] if q.dim() == 4 else 1
    if sin.shape != cos.shape:
        raise ValueError(f"apply_rope: sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if not (cos.is_floating_point() and sin.is_floating_point()):
        raise ValueError(f"apply_rope: cos and sin must be floating point, got {cos.dtype} and {sin.dtype}")
    for name, t in (("k", k), ("cos", cos), ("sin", sin), ("position_ids", position_ids)):
        if t is not None and t.device != q.device:
            raise ValueError(f"apply_rope: {name} must be on q's device {q.device}, got {t.device}")
    if cos.dim() not in (2, 3):
        raise ValueError(f"apply_rope: cos must be (T, R/2), (T, R) or (B, T, R), got {tuple(cos.shape)}")
    R = reference.rotated(cos.shape[-1], D, cos.dim(), rotary_dim)
    if R == 0:
        rule = "R or R/2 columns, R even and at most head_dim"
        raise ValueError(
            f"apply_rope: cos must have {rule} {D}, got {cos.shape[-1]} columns and rotary_dim={rotary_dim}"
        )
    if cos.dim() == 3 and (position_ids is not None or cos.shape[0] not in (1, B) or cos.shape[1] != T):
        if position_ids is not None:
            raise ValueError("apply_rope: position_ids index a 2-D table, but cos is 3-D with a row per token already")
        raise ValueError(f"apply_rope: cos must be (1 or {B}, {T}, R) for q {tuple(q.shape)}, got {tuple(cos.shape)}")
    if position_ids is None:
        if cos.shape[-2] < T:
            raise ValueError(f"apply_rope: cos must have a row for each of the {T} tokens, got {tuple(cos.shape)}")
    elif position_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"apply_rope: position_ids must be int64 or int32, got {position_ids.dtype}")
    elif tuple(position_ids.shape) not in ((T,), (1, T), (B, T)):
        raise ValueError(f"apply_rope: position_ids must be ({B}, {T}) or ({T},), got {tuple(position_ids.shape)}")
    return R


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
    )
}
