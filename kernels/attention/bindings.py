"""Attention's compiled kernels: C++ (`csrc/attention/attention_{fwd,bwd,few}_cpu.cpp`). Strides go with the pointers:
nothing is copied, however it lies.

They multiply in float32, whatever is stored. That is what CPUs without bf16 instructions do best. With AMX torch's own
bf16 kernel takes 0.5 to 0.75 of their time forward (32 heads, T 2048 and 512); with its backward it takes 1.05 and 1.6
of theirs. So the automatic choice on CPUs is these kernels for every dtype: training never loses, and a long prompt in
bf16 on such a CPU would gain from `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, cpu, pointer


def _sizes(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None) -> tuple[int, ...]:
    """(B, T, S, H, Hkv, D); of packed sequences their number, and all rows of q and of k."""
    B = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    return (B, q.shape[-3], k.shape[-3], q.shape[-2], *k.shape[-2:])


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride() if x.dim() == 4 else (0, *x.stride())


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def attention_fwd(
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
) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=acc)
    sinks = None if sinks is None else sinks.to(acc).contiguous()
    cu_q, cu_k = _dense(cu_seqlens_q), _dense(cu_seqlens_k)
    # fmt: off
    cpu.module.attention_fwd(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), pointer(sinks), out.data_ptr(), lse.data_ptr(), pointer(cu_q),
        pointer(cu_k), *_sizes(q, k, cu_q), _strides(q), _strides(k), _strides(v), scale, left, right, softcap,
        DTYPE_CODES[q.dtype],
    )
    # fmt: on
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse, dlse = lse.contiguous(), _dense(dlse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    wide = None if sinks is None else sinks.to(lse.dtype).contiguous()
    delta = None if sinks is None else torch.empty(lse.shape, dtype=lse.dtype)
    dsinks = torch.empty((0,) if wide is None else wide.shape, dtype=lse.dtype)
    cu_q, cu_k = _dense(cu_seqlens_q), _dense(cu_seqlens_k)
    # fmt: off
    cpu.module.attention_bwd(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), dout.data_ptr(), lse.data_ptr(), pointer(dlse),
        pointer(wide), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), pointer(delta),
        0 if wide is None else dsinks.data_ptr(), pointer(cu_q), pointer(cu_k), *_sizes(q, k, cu_q), _strides(q),
        _strides(k), _strides(v), _strides(out), _strides(dout), scale, left, right, softcap, DTYPE_CODES[q.dtype],
    )
    # fmt: on
    return dq, dk, dv, dsinks if sinks is None else dsinks.to(sinks.dtype)


def attention_decode_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    lengths = cache_seqlens.contiguous()
    blocks = k_cache.shape[0]
    width, stride = -1, 0
    if block_table is not None:
        if block_table.stride(1) != 1:
            block_table = block_table.contiguous()
        width, stride = block_table.shape[1], block_table.stride(0)
    # fmt: off
    cpu.module.attention_decode(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), lengths.data_ptr(),
        lengths.dtype == torch.int32, pointer(block_table), width, stride, blocks, *_sizes(q, k_cache, None),
        q.stride(), k_cache.stride(), v_cache.stride(), scale, left, softcap, DTYPE_CODES[q.dtype],
    )
    # fmt: on
    return out


def _why_not(q: Tensor, *tensors: Tensor | None) -> list[str]:
    reasons = cpu.why_not(q, *tensors)
    if not reasons and q.shape[-1] < 1:
        reasons = [f"head_dim {q.shape[-1]} is not served, 1 and more are"]
    return reasons


def why_not(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any) -> list[str]:
    return _why_not(q, k, v, sinks)


def why_not_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> list[str]:
    return _why_not(q, k_cache, v_cache)


CPU = Impl(attention_fwd, attention_bwd, why_not)
CPU_DECODE = Impl(attention_decode_fwd, None, why_not_decode)
