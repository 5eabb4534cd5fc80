"""QK-norm and rotary embedding in one Triton kernel, and its backward. The formulas are in `qk_norm_reference.py`.

Letters as in `triton_rope.py`; N rows of D elements are the heads of all tokens. A head's row is whole in registers:
its squares are summed, it is scaled and turned, and written once.

Floor (bytes, for N = B T (H + Hkv) heads of D elements of size b): forward 2 N D b and 4 N of rstd, backward 3 N D b
and the same of rstd. The norms and the rotation by themselves move 4 N D b forward and 5 N D b backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_reduce import sum_partials
from ..triton_support import cdiv, lanes, multiprocessors, on_device
from .triton_pairs import (
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

# Of the backward, a multiprocessor: as many as their registers let in at once (168 a thread in bfloat16), so that there
# is one wave. With 64 bytes a thread in flight they hide the latency of memory; more would only make more partial sums.
PROGRAMS = 3


@triton.jit
def _load_weight(
    W, offset, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """offset + weight of the pairs' first and second elements and of the rest, float32; the rest is one where R = D."""
    zero = tl.zeros([1, 1, 1], dtype=tl.int64)
    w1, w2 = load_pairs(W, zero, zero == 0, R // 2, BLOCK_HALF, INTERLEAVED)
    if R < D:
        cols = tl.arange(0, BLOCK_REST)[None, None, :]
        w3 = tl.load(W + R + cols, mask=cols < D - R, other=0.0).to(tl.float32)
    else:
        w3 = tl.zeros([1, 1, 1], dtype=tl.float32)
    return w1 + offset, w2 + offset, w3 + offset


@triton.jit
def _norm_heads(
    X, Y, RSTD, W, b, t, live, cos, sin, T, stride_b, stride_t, stride_h, eps, offset,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of some tokens of q or of k, shared with the programs along the grid's second axis."""
    w1, w2, w3 = _load_weight(W, offset, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    for first in range(tl.program_id(1) * BLOCK_H, HEADS, tl.num_programs(1) * BLOCK_H):
        h = first + tl.arange(0, BLOCK_H).to(tl.int64)[None, :, None]
        mask = live & (h < HEADS)
        source = b * stride_b + t * stride_t + h * stride_h
        row = (b * T + t) * HEADS + h
        x1, x2 = load_pairs(X, source, mask, R // 2, BLOCK_HALF, INTERLEAVED)
        squares = tl.sum(x1 * x1 + x2 * x2, axis=2, keep_dims=True)
        if R < D:
            cols = tl.arange(0, BLOCK_REST)[None, None, :]
            x3 = tl.load(X + source + R + cols, mask=mask & (cols < D - R), other=0.0).to(tl.float32)
            squares += tl.sum(x3 * x3, axis=2, keep_dims=True)
        rstd = 1.0 / tl.sqrt(squares / D + eps)
        tl.store(RSTD + row, rstd, mask=mask)
        y1, y2 = turn(x1 * rstd * w1, x2 * rstd * w2, cos, sin, False)
        store_pairs(Y, row * D, y1, y2, mask, R // 2, BLOCK_HALF, INTERLEAVED)
        if R < D:
            y3 = x3 * rstd * w3
            tl.store(Y + row * D + R + cols, y3.to(Y.dtype.element_ty), mask=mask & (cols < D - R))


@triton.jit
def _qk_norm_rope_fwd_kernel(
    Q, K, QW, KW, COS, SIN, P, Q_OUT, K_OUT, RSTD_Q, RSTD_K, T, blocks, table_rows, eps, offset,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    c_stride_b, c_stride_t, c_stride_d, p_stride_b, p_stride_t,
    HAS_P: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Program (i, j): the i-th run of BLOCK_T tokens, every num_programs(1)-th block of their heads from the j-th."""
    b, t, live = token_tile(tl.program_id(0), T, blocks, BLOCK_T)
    cos, sin = load_angles(
        COS, SIN, P, b, t, live, table_rows, c_stride_b, c_stride_t, c_stride_d, p_stride_b, p_stride_t,
        HAS_P, R // 2, BLOCK_HALF,
    )  # fmt: skip
    _norm_heads(
        Q, Q_OUT, RSTD_Q, QW, b, t, live, cos, sin, T, q_stride_b, q_stride_t, q_stride_h, eps, offset,
        H, D, R, INTERLEAVED, BLOCK_Q, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _norm_heads(
        K, K_OUT, RSTD_K, KW, b, t, live, cos, sin, T, k_stride_b, k_stride_t, k_stride_h, eps, offset,
        HKV, D, R, INTERLEAVED, BLOCK_K, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


@triton.jit
def _norm_heads_bwd(
    DY, X, DX, RSTD, W, dw1, dw2, dw3, b, t, live, cos, sin, T, offset,
    dy_stride_b, dy_stride_t, dy_stride_h, x_stride_b, x_stride_t, x_stride_h,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of some tokens of q or of k. The weight's gradient grows in dw1, dw2 and dw3, a tile each: they are
    summed over tokens and heads once, at the program's end. The weight is read again for each run of tokens: q's and
    k's at once would take more registers."""
    w1, w2, w3 = _load_weight(W, offset, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    for first in range(0, HEADS, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H).to(tl.int64)[None, :, None]
        mask = live & (h < HEADS)
        upstream = b * dy_stride_b + t * dy_stride_t + h * dy_stride_h
        source = b * x_stride_b + t * x_stride_t + h * x_stride_h
        row = (b * T + t) * HEADS + h
        x1, x2 = load_pairs(X, source, mask, R // 2, BLOCK_HALF, INTERLEAVED)
        g1, g2 = load_pairs(DY, upstream, mask, R // 2, BLOCK_HALF, INTERLEAVED)
        rstd = tl.load(RSTD + row, mask=mask, other=0.0)
        g1, g2 = turn(g1, g2, cos, sin, True)
        x1 *= rstd
        x2 *= rstd
        dw1 += g1 * x1
        dw2 += g2 * x2
        g1 *= w1
        g2 *= w2
        dots = tl.sum(g1 * x1 + g2 * x2, axis=2, keep_dims=True)
        if R < D:
            cols = tl.arange(0, BLOCK_REST)[None, None, :]
            x3 = tl.load(X + source + R + cols, mask=mask & (cols < D - R), other=0.0).to(tl.float32) * rstd
            g3 = tl.load(DY + upstream + R + cols, mask=mask & (cols < D - R), other=0.0).to(tl.float32)
            dw3 += g3 * x3
            g3 *= w3
            dots += tl.sum(g3 * x3, axis=2, keep_dims=True)
        mean = dots / D
        store_pairs(
            DX, row * D, (g1 - x1 * mean) * rstd, (g2 - x2 * mean) * rstd, mask, R // 2, BLOCK_HALF, INTERLEAVED
        )  # fmt: skip
        if R < D:
            dx3 = (g3 - x3 * mean) * rstd
            tl.store(DX + row * D + R + cols, dx3.to(DX.dtype.element_ty), mask=mask & (cols < D - R))
    return dw1, dw2, dw3


@triton.jit
def _weight_tiles(
    R: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Zeros in which a weight's gradient grows."""
    dw = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_HALF], dtype=tl.float32)
    if R < D:
        dw3 = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_REST], dtype=tl.float32)
    else:
        dw3 = tl.zeros([1, 1, 1], dtype=tl.float32)
    return dw, dw, dw3


@triton.jit
def _store_weight(
    PARTIAL, dw1, dw2, dw3, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """A program's part of a weight's gradient, D elements."""
    zero = tl.zeros([1, 1, 1], dtype=tl.int64)
    dw1 = tl.sum(tl.sum(dw1, axis=0), axis=0)[None, None, :]
    dw2 = tl.sum(tl.sum(dw2, axis=0), axis=0)[None, None, :]
    store_pairs(PARTIAL, zero, dw1, dw2, zero == 0, R // 2, BLOCK_HALF, INTERLEAVED)
    if R < D:
        cols = tl.arange(0, BLOCK_REST)
        tl.store(PARTIAL + R + cols, tl.sum(tl.sum(dw3, axis=0), axis=0), mask=cols < D - R)


@triton.jit
def _qk_norm_rope_bwd_kernel(
    DQ, DK, Q, K, QW, KW, RSTD_Q, RSTD_K, COS, SIN, P, DQ_OUT, DK_OUT, PARTIAL,
    T, blocks, all_blocks, blocks_per_program, table_rows, offset,
    dq_stride_b, dq_stride_t, dq_stride_h, dk_stride_b, dk_stride_t, dk_stride_h,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    c_stride_b, c_stride_t, c_stride_d, p_stride_b, p_stride_t,
    HAS_P: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Persistent: a program walks its own runs of tokens and leaves its part of both weights' gradients."""
    program = tl.program_id(0)
    dqw1, dqw2, dqw3 = _weight_tiles(R, D, BLOCK_T, BLOCK_Q, BLOCK_HALF, BLOCK_REST)
    dkw1, dkw2, dkw3 = _weight_tiles(R, D, BLOCK_T, BLOCK_K, BLOCK_HALF, BLOCK_REST)
    first = program * blocks_per_program
    for block in range(first, tl.minimum(first + blocks_per_program, all_blocks)):
        b, t, live = token_tile(block, T, blocks, BLOCK_T)
        cos, sin = load_angles(
            COS, SIN, P, b, t, live, table_rows, c_stride_b, c_stride_t, c_stride_d, p_stride_b, p_stride_t,
            HAS_P, R // 2, BLOCK_HALF,
        )  # fmt: skip
        dqw1, dqw2, dqw3 = _norm_heads_bwd(
            DQ, Q, DQ_OUT, RSTD_Q, QW, dqw1, dqw2, dqw3, b, t, live, cos, sin, T, offset,
            dq_stride_b, dq_stride_t, dq_stride_h, q_stride_b, q_stride_t, q_stride_h,
            H, D, R, INTERLEAVED, BLOCK_Q, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
        dkw1, dkw2, dkw3 = _norm_heads_bwd(
            DK, K, DK_OUT, RSTD_K, KW, dkw1, dkw2, dkw3, b, t, live, cos, sin, T, offset,
            dk_stride_b, dk_stride_t, dk_stride_h, k_stride_b, k_stride_t, k_stride_h,
            HKV, D, R, INTERLEAVED, BLOCK_K, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    part = PARTIAL + program.to(tl.int64) * 2 * D
    _store_weight(part, dqw1, dqw2, dqw3, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    _store_weight(part + D, dkw1, dkw2, dkw3, D, R, INTERLEAVED, BLOCK_HALF, BLOCK_REST)


def qk_norm_rope_fwd(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, T, H, D), Hkv, R = q.shape, k.shape[2], 2 * cos.shape[-1]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    rstd_q, rstd_k = (x.new_empty(x.shape[:-1], dtype=torch.float32) for x in (q, k))
    if B * T * (H + Hkv) == 0:
        return q_out, k_out, rstd_q, rstd_k
    q, k = dense_heads(q), dense_heads(k)
    cos, sin, *table_strides = tables(cos, sin)
    p, *p_strides = positions(position_ids, B, T, cos)
    tiles = config(T, H, Hkv, D, R, lanes(q.device))
    blocks = cdiv(T, tiles.tokens)
    splits = head_splits(B * blocks, cdiv(H, tiles.q_heads), multiprocessors(q.device))
    with on_device(q):
        _qk_norm_rope_fwd_kernel[(B * blocks, splits)](
            q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, p, q_out, k_out, rstd_q, rstd_k,
            T, blocks, cos.shape[-2], eps, offset, *q.stride()[:3], *k.stride()[:3], *table_strides, *p_strides,
            position_ids is not None, H, Hkv, D, R, interleaved,
            tiles.tokens, tiles.q_heads, tiles.k_heads, tiles.half, tiles.rest, num_warps=tiles.warps,
        )  # fmt: skip
    return q_out, k_out, rstd_q, rstd_k


def qk_norm_rope_bwd(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, T, H, D), Hkv, R = q.shape, k.shape[2], 2 * cos.shape[-1]
    dq_out, dk_out = q.new_empty(q.shape), k.new_empty(k.shape)
    q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    if B * T * (H + Hkv) == 0:
        return dq_out, dk_out, torch.zeros_like(q_weight), torch.zeros_like(k_weight)
    dq_weight, dk_weight = torch.empty_like(q_weight), torch.empty_like(k_weight)
    dq, dk, q, k = dense_heads(dq), dense_heads(dk), dense_heads(q), dense_heads(k)
    cos, sin, *table_strides = tables(cos, sin)
    p, *p_strides = positions(position_ids, B, T, cos)
    tiles = config(T, H, Hkv, D, R, lanes(q.device))
    blocks = cdiv(T, tiles.tokens)
    per_program = cdiv(B * blocks, PROGRAMS * multiprocessors(q.device))
    parts = cdiv(B * blocks, per_program)
    partial = q.new_empty((parts, 2 * D), dtype=torch.float32)
    with on_device(q):
        _qk_norm_rope_bwd_kernel[(parts,)](
            dq, dk, q, k, q_weight, k_weight, rstd_q.contiguous(), rstd_k.contiguous(), cos, sin, p,
            dq_out, dk_out, partial, T, blocks, B * blocks, per_program, cos.shape[-2], offset,
            *dq.stride()[:3], *dk.stride()[:3], *q.stride()[:3], *k.stride()[:3], *table_strides, *p_strides,
            position_ids is not None, H, Hkv, D, R, interleaved,
            tiles.tokens, tiles.q_heads, tiles.k_heads, tiles.half, tiles.rest, num_warps=tiles.warps,
        )  # fmt: skip
        sum_partials(partial, dq_weight, dk_weight)
    return dq_out, dk_out, dq_weight, dk_weight
