"""Tests of the tests: bugs planted in the CUDA kernels of SwiGLU, the rotary ops and cross-entropy."""

from __future__ import annotations

from pathlib import Path

import pytest
import simt_builder
from test_mutations import Bug, in_a_copy, parameters_of, trial

SWIGLU, ROPE, LOSS = (f"{op}/{op}_cuda.cu" for op in ("swiglu", "rope", "cross_entropy"))
ROW = "common/row.cuh"
TURN, QK_NORM, APPEND = (f"rope/{what}" for what in ("turn.cuh", "qk_norm_rope_cuda.cu", "rope_append_cuda.cu"))
OPS = {
    SWIGLU: ("swiglu", "swiglu_packed"), ROPE: ("apply_rope",), TURN: ("apply_rope",), QK_NORM: ("qk_norm_rope",),
    APPEND: ("rope_append_kv",), LOSS: ("cross_entropy", "linear_cross_entropy"),
    ROW: ("cross_entropy", "linear_cross_entropy", "sample"),
}  # fmt: skip

# fmt: off
BUGS = [
    # SwiGLU
    Bug("up forgotten", SWIGLU, "sigmoid(g[k][j]) * u[k][j]", "sigmoid(g[k][j])", quick=True),
    Bug("sign of the exponent", SWIGLU, "expf(-x)", "expf(x)"),
    Bug("one vector too many", SWIGLU, "g[k] = Vec<T, V>::load_if(i < vectors, gate",
        "g[k] = Vec<T, V>::load_if(i <= vectors, gate"),
    Bug("idle rows work", SWIGLU, "at.row < rows ? cols / V : 0", "cols / V"),
    Bug("stores beyond the row", SWIGLU, "if (i < vectors) Vec<T, V>::round(out)",
        "if (i <= vectors) Vec<T, V>::round(out)"),
    Bug("tiles overlap", SWIGLU, "kVectors * int(blockDim.x) + int(threadIdx.x)",
        "int(blockDim.x) + int(threadIdx.x)"),
    Bug("last tile left out", SWIGLU, "(vectors + width * kVectors - 1) / (width * kVectors)",
        "(vectors + width - 1) / (width * kVectors)"),
    Bug("last rows left out", SWIGLU, "(rows + groups - 1) / groups * tiles", "rows / groups * tiles"),
    Bug("32-bit row offset", SWIGLU, "gate += at.row * gate_stride;", "gate += int(at.row) * int(gate_stride);"),
    Bug("32-bit row offset, backward", SWIGLU, "dy += at.row * dy_stride;\n  gate += at.row * gate_stride;",
        "dy += at.row * dy_stride;\n  gate += int(at.row) * int(gate_stride);"),
    Bug("y by the gate's stride", SWIGLU, "y += at.row * cols", "y += at.row * gate_stride"),
    Bug("gradients swapped", SWIGLU, "round(of_gate).store(dgate", "round(of_up).store(dgate"),
    Bug("derivative of silu cut short", SWIGLU, "(s * (1.f + x * (1.f - s)))", "s"),
    Bug("odd strides as vectors", SWIGLU, "fit(a.up, a.up_stride) && fit(a.y", "fit(a.y"),
    Bug("odd strides as vectors, backward", SWIGLU, "fit(a.up, a.up_stride) && fit(a.dgate", "fit(a.dgate"),
    # RoPE
    Bug("turned the other way", ROPE, "a.conjugate ? -1.f : 1.f", "1.f", quick=True),
    Bug("sign of b", TURN, "a * angles.cos[j] - b * angles.sin[j]", "a * angles.cos[j] + b * angles.sin[j]"),
    Bug("pairs of neighbours always", TURN, "kInterleaved ? first + V : half + first", "first + V"),
    Bug("second half of D, not of R", TURN, "const int half = R / 2;", "const int half = D / 2;"),
    Bug("rest not copied", TURN, "i = R + threadIdx.x * V; i < D", "i = R + threadIdx.x * V; i < R"),
    Bug("rest copied from the start", TURN, "Vec<T, V>::load(x + head * head_stride + i).store",
        "Vec<T, V>::load(x + head * head_stride + i - R).store"),
    Bug("angles of the first unit", TURN, "angles.load(cos + unit * V, sin + unit * V", "angles.load(cos, sin"),
    Bug("half of the angles", TURN, "for (int i = 0; i < V; i += N) {", "for (int i = 0; i < N; i += N) {"),
    Bug("positions ignored", ROPE, "positions ? positions[token] : t", "t"),
    Bug("positions of the first batch", ROPE, "positions[token]", "positions[t]"),
    Bug("tables of the first batch", ROPE, "cos += b * cos_stride.x + row", "cos += row"),
    Bug("heads left out", TURN, "head = threadIdx.y; head < heads; head += blockDim.y)\n      turn",
        "head = threadIdx.y; head < heads; head += 2 * blockDim.y)\n      turn"),
    Bug("k with q's heads", ROPE, "k_out + token * Hkv * D, D, 1, Hkv,", "k_out + token * Hkv * D, D, 1, H,"),
    Bug("32-bit token offset", ROPE, "q + b * q_stride.x + t * q_stride.y",
        "q + b * q_stride.x + int(t) * int(q_stride.y)"),
    Bug("odd halves as vectors", ROPE, "a.R / 2 % V == 0 && ", ""),
    Bug("odd token strides as vectors", TURN, " && stride[0] % V == 0 && stride[1] % V == 0", ""),
    Bug("odd tables as vectors", TURN, " && stride[1] % 4 == 0", ""),
    # QK-norm and RoPE
    Bug("mean over half a head", QK_NORM, "sum / D + a.eps", "sum / R + a.eps", quick=True),
    Bug("idle heads leave before the sum", QK_NORM, "    float sum = 0.f;\n    for (int col = threadIdx.x * V; live",
        "    if (!live) continue;\n    float sum = 0.f;\n    for (int col = threadIdx.x * V; live"),
    Bug("one head too many", QK_NORM, "const bool live = head < heads;  //", "const bool live = head <= heads;  //"),
    Bug("offset forgotten", QK_NORM, "offset + w[col + j]", "w[col + j]"),
    Bug("weights of the first columns", QK_NORM, "offset + w[col + j]", "offset + w[j]"),
    Bug("k by q's weight", QK_NORM, "a.k_stride[2], a.k_weight,\n                                        static_cast",
        "a.k_stride[2], a.q_weight,\n                                        static_cast"),
    Bug("k by q's weight, whole", QK_NORM, "unit.weigh(a.k_weight, vectors, a.offset);\n    normalise",
        "normalise"),
    Bug("mean over half a head, whole", QK_NORM, "warp_sum(sum, width) / D", "warp_sum(sum, width) / (D / 2)"),
    Bug("second head left out", QK_NORM, "first += kHeads * blockDim.y", "first += 2 * kHeads * blockDim.y"),
    Bug("one head too many, whole", QK_NORM, "      if (head >= heads) continue;\n", ""),
    Bug("weights of the other half", QK_NORM, "load(w + two + i)", "load(w + one + i)"),
    Bug("units that are not there", QK_NORM, "const bool live = head < heads && unit.there;\n      u[h]",
        "const bool live = head < heads;\n      u[h]"),
    Bug("gradient's mean forgotten, whole", QK_NORM, " - x_u[j] * rstd * mean", ""),
    Bug("mean over a few lanes, whole", QK_NORM, "    const float mean = warp_sum(dot, width) / D;\n    if (!live)",
        "    const float mean = warp_sum(dot, 2) / D;\n    if (!live)"),
    Bug("dweight of the last head, whole", QK_NORM, "of_one[j] += g_u[j] * u", "of_one[j] = g_u[j] * u"),
    Bug("k's dweight in q's place", QK_NORM, "sums[D + one + j] = k_one[j]", "sums[D + one + j] = q_one[j]"),
    Bug("turned forward in the backward", QK_NORM, "vectors, -1.f)", "vectors, 1.f)"),
    Bug("gradient's mean forgotten", QK_NORM, " - unit[j] * rstd * mean", ""),
    Bug("mean over a few lanes", QK_NORM, "warp_sum(dot, width) / D", "warp_sum(dot, 2) / D"),
    Bug("dweight of the last token", QK_NORM, "dweight[col + j] += g", "dweight[col + j] = g"),
    Bug("dweight of one y", QK_NORM, "for (int y = 0; y < int(blockDim.y); y++)", "for (int y = 0; y < 1; y++)"),
    Bug("sums read too early", QK_NORM, "  }\n  __syncthreads();\n  for (int i = thread; i < 2 * D",
        "  }\n  for (int i = thread; i < 2 * D"),
    Bug("sums not cleared", QK_NORM, "sums[i] = 0.f;", ";"),
    Bug("shared memory too short", QK_NORM, "int(block.groups * 8 * a.D), stream",
        "int(block.groups * 4 * a.D), stream"),
    Bug("tokens left out", QK_NORM, "n += gridDim.x", "n += 2 * gridDim.x"),
    # RoPE and the cache
    Bug("positions from the first", APPEND, "a.lengths[b] - a.T + t", "t", quick=True),
    Bug("tokens before the start are placed", APPEND, "position >= 0 && position", "position"),
    Bug("v turned", APPEND, "0, cos, sin, vectors, 1.f", "R, cos, sin, vectors, 1.f"),
    Bug("v where k belongs", APPEND, "T* v_to = static_cast<T*>(a.v_cache)", "T* v_to = static_cast<T*>(a.k_cache)"),
    Bug("blocks in a row", APPEND, "a.block_table[b * a.table_stride + position / a.S]", "position / a.S"),
    Bug("place within a block", APPEND, "place = position % a.S", "place = position % (a.S - 1)"),
    Bug("heads of the cache dense", APPEND, "k_to, a.k_cache_stride[2]", "k_to, D"),
    # cross-entropy
    Bug("no barrier in the merge", LOSS, "  __syncthreads();\n  if (warp > 0) return s;",
        "  if (warp > 0) return s;", quick=True),
    Bug("idle slots are read", LOSS, "if (lane < int(blockDim.x) / kWarp) {", "{"),
    Bug("sums not rescaled", LOSS, "    total *= exp_fast(top - anchor(to));\n", ""),
    Bug("other's sums not rescaled", LOSS, "    other.raise(to);\n", ""),
    Bug("spread not moved", LOSS, "    spread += shares * (anchor(to) - anchor(top));\n", ""),
    Bug("last vector twice", LOSS, "i < in.vectors; i += step) {", "i <= in.vectors; i += step) {"),
    Bug("singles left out", LOSS, "for (int i = part * width + t; i < in.singles; i += step) {",
        "for (int i = part * width + t; i < in.lead; i += step) {"),
    Bug("rows always aligned", ROW, "lead = off ? (V * int(sizeof(T)) - off) / int(sizeof(T)) : 0;", "lead = 0;"),
    Bug("gradient never lies otherwise", ROW, "vectors = alike ? (n - lead) / V : 0;", "vectors = (n - lead) / V;"),
    Bug("parts read the same", LOSS, "int i = part * width + t;\n    for", "int i = t;\n    for"),
    Bug("merge drops a part", LOSS, "part = threadIdx.x; part < parts", "part = threadIdx.x; part < parts - 1"),
    Bug("ignored rows count", LOSS, "    *loss = 0.f;\n", "    *loss = 1.f;\n"),
    Bug("ignored rows have gradients", LOSS, "const bool ignored = gradient.y == options.ignore_index;",
        "const bool ignored = false;"),
    Bug("target's logit uncapped", LOSS, "inside ? options.capped(element(x + y)) : 0.f",
        "inside ? element(x + y) : 0.f"),
    Bug("weights ignored", LOSS, "of_row *= options.weight_of(int(y))", "of_row *= 1.f"),
    Bug("smoothing's sum without weights", LOSS, "options.all_weights(classes) * log_total", "classes * log_total"),
    Bug("z-loss forgotten", LOSS, "of_row += options.z_loss * whole * whole", "of_row += 0.f"),
    Bug("z-loss forgotten, backward", LOSS, "gradient.share += 2.f * options.z_loss * gradient.lse * upstream",
        "gradient.share += 0.f"),
    Bug("cap's derivative forgotten", LOSS, "dx *= 1.f - (x / options.softcap) * (x / options.softcap)", "dx *= 1.f"),
    Bug("target not subtracted", LOSS, "if (c == y) dx -= at_target;", ""),
    Bug("target off by one", LOSS, "if (c == y) dx", "if (c + 1 == y) dx"),
    Bug("smoothing's share forgotten", LOSS, "dx -= everywhere * options.weight_of(c)", "dx -= 0.f"),
    Bug("32-bit row offset", LOSS, "logits + row * stride;\n  const", "logits + int(row) * int(stride);\n  const"),
    Bug("32-bit row offset, backward", LOSS, "logits + row * stride;\n  Out* dx",
        "logits + int(row) * int(stride);\n  Out* dx"),
    Bug("classes of a panel counted from 0", LOSS, "gradient.of<kPlain>(element(x + c), first + c, options)",
        "gradient.of<kPlain>(element(x + c), c, options)"),
    Bug("classes of a panel counted from 0, vectors", LOSS, "? first + in.lead + i * V + j", "? in.lead + i * V + j"),
    Bug("targets outside a panel are no targets", LOSS, "gradient.y >= 0 && gradient.y < classes",
        "gradient.y >= 0 && gradient.y < columns"),
    Bug("gradient's vectors by the logits' place", ROW,
        "reinterpret_cast<uintptr_t>(out + lead) % (V * sizeof(Out)) == 0", "true"),
    Bug("dloss of the first row", LOSS, "dloss[row * dloss_stride]", "dloss[0]"),
    Bug("last tile left out", LOSS, "ceil_div(vectors, int64_t(threads) * kBackwardVectors)",
        "vectors / (int64_t(threads) * kBackwardVectors) + (vectors < int64_t(threads) * kBackwardVectors)"),
]
# fmt: on


@pytest.mark.parametrize("bug", parameters_of(BUGS))
@pytest.mark.usefixtures("built_simt")  # all that a bug doesn't touch is compiled by then
def test_planted_bug_is_noticed(bug: Bug, tmp_path: Path) -> None:
    said = trial(in_a_copy(bug, tmp_path), tmp_path, "op_trials.py", *OPS[bug.file])
    print(said)
    assert said.startswith("CAUGHT"), said


def test_every_bug_still_fits_the_source(tmp_path: Path) -> None:
    for number, bug in enumerate(BUGS):
        in_a_copy(bug, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.usefixtures("built_simt")
def test_nothing_is_noticed_without_a_bug(tmp_path: Path) -> None:
    ops = tuple(op for names in OPS.values() for op in names)
    assert trial(simt_builder.CSRC, tmp_path, "op_trials.py", *ops) == "NOTHING NOTICED"
