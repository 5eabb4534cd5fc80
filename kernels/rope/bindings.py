"""The rotary ops' C++ kernels (`csrc/rope/*_cpu.cpp`). One turns either way: RoPE's forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, acc_dtype, as_acc, cpu, empty_like, pointer


def dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tables(cos: Tensor, sin: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """In the kernels' dtype, their columns equally far apart."""
    if cos.dtype != acc or sin.dtype != acc:
        cos, sin = cos.to(acc), sin.to(acc)
    if cos.stride(-1) != sin.stride(-1):
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin


def table_strides(table: Tensor) -> tuple[int, int]:
    """From one batch to the next (none where they share a table) and from row to row."""
    return (table.stride(0) if table.dim() == 3 and table.shape[0] > 1 else 0), table.stride(-2)


def positions(position_ids: Tensor | None, B: int, T: int) -> Tensor | None:
    return None if position_ids is None else position_ids.to(torch.int64).expand(B, T).contiguous()


# --- RoPE ------------------------------------------------------------------------------------------------------------
def _rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> tuple[Tensor, Tensor]:
    (B, T, H, D), Hkv, dtype = q.shape, k.shape[2], q.dtype
    q, k = dense_heads(q), dense_heads(k)
    cos, sin = _tables(cos, sin, acc_dtype(dtype))
    position_ids = positions(position_ids, B, T)
    q_out, k_out = empty_like(q), empty_like(k)
    cpu.module.rope(
        q.data_ptr(), k.data_ptr(), q_out.data_ptr(), k_out.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        pointer(position_ids), B, T, H, Hkv, D, 2 * cos.shape[-1], q.stride(), k.stride(), table_strides(cos),
        table_strides(sin), cos.stride(-1), cos.shape[-2], interleaved, conjugate, DTYPE_CODES[dtype],
    )  # fmt: skip
    return q_out, k_out


def both_ways(rotate: Any, extension: Any) -> Impl:
    """RoPE by a function that turns either way."""

    def rope_fwd(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        return rotate(q, k, cos, sin, position_ids, interleaved, False)

    def rope_bwd(
        dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        return rotate(dq, dk, cos, sin, position_ids, interleaved, True)

    def why_not(q: Tensor, k: Tensor, *_: Any) -> list[str]:
        return extension.why_not(q, k)

    return Impl(rope_fwd, rope_bwd, why_not)


CPU = both_ways(_rotate, cpu)


# --- QK-norm and RoPE ------------------------------------------------------------------------------------------------
def qk_norm_rope_fwd(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    eps: float, offset: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (B, T, H, D), Hkv, dtype = q.shape, k.shape[2], q.dtype
    acc = acc_dtype(dtype)
    q, k, q_weight, k_weight = dense_heads(q), dense_heads(k), as_acc(q_weight, acc), as_acc(k_weight, acc)
    cos, sin = _tables(cos, sin, acc)
    position_ids = positions(position_ids, B, T)
    q_out, k_out = empty_like(q), empty_like(k)
    rstd_q, rstd_k = torch.empty(q.shape[:-1], dtype=acc), torch.empty(k.shape[:-1], dtype=acc)
    cpu.module.qk_norm_rope_fwd(
        q.data_ptr(), k.data_ptr(), q_weight.data_ptr(), k_weight.data_ptr(), q_out.data_ptr(), k_out.data_ptr(),
        rstd_q.data_ptr(), rstd_k.data_ptr(), cos.data_ptr(), sin.data_ptr(), pointer(position_ids), B, T, H, Hkv, D,
        2 * cos.shape[-1], q.stride(), k.stride(), table_strides(cos), table_strides(sin), cos.stride(-1),
        cos.shape[-2], interleaved, eps, offset, DTYPE_CODES[dtype],
    )  # fmt: skip
    return q_out, k_out, rstd_q, rstd_k


def qk_norm_rope_bwd(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rstd_q: Tensor, rstd_k: Tensor,
    cos: Tensor, sin: Tensor, position_ids: Tensor | None, offset: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (B, T, H, D), Hkv, dtype = q.shape, k.shape[2], q.dtype
    acc = acc_dtype(dtype)
    q, k, dq, dk = (dense_heads(t) for t in (q, k, dq.to(dtype), dk.to(dtype)))
    wide = as_acc(q_weight, acc), as_acc(k_weight, acc)
    rstd_q, rstd_k = rstd_q.contiguous(), rstd_k.contiguous()
    cos, sin = _tables(cos, sin, acc)
    position_ids = positions(position_ids, B, T)
    q_grad, k_grad = empty_like(q), empty_like(k)
    dweights = [torch.empty_like(w) for w in wide]
    cpu.module.qk_norm_rope_bwd(
        dq.data_ptr(), dk.data_ptr(), q.data_ptr(), k.data_ptr(), wide[0].data_ptr(), wide[1].data_ptr(),
        rstd_q.data_ptr(), rstd_k.data_ptr(), cos.data_ptr(), sin.data_ptr(), pointer(position_ids),
        q_grad.data_ptr(), k_grad.data_ptr(), dweights[0].data_ptr(), dweights[1].data_ptr(), B, T, H, Hkv, D,
        2 * cos.shape[-1], dq.stride(), dk.stride(), q.stride(), k.stride(), table_strides(cos), table_strides(sin),
        cos.stride(-1), cos.shape[-2], interleaved, offset, DTYPE_CODES[dtype],
    )  # fmt: skip
    return q_grad, k_grad, dweights[0].to(q_weight.dtype), dweights[1].to(k_weight.dtype)


def why_not_qk_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *_: Any) -> list[str]:
    reasons = cpu.why_not(q, k, q_weight, k_weight)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if not reasons and weight.dtype == torch.float64 and q.dtype != torch.float64:
            reasons = [f"q is {q.dtype} and {name} {weight.dtype}: float64 goes with float64 only"]
    return reasons


CPU_QK_NORM = Impl(qk_norm_rope_fwd, qk_norm_rope_bwd, why_not_qk_norm)


# --- RoPE and the cache ----------------------------------------------------------------------------------------------
def rope_append_kv_fwd(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    cache_seqlens: Tensor, block_table: Tensor | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    (B, T, H, D), Hkv, dtype = q.shape, k.shape[2], q.dtype
    q, k, v = dense_heads(q), dense_heads(k), dense_heads(v)
    cos, sin = _tables(cos, sin, acc_dtype(dtype))
    lengths = cache_seqlens.to(torch.int64).contiguous()
    columns = block_stride = 0
    if block_table is not None:
        block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        columns, block_stride = block_table.shape[1], block_table.stride(0)
    out = empty_like(q)
    cpu.module.rope_append(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        cos.data_ptr(), sin.data_ptr(), lengths.data_ptr(), pointer(block_table), B, T, H, Hkv, D, 2 * cos.shape[1],
        q.stride(), k.stride(), v.stride(), k_cache.shape, k_cache.stride(), v_cache.stride(), cos.stride(),
        (sin.stride(0), sin.stride(1)), cos.shape[0], columns, block_stride, interleaved, DTYPE_CODES[dtype],
    )  # fmt: skip
    # Autograd counts the writes to a tensor, to find out when one that it saved has changed. It sees no kernel's.
    torch.autograd.graph.increment_version([t for t in (k_cache, v_cache) if not t.is_inference()])
    return out


def why_not_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any
) -> list[str]:
    return cpu.why_not(q, k, v, k_cache, v_cache)


CPU_APPEND = Impl(rope_append_kv_fwd, None, why_not_append)
