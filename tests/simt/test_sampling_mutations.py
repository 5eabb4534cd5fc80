"""Tests of the tests: bugs planted in the CUDA kernel that draws tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import simt_builder
from test_mutations import Bug, in_a_copy, parameters_of, trial

SAMPLE = "sampling/sampling_cuda.cu"

# fmt: off
BUGS = [
    # barriers
    Bug("maximum read too early", SAMPLE, "] = x;\n  __syncthreads();\n  x = of_warp", "] = x;\n  x = of_warp"),
    Bug("sums of the warps read too early", SAMPLE, "of_warp[warp] = running;\n  __syncthreads();",
        "of_warp[warp] = running;", quick=True),
    Bug("found before it is found", SAMPLE, "      }\n    }\n  }\n  __syncthreads();\n}", "      }\n    }\n  }\n}"),
    Bug("bins read while they fill", SAMPLE, "  constexpr int kEach = kBins / kWarp;\n  __syncthreads();",
        "  constexpr int kEach = kBins / kWarp;"),
    Bug("bins fill while they are cleared", SAMPLE, "s.members = 0;\n  __syncthreads();", "s.members = 0;"),
    Bug("cleared while the last bin is read", SAMPLE, "    __syncthreads();\n    clear(s);\n    Adder adder(s);",
        "    clear(s);\n    Adder adder(s);"),
    Bug("members counted too early", SAMPLE, "  __syncthreads();\n  const unsigned members",
        "  const unsigned members"),
    Bug("sums of the parts read too early", SAMPLE,
        "  }\n  __syncthreads();\n  unsigned long long total = 0, ties = 0;",
        "  }\n  unsigned long long total = 0, ties = 0;"),
    Bug("sums of the parts overwritten", SAMPLE, "  __syncthreads();\n  ties += block_before",
        "  ties += block_before"),
    # bounds
    Bug("more members than there is room", SAMPLE, "if (at < kMembers) s.member", "s.member"),
    Bug("members that found no room are forgotten", SAMPLE, "if (members <= kMembers) {", "if (true) {"),
    Bug("32-bit row offset", SAMPLE, "+ row * a.stride", "+ int(row) * int(a.stride)"),
    Bug("one vector too many", SAMPLE, "slot >= 1 && slot <= row.vectors", "slot >= 1 && slot <= row.vectors + 1"),
    Bug("single elements left out", SAMPLE, "return row.vectors + 2;", "return row.vectors + 1;"),
    # thresholds
    Bug("top-k one too many", SAMPLE, "find(s, s.count, a.top_k, true)", "find(s, s.count, a.top_k + 1, true)"),
    Bug("what lies above the bin forgotten", SAMPLE, "need - above, false)", "need, false)"),
    Bug("bits of the wrong members", SAMPLE, "if ((key & known) == prefix) adder", "adder"),
    Bug("the last digit left out", SAMPLE, "shift >= 0; shift", "shift > 0; shift"),
    Bug("what an adder holds is lost", SAMPLE, "    if (to != bin) flush();\n", ""),
    Bug("top-p of what top-k dropped", SAMPLE, "bin < last || !by_count ? mine : bin == last ? in_last : 0", "mine"),
    Bug("top-p's last bin whole", SAMPLE, "key_of(z) >= kept.least) left", "true) left"),
    Bug("top-p turned round", SAMPLE, "(1.0 - a.top_p) * double(total)", "a.top_p * double(total)"),
    Bug("top-p's ties all stay", SAMPLE, "kept.dropped = p.ties - ", "kept.dropped = 0 * "),
    Bug("top-p's last ties go", SAMPLE, "return gone < ties ? ties - gone : 0;", "return gone ? 0 : ties;"),
    Bug("min-p forgotten", SAMPLE, "min_p <= 0.f || ", "true || "),
    Bug("negative logits in the wrong order", SAMPLE, "? ~bits : bits | 0x80000000u", "? bits : bits | 0x80000000u"),
    Bug("temperature upside down", SAMPLE, "(top - z) / temperature", "(top - z) * temperature"),
    Bug("far logits beyond the bins", SAMPLE, "d < float(kBins - 1) ? int(d) : kBins - 1", "int(d) % kBins"),
    # the draw
    Bug("the last token of a piece", SAMPLE, "token < 0 && target < running", "target < running"),
    Bug("drawn from the first part", SAMPLE, "    if (target < of_part) break;\n", "    break;\n"),
    Bug("parts weigh their ties twice", SAMPLE, "of_part = s.sums[0][chosen] +", "of_part = 2 * s.sums[0][chosen] +"),
    Bug("ties of earlier parts forgotten", SAMPLE, "    target -= of_part;\n    ties +=",
        "    target -= of_part;\n    ties = 0 *"),
    Bug("ties before a piece forgotten", SAMPLE, "ties += block_before(piece.ties", "block_before(piece.ties"),
    Bug("number of the first row", SAMPLE, "a.uniform[row]", "a.uniform[0]"),
    Bug("weights as floats' bits", SAMPLE, "uint64_t(kOne * expf", "uint64_t(kOne * 0.5f + expf"),
]
# fmt: on


@pytest.mark.parametrize("bug", parameters_of(BUGS))
@pytest.mark.usefixtures("built_simt")  # all that a bug doesn't touch is compiled by then
def test_planted_bug_is_noticed(bug: Bug, tmp_path: Path) -> None:
    said = trial(in_a_copy(bug, tmp_path), tmp_path, "op_trials.py", "sample")
    print(said)
    assert said.startswith("CAUGHT"), said


def test_every_bug_still_fits_the_source(tmp_path: Path) -> None:
    for number, bug in enumerate(BUGS):
        in_a_copy(bug, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.usefixtures("built_simt")
def test_nothing_is_noticed_without_a_bug(tmp_path: Path) -> None:
    assert trial(simt_builder.CSRC, tmp_path, "op_trials.py", "sample") == "NOTHING NOTICED"
