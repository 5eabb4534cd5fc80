"""Attention's CUDA kernels (`csrc/attention/*.cuh`): tensors become pointers here.

Strides of batch, row and head go with the pointers. Heads must be dense: others are copied.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, cuda, pointer, stream

MAX_HEAD_DIM = 256
SIMT_MULTIPROCESSORS = 4  # what the CPU's SIMT machine plays


def _dense(x: Tensor) -> Tensor:
    """x with neighbouring elements in a head; the kernels' strides count up."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, row and head."""
    return x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])


def _sizes(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None) -> tuple[int, ...]:
    """(B, T, S, H, Hkv, D); of packed sequences their number, and all rows of q and of k."""
    B = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    return (B, q.shape[-3], k.shape[-3], q.shape[-2], *k.shape[-2:])


def hopper_wanted(on_gpu: bool) -> bool:
    """Whether the forward in Hopper's own instructions (csrc/attention/attention_hopper.cuh) is to run where it can.

    On a GPU it is: 1.6 to 2.5 times as fast as the portable one on an H100. PYLLM_HOPPER=0 forbids it, and
    PYLLM_HOPPER=1 has the SIMT machine run it too.
    """
    asked = os.environ.get("PYLLM_HOPPER", "")
    return asked != "0" if asked else on_gpu


def why_not_hopper(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Reasons against that forward; empty: it can run this. All options of attention are served."""
    if not cuda.module.has_hopper():
        return ["the CUDA kernels were built without sm_90"]
    if q.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(q.device) != (9, 0)):
        return ["the GPU is not a Hopper (compute capability 9.0)"]
    if q.dtype not in (torch.float16, torch.bfloat16):
        return [f"dtype {q.dtype} is not a 16-bit one"]
    if q.numel() == 0 or k.numel() == 0:
        return ["no queries or no keys"]
    return [reason for name, x in (("q", q), ("k", k), ("v", v)) for reason in _why_no_tma(name, x)]


def _why_no_tma(name: str, x: Tensor) -> list[str]:
    """What keeps the TMA unit from reading x (..., rows, heads, D), dense in D, with 16-bit elements."""
    if x.data_ptr() % 16:
        return [f"{name} is not aligned to 16 bytes"]
    outer = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    if any(stride <= 0 or stride % 8 for stride in outer):
        return [f"{name}'s strides {tuple(x.stride())} are not positive multiples of 8, the last one apart"]
    return []


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    scale: float, left: int, right: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = _dense(q), _dense(k), _dense(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32, device=q.device)
    sinks = None if sinks is None else sinks.float().contiguous()
    cu_q, cu_k = (None if cu is None else cu.contiguous() for cu in (cu_seqlens_q, cu_seqlens_k))
    hopper = hopper_wanted(q.is_cuda) and not why_not_hopper(q, k, v)
    cuda.module.attention_fwd(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), pointer(sinks), out.data_ptr(), lse.data_ptr(), pointer(cu_q),
        pointer(cu_k), _sizes(q, k, cu_q), _strides(q), _strides(k), _strides(v), scale, left, right, softcap,
        DTYPE_CODES[q.dtype], hopper, stream(q),
    )  # fmt: skip
    return out, lse


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, scale: float, left: int, right: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, out, dout = _dense(q), _dense(k), _dense(v), _dense(out), _dense(dout)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    cu_q, cu_k = (None if cu is None else cu.contiguous() for cu in (cu_seqlens_q, cu_seqlens_k))
    cuda.module.attention_bwd(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), dout.data_ptr(), lse.data_ptr(), pointer(dlse),
        delta.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), pointer(cu_q), pointer(cu_k),
        _sizes(q, k, cu_q), _strides(q), _strides(k), _strides(v), _strides(out), _strides(dout), scale, left, right,
        softcap, DTYPE_CODES[q.dtype], stream(q),
    )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, lse.new_empty(0)
    # A number for each query and head: what torch sums is D times smaller than q.
    share = torch.exp(sinks.float()[:, None] - lse) * delta
    return dq, dk, dv, -share.sum(-1).reshape(-1, sinks.shape[0]).sum(0).to(sinks.dtype)


def attention_decode_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, scale: float,
    left: int, softcap: float,
) -> Tensor:  # fmt: skip
    q, k_cache, v_cache, lengths = _dense(q), _dense(k_cache), _dense(v_cache), cache_seqlens.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sizes = (*q.shape[:2], k_cache.shape[1], q.shape[2], *k_cache.shape[2:])
    width, row, keys = 0, 0, k_cache.shape[1]
    if block_table is not None:
        if block_table.stride(1) != 1:
            block_table = block_table.contiguous()
        width, row = block_table.shape[1], block_table.stride(0)
        keys *= width
    sms = SIMT_MULTIPROCESSORS
    if q.is_cuda:
        sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    seen = keys if left < 0 else min(keys, left + q.shape[1])
    splits = cuda.module.attention_decode_splits(*q.shape[:2], seen, q.shape[2], k_cache.shape[2], sms)
    part = part_lse = None
    if splits > 1:
        part = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, *q.shape[:3]), dtype=torch.float32, device=q.device)
    cuda.module.attention_decode(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), lengths.data_ptr(),
        lengths.dtype == torch.int32, pointer(block_table), width, row, k_cache.shape[0], pointer(part),
        pointer(part_lse), splits, sizes, _strides(q), _strides(k_cache), _strides(v_cache), scale, left, softcap,
        DTYPE_CODES[q.dtype], stream(q),
    )  # fmt: skip
    return out


def why_not(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> list[str]:
    reasons = cuda.why_not(q, k, v)
    if not reasons and not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        reasons = [f"head_dim {q.shape[-1]} is not served, 1 to {MAX_HEAD_DIM} are"]
    return reasons


CUDA = Impl(attention_fwd, attention_bwd, why_not)
CUDA_DECODE = Impl(attention_decode_fwd, None, why_not)
