"""Attention's backward in Triton, without atomics: the same bits every run. The formulas are in `reference.py`.

1. delta: D = rowsum(do * out) - dlse of every query and head, negated; lse, negated and in the units of the products;
   the sinks' gradient, as a partial sum per program.
2. dk and dv: a program owns BLOCK_N keys of one key-value head and walks over the queries of all heads of its group in
   one flat loop over (head, block of queries). S^T = K Q^T and dP^T = V dO^T, keys down and queries across: P^T and
   dS^T are then left operands, which matrix units take from registers.
3. dq: a program owns BLOCK_M queries of one head and walks over its keys.

P is computed again in both: 7 products instead of the 5 of a kernel that adds dq up atomically, 14 D operations for
each pair that meets where 10 D are useful, so at best 5/7 of the peak. At 16 bits both loops are bound by the matrix
units. -lse and -delta are their accumulators' initial values, which saves the subtractions and the registers, and the
exponentials run while dP is still in the units (tests/build/offline/overlap.py reads that from the machine code).
Where there are too few blocks of keys to fill a GPU, the flat loop is dealt out to several programs, whose float32 sums
another kernel adds in a fixed order.

Floor in bytes, at 16 bits: delta reads do and out once. dk and dv read k and v once, and q and do once for each block
of keys, dq the other way round: all but the first time from L2, where a head's 4 D bytes a row are at home. Scratch: 8
bytes per query and head; with parts, 8 bytes per part and element of k.

Packed sequences need no host sync (`sequence_of`). Rows past the last sequence are one more, which meets nobody: its
gradients are zeros. A block that reaches over the end of its sequence is loaded through masked pointers wherever it is
summed over: what lies beyond is another sequence's, or nobody's and perhaps NaN, and 0 * NaN isn't 0.
Source: Dao 2023, arXiv:2307.08691, whose two loops over recomputed probabilities these are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_math import LOG2_E, tanh
from ..triton_support import multiprocessors, on_device
from . import triton_common as common
from .triton_common import load_rows, sequence_of, visible

PAD = tl.constexpr(128)  # rows of scratch that a sequence takes a multiple of; no tile of queries is longer
NO_DESCRIPTORS = (None, None, None, None)


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps of a program, buffers of its loads."""

    m: int
    n: int
    warps: int
    stages: int


def config(arch: int, D: int, half: bool, softcap: bool) -> tuple[Tiles, Tiles]:
    """(of dk and dv, of dq) for a head dimension, on a GPU of compute capability `arch`, 0 for AMD.

    The largest tiles that compile without spills (tests/build/triton_budget.json): two sums of BLOCK_N x D floats and
    two of BLOCK_N x BLOCK_M must fit 64 K registers. Hopper and sm_100 take a tile from shared memory into products of
    64 rows and more; elsewhere 99 KB are all that sm_86, sm_89 and sm_120 have. A softcap's tanh and slope, and the
    column masks of a D that is no power of two, need registers of their own. float32 has no matrix units.
    """
    wide = block_d(D)
    if not half:
        side = 32 if wide <= (64 if arch // 10 == 10 else 128) else 16
        return Tiles(side, side, 4, 1), Tiles(side, side, 4, 1)
    if arch // 10 in (9, 10):
        if wide <= 64:
            return Tiles(64, 128, 8, 2), Tiles(128, 64 if softcap or arch >= 100 else 128, 8, 2)
        if wide == 128:
            return Tiles(32 if softcap or wide != D else 64, 128, 8, 2), Tiles(128, 64, 8, 2)
        return Tiles(32, 64, 8, 2), Tiles(128, 32, 8, 2)
    if arch == 0:
        return (Tiles(32, 32, 4, 1) if wide > 128 else Tiles(64, 64, 4, 1)), Tiles(64, 32 if wide > 128 else 64, 4, 1)
    if wide <= 64:
        return Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 2)
    if wide == 128:
        return Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)
    return Tiles(32, 32, 8, 1), Tiles(32, 32, 4, 2)


