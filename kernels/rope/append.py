"""Rotary embedding of new tokens fused with their entry into a key-value cache; formula: `append_reference.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..dispatch import Impl, Op, lazy, needs_grad
from ..spec import Spec
from . import append_reference, bindings, bindings_cuda, reference


def _why_not_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any
) -> list[str]:
    return triton_support.why_not(q, k, v, k_cache, v_cache)


IMPLS = {
    "triton": Impl(lazy("pyllm.kernels.rope.triton_append:rope_append_kv_fwd"), None, _why_not_triton),
    "cuda": bindings_cuda.CUDA_APPEND,
    "cpu": bindings.CPU_APPEND,
    "eager": append_reference.EAGER,
}


def rope_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotates q and k of the newest tokens and writes k and v into the caches, **in place**: a layer's step.

    Follow it with `attention_decode(q, k_cache, v_cache, cache_seqlens, ...)`, which takes the same lengths.

    Args:
        q: (B, T, H, D), the newest T tokens of every sequence; any strides.
        k, v: (B, T, Hkv, D) in q's dtype; any strides.
        cos, sin: (P, R/2) or (P, R), row p for position p; columns, dtype and `rotary_dim` as in `apply_rope`.
        k_cache, v_cache: (B, S, Hkv, D) in q's dtype, any strides. Paged, with a block_table: (num_blocks, block_size,
            Hkv, D), blocks of any size in any order.
        cache_seqlens: (B,) int32 or int64, every sequence's length **with** its T new tokens: token t goes to position
            cache_seqlens[b] - T + t. A token with a negative position goes nowhere, so a sequence may have fewer than T
            new tokens, the last ones, or with length 0 none.
        block_table: (B, max_blocks) int32: the block that holds positions i * block_size and on of sequence b is
            block_table[b, i]. Entries that no new token needs may be anything. No two tokens may have one place.
        interleaved: pairs are neighbours (GPT-J) instead of half a head apart (Llama in Hugging Face).
        rotary_dim: R, the leading elements of a head that are rotated; the others pass.
        backend: "triton", "cuda", "cpu", "eager", or None to choose.
    Returns:
        q rotated, in its shape and dtype, contiguous. Computed in float32 and rounded once, as is k.
    Raises:
        ValueError: shapes, dtypes or devices don't fit; a gradient is wanted; on CPU also lengths beyond the cache or
            the tables, and blocks that the cache doesn't have. On a GPU, where to ask would stall the stream, such a
            token isn't written, and the nearest row of the tables turns it.
        BackendError: a named backend can't run this; its reasons are listed.
    Source: Su et al. 2021, arXiv:2104.09864; paged caches: Kwon et al. 2023, arXiv:2309.06180.
    """
    if needs_grad(q, k, v, k_cache, v_cache):
        raise ValueError(
            "rope_append_kv: has no gradient, but an input requires one; use apply_rope, or torch.no_grad() to generate"
        )
    R = _check(q, k, v, cos, sin, rotary_dim)
    _check_cache(q, k, k_cache, v_cache, cache_seqlens, block_table)
    cos, sin = (reference.half_table(t, q.shape[-1], R, interleaved) for t in (cos, sin))
    args = (q, k, v, cos, sin, k_cache, v_cache, cache_seqlens, block_table, interleaved)
    chosen = ROPE_APPEND_KV.select(backend, q.device, *args)
    return ROPE_APPEND_KV.fwd(*args, chosen)


def _check(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int | None) -> int:
    op = "rope_append_kv"
    if q.dim() != 4:
        raise ValueError(f"{op}: q must be (B, T, H, D), got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"{op}: q must be floating point, got {q.dtype}")
    if k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{op}: k must agree with q {tuple(q.shape)} in all but the number of heads, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"{op}: v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must have q's dtype {q.dtype}, got {t.dtype}")
    for name, t in (("k", k), ("v", v), ("cos", cos), ("sin", sin)):
        if t.device != q.device:
            raise ValueError(f"{op}: {name} must be on q's device {q.device}, got {t.device}")
    if cos.dim() != 2 or cos.shape[0] == 0:
        raise ValueError(f"{op}: cos must be (P, R/2) or (P, R), a row for every position, got {tuple(cos.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"{op}: sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if not (cos.is_floating_point() and sin.is_floating_point()):
        raise ValueError(f"{op}: cos and sin must be floating point, got {cos.dtype} and {sin.dtype}")
    R = reference.rotated(cos.shape[-1], q.shape[-1], 2, rotary_dim)
    if R == 0:
        raise ValueError(
            f"{op}: cos must have R or R/2 columns, R even and at most head_dim {q.shape[-1]}, "
            f"got {cos.shape[-1]} columns and rotary_dim={rotary_dim}"
        )
    return R


def _check_cache(
    q: Tensor, k: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None
) -> None:
    op, B = "rope_append_kv", q.shape[0]
    batch, form = (B, "(B, S, Hkv, D)") if block_table is None else (None, "(num_blocks, block_size, Hkv, D)")
    if k_cache.dim() != 4 or k_cache.shape[2:] != k.shape[2:] or batch not in (None, k_cache.shape[0]):
        raise ValueError(f"{op}: k_cache must be {form} to take k {tuple(k.shape)}, got {tuple(k_cache.shape)}")
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"{op}: v_cache must have k_cache's shape {tuple(k_cache.shape)}, got {tuple(v_cache.shape)}")
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must have q's dtype {q.dtype}, got {t.dtype}")
    if tuple(cache_seqlens.shape) != (B,) or cache_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: cache_seqlens must be ({B},) int32 or int64, one length per sequence, "
            f"got {tuple(cache_seqlens.shape)} {cache_seqlens.dtype}"
        )
    if block_table is not None:
        if block_table.dim() != 2 or block_table.shape[0] != B or block_table.dtype != torch.int32:
            raise ValueError(
                f"{op}: block_table must be ({B}, max_blocks) int32, a row per sequence, "
                f"got {tuple(block_table.shape)} {block_table.dtype}"
            )
        if k_cache.shape[1] == 0:
            raise ValueError(f"{op}: k_cache must have a place or more in every block, got {tuple(k_cache.shape)}")
    others = (
        ("k_cache", k_cache),
        ("v_cache", v_cache),
        ("cache_seqlens", cache_seqlens),
        ("block_table", block_table),
    )
    for name, other in others:
        if other is not None and other.device != q.device:
            raise ValueError(f"{op}: {name} must be on q's device {q.device}, got {other.device}")


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


ROPE_APPEND_KV = Op(
    "rope_append_kv",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cache_seqlens, Tensor? block_table, bool interleaved) -> Tensor",
    _fake,
    IMPLS,
)


def appended(*, k_cache: Tensor, v_cache: Tensor, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(q rotated, k_cache, v_cache), the caches copied first, strides and all: what tests call like any other op."""
    k_cache, v_cache = (c.new_empty_strided(c.shape, c.stride()).copy_(c) for c in (k_cache, v_cache))
    return rope_append_kv(k_cache=k_cache, v_cache=v_cache, **inputs), k_cache, v_cache


SPECS = {
    "rope_append_kv": Spec(
        appended,
        append_reference.rope_append_kv,
        append_reference.rope_append_kv,
        ROPE_APPEND_KV,
        append_reference.CASES,
        append_reference.append_inputs,
        (),
        append_reference.append_cost,
        reference.pair,
    )
}
