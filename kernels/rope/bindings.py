"""Rotary embedding's compiled kernel: C++ (`csrc/rope/rope_cpu.cpp`), which turns either way: forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, cpu, pointer


def _rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> tuple[Tensor, Tensor]:
    (B, T, H, D), Hkv = q.shape, k.shape[2]
    q, k = _dense_heads(q), _dense_heads(k)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if cos.dtype != acc or sin.dtype != acc:
        cos, sin = cos.to(acc), sin.to(acc)
    if cos.stride(-1) != sin.stride(-1):
        cos, sin = cos.contiguous(), sin.contiguous()
    if position_ids is not None:
        position_ids = position_ids.to(torch.int64).expand(B, T).contiguous()
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    # fmt: off
    cpu.module.rope(
        q.data_ptr(), k.data_ptr(), q_out.data_ptr(), k_out.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        pointer(position_ids), B, T, H, Hkv, D, 2 * cos.shape[-1], *q.stride()[:3], *k.stride()[:3],
        *_table_strides(cos), *_table_strides(sin), cos.stride(-1), cos.shape[-2], interleaved, conjugate,
        DTYPE_CODES[q.dtype],
    )
    # fmt: on
    return q_out, k_out


def _dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _table_strides(table: Tensor) -> tuple[int, int]:
    """From one batch to the next (none where they share a table) and from row to row."""
    return (table.stride(0) if table.dim() == 3 and table.shape[0] > 1 else 0), table.stride(-2)


def rope_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, cos, sin, position_ids, interleaved, False)


def rope_bwd(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return _rotate(dq, dk, cos, sin, position_ids, interleaved, True)


def why_not(q: Tensor, k: Tensor, *_: Any) -> list[str]:
    return cpu.why_not(q, k)


CPU = Impl(rope_fwd, rope_bwd, why_not)
