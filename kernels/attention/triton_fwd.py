"""Attention forward in Triton: one pass over the keys with an online softmax. The formula is in `reference.py`.

Letters: B batch, T queries, S keys, H query heads, Hkv key-value heads, D head_dim. One program computes a tile of
BLOCK_M queries of one head and walks the blocks of BLOCK_N keys that any of them sees:

    1. the blocks that a bound of the window cuts through: scores with a mask
    2. the steady loop over all others: no mask at all
    3. the last block, where S cuts through it: loads with a mask too, so that no value beyond a sequence counts

The floor is compute: 4 D FLOPs for each head and each pair that meets; memory is q, k, v read and out, lse written once
(K and V of a head stay in L2 for all its tiles).

Overlap (sm_90): the steady loop carries the scores of the next block, and issues their product right after p is
rounded. The compiler then runs it under the exp2 of this block: tests/build/offline/overlap.py measures the share. The
same product a line earlier or later loses it, and a plain loop has none. The cut block is last for the compiler's sake
as well: as the first it had every wgmma waited for by itself (ptxas C7515).

Order: heads in sections whose K and V fit in L2; inside a section all heads go from the last tile, which under a causal
mask sees most keys, to the first. The longest come first, so that no multiprocessor starts one when the others end.

Not persistent: a program that walks several tiles would save a launch's few microseconds, but Triton doesn't overlap
one tile's end with the next one's start, and the hardware's own queue balances unequal tiles better than fixed shares.
Short sequences get small tiles instead, several programs to a multiprocessor, which hide each other's start and end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import lazy
from ..triton_math import LN_2, LOG2_E, tanh
from ..triton_support import multiprocessors, on_device
from . import gluon_choice
from .triton_common import (
    architecture,
    clamped_bounds,
    load_rows,
    matrix_descriptor,
    row_strides,
    sequence_of,
    strides,
    visible,
)

gluon_forward = lazy(f"{__package__}.gluon_fwd:attention_fwd_gluon")  # optional: not every Triton has Gluon
L2_SECTION = 32 << 20  # bytes of K and V that tiles in flight share; H100 has 50 MB of L2, A100 40 MB


@triton.jit
def _block(ROWS, base, first, n, step, stride, column, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The n-th block of keys or values, all of whose rows are there: by descriptor, or by pointers without one."""
    if ROWS is not None:
        return ROWS.load([first + n * BLOCK_N, column])
    else:
        return load_rows(base + n * step, stride, tl.arange(0, BLOCK_N), 0, D, BLOCK_D, False)


@triton.jit
def _softmax(s, seen, m, total, scale, softcap, SOFTCAP: tl.constexpr):
    """(p, what all before is worth now, m, total) after one more block of scores. m is in units of log 2.

    seen: which scores count, None for all. With a softcap `scale` and `softcap` make
    softcap * tanh(scale * s) the score in units of log 2, else scale * s is.
    """
    if SOFTCAP:
        s = softcap * tanh(s * scale)
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    highest = tl.max(s, 1)
    if not SOFTCAP:
        highest *= scale
    highest = tl.maximum(m, highest)
    base = highest
    if seen is not None:  # a row that has seen nothing yet: -inf - 0 is still -inf, and exp2 of it 0
        base = tl.where(highest == float("-inf"), 0.0, highest)
    if SOFTCAP:
        p = tl.exp2(s - base[:, None])
    else:
        p = tl.exp2(s * scale - base[:, None])
    before = tl.exp2(m - base)
    return p, before, highest, total * before + tl.sum(p, 1)


@triton.jit
def _attend(q, k, v, seen, m, total, acc, scale, softcap, SOFTCAP: tl.constexpr):
    """(m, total, acc) after one more block of keys and values."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    p, before, m, total = _softmax(s, seen, m, total, scale, softcap, SOFTCAP)
    acc = tl.dot(p.to(v.dtype), v, acc * before[:, None], input_precision="ieee")
    return m, total, acc


@triton.jit
def _fill_outside(CU, OUT, LSE, SINKS, tile, total, h, H, sequences, D: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The tile's rows of a packed batch that belong to no sequence see nothing: zeros, and -inf or the sink."""
    first, end = tl.load(CU), tl.load(CU + sequences)
    if (tile * BLOCK_M < first) | ((tile + 1) * BLOCK_M > end):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.arange(0, BLOCK_D)
        outside = ((rows < first) | (rows >= end)) & (rows < total)
        lse = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if SINKS is not None:
            lse = tl.zeros([BLOCK_M], tl.float32) + tl.load(SINKS + h).to(tl.float32)
        tl.store(LSE + h.to(tl.int64) * total + rows, lse, mask=outside)
        where = OUT + (rows.to(tl.int64) * H + h)[:, None] * D + cols[None, :]
        zeros = tl.zeros([BLOCK_M, BLOCK_D], OUT.dtype.element_ty)
        tl.store(where, zeros, mask=outside[:, None] & (cols < D)[None, :])


