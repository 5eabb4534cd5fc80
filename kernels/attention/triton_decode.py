"""Decoding attention in Triton: the newest tokens of every sequence against its cache. Formulas are in `reference.py`.

The cache is read once, whoever shares it: the H / Hkv query heads of a KV head and the T new tokens are the *rows* of
one program's matrix products (row r is token r // group, head r % group of the group), at least 16 of them as matrix
units want it. Few sequences would leave most of the GPU idle, so the keys of each are split over several programs
(Flash-Decoding); a second kernel then merges what these found. Many rows (a chunk of a prompt) make several tiles.

Lengths are read on the device and the grid comes of shapes alone: a captured CUDA graph serves every length. Each split
takes its share of the keys that its sequence really has, so a long cache that is hardly filled still keeps all busy.
Keys that no row of a program sees aren't read: beyond the length, before the window, in a block that isn't allocated.

Floor (bytes, elements of size b): the seen keys and values once, 2 Hkv D b each, q and out. Splits add 8 D + 8 for each
of their rows, written and read back, 3 % of the cache's bytes at the smallest share of keys (MIN_KEYS) and group 4.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_math import tanh
from ..triton_support import multiprocessors, on_device

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: below every score, yet finite, so that - never makes NaN
MIN_KEYS = 256  # of a split: fewer, and its partial result is no longer small beside them
RESIDENT = 2  # programs that a multiprocessor holds at once, at the least
MERGED = 16  # splits that the second kernel loads at once


@triton.jit
def _where_keys_lie(TABLE, cols, start, seen, b, table_stride, n_blocks, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Indices along a cache's first two dimensions, 64-bit, of the keys `cols` = start, start + 1, ... of sequence b.

    Contiguous: (sequence, key). Paged: (block, key of the block), by one look-up where a tile of keys is in one block.
    A number outside the cache, a bug of the caller, becomes the nearest block's: nothing is read out of bounds.
    """
    if PAGE == 0:
        return b, cols.to(tl.int64)
    if PAGE % BLOCK_N == 0:
        block = tl.load(TABLE + b * table_stride + start // PAGE)
    else:
        block = tl.load(TABLE + b * table_stride + cols // PAGE, mask=seen, other=0)
    block = tl.maximum(tl.minimum(block, n_blocks - 1), 0)
    return block.to(tl.int64), (cols % PAGE).to(tl.int64)


@triton.jit(do_not_specialize=["S", "n_blocks", "splits", "left", "table_stride"])
def _attention_decode_kernel(
    Q, K, V, SEQLENS, TABLE, OUT, PARTIAL, LSE,
    T, S, Hkv, n_blocks, tiles, splits, left, scale, cap,
    q_stride_b, q_stride_t, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    v_stride_b, v_stride_s, v_stride_h, v_stride_d, table_stride,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per split of a tile of rows of a KV head of a sequence; tiles that see most keys come first.

    WHOLE: there is one split, and its result is the output. Otherwise each leaves its own, normalised, and the
    logarithm (base 2) of its sum, -inf where a row saw nothing: then its PARTIAL isn't written.
    """
    program = tl.program_id(0)
    split = program % splits
    tile = tiles - 1 - program // splits % tiles
    head = (program // splits // tiles).to(tl.int64)  # of B * Hkv
    b = head // Hkv
    hk = head % Hkv
    n = tl.load(SEQLENS + b).to(tl.int32)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    t = rows // GROUP
    query = n - T + t  # the rows' positions among the keys
    live = rows < T * GROUP

    first_row = tile * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, T * GROUP) - 1
    hi = tl.maximum(tl.minimum(n - T + last_row // GROUP + 1, S), 0)
    lo = 0
    if WINDOW:
        lo = tl.maximum(n - T + first_row // GROUP - left, 0)
    first = lo // BLOCK_N
    share = tl.cdiv(tl.maximum(tl.cdiv(hi, BLOCK_N) - first, 0), splits)
    begin = (first + split * share) * BLOCK_N
    end = tl.minimum(begin + share * BLOCK_N, hi)

    q_at = b * q_stride_b + t.to(tl.int64) * q_stride_t + (hk * GROUP + rows % GROUP) * q_stride_h
    q_mask = live[:, None] & (d < D)[None, :]
    q = tl.load(Q + q_at[:, None] + d[None, :] * q_stride_d, mask=q_mask, other=0.0)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        seen = (cols >= lo) & (cols < end)
        major, minor = _where_keys_lie(TABLE, cols, start, seen, b, table_stride, n_blocks, PAGE, BLOCK_N)
        k_at = major * k_stride_b + minor * k_stride_s + hk * k_stride_h
        v_at = major * v_stride_b + minor * v_stride_s + hk * v_stride_h
        mask = seen[:, None]
        if D < BLOCK_D:
            mask = mask & (d < D)[None, :]
        k = tl.load(K + k_at[:, None] + d[None, :] * k_stride_d, mask=mask, other=0.0)
        v = tl.load(V + v_at[:, None] + d[None, :] * v_stride_d, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            s = cap * tanh(s)
        keep = seen[None, :] & (cols[None, :] <= query[:, None])
        if WINDOW:
            keep = keep & (cols[None, :] >= query[:, None] - left)
        s = tl.where(keep, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(V.dtype.element_ty), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new

    some = total > 0
    total = tl.where(some, total, 1.0)
    acc = acc / total[:, None]
    h = hk * GROUP + rows % GROUP
    if WHOLE:
        out_at = ((b * T + t) * (Hkv * GROUP) + h) * D
        tl.store(OUT + out_at[:, None] + d[None, :], acc.to(OUT.dtype.element_ty), mask=q_mask)
    else:
        part = (head * (T * GROUP) + rows) * splits + split
        tl.store(LSE + part, tl.where(some, m + tl.log2(total), float("-inf")), mask=live)
        tl.store(PARTIAL + part[:, None] * D + d[None, :], acc, mask=q_mask & some[:, None])


@triton.jit(do_not_specialize=["splits"])
def _merge_splits_kernel(
    PARTIAL, LSE, OUT, T, Hkv, splits,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per row: its splits' results, each by its share of the row's sum. Always in the same order."""
    row = tl.program_id(0).to(tl.int64)  # of B * Hkv * T * GROUP
    d = tl.arange(0, BLOCK_D)
    m = tl.full([BLOCK_S], LOWEST, tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        m = tl.maximum(m, tl.load(LSE + row * splits + s, mask=s < splits, other=float("-inf")))
    top = tl.max(m, 0)
    total = tl.zeros([BLOCK_S], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        weight = tl.exp2(tl.load(LSE + row * splits + s, mask=s < splits, other=float("-inf")) - top)
        total += weight
        mask = (weight > 0)[:, None] & (d < D)[None, :]
        part = tl.load(PARTIAL + (row * splits + s)[:, None] * D + d[None, :], mask=mask, other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
    total = tl.sum(total, 0)
    acc = acc / tl.where(total == 0, 1.0, total)
    t = row // GROUP % T
    head = row // GROUP // T
    out_at = (((head // Hkv) * T + t) * Hkv + head % Hkv) * GROUP + row % GROUP
    tl.store(OUT + out_at * D + d, acc.to(OUT.dtype.element_ty), mask=d < D)


def config(
    rows: int, head_dim: int, itemsize: int, paged: bool = False, amd: bool = False
) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_D, num_warps, num_stages) for `rows` new tokens times query heads of a KV head.

    Two tiles of keys and values are on their way while a third is multiplied: 32 KB a tile, so that two programs fit a
    multiprocessor of an A100, and one of GPUs with 99 KB. A look-up in the block table takes two stages of its own
    (Triton counts each load that waits for another as one more level). AMD has 64 KB, so one tile on its way; and half
    as many rows, or window and softcap spill.
    float32 has no matrix units at full precision: its products live in registers, which makes smaller tiles.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    rows = max(16, triton.next_power_of_2(rows))
    if itemsize == 4:
        block_m, block_n = min(rows, 32, max(16, 4096 // block_d)), max(16, min(32, 2048 // block_d))
        warps = 8 if block_m * block_d > 2048 else 4
    else:
        block_m, block_n = min(rows, 64, (4096 if amd else 8192) // block_d), min(64, 8192 // block_d)
        warps = 8 if block_m * block_d > 4096 else 4
    stages = (3 if paged else 2) if amd else (5 if paged else 3)
    return block_m, block_n, block_d, warps, stages


@functools.lru_cache(maxsize=4096)
def split_count(programs: int, tiles: int, least: int, processors: int) -> int:
    """Into how many splits to divide `tiles` of keys, where one split each makes `programs` programs.

    The time of s splits is the waves of programs times the tiles of a split. The fewest splits within 5 % of the best
    time win: each costs a partial result. A split has `least` tiles or there is only one, and there is only one where
    programs nearly fill the GPU without. All this is known from shapes: lengths may change under a CUDA graph.
    """
    slots = RESIDENT * processors
    if programs >= 0.8 * slots:
        return 1
    times = []
    for splits in range(1, max(1, min(tiles // least, 2 * slots)) + 1):
        times.append(-(-programs * splits // slots) * -(-tiles // splits))
    best = min(times)
    return next(splits for splits, time in enumerate(times, 1) if 0.95 * time <= best)


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
    (B, T, H, D), Hkv = q.shape, k_cache.shape[2]
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    n_blocks, capacity, page, table, table_stride = k_cache.shape[0], k_cache.shape[1], 0, cache_seqlens, 0
    if block_table is not None:
        page = capacity
        capacity = block_table.shape[1] * page if n_blocks else 0
        table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        table_stride = table.stride(0)
    group, heads, amd = H // Hkv, B * Hkv, q.is_cuda and torch.version.hip is not None
    rows = T * group
    block_m, block_n, block_d, warps, stages = config(rows, D, q.element_size(), page > 0, amd)
    tiles = triton.cdiv(rows, block_m)
    # As many keys as a split's partial result is small beside: the more rows, the more keys.
    least = max(MIN_KEYS, 16 * block_m) // block_n
    splits = split_count(heads * tiles, triton.cdiv(capacity, block_n), least, multiprocessors(q.device))
    partial = lse = out
    if splits > 1:
        partial = q.new_empty((heads * rows, splits, D), dtype=torch.float32)
        lse = q.new_empty((heads * rows, splits), dtype=torch.float32)
    factor, cap = (scale / softcap, softcap * math.log2(math.e)) if softcap else (scale * math.log2(math.e), 0.0)
    with on_device(q):
        _attention_decode_kernel[(heads * tiles * splits,)](
            q, k_cache, v_cache, cache_seqlens.contiguous(), table, out, partial, lse,
            T, capacity, Hkv, n_blocks, tiles, splits, left, factor, cap,
            *q.stride(), *k_cache.stride(), *v_cache.stride(), table_stride,
            group, D, page, left >= 0, softcap > 0, splits == 1, block_m, block_n, block_d,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if splits > 1:
            _merge_splits_kernel[(heads * rows,)](
                partial, lse, out, T, Hkv, splits, group, D, MERGED, block_d, num_warps=4
            )
    return out
