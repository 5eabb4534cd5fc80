"""The rotary ops' CUDA kernels (`csrc/rope/*_cuda.cu`): tensors become pointers here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, as_acc, cuda, empty_like, pointer, stream
from .bindings import both_ways, dense_heads, positions, table_strides

MAX_HEAD_DIM = 1024  # of qk_norm_rope: a block's sums of the weights' gradients are in shared memory
SIMT_MULTIPROCESSORS = 4  # what the CPU's SIMT machine plays


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """In float32, with dense rows."""
    cos, sin = (t if t.dtype == torch.float32 else t.float() for t in (cos, sin))
    return dense_heads(cos), dense_heads(sin)


def _sizes(q: Tensor, k: Tensor, cos: Tensor) -> tuple[int, ...]:
    """(B, T, H, Hkv, D, R)."""
    return (*q.shape[:3], k.shape[2], q.shape[3], 2 * cos.shape[-1])


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, conjugate: bool
) -> tuple[Tensor, Tensor]:
    q, k = dense_heads(q), dense_heads(k)
    cos, sin = _tables(cos, sin)
    position_ids = positions(position_ids, *q.shape[:2])
    q_out, k_out = empty_like(q), empty_like(k)
    cuda.module.rope(
        q.data_ptr(), k.data_ptr(), q_out.data_ptr(), k_out.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        pointer(position_ids), _sizes(q, k, cos), q.stride()[:3], k.stride()[:3], table_strides(cos),
        table_strides(sin), cos.shape[-2], interleaved, conjugate, DTYPE_CODES[q.dtype], stream(q),
    )  # fmt: skip
    return q_out, k_out


CUDA = both_ways(_rotate, cuda)


# --- QK-norm and RoPE ------------------------------------------------------------------------------------------------
def qk_norm_rope_fwd(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    eps: float, offset: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k = dense_heads(q), dense_heads(k)
    q_weight, k_weight = (as_acc(w, torch.float32) for w in (q_weight, k_weight))
    cos, sin = _tables(cos, sin)
    position_ids = positions(position_ids, *q.shape[:2])
    q_out, k_out = empty_like(q), empty_like(k)
    rstd_q, rstd_k = (torch.empty(x.shape[:-1], dtype=torch.float32, device=q.device) for x in (q, k))
    cuda.module.qk_norm_rope_fwd(
        q.data_ptr(), k.data_ptr(), q_weight.data_ptr(), k_weight.data_ptr(), q_out.data_ptr(), k_out.data_ptr(),
        rstd_q.data_ptr(), rstd_k.data_ptr(), cos.data_ptr(), sin.data_ptr(), pointer(position_ids),
        _sizes(q, k, cos), q.stride()[:3], k.stride()[:3], table_strides(cos), table_strides(sin), cos.shape[-2],
        interleaved, eps, offset, DTYPE_CODES[q.dtype], stream(q),
    )  # fmt: skip
    return q_out, k_out, rstd_q, rstd_k


def qk_norm_rope_bwd(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rstd_q: Tensor, rstd_k: Tensor,
    cos: Tensor, sin: Tensor, position_ids: Tensor | None, offset: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, dq, dk = (dense_heads(t) for t in (q, k, dq.to(q.dtype), dk.to(q.dtype)))
    wide = [as_acc(w, torch.float32) for w in (q_weight, k_weight)]
    rstd_q, rstd_k = rstd_q.contiguous(), rstd_k.contiguous()
    cos, sin = _tables(cos, sin)
    position_ids = positions(position_ids, *q.shape[:2])
    q_grad, k_grad = empty_like(q), empty_like(k)
    sms = SIMT_MULTIPROCESSORS
    if q.is_cuda:
        sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    parts = min(q.shape[0] * q.shape[1], 4 * sms)
    partial = torch.empty((parts, 2, q.shape[-1]), dtype=torch.float32, device=q.device)
    cuda.module.qk_norm_rope_bwd(
        dq.data_ptr(), dk.data_ptr(), q.data_ptr(), k.data_ptr(), wide[0].data_ptr(), wide[1].data_ptr(),
        q_grad.data_ptr(), k_grad.data_ptr(), rstd_q.data_ptr(), rstd_k.data_ptr(), partial.data_ptr(), parts,
        cos.data_ptr(), sin.data_ptr(), pointer(position_ids), _sizes(q, k, cos), dq.stride()[:3], dk.stride()[:3],
        q.stride()[:3], k.stride()[:3], table_strides(cos), table_strides(sin), cos.shape[-2], interleaved, offset,
        DTYPE_CODES[q.dtype], stream(q),
    )  # fmt: skip
    dq_weight, dk_weight = partial[:, 0].sum(0), partial[:, 1].sum(0)  # of a few hundred rows of a head's length
    return q_grad, k_grad, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype)


def why_not_qk_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *_: Any) -> list[str]:
    reasons = cuda.why_not(q, k, q_weight, k_weight)
    if not reasons and q.shape[-1] > MAX_HEAD_DIM:
        reasons = [f"head_dim {q.shape[-1]} is above {MAX_HEAD_DIM}"]
    return reasons


CUDA_QK_NORM = Impl(qk_norm_rope_fwd, qk_norm_rope_bwd, why_not_qk_norm)


# --- RoPE and the cache ----------------------------------------------------------------------------------------------
def rope_append_kv_fwd(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    cache_seqlens: Tensor, block_table: Tensor | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    q, k, v = dense_heads(q), dense_heads(k), dense_heads(v)
    cos, sin = _tables(cos, sin)
    lengths = cache_seqlens.to(torch.int64).contiguous()
    width = row = 0
    if block_table is not None:
        block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        width, row = block_table.shape[1], block_table.stride(0)
    out = empty_like(q)
    cuda.module.rope_append(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        cos.data_ptr(), sin.data_ptr(), lengths.data_ptr(), pointer(block_table), _sizes(q, k, cos), k_cache.shape[1],
        k_cache.shape[0], width, row, q.stride()[:3], k.stride()[:3], v.stride()[:3], k_cache.stride(),
        v_cache.stride(), cos.stride(0), sin.stride(0), cos.shape[0], interleaved, DTYPE_CODES[q.dtype], stream(q),
    )  # fmt: skip
    # Autograd counts the writes to a tensor, to find out when one that it saved has changed. It sees no kernel's.
    torch.autograd.graph.increment_version([t for t in (k_cache, v_cache) if not t.is_inference()])
    return out


def why_not_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any
) -> list[str]:
    return cuda.why_not(q, k, v, k_cache, v_cache)


CUDA_APPEND = Impl(rope_append_kv_fwd, None, why_not_append)