@triton.jit(do_not_specialize=["T", "S", "H", "group", "heads", "sequences", "tiles", "section", "left", "right"])
def _attention_fwd_kernel(
    Q, K, V, Q_ROWS, K_ROWS, V_ROWS, SINKS, CU_Q, CU_K, OUT, LSE,
    T, S, H, group, heads, sequences, tiles, section, left, right, scale, softcap,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    D: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program p: a tile of BLOCK_M queries of one of the `heads` (B * H, packed H), `tiles` each, in sections of heads.

    Q_ROWS, K_ROWS, V_ROWS: descriptors of Q, K, V as matrices, or None. Their boxes may cross into the next sequence:
    such queries aren't stored, and such scores are masked; values go by pointers in the block that S cuts through.
    Packed (CU_Q, CU_K): T and S are the totals.
    """
    program = tl.program_id(0)
    begin = program // (section * tiles) * section
    wide = tl.minimum(section, heads - begin)
    index = program - begin * tiles
    tile = tiles - 1 - index // wide
    b = (begin + index % wide) // H
    h = (begin + index % wide) % H
    hkv = h // group

    # Its queries are rows q_start to q_start + T, its keys k_start to k_start + S.
    if CU_Q is not None:
        total_q = T
        _fill_outside(CU_Q, OUT, LSE, SINKS, tile, total_q, h, H, sequences, D, BLOCK_M, BLOCK_D)
        b, tile = sequence_of(CU_Q, tile, sequences, BLOCK_M)
        if b < 0:
            return
        q_start = tl.load(CU_Q + b).to(tl.int64)
        k_start = tl.load(CU_K + b).to(tl.int64)
        T = tl.load(CU_Q + b + 1) - q_start.to(tl.int32)
        S = tl.load(CU_K + b + 1) - k_start.to(tl.int32)
        if tile * BLOCK_M >= T:
            return
        LSE += h.to(tl.int64) * total_q + q_start
        Q += q_start * q_row
        K += k_start * k_row
        V += k_start * v_row
    else:
        q_start = b.to(tl.int64) * T
        k_start = b.to(tl.int64) * S
        LSE += q_start * H + h * T.to(tl.int64)
        Q += b.to(tl.int64) * q_batch
        K += b.to(tl.int64) * k_batch
        V += b.to(tl.int64) * v_batch
    Q += h.to(tl.int64) * q_head
    K += hkv.to(tl.int64) * k_head
    V += hkv.to(tl.int64) * v_head
    at = tile * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    k_first = k_start.to(tl.int32)  # of a descriptor's coordinates
    k_step = tl.cast(k_row, tl.int64) * BLOCK_N
    v_step = tl.cast(v_row, tl.int64) * BLOCK_N
    if Q_ROWS is not None:
        q = Q_ROWS.load([q_start.to(tl.int32) + at, h * D])
    else:
        q = load_rows(Q + at * tl.cast(q_row, tl.int64), q_row, rows, T - at, D, BLOCK_D, True)

    # Blocks of keys: any of the tile's queries sees [first, end), all of them see [full_first, full_end) whole.
    query = at + S - T  # where the first one sits among the keys
    first, end, full_first, full_end = query * 0, tl.cdiv(S, BLOCK_N), query * 0, S // BLOCK_N
    if HAS_RIGHT:
        end = tl.cdiv(tl.maximum(tl.minimum(query + BLOCK_M + right, S), 0), BLOCK_N)
        full_end = tl.maximum(tl.minimum(query + 1 + right, S), 0) // BLOCK_N
    if HAS_LEFT:
        first = tl.minimum(tl.maximum(query - left, 0) // BLOCK_N, end)
        full_first = tl.cdiv(tl.maximum(query + BLOCK_M - 1 - left, 0), BLOCK_N)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # The block that S cuts through comes last.
    cut = (end > first) & (end * BLOCK_N > S)
    end -= cut.to(tl.int32)
    full_first = tl.minimum(full_first, end)
    full_end = tl.maximum(tl.minimum(full_end, end), full_first)

    # 1. Blocks that a bound cuts through: from the right edge down to full_end, then from full_first down to first.
    if HAS_LEFT or HAS_RIGHT:
        for i in tl.range(0, end - full_end + full_first - first):
            n = end - 1 - i
            if HAS_LEFT:
                n -= tl.where(n < full_end, full_end - full_first, 0)
            key = n * BLOCK_N + keys
            seen = visible(query + rows[:, None], key[None, :], left, right, HAS_LEFT, HAS_RIGHT)
            k = _block(K_ROWS, K, k_first, n, k_step, k_row, hkv * D, D, BLOCK_N, BLOCK_D)
            v = _block(V_ROWS, V, k_first, n, v_step, v_row, hkv * D, D, BLOCK_N, BLOCK_D)
            m, total, acc = _attend(q, k, v, seen, m, total, acc, scale, softcap, SOFTCAP)

    # 2. Blocks that all see whole, from the right. The overlap hangs on the order of these lines: see above.
    if OVERLAP:
        if full_end > full_first:
            k = _block(K_ROWS, K, k_first, full_end - 1, k_step, k_row, hkv * D, D, BLOCK_N, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            for n in tl.range(full_end - 1, full_first, -1):
                k = _block(K_ROWS, K, k_first, n - 1, k_step, k_row, hkv * D, D, BLOCK_N, BLOCK_D)
                p, before, m, total = _softmax(s, None, m, total, scale, softcap, SOFTCAP)
                p = p.to(V.dtype.element_ty)
                s = tl.dot(q, tl.trans(k), input_precision="ieee")
                acc *= before[:, None]
                v = _block(V_ROWS, V, k_first, n, v_step, v_row, hkv * D, D, BLOCK_N, BLOCK_D)
                acc = tl.dot(p, v, acc, input_precision="ieee")
            p, before, m, total = _softmax(s, None, m, total, scale, softcap, SOFTCAP)
            v = _block(V_ROWS, V, k_first, full_first, v_step, v_row, hkv * D, D, BLOCK_N, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * before[:, None], input_precision="ieee")
    else:
        for n in tl.range(full_end - 1, full_first - 1, -1):
            k = _block(K_ROWS, K, k_first, n, k_step, k_row, hkv * D, D, BLOCK_N, BLOCK_D)
            v = _block(V_ROWS, V, k_first, n, v_step, v_row, hkv * D, D, BLOCK_N, BLOCK_D)
            m, total, acc = _attend(q, k, v, None, m, total, acc, scale, softcap, SOFTCAP)

    # 3. The block that S cuts through. Its values are loaded with a mask: 0 * NaN of another sequence would be NaN.
    if cut:
        key = end * BLOCK_N + keys
        seen = (key < S)[None, :]
        if HAS_LEFT or HAS_RIGHT:
            seen = seen & visible(query + rows[:, None], key[None, :], left, right, HAS_LEFT, HAS_RIGHT)
        if K_ROWS is not None:
            k = K_ROWS.load([k_first + end * BLOCK_N, hkv * D])
        else:
            k = load_rows(K + end * k_step, k_row, keys, S - end * BLOCK_N, D, BLOCK_D, True)
        v = load_rows(V + end * v_step, v_row, keys, S - end * BLOCK_N, D, BLOCK_D, True)
        m, total, acc = _attend(q, k, v, seen, m, total, acc, scale, softcap, SOFTCAP)

    if SINKS is not None:  # one more score, without a value
        sink = tl.load(SINKS + h).to(tl.float32) * LOG2_E
        highest = tl.maximum(m, sink)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        before = tl.exp2(m - base)
        acc *= before[:, None]
        total = total * before + tl.exp2(sink - base)
        m = highest
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    lse = tl.where(nothing, float("-inf"), (m + tl.log2(total)) * LN_2)
    tl.store(LSE + at + rows, lse, mask=at + rows < T)
    cols = tl.arange(0, BLOCK_D)
    where = OUT + ((q_start + at + rows) * H + h)[:, None] * D + cols[None, :]
    stored = (at + rows < T)[:, None]
    if D < BLOCK_D:
        stored = stored & (cols < D)[None, :]
    tl.store(where, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=stored)


class Tile(NamedTuple):
    """What one program takes on, and with how many warps and stages of the pipeline of loads."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def config(arch: int, head_dim: int, itemsize: int, *, descriptors: bool, small: bool = False) -> Tile:
    """The tile for an architecture (90 is sm_90, 0 AMD) and a way to load; small: there are fewer tiles than SMs.

    By descriptors (sm_90 and sm_100) q stays in shared memory, and 128 x 128 x 128 fits the registers of 8 warps; with
    4 warps 128 rows always spill. Above head_dim 128, and on Blackwell, whose loop isn't overlapped, blocks are
    smaller. Up to head_dim 64 they are as well, since then no feature takes more than 128 registers: two programs fit
    on a multiprocessor, and one hides the other's masked blocks, start and end. Small tiles have one warpgroup, and a
    third stage where shared memory has room for one program only.
    By pointers the addresses take registers, and so does q before sm_90; other GPUs have 64 KB (AMD), 99 KB (sm_86,
    89, 120) or 163 KB (sm_80) of shared memory: these tiles fit all of them.
    float32 goes to the plain cores ("ieee"), where each thread holds its whole rows of q and k: tiny tiles.
    tests/build/offline/attention_fwd.py compiles every row of this table.
    """
    if itemsize == 4:
        return Tile(16, 16, 8 if arch else 4, 1)
    if not descriptors and not arch:
        return Tile(128, 32, 4, 1) if head_dim <= 64 else Tile(64, 32, 4, 1)
    if not descriptors:
        return Tile(128, 64 if head_dim <= 64 else 32, 8, 2) if head_dim <= 128 else Tile(64, 32, 8, 2)
    if arch >= 100 and head_dim > 128:
        return Tile(64, 64, 8, 2)
    if small:
        return Tile(64, 64, 4, 3 if head_dim == 128 else 2)
    if arch >= 100:
        return Tile(128, 64, 8, 2)
    if head_dim <= 64:
        return Tile(128, 64, 8, 3 if head_dim == 64 else 2)
    return Tile(128, 128 if head_dim == 128 else 64, 8, 2)


def overlapped(arch: int, descriptors: bool) -> bool:
    """Whether the steady loop carries the next scores: where wgmma can compute them while exp2 runs."""
    return arch == 90 and descriptors


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
    """(out, lse) of the op's arguments; see the public function. `kernels/attention/__init__.py` has checked them."""
    (T, H, D), (S, Hkv) = q.shape[-3:], k.shape[-3:-1]
    packed = cu_seqlens_q is not None
    sequences = cu_seqlens_q.numel() - 1 if cu_seqlens_q is not None else q.shape[0]
    heads = H if packed else sequences * H
    if scale <= 0.0:  # the kernel's running maximum wants a positive scale; nobody uses another
        q, scale = q * (-1.0 if scale else 0.0), -scale or 1.0
    left, right = clamped_bounds(left, right, T, S)
    arch = architecture(q.device)
    if gluon_choice.wanted(q.is_cuda, D):
        args = (q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap)
        capability = divmod(arch, 10) if q.is_cuda else None
        if not gluon_choice.why_not(*args, capability=capability):
            return gluon_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, right == 0)
    out = q.new_empty(q.shape)
    lse = q.new_empty((*q.shape[:-3], H, T), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    # With a tile of 128 rows for every multiprocessor there is enough to do; below that, more and smaller ones.
    small = triton.cdiv(T, 128) * heads < multiprocessors(q.device)
    rows = row_strides(arch, q, k, v)
    tile = config(arch, D, q.element_size(), descriptors=rows is not None, small=small)
    tiles = T // tile.block_m + max(sequences, 1) if packed else triton.cdiv(T, tile.block_m)
    section = max(1, L2_SECTION // (2 * S * D * q.element_size() or 1)) * (H // Hkv)
    block_d = max(16, triton.next_power_of_2(D))
    q_rows = k_rows = v_rows = None
    if rows is not None:
        q_rows, k_rows, v_rows = (
            matrix_descriptor(x, stride, block)
            for x, stride, block in zip((q, k, v), rows, (tile.block_m, tile.block_n, tile.block_n), strict=True)
        )
    (q, *q_strides), (k, *k_strides), (v, *v_strides) = strides(q), strides(k), strides(v)
    with on_device(q):
        _attention_fwd_kernel[(tiles * heads,)](
            q, k, v, q_rows, k_rows, v_rows, None if sinks is None else sinks.contiguous(),
            None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
            None if cu_seqlens_k is None else cu_seqlens_k.contiguous(), out, lse,
            T, S, H, H // Hkv, heads, sequences, tiles, min(section, heads), left, right,
            scale / softcap if softcap else scale * LOG2_E.value, softcap * LOG2_E.value,
            *q_strides, *k_strides, *v_strides,
            D, left >= 0, right >= 0, softcap > 0, tile.block_m, tile.block_n, block_d,
            overlapped(arch, rows is not None), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse
