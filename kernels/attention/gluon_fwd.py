"""Attention's forward in Gluon for Hopper (sm_90): one warp loads, two warpgroups compute, and they rarely wait.

The formula is in `reference.py`. Letters: B batch, T queries, S keys, H query heads, Hkv key-value heads, D head_dim.
One program computes BLOCK_M queries of one head, on 12 warps in three roles:

    producer    1 warp (and 3 that only fill its warpgroup up), 24 registers a thread: issues TMA loads, nothing else
    consumer 0  4 warps (a warpgroup), 240 registers a thread: the upper BLOCK_M / 2 queries
    consumer 1  4 warps, the same: the lower BLOCK_M / 2 queries

Keys and values travel through shared memory in two rings of STAGES slots. A slot has two mbarriers: `full`, which the
TMA unit completes when all bytes have landed, and `empty`, at which both consumers say that they are done reading.
Who waits for whom, time running downwards:

    producer                     k ring, v ring           consumer 0, consumer 1: each does all of this

    load q, both halves         ------ q_full[half] --->  wait q_full[mine]
    load k(0)                   ------ k_full --------->  wait k_full; S(0) = q k(0)^T; wait for it; arrive k_empty
    for every block j but the last:                       for every block j but the last:
      wait k_empty, load k(j+1) ------ k_full --------->    wait k_full, issue S(j+1) = q k(j+1)^T
                                                            softmax step of S(j), rescale acc    (under S(j+1))
      wait v_empty, load v(j)   ------ v_full --------->    wait v_full, issue acc += p v(j)
                                <----- k_empty ---------    wait for S(j+1), arrive k_empty
                                <----- v_empty ---------    wait for acc, arrive v_empty
    wait v_empty, load v(last)  ------ v_full --------->  softmax step of S(last), acc += p v(last), store out and lse

- Overlap, twice. In a consumer the exponentials of block j run while the tensor cores compute S(j+1): that is why
  S(j+1) is issued before the softmax of S(j). The textbook's order, softmax of S(j+1) under p(j) v(j), does not survive
  ptxas, which moves the wait above the exponentials. And one consumer's products run under the other's softmax.
- Parity. An mbarrier knows its phase modulo 2. Block j is user number j // STAGES of its slot, so a reader waits
  for phase (j // STAGES) & 1 of `full`, and the producer for the phase before that of `empty`. At a new barrier the
  phase before the first counts as over: the first loads find their slots empty, as they are.
- Blocks of keys are counted from the end: block j ends j * BLOCK_N before `end`, one past the last key that any of this
  program's queries sees. So only the first blocks need causality's mask, only the last one a mask for keys before the
  first, and no row behind a sequence is ever read: past a packed batch's last sequence may lie anything. Before the
  first key the TMA unit delivers zeros, or, when packed, the sequence before, whose probabilities are 0 (its NaN or
  infinite values would not stay out; those of another batch do). With nothing to see, the one block is masked whole.
- The scale rides in the exponent: p = exp2(s * scale * log2(e) - m), one multiply-add an element.
- Order of programs: longest first under causality (the last queries), so that short ones fill the end. Heads come in
  sections whose keys and values fit the L2 cache together.
- Packed sequences need no word from the host: sequence b owns the tiles from cu[b] // BLOCK_M + b on, at least as many
  as it needs. A program finds its sequence by bisection, and leaves if its tile is past the end. Rows behind the last
  sequence are one more sequence, without keys.
- The result leaves through the queries' shared memory, dead by then, so that rows are stored in 16-byte pieces.

Registers: 240 * 8 warps + 24 * 4 warps = 2016 of a lane's 2048 on a multiprocessor, which therefore runs one program.
Floor: 4 T S D FLOPs a head, half when causal. K and V are read once per BLOCK_M queries, 128 FLOPs a byte: 660 TFLOP/s
ask for 5 TB/s, which the L2 cache has and the memory hasn't. Hence the sections.
Not served, and why: see `gluon_choice.py`. After FlashAttention-3, Shah et al. 2024, arXiv:2407.08608. tests/gluon runs
this very text on a CPU model of barriers, TMA and wgmma.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..triton_support import on_device

LOG2_E = 1.4426950408889634
LN_2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.0e38)  # a maximum before any key: finite, so that -inf minus it is -inf and not NaN
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
L2_SECTION = 32 << 20  # bytes of keys and values that programs running together should share


@gluon.constexpr_function
def _accumulator(columns):
    """Registers of a warpgroup's accumulator: each warp 16 rows, each row in the four lanes of a quad."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _ring(block, STAGES: gl.constexpr):
    """Slot of a block and the phase of its barriers."""
    return block % STAGES, (block // STAGES) & 1


@gluon.jit
def _load(desc, smem, full, empty, j, batch, row, head, end, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Block j of the keys, or values, whose sequence begins at `row`, into its slot as soon as that is empty."""
    slot, phase = _ring(j, STAGES)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    first = row + end - (j + 1) * BLOCK_N
    tma.async_copy_global_to_shared(desc, [batch, first, head, 0], full.index(slot), smem.index(slot))


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
    batch, q_row, k_row, q_head, k_head, end, blocks,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All loads, in the order in which the consumers need them."""
    for half in gl.static_range(2):
        mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
        row = q_row + half * (BLOCK_M // 2)
        tma.async_copy_global_to_shared(q_desc, [batch, row, q_head, 0], q_full.index(half), q_smem.index(half))
    _load(k_desc, k_smem, k_full, k_empty, 0, batch, k_row, k_head, end, BLOCK_N, STAGES)
    for j in range(blocks - 1):
        _load(k_desc, k_smem, k_full, k_empty, j + 1, batch, k_row, k_head, end, BLOCK_N, STAGES)
        _load(v_desc, v_smem, v_full, v_empty, j, batch, k_row, k_head, end, BLOCK_N, STAGES)
    _load(v_desc, v_smem, v_full, v_empty, blocks - 1, batch, k_row, k_head, end, BLOCK_N, STAGES)


@gluon.jit
def _scores(q, k_smem, k_full, j, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Issues q k^T for block j as soon as its keys are there."""
    slot, phase = _ring(j, STAGES)
    mbarrier.wait(k_full.index(slot), phase)
    k = k_smem.index(slot).reshape([BLOCK_N, D])
    zeros = gl.zeros([BLOCK_M // 2, BLOCK_N], gl.float32, _accumulator(BLOCK_N))
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _masked(s, j, last_key, end, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """-inf for keys after each query's last one, and for those before the first."""
    keys = end - (j + 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, _accumulator(BLOCK_N)))
    keep = gl.expand_dims(keys >= 0, 0)
    if CAUSAL:
        keep = keep & (gl.expand_dims(keys, 0) <= gl.expand_dims(last_key, 1))
    return gl.where(keep, s, float("-inf"))


@gluon.jit
def _accumulate(
    s, acc, m, total, j, v_smem, v_full, scale,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax over scores s of block j; issues acc += p v. m is in units of log 2."""
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
    rescale = gl.exp2(m - m_new)
    total = total * rescale + gl.sum(p, 1)
    acc = acc * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, _accumulator(D))), 1)
    p = gl.convert_layout(p.to(v_smem.dtype), gl.DotOperandLayout(0, _accumulator(D), 2))
    slot, phase = _ring(j, STAGES)
    mbarrier.wait(v_full.index(slot), phase)
    v = v_smem.index(slot).reshape([BLOCK_N, D])
    return warpgroup_mma(p, v, acc, is_async=True), m_new, total


@gluon.jit
def _step(
    s, acc, m, total, j, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, last_key, end, scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Block j is worked off while the scores of block j + 1 are computed; returns those."""
    s_next = _scores(q, k_smem, k_full, j + 1, BLOCK_M, BLOCK_N, D, STAGES)
    if CAUSAL:
        s = _masked(s, j, last_key, end, BLOCK_N, CAUSAL)
    acc, m, total = _accumulate(s, acc, m, total, j, v_smem, v_full, scale, BLOCK_N, D, STAGES)
    s = warpgroup_mma_wait(1, deps=(s_next,))
    mbarrier.arrive(k_empty.index((j + 1) % STAGES), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(j % STAGES), count=1)
    return s, acc, m, total


@gluon.jit
def _consumer(
    OUT, LSE, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
    tile_row, rows, out_row, out_stride, lse_row, end, shift, masked, blocks, scale,
    HALF: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """Half a tile of queries against all blocks of keys. rows: of the sequence; the tile begins at tile_row."""
    M: gl.constexpr = BLOCK_M // 2
    per_row: gl.constexpr = gl.SliceLayout(1, _accumulator(BLOCK_N))
    query = tile_row + HALF * M + gl.arange(0, M, per_row)
    last_key = query + shift
    m = gl.full([M], LOWEST, gl.float32, per_row)
    total = gl.zeros([M], gl.float32, per_row)
    acc = gl.zeros([M, D], gl.float32, _accumulator(D))

    mbarrier.wait(q_full.index(HALF), 0)
    q = q_smem.index(HALF).reshape([M, D])
    s = warpgroup_mma_wait(0, deps=(_scores(q, k_smem, k_full, 0, BLOCK_M, BLOCK_N, D, STAGES),))
    mbarrier.arrive(k_empty.index(0), count=1)
    if CAUSAL:
        for j in range(masked):
            s, acc, m, total = _step(
                s, acc, m, total, j, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, last_key, end, scale,
                BLOCK_M, BLOCK_N, D, STAGES, True,
            )  # fmt: skip
    for j in range(masked, blocks - 1):
        s, acc, m, total = _step(
            s, acc, m, total, j, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, last_key, end, scale,
            BLOCK_M, BLOCK_N, D, STAGES, False,
        )  # fmt: skip
    s = _masked(s, blocks - 1, last_key, end, BLOCK_N, CAUSAL)
    acc, m, total = _accumulate(s, acc, m, total, blocks - 1, v_smem, v_full, scale, BLOCK_N, D, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    seen = total > 0.0
    lse = gl.where(seen, (m + gl.log2(total)) * LN_2, float("-inf"))
    gl.store(LSE + lse_row + query, lse, mask=query < rows)
    inverse = gl.convert_layout(gl.where(seen, 1.0 / total, 0.0), gl.SliceLayout(1, _accumulator(D)))
    q.store((acc * gl.expand_dims(inverse, 1)).to(q.dtype))
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    out = q.load(wide)
    row = tile_row + HALF * M + gl.arange(0, M, gl.SliceLayout(1, wide))
    col = gl.arange(0, D, gl.SliceLayout(0, wide))
    where = (out_row + row) * out_stride
    gl.store(OUT + gl.expand_dims(where, 1) + gl.expand_dims(col, 0), out, mask=gl.expand_dims(row < rows, 1))


@gluon.jit
def _sequence_of(tile, CU_Q, B, BLOCK_M: gl.constexpr):
    """The last sequence b <= B whose first tile, cu[b] // BLOCK_M + b, is not after this one."""
    low = 0
    high = B
    while low < high:
        middle = (low + high + 1) // 2
        after = gl.load(CU_Q + middle) // BLOCK_M + middle > tile
        low = gl.where(after, low, middle)
        high = gl.where(after, middle - 1, high)
    return low


@gluon.jit(do_not_specialize=["scale", "T", "S", "B", "H", "tiles", "heads", "section"])
def _attention_fwd_kernel(
    q_desc, k_desc, v_desc, OUT, LSE, CU_Q, CU_K, scale, T, S, B, H, tiles, heads, section,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One program per tile of BLOCK_M queries and head. T: rows of q (packed: of all sequences); scale in log 2.

    tiles: of all queries of a head; heads: B * H, packed H; section: heads that run side by side.
    """
    program = gl.program_id(0)
    first_head = program // (section * tiles) * section
    side = gl.minimum(heads - first_head, section)
    within = program % (section * tiles)
    head = first_head + within % side
    tile = tiles - 1 - within // side
    if PACKED:
        batch = 0
        b = _sequence_of(tile, CU_Q, B, BLOCK_M)
        q_first = gl.load(CU_Q + b)
        rows = gl.load(CU_Q + b + 1, mask=b < B, other=T) - q_first
        k_first = gl.load(CU_K + b)
        keys = gl.load(CU_K + b + 1, mask=b < B, other=k_first) - k_first
        tile_row = (tile - (q_first // BLOCK_M + b)) * BLOCK_M
        if tile_row >= rows:
            return
        out_row = q_first.to(gl.int64)
        lse_row = head.to(gl.int64) * T + q_first
    else:
        batch = head // H
        q_first = 0
        k_first = 0
        rows = T
        keys = S
        tile_row = tile * BLOCK_M
        out_row = batch.to(gl.int64) * T
        lse_row = head.to(gl.int64) * T
    q_head = head % H
    shift = keys - rows
    end = keys
    masked = 0
    if CAUSAL:
        end = gl.minimum(tile_row + BLOCK_M + shift, keys)  # below 0: nothing to see
    blocks = gl.maximum(gl.cdiv(end, BLOCK_N), 1)
    if CAUSAL:
        # Blocks that reach past the last key of the tile's first query. The last block has a mask of its own.
        masked = gl.minimum(gl.cdiv(end - (tile_row + shift + 1), BLOCK_N), blocks - 1)

    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2, 1, BLOCK_M // 2, 1, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()  # the TMA unit must see the barriers as they are now

    out_stride = H * D
    out = OUT + q_head * D
    # Arguments stand here twice because a tuple in a variable would lose which of them are constants.
    gl.warp_specialize([
        (_consumer, (out, LSE, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
                     tile_row, rows, out_row, out_stride, lse_row, end, shift, masked, blocks, scale,
                     0, BLOCK_M, BLOCK_N, D, STAGES, CAUSAL)),
        (_consumer, (out, LSE, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
                     tile_row, rows, out_row, out_stride, lse_row, end, shift, masked, blocks, scale,
                     1, BLOCK_M, BLOCK_N, D, STAGES, CAUSAL)),
        (_producer, (q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
                     batch, q_first + tile_row, k_first, q_head, q_head // GROUP, end, blocks,
                     BLOCK_M, BLOCK_N, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


def config(D: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, STAGES).

    A consumer's thread holds BLOCK_N / 2 scores twice and D / 2 sums, at 64 rows: the largest tiles without spills.
    Shared memory is 112 KiB at D = 64, 160 at 128, 192 at 256, of 227. At D = 64 a block takes half the time that it
    does at 128, so loads run one block further ahead.
    """
    if D == 256:
        return 128, 64, 2
    return 128, 128, 3 if D == 64 else 2


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Boxes of `rows` rows of one head of x (B, T, H, D)."""
    strides = list(x.stride())
    for i in (2, 1, 0):  # where there is but one, any stride will do for torch, not for the TMA unit
        if x.shape[i] == 1:
            strides[i] = strides[i + 1] * x.shape[i + 1]
    return TensorDescriptor(x, list(x.shape), strides, [1, rows, 1, x.shape[3]], SHARED)


def attention_fwd_gluon(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) for what `gluon_choice.why_not` has no reason against; shapes as in `reference.py`."""
    packed = cu_seqlens_q is not None
    out = q.new_empty(q.shape)
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
    if packed:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    (B, T, H, D), (S, Hkv) = q.shape, k.shape[1:3]
    block_m, block_n, stages = config(D)
    if cu_seqlens_q is not None:
        B = cu_seqlens_q.shape[0] - 1
        tiles, heads = T // block_m + B + 1, H
    else:
        tiles, heads = -(-T // block_m), B * H
    group = H // Hkv
    section = min(heads, group * max(1, L2_SECTION // (4 * S * D)))
    with on_device(q):
        _attention_fwd_kernel[(tiles * heads,)](
            _descriptor(q, block_m // 2), _descriptor(k, block_n), _descriptor(v, block_n), out, lse,
            cu_seqlens_q, cu_seqlens_k, scale * LOG2_E, T, S, B, H, tiles, heads, section,
            group, D, block_m, block_n, stages, causal, packed, num_warps=4, maxnreg=168,
        )  # fmt: skip
    return out, lse
