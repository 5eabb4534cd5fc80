"""Rotary embedding of new tokens and entry into the cache, in one Triton launch. Formula: `append_reference.py`.

Generating a token runs this once a layer on a few KB, where a launch costs more than the work: apply_rope and two
indexed copies would be three launches and more. Lengths are read on the device, so a CUDA graph serves every step.

All tensors are read and written through their strides: nothing is copied, whatever the layout. Offsets are 64-bit.

Floor (bytes, elements of size b): 2 B T (H + 2 Hkv) D b, and R/2 columns of cos and sin per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import DTYPES, lanes, on_device

TILE = 2048  # elements of a program: 16 a thread, two 16-byte loads of bfloat16


@triton.jit
def _turn(
    X, x_stride_d, Y, y_stride_d, mask, cos, sin,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Some heads at the addresses X, a column, to those at Y, rotated; mask says which. cos and sin are a row."""
    if INTERLEAVED:  # pairs are neighbours: read whole, parted in registers
        pair = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        inside = mask & (pair < 2 * HALF)
        x = tl.load(X + pair * x_stride_d, mask=inside, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, [x.shape[0], BLOCK_HALF, 2]))
        y = tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), [x.shape[0], 2 * BLOCK_HALF])
        tl.store(Y + pair * y_stride_d, y.to(Y.dtype.element_ty), mask=inside)
    else:
        i = tl.arange(0, BLOCK_HALF)[None, :]
        inside = mask & (i < HALF)
        x1 = tl.load(X + i * x_stride_d, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(X + (i + HALF) * x_stride_d, mask=inside, other=0.0).to(tl.float32)
        tl.store(Y + i * y_stride_d, (x1 * cos - x2 * sin).to(Y.dtype.element_ty), mask=inside)
        tl.store(Y + (i + HALF) * y_stride_d, (x2 * cos + x1 * sin).to(Y.dtype.element_ty), mask=inside)
    if 2 * HALF < D:
        _copy(
            X + 2 * HALF * x_stride_d, x_stride_d, Y + 2 * HALF * y_stride_d, y_stride_d, mask, D - 2 * HALF, BLOCK_REST
        )


@triton.jit
def _copy(X, x_stride_d, Y, y_stride_d, mask, COLS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[None, :]
    inside = mask & (i < COLS)
    tl.store(Y + i * y_stride_d, tl.load(X + i * x_stride_d, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["capacity", "n_blocks", "table_rows", "table_stride"])
def _rope_append_kv_kernel(
    Q, K, V, COS, SIN, K_CACHE, V_CACHE, SEQLENS, TABLE, OUT, T, capacity, n_blocks, table_rows,
    q_stride_b, q_stride_t, q_stride_h, q_stride_d, k_stride_b, k_stride_t, k_stride_h, k_stride_d,
    v_stride_b, v_stride_t, v_stride_h, v_stride_d,
    kc_stride_b, kc_stride_s, kc_stride_h, kc_stride_d, vc_stride_b, vc_stride_s, vc_stride_h, vc_stride_d,
    cos_stride_p, cos_stride_d, sin_stride_p, sin_stride_d, table_stride,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (token, part): BLOCK_H heads of a token's q, or, in the last parts, as many of its k and v."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b = token // T
    t = token % T
    position = tl.load(SEQLENS + b).to(tl.int64) - T + t
    row = tl.maximum(tl.minimum(position, table_rows - 1), 0)
    i = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(COS + row * cos_stride_p + i * cos_stride_d, mask=i < HALF, other=0.0).to(tl.float32)
    sin = tl.load(SIN + row * sin_stride_p + i * sin_stride_d, mask=i < HALF, other=0.0).to(tl.float32)
    q_parts = tl.cdiv(H, BLOCK_H)
    if part < q_parts:
        h = (part * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
        _turn(
            Q + (b * q_stride_b + t * q_stride_t + h * q_stride_h), q_stride_d, OUT + (token * H + h) * D, 1, h < H,
            cos, sin, D, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        h = ((part - q_parts) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
        placed = (position >= 0) & (position < capacity)
        major = b
        minor = position
        if PAGE > 0:
            major = tl.load(TABLE + b * table_stride + position // PAGE, mask=placed, other=-1).to(tl.int64)
            minor = position % PAGE
            placed = placed & (major >= 0) & (major < n_blocks)
        mask = (h < HKV) & placed
        _turn(
            K + (b * k_stride_b + t * k_stride_t + h * k_stride_h), k_stride_d,
            K_CACHE + (major * kc_stride_b + minor * kc_stride_s + h * kc_stride_h), kc_stride_d, mask,
            cos, sin, D, HALF, INTERLEAVED, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
        _copy(
            V + (b * v_stride_b + t * v_stride_t + h * v_stride_h), v_stride_d,
            V_CACHE + (major * vc_stride_b + minor * vc_stride_s + h * vc_stride_h), vc_stride_d, mask, D, BLOCK_D,
        )  # fmt: skip


def config(H: int, Hkv: int, D: int, R: int, lanes: int = 32) -> tuple[int, int, int, int, int]:
    """(BLOCK_H, BLOCK_HALF, BLOCK_REST, BLOCK_D, num_warps): as many heads as make a TILE, 16 elements a lane."""
    block_d = triton.next_power_of_2(D)
    block_h = min(triton.next_power_of_2(max(H, Hkv)), max(1, TILE // block_d))
    warps = max(1, min(8, block_h * block_d // (16 * lanes)))
    return block_h, triton.next_power_of_2(max(R // 2, 1)), triton.next_power_of_2(max(D - R, 1)), block_d, warps


def rope_append_kv_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    interleaved: bool,
) -> Tensor:
    (B, T, H, D), Hkv = q.shape, k.shape[2]
    out = q.new_empty(q.shape)
    if B * T * D == 0:
        return out
    cos, sin = (t if t.dtype in DTYPES else t.float() for t in (cos, sin))
    capacity, page, table, table_stride = k_cache.shape[1], 0, cache_seqlens, 0
    if block_table is not None:
        page = capacity
        capacity = block_table.shape[1] * page
        table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        table_stride = table.stride(0)
    half = cos.shape[1]
    block_h, block_half, block_rest, block_d, warps = config(H, Hkv, D, 2 * half, lanes(q.device))
    with on_device(q):
        _rope_append_kv_kernel[(B * T, triton.cdiv(H, block_h) + triton.cdiv(Hkv, block_h))](
            q, k, v, cos, sin, k_cache, v_cache, cache_seqlens.contiguous(), table, out,
            T, capacity, k_cache.shape[0], cos.shape[0], *q.stride(), *k.stride(), *v.stride(),
            *k_cache.stride(), *v_cache.stride(), *cos.stride(), *sin.stride(), table_stride,
            H, Hkv, D, half, interleaved, page, block_h, block_half, block_rest, block_d, num_warps=warps,
        )  # fmt: skip
    # Autograd counts the writes to a tensor, to find out when one that it saved has changed. It sees no kernel's.
    torch.autograd.graph.increment_version([t for t in (k_cache, v_cache) if not t.is_inference()])
    return out
