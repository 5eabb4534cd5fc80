"""Rotary embedding in Triton, q and k in one launch. The formula is in `reference.py`; backward turns the other way.

Letters: B batch, T tokens, H and Hkv heads, D head_dim, R <= D rotated elements. q and k are read through their batch,
token and head strides, so that (B, H, T, D) costs no copy; outputs are contiguous. Offsets are 64-bit from the token
and head on.

Floor (bytes, for elements of size b): 2 B T (H + Hkv) D b, forward and backward, and the tables' R/2 columns per token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import cdiv, lanes, multiprocessors, on_device
from .triton_pairs import (
    Tiles,
    config,
    dense_heads,
    head_splits,
    load_angles,
    load_pairs,
    positions,
    store_pairs,
    tables,
    token_tile,
    turn,
)


@triton.jit
def _rotate_heads(
    X, Y, b, t, live, cos, sin, T, stride_b, stride_t, stride_h,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of some tokens of q or of k, shared with the programs along the grid's second axis."""
    for first in range(tl.program_id(1) * BLOCK_H, HEADS, tl.num_programs(1) * BLOCK_H):
        h = first + tl.arange(0, BLOCK_H).to(tl.int64)[None, :, None]
        mask = live & (h < HEADS)
        source = b * stride_b + t * stride_t + h * stride_h
        target = ((b * T + t) * HEADS + h) * D
        x1, x2 = load_pairs(X, source, mask, R // 2, BLOCK_HALF, INTERLEAVED)
        y1, y2 = turn(x1, x2, cos, sin, CONJUGATE)
        store_pairs(Y, target, y1, y2, mask, R // 2, BLOCK_HALF, INTERLEAVED)
        if R < D:
            cols = tl.arange(0, BLOCK_REST)[None, None, :]
            rest = tl.load(X + source + R + cols, mask=mask & (cols < D - R))
            tl.store(Y + target + R + cols, rest, mask=mask & (cols < D - R))


@triton.jit
def _rope_kernel(
    Q, K, COS, SIN, P, Q_OUT, K_OUT, T, blocks, table_rows,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    c_stride_b, c_stride_t, c_stride_d, p_stride_b, p_stride_t,
    HAS_P: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th run of BLOCK_T tokens, every num_programs(1)-th block of their heads from the j-th.

    The angles are read once for all heads of q and k.
    """
    b, t, live = token_tile(tl.program_id(0), T, blocks, BLOCK_T)
    cos, sin = load_angles(
        COS, SIN, P, b, t, live, table_rows, c_stride_b, c_stride_t, c_stride_d, p_stride_b, p_stride_t,
        HAS_P, R // 2, BLOCK_HALF,
    )  # fmt: skip
    _rotate_heads(
        Q, Q_OUT, b, t, live, cos, sin, T, q_stride_b, q_stride_t, q_stride_h,
        H, D, R, INTERLEAVED, CONJUGATE, BLOCK_Q, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _rotate_heads(
        K, K_OUT, b, t, live, cos, sin, T, k_stride_b, k_stride_t, k_stride_h,
        HKV, D, R, INTERLEAVED, CONJUGATE, BLOCK_K, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


def tiles_of(T: int, H: int, Hkv: int, D: int, R: int, lanes: int = 32) -> Tiles:
    """`config` for these kernels: where only a part of a head turns, its pairs are half of a tile at most, and half the
    threads keep their accesses 16 bytes wide."""
    return config(T, H, Hkv, D, R, lanes, 128 if R == D else 64)


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, conjugate: bool
) -> tuple[Tensor, Tensor]:
    (B, T, H, D), Hkv, R = q.shape, k.shape[2], 2 * cos.shape[-1]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if B * T * (H + Hkv) == 0:
        return q_out, k_out
    q, k = dense_heads(q), dense_heads(k)
    cos, sin, *table_strides = tables(cos, sin)
    p, *p_strides = positions(position_ids, B, T, cos)
    tiles = tiles_of(T, H, Hkv, D, R, lanes(q.device))
    blocks = cdiv(T, tiles.tokens)
    splits = head_splits(B * blocks, cdiv(H, tiles.q_heads), multiprocessors(q.device))
    with on_device(q):
        _rope_kernel[(B * blocks, splits)](
            q, k, cos, sin, p, q_out, k_out, T, blocks, cos.shape[-2], *q.stride()[:3], *k.stride()[:3],
            *table_strides, *p_strides, position_ids is not None, H, Hkv, D, R, interleaved, conjugate,
            tiles.tokens, tiles.q_heads, tiles.k_heads, tiles.half, tiles.rest, num_warps=tiles.warps,
        )  # fmt: skip
    return q_out, k_out


def rope_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return _launch(q, k, cos, sin, position_ids, interleaved, False)


def rope_bwd(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return _launch(dq, dk, cos, sin, position_ids, interleaved, True)
