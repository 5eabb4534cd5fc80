"""Tests of the tests: bugs planted in the CUDA kernels of attention and in the primitives below them."""

from __future__ import annotations

from pathlib import Path

import pytest
import simt_builder
from test_mutations import Bug, in_a_copy, parameters_of, trial

FWD, BWD, DECODE = (f"attention/attention_{what}.cuh" for what in ("fwd", "bwd", "decode"))
SOFTMAX, TILES, SEQUENCES, MMA = (
    "attention/softmax.cuh",
    "attention/warp_tiles.cuh",
    "attention/sequences.cuh",
    "common/mma.cuh",
)
BOTH = ("attention", "attention_decode")
HOPPER, COMMON = "attention/attention_hopper.cuh", "common/hopper.cuh"

# fmt: off
BUGS = [
    # copies in flight, barriers, shared memory
    Bug("k overwritten while it is read", FWD,
        "    __syncthreads();  // v is here, and nobody reads this k any more\n", "", quick=True),
    Bug("v overwritten while it is read", FWD,
        "    __syncthreads();  // k is here, and nobody reads the last v any more\n", ""),
    Bug("v not waited for", FWD,
        "    cp_async_wait<0>();\n    __syncthreads();  // v is here", "    __syncthreads();  // v"),
    Bug("q not waited for without keys", FWD, "  cp_async_commit();  // or nobody would wait for q", "  //"),
    Bug("shared memory too short", FWD, "bytes(kRows + 2 * kKeys)", "bytes(kRows + kKeys)"),
    Bug("stage filled while it is read", BWD, "    __syncthreads();  // the stage may be filled again\n", ""),
    Bug("stage read too early", BWD, "cp_async_wait<kStages - 1>();", "cp_async_wait<kStages>();"),
    Bug("stages in the wrong order", BWD, "const int stage = n % kStages, first", "const int stage = 0, first"),
    Bug("no room for lse and delta", BWD, " + 2 * 4 * kStages * kOther;", ";"),
    Bug("stage filled while it is read", DECODE, "    __syncwarp();  // the stage may be filled again\n", ""),
    Bug("stage read too early", DECODE, "cp_async_wait<kStages - 1>();\n    __syncwarp();", "__syncwarp();"),
    Bug("other lanes' copies not waited for", DECODE, "cp_async_wait<kStages - 1>();\n    __syncwarp();",
        "cp_async_wait<kStages - 1>();"),
    Bug("warps' results over others' keys", DECODE, "  cp_async_wait<0>();\n  __syncthreads();\n\n  // The warps'",
        "  cp_async_wait<0>();\n\n  // The warps'"),
    Bug("warps' results read too early", DECODE, "  }\n  __syncthreads();\n  for (int i = thread",
        "  }\n  for (int i = thread"),
    Bug("results stored too early", TILES, "  __syncwarp();\n  for (int i = lane", "  for (int i = lane"),
    # fragments
    Bug("rows of b in a's order", MMA, "row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2",
        "row + lane % 16, 2 * step + lane / 16"),
    Bug("a's halves swapped", MMA, "tile.chunk(row + lane % 16, 2 * step + lane / 16)",
        "tile.chunk(row + (lane + 8) % 16, 2 * step + lane / 16)"),
    Bug("columns not transposed", MMA, "ldmatrix<true>(b, tile", "ldmatrix<false>(b, tile"),
    Bug("products in d's order, halves", MMA, "d[2 * step + i / 2][i % 2 * 2], d[2 * step + i / 2][i % 2 * 2 + 1]",
        "d[2 * step + i % 2][i / 2 * 2], d[2 * step + i % 2][i / 2 * 2 + 1]"),
    Bug("products in d's order, floats", MMA, "d[step][i % 2 * 2 + i / 2]", "d[step][i]"),
    Bug("keys of floats out of order", MMA, "row + 2 * (lane % 4) + i % 2", "row + lane % 4 + 4 * (i % 2)"),
    Bug("TF32 alone", MMA, "  mma_tf32(sum, rest, big0, big1);\n", ""),
    Bug("float sums cut off in the tensor core", MMA, "  mma_tf32(sum, big, big0, big1);",
        "  mma_tf32(d, big, big0, big1);"),
    Bug("every step the first", TILES, "load_b_rows(of_b, b, 8 * n, step);", "load_b_rows(of_b, b, 8 * n, 0);"),
    # which rows and keys
    Bug("one key too many", TILES, "column >= past", "column > past"),
    Bug("full tiles judged generously", SEQUENCES, "last_j < end_key(i)", "last_j <= end_key(i)"),
    Bug("window one key wider", SEQUENCES, "S - T - left, 0, S)", "S - T - left - 1, 0, S)"),
    Bug("window one key narrower to the right", SEQUENCES, "S - T + right + 1, 0, S)", "S - T + right, 0, S)"),
    Bug("aligned to the first key", SEQUENCES, "int64_t(i) + S - T + right", "int64_t(i) + right"),
    Bug("first query too late", SEQUENCES, "S + T - right, 0, T)", "S + T - right + 1, 0, T)"),
    Bug("last query too early", SEQUENCES, "S + T + left + 1, 0, T)", "S + T + left, 0, T)"),
    Bug("packed sequences one tile off", SEQUENCES, "/ kRows + middle <= tile", "/ kRows + middle < tile"),
    Bug("rows after the last sequence see it", SEQUENCES, "  if (rest) (kOfKeys ? at.span.T : at.span.S) = 0;\n", ""),
    Bug("rows after the last sequence forgotten", SEQUENCES, "n / rows + a.B + 1", "n / rows + a.B"),
    Bug("tiles of the last rows forgotten", SEQUENCES, "a.B * ceil_div(n, rows)", "a.B * (n / rows)"),
    Bug("32-bit row offset", TILES, "first + r * stride : nullptr", "first + int(r * stride) : nullptr"),
    Bug("32-bit row offset of vectors", TILES, "first + first * row_at.stride", "first + int(first * row_at.stride)"),
    Bug("vectors past the end", TILES, "first + k * kStep < count);", "true);"),
    Bug("columns of vectors past the head", TILES, "c * V < D ? row_at.count : 0", "row_at.count"),
    Bug("32-bit offset of a tile", SEQUENCES, "row0 * stride.row + head", "int(row0 * stride.row) + head"),
    Bug("columns past the head", TILES, "row != nullptr && c * V < D);", "row != nullptr);"),
    Bug("columns past the head, singly", TILES, "row != nullptr && c * V + j < D;", "row != nullptr;"),
    Bug("rows stored past the end", TILES, "if (r >= count) break;", "if (r > count) break;"),
    Bug("odd head strides as vectors", TILES, "stride.head % V == 0 && D % V == 0", "D % V == 0"),
    Bug("odd heads as vectors", TILES, "stride.head % V == 0 && D % V == 0", "stride.head % V == 0"),
    Bug("keys of another group", FWD, "at.head / (a.H / a.Hkv)", "at.head % a.Hkv"),
    Bug("queries of another group", BWD, "at.head * group + n / tiles", "at.head + n / tiles * int(a.Hkv)"),
    # arithmetic
    Bug("lse in base 2", FWD, "lse[m][i] * kLn2", "lse[m][i]"),
    Bug("sink in base e", FWD, "a.sinks[at.head] * kLog2e", "a.sinks[at.head]"),
    Bug("sums not brought to the new maximum", SOFTMAX, "acc[m][c][e] *= fade[m][e / 2]",
        "acc[m][c][e] *= e % 2 ? fade[m][e / 2] : 1.f"),
    Bug("sum joins the sink too high", SOFTMAX, "total * fade + exp2_fast(sink - base)",
        "total + exp2_fast(sink - base)"),
    Bug("nothing seen: inf - inf", SOFTMAX, "highest == -kInfinity ? 0.f : highest * unit;",
        "highest * unit;"),
    Bug("maximum of half a row", SOFTMAX, "highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));", ""),
    Bug("sum of half a row", SOFTMAX, "total += __shfl_xor_sync(kAllLanes, total, 2);", ""),
    Bug("no cap", SOFTMAX, "cap * tanhf(s[m][n][e])", "cap * s[m][n][e]"),
    Bug("cap's derivative forgotten", BWD, "0.f : score.derivative(x)", "0.f : 1.f"),
    Bug("delta forgotten", BWD, "(ds[0][c][e] - (e % 2 ? delta.y : delta.x))", "ds[0][c][e]"),
    Bug("lse's gradient forgotten", BWD, "sum - b.dlse[row]", "sum"),
    Bug("scale forgotten", BWD, "{{a.scale, a.scale}}", "{{1.f, 1.f}}"),
    Bug("queries past the end count", BWD, "return lse == -kInfinity ? kInfinity : lse * kLog2e;",
        "return lse * kLog2e;"),
    Bug("delta of another column", BWD, "const float2*>(delta_of + column)",
        "const float2*>(delta_of + column / 4 * 2)"),
    # decode
    Bug("lengths ignored", DECODE, "clamp(length, 0, capacity)", "int(capacity)"),
    Bug("lengths always long", DECODE, "a.lengths_are_32_bits ?", "false ?"),
    Bug("splits overlap", DECODE, "min(chunks, (split + 1) * share)", "chunks"),
    Bug("warps read the same", DECODE, "next = split * share + warp", "next = split * share"),
    Bug("blocks in a row", DECODE, "a.block_table[batch * a.table_stride + key / a.S]", "int(key / a.S)"),
    Bug("another sequence's blocks", DECODE, "a.block_table[batch * a.table_stride + key / a.S]",
        "a.block_table[key / a.S]"),
    Bug("place within a block", DECODE, "key % a.S * stride.row", "key * stride.row"),
    Bug("all rows one token", DECODE, "const int token = (row0 + g + 8 * i) / group", "const int token = row0 / group"),
    Bug("heads of a group swapped", DECODE, "row / group * a.q_stride.row + row % group * a.q_stride.head",
        "row / group * a.q_stride.row + (group - 1 - row % group) * a.q_stride.head"),
    Bug("warps joined without weights", DECODE, "sum += weight * products", "sum += products"),
    Bug("splits joined without weights", DECODE, "sum += weight * part", "sum += part"),
    Bug("a split's lse is its maximum", DECODE, "base + log2f(total)", "base"),
]
HOPPER_BUGS = [
    # the order of things
    Bug("q not waited for", HOPPER, "    shared.queries_full().wait(0);\n", ""),
    Bug("first keys not waited for", HOPPER, "    shared.keys_full(0).wait(0);\n", ""),
    Bug("keys not waited for", HOPPER, "      shared.keys_full(next).wait(next_round);\n", ""),
    Bug("values not waited for", HOPPER, "      shared.values_full(stage).wait(round);\n      turn", "      turn"),
    Bug("last values not waited for", HOPPER, "    shared.values_full(stage).wait(round);\n    const int last",
        "    const int last"),
    Bug("rounds not told apart", HOPPER, "next_round = next == 0 ? round ^ 1 : round", "next_round = round"),
    Bug("keys fetched over those in use", HOPPER, "    shared.keys_empty(stage).wait(round ^ 1);\n", ""),
    Bug("values fetched over those in use", HOPPER, "    shared.values_empty(stage).wait(round ^ 1);\n", ""),
    Bug("keys given back before they are read", HOPPER,
        "    wgmma_wait<0>();\n    pin(s[0]);\n    if (lane == 0) shared.keys_empty(0).arrive();\n",
        "    if (lane == 0) shared.keys_empty(0).arrive();\n    wgmma_wait<0>();\n    pin(s[0]);\n", quick=True),
    Bug("values given back before they are read", HOPPER,
        "      wgmma_wait<0>();\n      pin(acc[0]);\n      if (lane == 0) shared.values_empty(stage).arrive();\n",
        "      if (lane == 0) shared.values_empty(stage).arrive();\n      wgmma_wait<0>();\n      pin(acc[0]);\n"),
    Bug("half the warps give keys back", HOPPER, "shared.keys_empty(i).init(4 * Shape::kConsumers)",
        "shared.keys_empty(i).init(2 * Shape::kConsumers)"),
    Bug("fewer bytes expected", HOPPER, "full.arrive_expecting(Shape::kStage)",
        "full.arrive_expecting(Shape::kStage - 16)"),
    Bug("mbarriers used before they are made", HOPPER, "  __syncthreads();\n  if (threadIdx.x < kWarpgroup)",
        "  if (threadIdx.x < kWarpgroup)"),
    Bug("scores read before they are there", HOPPER, "wgmma_wait<1>();", "wgmma_wait<2>();"),
    Bug("accumulator rescaled while products run", HOPPER,
        "      wgmma_wait<0>();\n      pin(acc[0]);\n      if (lane == 0) shared.values_empty(stage).arrive();\n"
        "      softmax.rescale(acc, fade);\n",
        "      softmax.rescale(acc, fade);\n      wgmma_wait<0>();\n      pin(acc[0]);\n"
        "      if (lane == 0) shared.values_empty(stage).arrive();\n"),
    Bug("probabilities rounded while products run", HOPPER, "      wgmma_wait<0>();\n      pin(acc[0]);\n      if",
        "      round_them();\n      wgmma_wait<0>();\n      pin(acc[0]);\n      if"),
    Bug("no fence before products", HOPPER, "      pin(acc[0]);\n      wgmma_begin();\n", "      pin(acc[0]);\n"),
    Bug("turn never passed back", HOPPER, "if (consumer == 0 || j + kKeys < end) turn.pass();",
        "if (consumer == 0) turn.pass();"),
    Bug("nobody begins", HOPPER, "if (consumer == 1) turn.pass();", ""),
    Bug("results stored over q in use", HOPPER,
        "    named_barrier_wait(kOneConsumer + consumer, kWarpgroup);  // all four warps are done with q\n", ""),
    Bug("cleared values not waited for", HOPPER, "  named_barrier_wait(kAllConsumers, kThreads);\n", ""),
    Bug("cleared values not fenced", HOPPER, "  stores_are_for_wgmma();\n", ""),
    # which data
    Bug("a neighbour's values not cleared", HOPPER, "if (a.cu_q && last + kKeys > span.S)", "if (false)"),
    Bug("one row of a neighbour's left", HOPPER, "(count + row) * kPanelRow", "(count + row - (row > 0)) * kPanelRow"),
    Bug("q of the other warpgroup", HOPPER, "const q = shared.queries(consumer)", "const q = shared.queries(0)"),
    Bug("queries of the first", HOPPER, "at.q_row0 + at.row + 64 * w", "at.q_row0 + at.row"),
    Bug("panels all the first", HOPPER, "full, p * kPanelColumns, kv_head", "full, 0, kv_head"),
    Bug("keys of another sequence", HOPPER, "at.k_row0 + j, at.batch", "j, at.batch"),
    Bug("keys of another batch", HOPPER, "at.k_row0 + j, at.batch", "at.k_row0 + j, 0"),
    Bug("keys of another group", HOPPER, "int(at.head / (a.H / a.Hkv))", "int(at.head % a.Hkv)"),
    Bug("full tiles judged by one row", HOPPER, "span.all_see(at.row, at.row + rows - 1, j",
        "span.all_see(at.row + rows - 1, at.row, j"),
    Bug("products added to old scores", HOPPER, "Shape::kKeyPanel, step), step > 0);",
        "Shape::kKeyPanel, step), true);"),
    Bug("depth beyond a panel", COMMON, "first + step / 4 * panel_bytes + step % 4 * 32", "first + step * 32"),
    Bug("depth in rows of 8", COMMON, "step * 16 * kPanelRow", "step * 8 * kPanelRow"),
    Bug("batch stride in elements", COMMON, "n > 1 ? 2 * stride : 16; };\n  static_cast",
        "n > 1 ? stride : 16; };\n  static_cast"),
    Bug("lse in base 2", HOPPER, "lse[0][i] * kLn2", "lse[0][i]"),
    Bug("accumulator not rescaled", HOPPER, "      softmax.rescale(acc, fade);\n", ""),
    Bug("shared memory too short", HOPPER, "kShared = kPanelAlignment + kTiles + (1 + 4",
        "kShared = kTiles - 1024 + (1 + 4"),
]
# fmt: on
BY_HOPPER = ("hopper:attention",)
OPS = {FWD: BOTH[:1], BWD: BOTH[:1], DECODE: BOTH[1:], HOPPER: BY_HOPPER, COMMON: BY_HOPPER}


@pytest.mark.parametrize("bug", parameters_of(BUGS + HOPPER_BUGS))
@pytest.mark.usefixtures("built_simt")  # all that a bug doesn't touch is compiled by then
def test_planted_bug_is_noticed(bug: Bug, tmp_path: Path) -> None:
    said = trial(in_a_copy(bug, tmp_path), tmp_path, "op_trials.py", *OPS.get(bug.file, BOTH))
    print(said)
    assert said.startswith("CAUGHT"), said


def test_every_bug_still_fits_the_source(tmp_path: Path) -> None:
    for number, bug in enumerate(BUGS + HOPPER_BUGS):
        in_a_copy(bug, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.usefixtures("built_simt")
def test_nothing_is_noticed_without_a_bug(tmp_path: Path) -> None:
    assert trial(simt_builder.CSRC, tmp_path, "op_trials.py", *BOTH, "hopper:attention") == "NOTHING NOTICED"