def block_d(D: int) -> int:
    """Columns of a tile: a power of two, and as many as matrix units take."""
    return max(16, triton.next_power_of_2(D))


def tiles_of(rows: int, block: int, cu_seqlens: Tensor | None) -> int:
    """Tiles of a batch element, or of all sequences and of the rows before the first and past the last."""
    return triton.cdiv(rows, block) if cu_seqlens is None else rows // block + cu_seqlens.shape[0] + 1


def delta_rows(D: int) -> int:
    """Rows of a program of the delta kernel: 4096 elements of do and out, 32 for each of its 128 threads."""
    return min(PAD.value, 4096 // block_d(D))


def parts_of(programs: int, steps: int, device: torch.device) -> int:
    """Programs that share one block of keys, each with its part of the `steps` of the flat loop.

    As many as make two waves, when there is less than one: fewer leave multiprocessors idle, and each costs a float32
    dk and dv, written and read. Four steps at least pay for that.
    """
    return max(1, min(2 * multiprocessors(device) // max(1, programs), steps // 4))


@triton.jit
def _at(X, b, row, h, stride_b, stride_t, stride_h):
    """Address of a row of a head."""
    return X + tl.cast(b, tl.int64) * stride_b + tl.cast(row, tl.int64) * stride_t + tl.cast(h, tl.int64) * stride_h


@triton.jit
def _store_rows(base, x, stride, rows, n_rows, D: tl.constexpr):
    cols = tl.arange(0, x.shape[1])
    where = base + rows[:, None] * stride + cols[None, :]
    tl.store(where, x.to(base.dtype.element_ty), mask=(rows[:, None] < n_rows) & (cols[None, :] < D))


@triton.jit
def _sequence(CU, tile, B, BLOCK: tl.constexpr):
    """(b, index): `tile` is the index-th of sequence b; of -1 before the first and B after the last, which meet nobody.

    `tiles_of` has one tile more than `sequence_of` counts, for -1.
    """
    b, index = sequence_of(CU, tile - 1, B + 1, BLOCK)
    return b, tl.where(b < 0, tile, index)


@triton.jit
def _span(CU, b, B, total):
    """(first row, number of rows, first row in the padded scratch) of sequence b."""
    start = tl.minimum(tl.load(CU + b, mask=b >= 0, other=0), total)
    end = tl.minimum(tl.load(CU + b + 1, mask=b < B, other=total), total)
    return start, end - start, (start // PAD + b + 1) * PAD


@triton.jit
def _p_and_ds(
    a, b, c, d, lse, delta, query, key, keys, unit, cap, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, RAGGED: tl.constexpr, SOFTCAP: tl.constexpr,
    FOLD_LSE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """P and dS of a tile (dS without the scale) from its products s = a b and dP = c d. lse and delta are negated.

    The two products are issued back to back, so that the exponentials of the first run during the second.
    unit: turns s into powers of two. With a softcap: tanh(cap * s), cap being scale / softcap, is what it turns.
    query, key: positions on one scale. RAGGED: there may be keys beyond `keys`, the number of them.
    """
    if FOLD_LSE:
        s = tl.dot(a, b, tl.broadcast_to(lse, (a.shape[0], b.shape[1])))
    else:  # "ieee": float32 isn't rounded to tf32
        s = tl.dot(a, b, input_precision="ieee")
    if HALF:
        dp = tl.dot(c, d, tl.broadcast_to(delta, (c.shape[0], d.shape[1])))
    else:
        dp = tl.dot(c, d, input_precision="ieee")
    if SOFTCAP:
        s = tanh(s * cap)
    exponent = s * unit
    if not FOLD_LSE:
        exponent += lse
    if HAS_LEFT or HAS_RIGHT:
        exponent = tl.where(visible(query, key, left, right, HAS_LEFT, HAS_RIGHT), exponent, float("-inf"))
    if RAGGED:
        exponent = tl.where(key < keys, exponent, float("-inf"))
    p = tl.exp2(exponent)
    if not HALF:
        dp += delta
    ds = p * dp
    if SOFTCAP:
        ds *= 1.0 - s * s
    return p, ds


@triton.jit(do_not_specialize=["B", "T", "H"])
def _delta_kernel(
    DO, OUT, LSE, DLSE, SINKS, NEG_LSE, NEG_DELTA, PARTIAL, CU_Q, B, T, T_pad, H,
    do_b, do_t, do_h, out_b, out_t, out_h, unit,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (b, h, tile): BLOCK_M rows of one head of the padded scratch. unit: turns lse into that of the products.

    Where there is no query, or one that sees nothing (lse -inf), -inf is stored for -lse and 0 for delta: every p is 0.
    """
    tiles = T_pad // BLOCK_M
    tile = tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % H
    b = tl.program_id(0) // tiles // H
    T_all, first, row, rows = T, b * 0, tile * BLOCK_M, tl.arange(0, BLOCK_M)
    at = (tl.cast(b, tl.int64) * H + h) * T_pad + row + rows
    if CU_Q is not None:
        sequence, index = _sequence(CU_Q, row // PAD, B, PAD)
        first, T, _ = _span(CU_Q, sequence, B, T_all)
        row = index * PAD + row % PAD
    do = load_rows(_at(DO, b, first + row, h, do_b, do_t, do_h), do_t, rows, T - row, D, BLOCK_D, True)
    out = load_rows(_at(OUT, b, first + row, h, out_b, out_t, out_h), out_t, rows, T - row, D, BLOCK_D, True)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
    source = (tl.cast(b, tl.int64) * H + h) * T_all + first + row + rows
    lse = tl.load(LSE + source, mask=rows < T - row, other=float("-inf"))
    if DLSE is not None:
        delta -= tl.load(DLSE + source, mask=rows < T - row, other=0.0)
    seen = lse > float("-inf")
    delta, lse = tl.where(seen, delta, 0.0), tl.where(seen, lse, float("inf"))
    tl.store(NEG_DELTA + at, -delta)
    tl.store(NEG_LSE + at, -lse * unit)
    if SINKS is not None:
        share = tl.exp2((tl.load(SINKS + h).to(tl.float32) - lse) * LOG2_E)
        tl.store(PARTIAL + (tl.cast(b, tl.int64) * tiles + tile) * H + h, -tl.sum(share * delta, axis=0))


@triton.jit(do_not_specialize=["B", "T", "S", "Hkv", "tiles", "parts", "part_stride", "left", "right"])
def _dkdv_kernel(
    Q, K, V, DO, Q_TMA, K_TMA, V_TMA, DO_TMA, NEG_LSE, NEG_DELTA, DK, DV, CU_Q, CU_K,
    B, T, S, T_pad, Hkv, tiles, parts, part_stride,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, scale, unit, cap, left, right,
    GROUP: tl.constexpr, D: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    FOLD_LSE: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (b, key-value head, part, tile): BLOCK_N keys, and its part of the queries of the head's group.

    Packed: B counts the sequences, T and S are all rows there are, b is 0. First tiles first: under a causal mask they
    have the most queries.
    """
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles % parts
    head = tl.program_id(0) // tiles // parts % Hkv
    b = tl.program_id(0) // tiles // parts // Hkv
    T_all, S_all, q_first, q_pad, k_first = T, S, b * 0, b * 0, b * 0
    if CU_Q is not None:
        sequence, tile = _sequence(CU_K, tile, B, BLOCK_N)
        k_first, S, _ = _span(CU_K, sequence, B, S_all)
        q_first, T, q_pad = _span(CU_Q, sequence, B, T_all)
        T = tl.where((sequence >= 0) & (sequence < B), T, 0)
    n = tile * BLOCK_N
    if n >= S:
        return
    down, across = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    if K_TMA is None:
        k = load_rows(_at(K, b, k_first + n, head, k_b, k_t, k_h), k_t, down, S - n, D, BLOCK_D, True)
        v = load_rows(_at(V, b, k_first + n, head, v_b, v_t, v_h), v_t, down, S - n, D, BLOCK_D, True)
    else:  # keys beyond the sequence do no harm here: they have rows of dk and dv to themselves, which aren't stored
        k = K_TMA.load([b * S_all + k_first + n, head * D])
        v = V_TMA.load([b * S_all + k_first + n, head * D])
    # Query i sits on key i + S - T. The first and the last one that see any of these keys:
    shift = S - T
    begin, end = 0, T
    if HAS_RIGHT:
        begin = tl.maximum(0, n - shift - right)
    if HAS_LEFT:
        end = tl.minimum(T, tl.minimum(n + BLOCK_N, S) - shift + left)
    first = begin // BLOCK_M
    blocks = tl.maximum(tl.cdiv(end, BLOCK_M) - first, 0)
    steps = blocks * GROUP
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in tl.range(steps * part // parts, steps * (part + 1) // parts, num_stages=STAGES):
        h = head * GROUP + i // tl.maximum(blocks, 1)
        m = (first + i % tl.maximum(blocks, 1)) * BLOCK_M
        at = (tl.cast(b, tl.int64) * Hkv * GROUP + h) * T_pad + q_pad + m
        lse = tl.load(NEG_LSE + at + across)
        delta = tl.load(NEG_DELTA + at + across)
        if Q_TMA is None:
            q = load_rows(_at(Q, b, q_first + m, h, q_b, q_t, q_h), q_t, across, T - m, D, BLOCK_D, True)
            do = load_rows(_at(DO, b, q_first + m, h, do_b, do_t, do_h), do_t, across, T - m, D, BLOCK_D, True)
        else:
            q = Q_TMA.load([b * T_all + q_first + m, h * D])
            do = DO_TMA.load([b * T_all + q_first + m, h * D])
        p, ds = _p_and_ds(
            k, q.T, v, do.T, lse[None, :], delta[None, :], (m + shift + across)[None, :], (n + down)[:, None], S,
            unit, cap, left, right, HAS_LEFT, HAS_RIGHT, False, SOFTCAP, FOLD_LSE, HALF,
        )  # fmt: skip
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    at = tl.cast(part, tl.int64) * part_stride + ((tl.cast(b, tl.int64) * S_all + k_first + n) * Hkv + head) * D
    _store_rows(DK + at, dk * scale, Hkv * D, down, S - n, D)
    _store_rows(DV + at, dv, Hkv * D, down, S - n, D)


@triton.jit(do_not_specialize=["B", "T", "S", "H", "tiles", "left", "right"])
def _dq_kernel(
    Q, K, V, DO, Q_TMA, K_TMA, V_TMA, DO_TMA, NEG_LSE, NEG_DELTA, DQ, CU_Q, CU_K,
    B, T, S, T_pad, H, tiles,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, scale, unit, cap, left, right,
    GROUP: tl.constexpr, D: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    FOLD_LSE: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (b, head, tile): BLOCK_M queries. Packed: as in `_dkdv_kernel`. Last tiles first: they see the most."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    h = tl.program_id(0) // tiles % H
    b = tl.program_id(0) // tiles // H
    T_all, S_all, q_first, q_pad, k_first = T, S, b * 0, b * 0, b * 0
    if CU_Q is not None:
        sequence, tile = _sequence(CU_Q, tile, B, BLOCK_M)
        q_first, T, q_pad = _span(CU_Q, sequence, B, T_all)
        k_first, S, _ = _span(CU_K, sequence, B, S_all)
        S = tl.where((sequence >= 0) & (sequence < B), S, 0)
    m = tile * BLOCK_M
    if m >= T:
        return
    across = tl.arange(0, BLOCK_M)
    if Q_TMA is None:
        q = load_rows(_at(Q, b, q_first + m, h, q_b, q_t, q_h), q_t, across, T - m, D, BLOCK_D, True)
        do = load_rows(_at(DO, b, q_first + m, h, do_b, do_t, do_h), do_t, across, T - m, D, BLOCK_D, True)
    else:
        q = Q_TMA.load([b * T_all + q_first + m, h * D])
        do = DO_TMA.load([b * T_all + q_first + m, h * D])
    at = (tl.cast(b, tl.int64) * H + h) * T_pad + q_pad + m
    lse = tl.load(NEG_LSE + at + across)
    delta = tl.load(NEG_DELTA + at + across)
    # The first and the last key that any of these queries sees, and the blocks between that all of them see whole.
    shift = S - T
    m_last = tl.minimum(m + BLOCK_M, T) - 1
    begin, end = 0, S
    if HAS_LEFT:
        begin = tl.maximum(0, m + shift - left) // BLOCK_N * BLOCK_N
    if HAS_RIGHT:
        end = tl.maximum(0, tl.minimum(S, m_last + shift + right + 1))
    stop = tl.minimum(tl.cdiv(end, BLOCK_N), S // BLOCK_N) * BLOCK_N
    clear, mixed = begin, stop
    if HAS_LEFT:
        clear = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(0, m_last + shift - left), BLOCK_N) * BLOCK_N, begin), stop)
    if HAS_RIGHT:
        mixed = tl.maximum(tl.minimum(tl.maximum(0, m + shift + right + 1) // BLOCK_N * BLOCK_N, stop), clear)
    kv, down = h // GROUP, tl.arange(0, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # 0 the block that is not whole, 1 and 3 those that a bound cuts, 2 all others. 0 comes first, when there is no sum
    # yet to hold: last it would cost spills. float32, whose products want all registers, does everything there.
    for phase in tl.static_range(4):
        low, high = begin, end
        if phase == 0 and HALF:
            low = tl.maximum(S // BLOCK_N * BLOCK_N, begin)
        elif phase == 1:
            low, high = begin, clear
        elif phase == 2:
            low, high = clear, mixed
        elif phase == 3:
            low, high = mixed, stop
        if phase == 0 or (HALF and (phase == 2 or (HAS_LEFT if phase == 1 else HAS_RIGHT))):
            for n in tl.range(low, high, BLOCK_N, num_stages=1 if phase == 0 else STAGES):
                if K_TMA is None or phase == 0:
                    k = load_rows(_at(K, b, k_first + n, kv, k_b, k_t, k_h), k_t, down, S - n, D, BLOCK_D, phase == 0)
                    v = load_rows(_at(V, b, k_first + n, kv, v_b, v_t, v_h), v_t, down, S - n, D, BLOCK_D, phase == 0)
                else:
                    k = K_TMA.load([b * S_all + k_first + n, kv * D])
                    v = V_TMA.load([b * S_all + k_first + n, kv * D])
                _p, ds = _p_and_ds(
                    q, k.T, do, v.T, lse[:, None], delta[:, None], (m + shift + across)[:, None], (n + down)[None, :],
                    S, unit, cap, left, right, HAS_LEFT and phase != 2, HAS_RIGHT and phase != 2, phase == 0,
                    SOFTCAP, FOLD_LSE, HALF,
                )  # fmt: skip
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    at = ((tl.cast(b, tl.int64) * T_all + q_first + m) * H + h) * D
    _store_rows(DQ + at, dq * scale, H * D, across, T - m, D)


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(PARTIAL, OUT, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """OUT[c] = sum over p of PARTIAL[p, c], always in the same order. One program per BLOCK_C."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        parts = (start + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        mask = (parts < P) & (cols < C)[None, :]
        total += tl.sum(tl.load(PARTIAL + parts * C + cols[None, :], mask=mask, other=0.0), axis=0)
    tl.store(OUT + cols, total.to(OUT.dtype.element_ty), mask=cols < C)


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, scale: float, left: int, right: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dsinks), contiguous; dsinks is empty without sinks."""
    packed = cu_seqlens_q is not None
    (T, H, D), (S, Hkv), B = q.shape[-3:], k.shape[-3:-1], 1 if packed else q.shape[0]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dsinks = lse.new_empty(0) if sinks is None else sinks.new_zeros(sinks.shape)
    if B * T * H == 0:
        return dq, dk.zero_(), dv.zero_(), dsinks
    (q, *q_strides), (k, *k_strides), (v, *v_strides) = map(common.strides, (q, k, v))
    (dout, *do_strides), (out, *out_strides) = map(common.strides, (dout, out))
    left, right = common.clamped_bounds(left, right, T, S)
    half = q.dtype != torch.float32
    dkdv, of_q = config(common.architecture(q.device), D, half, softcap > 0.0)
    # Where the lse starts off the product, it is divided by what the product is multiplied with.
    fold_lse = half and softcap == 0.0 and scale > 1e-30
    unit, cap = (softcap * LOG2_E.value, scale / softcap) if softcap else (scale * LOG2_E.value, 0.0)
    sequences = 0 if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    T_pad = tiles_of(T, PAD.value, cu_seqlens_q) * PAD.value
    neg_lse, neg_delta = lse.new_empty((2, B, H, T_pad)).unbind()
    with on_device(q):
        parts = B * T_pad // delta_rows(D)
        partial = None if sinks is None else lse.new_empty((parts, H))
        _delta_kernel[(parts * H,)](
            dout, out, lse.contiguous(), None if dlse is None else dlse.contiguous(),
            None if sinks is None else sinks.contiguous(), neg_lse, neg_delta, partial, cu_seqlens_q, sequences,
            T, T_pad, H, *do_strides, *out_strides, 1.0 / scale if fold_lse else LOG2_E.value,
            D, delta_rows(D), block_d(D), num_warps=4,
        )  # fmt: skip
        if sinks is not None:
            _sum_partials_kernel[(triton.cdiv(H, 32),)](partial, dsinks, parts, H, 64, 32, num_warps=4)
        strided = (*q_strides, *k_strides, *v_strides, *do_strides, float(scale), unit, cap, left, right)
        constants = dict(GROUP=H // Hkv, D=D, HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, SOFTCAP=softcap > 0.0)
        constants |= dict(FOLD_LSE=fold_lse, HALF=half, BLOCK_D=block_d(D))
        if dk.numel():
            m, n, warps, stages = dkdv
            tiles = tiles_of(S, n, cu_seqlens_k)
            parts = parts_of(B * Hkv * tiles, H // Hkv * triton.cdiv(T, m), q.device)
            sums = (dk, dv) if parts == 1 else k.new_empty((2, parts, *k.shape), dtype=torch.float32).unbind()
            # A block of queries is summed over, so it may hold no others; beyond the tensor a descriptor reads zeros.
            within = not packed and (B == 1 or T % m == 0)
            tma = descriptors(q, k, v, dout, m, n) if within else NO_DESCRIPTORS
            _dkdv_kernel[(B * Hkv * parts * tiles,)](
                q, k, v, dout, *tma, neg_lse, neg_delta, *sums, cu_seqlens_q, cu_seqlens_k,
                sequences, T, S, T_pad, Hkv, tiles, parts, k.numel(), *strided,
                **constants, BLOCK_M=m, BLOCK_N=n, STAGES=stages, num_warps=warps, num_stages=stages,
            )  # fmt: skip
            if parts > 1:
                for partials, total in zip(sums, (dk, dv), strict=True):
                    blocks = triton.cdiv(k.numel(), 1024)
                    _sum_partials_kernel[(blocks,)](partials, total, parts, k.numel(), 4, 1024, num_warps=4)
        m, n, warps, stages = of_q
        tiles = tiles_of(T, m, cu_seqlens_q)
        _dq_kernel[(B * H * tiles,)](
            q, k, v, dout, *descriptors(q, k, v, dout, m, n), neg_lse, neg_delta, dq, cu_seqlens_q, cu_seqlens_k,
            sequences, T, S, T_pad, H, tiles, *strided,
            **constants, BLOCK_M=m, BLOCK_N=n, STAGES=stages, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dq, dk, dv, dsinks


def descriptors(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, m: int, n: int) -> tuple[Any, ...]:
    """Descriptors of q, k, v and dout as matrices [B * T, H * D] by tiles of a head, or None four times."""
    found = common.row_strides(common.architecture(q.device), q, k, v, dout)
    if found is None:
        return NO_DESCRIPTORS
    return tuple(map(common.matrix_descriptor, (q, k, v, dout), found, (m, n, n, m)))
