"""Scaled dot-product attention with grouped key-value heads. The formulas are in `reference.py`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..dispatch import Impl, Op, apply, lazy, needs_grad, once_differentiable
from ..spec import Spec
from . import bindings, bindings_cuda, eager, reference

MAX_HEAD_DIM = 256  # of the kernels: a tile of 128 queries and its 256 columns fill the registers


def _why_not_triton(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any) -> list[str]:
    reasons = triton_support.why_not(q, k, v, sinks)
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        reasons.append(f"head_dim {q.shape[-1]} is not served, 1 to {MAX_HEAD_DIM} are")
    return reasons


def _why_not_triton_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> list[str]:
    if q.shape[-1] > 256:
        return [f"head_dim is {q.shape[-1]}: up to 256 fit a program"]
    return triton_support.why_not(q, k_cache, v_cache)


IMPLS = {
    "triton": Impl(
        lazy(f"{__name__}.triton_fwd:attention_fwd"), lazy(f"{__name__}.triton_bwd:attention_bwd"), _why_not_triton
    ),
    "cuda": bindings_cuda.CUDA,
    "cpu": bindings.CPU,
    "eager": eager.EAGER,
}
DECODE_IMPLS = {
    "triton": Impl(lazy(f"{__name__}.triton_decode:attention_decode_fwd"), None, _why_not_triton_decode),
    "cuda": bindings_cuda.CUDA_DECODE,
    "cpu": bindings.CPU_DECODE,
    "eager": eager.EAGER_DECODE,
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale * q k^T) v for every head; the H query heads share Hkv heads of keys and values.

    Args:
        q: (B, T, H, D), or packed (total_q, H, D) with `cu_seqlens_q`; any strides.
        k, v: (B, S, Hkv, D) in q's dtype, packed (total_k, Hkv, D). H must be a multiple of Hkv: MHA is Hkv == H, MQA
            is Hkv == 1. They are never repeated in memory.
        causal: a query sees no later key. With T != S the last query sits on the last key, as in FlashAttention 2.1+.
        softmax_scale: 1 / sqrt(D) unless given.
        window: an int W >= 1: a query sees the last W keys, its own among them (Hugging Face's sliding_window); without
            causal, the keys less than W away on either side. Or (left, right), how many before and after its own, -1
            for all of them (FlashAttention's window_size). Aligned as causal is.
        softcap: c > 0 replaces every score s by c * tanh(s / c) (Gemma 2).
        sinks: (H,) one logit per head that joins the softmax's sum, and lse, but has no value (gpt-oss).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32, the rows where each packed sequence starts and the last one
            ends; no attention crosses from one to another. cu_seqlens_k is cu_seqlens_q unless given. Rows past the
            last sequence get zeros.
        return_lse: also return the logarithm of every softmax's sum, differentiable too.
        backend: "triton", "cuda", "cpu", "eager", or None to choose.
    Returns:
        out, in q's shape and dtype, contiguous; with return_lse also lse (B, H, T), packed (H, total_q), in float32
        (float64 for float64). A query that sees nothing gets zeros and lse -inf (with sinks: the sink). Scores, softmax
        and sums are float32, out is rounded once; kernels may round the probabilities to q's dtype before they meet v.
        Under autocast q, k and v are cast to its dtype.
    Raises:
        ValueError: shapes, dtypes, devices or options don't fit; on CPU also cu_seqlens that don't rise within q and k.
        BackendError: a named backend can't run this; its reasons are listed.
    Source: Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691; Ainslie et al. 2023, arXiv:2305.13245.
    """
    q, k, v = _autocast(q, k, v)
    _check_heads("attention", q, k, v, "k", "v", 3 if cu_seqlens_q is not None else 4)
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError("attention: cu_seqlens_k needs cu_seqlens_q as well")
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check_cu_seqlens(q, cu_seqlens_q, cu_seqlens_k)
    _check_softcap("attention", softcap)
    _check_window(window)
    if sinks is not None:
        if tuple(sinks.shape) != (q.shape[-2],) or not sinks.is_floating_point():
            raise ValueError(
                f"attention: sinks must be ({q.shape[-2]},) floating point, one per query head, "
                f"got {tuple(sinks.shape)} {sinks.dtype}"
            )
        if sinks.device != q.device:
            raise ValueError(f"attention: sinks must be on q's device {q.device}, got {sinks.device}")
    left, right = reference.bounds(causal, window)
    scale = reference.scale_of(softmax_scale, q)
    args = (q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, scale, left, right, float(softcap))
    chosen = ATTENTION.select(backend, q.device, *args)
    if needs_grad(q, k, v, sinks):
        out, lse = apply(_Attention, *args, chosen)
    else:
        out, lse = ATTENTION.fwd(*args, chosen)
    return (out, lse) if return_lse else out


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of the newest tokens of every sequence to a cache that holds their keys and values already.

    Args:
        q: (B, T, H, D), the newest T tokens of every sequence, 1 in plain generation; any strides.
        k_cache, v_cache: (B, S, Hkv, D) in q's dtype, any strides; H must be a multiple of Hkv. Paged, with a
            block_table: (num_blocks, block_size, Hkv, D), blocks of any size in any order.
        cache_seqlens: (B,) int32 or int64: how many leading keys of the cache are valid, the T new ones included. The
            last query sits on the last valid key. What lies beyond may be anything, NaN too. On a GPU, where to ask
            would stall the stream, a length beyond the cache is cut to it.
        block_table: (B, max_blocks) int32: the block that holds keys i * block_size and on of sequence b is
            block_table[b, i]. Entries that no key in use needs may be anything.
        softmax_scale: 1 / sqrt(D) unless given.
        window: a query sees the last `window` keys, its own among them; None for all.
        softcap: c > 0 replaces every score s by c * tanh(s / c).
        backend: "triton", "cuda", "cpu", "eager", or None to choose.
    Returns:
        (B, T, H, D) in q's dtype, contiguous. Rounding and empty rows as in `attention`.
    Raises:
        ValueError: shapes, dtypes, devices or options don't fit; a gradient is wanted; on CPU also lengths beyond the
            cache and blocks that it doesn't have.
        BackendError: a named backend can't run this; its reasons are listed.
    Source: Dao et al. 2023, Flash-Decoding for long-context inference; blocks: Kwon et al. 2023, arXiv:2309.06180.
    """
    q, k_cache, v_cache = _autocast(q, k_cache, v_cache)
    if needs_grad(q, k_cache, v_cache):
        raise ValueError(
            "attention_decode: has no gradient, but q or a cache requires one; use attention(..., causal=True), "
            "or torch.no_grad() to generate"
        )
    _check_heads("attention_decode", q, k_cache, v_cache, "k_cache", "v_cache", 4, paged=block_table is not None)
    if block_table is not None:
        _check_block_table(q, k_cache, block_table)
    if tuple(cache_seqlens.shape) != (q.shape[0],) or cache_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"attention_decode: cache_seqlens must be ({q.shape[0]},) int32 or int64, one length per sequence, "
            f"got {tuple(cache_seqlens.shape)} {cache_seqlens.dtype}"
        )
    if cache_seqlens.device != q.device:
        raise ValueError(
            f"attention_decode: cache_seqlens must be on q's device {q.device}, got {cache_seqlens.device}"
        )
    _check_softcap("attention_decode", softcap)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"attention_decode: window must be an int of at least 1 or None, got {window!r}")
    left = -1 if window is None else window - 1
    scale = reference.scale_of(softmax_scale, q)
    args = (q, k_cache, v_cache, cache_seqlens, block_table, scale, left, float(softcap))
    chosen = ATTENTION_DECODE.select(backend, q.device, *args)
    return ATTENTION_DECODE.fwd(*args, chosen)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _check_heads(
    op: str, q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str, dims: int, paged: bool = False
) -> None:
    if q.dim() != dims:
        form = "(B, T, H, D)" if dims == 4 else "packed (total_q, H, D), since cu_seqlens_q is given,"
        raise ValueError(f"{op}: q must be {form} got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"{op}: q must be floating point, got {q.dtype}")
    for name, t in ((k_name, k), (v_name, v)):
        if t.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must have q's dtype {q.dtype}, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{op}: {name} must be on q's device {q.device}, got {t.device}")
    if k.dim() != dims or k.shape[-1] != q.shape[-1] or (dims == 4 and not paged and k.shape[0] != q.shape[0]):
        what = "be (num_blocks, block_size, Hkv, D) and agree in" if paged else "agree in batch and"
        raise ValueError(f"{op}: {k_name} must {what} head_dim with q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"{op}: {v_name} must have {k_name}'s shape {tuple(k.shape)}, got {tuple(v.shape)}")
    H, Hkv = q.shape[-2], k.shape[-2]
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"{op}: q's {H} heads must be a multiple of {k_name}'s, got {Hkv}")


def _check_block_table(q: Tensor, k_cache: Tensor, block_table: Tensor) -> None:
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0] or block_table.dtype != torch.int32:
        raise ValueError(
            f"attention_decode: block_table must be ({q.shape[0]}, max_blocks) int32, a row per sequence, "
            f"got {tuple(block_table.shape)} {block_table.dtype}"
        )
    if block_table.device != q.device:
        raise ValueError(f"attention_decode: block_table must be on q's device {q.device}, got {block_table.device}")
    if k_cache.shape[1] == 0:
        raise ValueError(
            f"attention_decode: k_cache must have a key or more in every block, since block_table is given, "
            f"got {tuple(k_cache.shape)}"
        )


def _check_cu_seqlens(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dim() != 1 or cu.shape[0] < 1 or cu.dtype != torch.int32:
            raise ValueError(f"attention: {name} must be int32 (sequences + 1,), got {tuple(cu.shape)} {cu.dtype}")
        if cu.device != q.device:
            raise ValueError(f"attention: {name} must be on q's device {q.device}, got {cu.device}")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"attention: cu_seqlens_k must have cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}, "
            f"got {tuple(cu_seqlens_k.shape)}"
        )


def _check_softcap(op: str, softcap: float) -> None:
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be 0 (off) or positive and finite, got {softcap}")


def _check_window(window: Any) -> None:
    if window is None or (isinstance(window, int) and not isinstance(window, bool) and window >= 1):
        return
    if isinstance(window, tuple) and len(window) == 2 and all(isinstance(w, int) and w >= -1 for w in window):
        return
    raise ValueError(
        f"attention: window must be an int of at least 1, (left, right) of at least -1, or None, got {window!r}"
    )


def _fwd_fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=acc)


def _bwd_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    dsinks = lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _decode_fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


_OPTIONS = "Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, int left, int right, float softcap"
ATTENTION = Op(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _fwd_fake,
    IMPLS,
    bwd_schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    bwd_fake=_bwd_fake,
)
ATTENTION_DECODE = Op(
    "attention_decode",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, float scale, int left, "
    "float softcap) -> Tensor",
    _decode_fake,
    DECODE_IMPLS,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        scale: float,
        left: int,
        right: int,
        softcap: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        tensors, options = (sinks, cu_seqlens_q, cu_seqlens_k), (scale, left, right, softcap)
        out, lse = ATTENTION.fwd(q, k, v, *tensors, *options, backend)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)  # lse is rarely differentiated: no zeros are made and added for it
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, dsinks = ATTENTION.bwd(dout, dlse, q, k, v, out, lse, *tensors, *ctx.options, ctx.backend)
        return dq, dk, dv, None if tensors[0] is None else dsinks, *[None] * 7


SPECS = {
    "attention": Spec(
        attention,
        reference.attention,
        eager.yardstick,
        ATTENTION,
        reference.CASES,
        reference.attention_inputs,
        ("q", "k", "v", "sinks"),
        reference.attention_cost,
        reference.keys,
        {"k": reference.queries, "v": reference.queries, "sinks": reference.rows},
    ),
    "attention_decode": Spec(
        attention_decode,
        reference.attention_decode,
        functools.partial(reference.attention_decode, rounded=True),
        ATTENTION_DECODE,
        reference.DECODE_CASES,
        reference.decode_inputs,
        (),
        reference.decode_cost,
        reference.keys,
    ),
}
