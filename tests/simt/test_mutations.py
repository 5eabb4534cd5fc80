"""Tests of the tests: bugs planted in RMSNorm's kernels, each of which the machine's checks must notice.

A bug is a change of the source's text. When a text is no longer found, the source has changed: adapt the bug to it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import simt_builder

KERNEL, DEVICE = "rms_norm/rms_norm_cuda.cu", "common/device.cuh"


class Bug(NamedTuple):
    name: str
    file: str
    text: str
    instead: str
    quick: bool = False


# fmt: off
BUGS = [
    # synchronisation
    Bug("no barrier in block_sum", DEVICE, "warp] = x;\n  __syncthreads();", "warp] = x;"),
    Bug("barrier in a branch", DEVICE, "warp] = x;\n  __syncthreads();", "warp] = x, __syncthreads();"),
    Bug("block_sum has one buffer", DEVICE, "partial[turn & 1]", "partial[0]"),
    Bug("turns don't alternate", KERNEL, "row_sum(dot, turn++)", "row_sum(dot)", quick=True),
    Bug("idle slots of block_sum are read", DEVICE, "lane < warps ? partial[turn & 1][lane] : 0.f",
        "partial[turn & 1][lane]"),
    Bug("stage refilled too early", KERNEL, "      if (k > 0) __syncthreads();  // the stage may still be read\n", ""),
    Bug("stage read too early", KERNEL, "= dweight[k][j];\n      __syncthreads();", "= dweight[k][j];"),
    Bug("dweight summed too early", KERNEL, "[lane] = sum;\n  __syncthreads();", "[lane] = sum;"),
    Bug("idle rows leave before the sum", KERNEL, "  x += row * x_stride;\n",
        "  if (!live) return;\n  x += row * x_stride;\n"),
    # bounds
    Bug("one row too many, forward", KERNEL, "const bool live = row < rows;  ", "const bool live = row <= rows;  "),
    Bug("one row too many, backward", KERNEL, "    const bool live = row < rows;\n",
        "    const bool live = row <= rows;\n"),
    Bug("idle rows store rstd", KERNEL, "if (live && t == 0) rstd", "if (t == 0) rstd"),
    Bug("idle rows join the gradient", KERNEL, "live_cols = live ? cols : 0", "live_cols = cols"),
    Bug("one vector too many", KERNEL, "in[k] = Vec<X, V>::load_if(i < vectors, x + i * V)",
        "in[k] = Vec<X, V>::load_if(i <= vectors, x + i * V)"),
    Bug("one column too many in dweight", KERNEL, "  if (col < cols) {", "  if (col <= cols) {"),
    Bug("32-bit row offset, forward", KERNEL, "x += row * x_stride", "x += int(row) * int(x_stride)"),
    Bug("32-bit row offset, backward", KERNEL, "dy + row * dy_stride", "dy + int(row) * int(dy_stride)"),
    # alignment
    Bug("odd columns as vectors", KERNEL, "(a.y), a.cols) && vectors_fit<H, V>(static_cast<H*>(a.h), a.cols);",
        "(a.y), 0) && vectors_fit<H, V>(static_cast<H*>(a.h), 0);"),
    Bug("odd columns as vectors, backward", KERNEL, "vectors_fit<X, V>(static_cast<X*>(a.dx), a.cols) && ", ""),
    Bug("odd strides as vectors", DEVICE, " && row_stride % N == 0", ""),
    Bug("odd addresses as vectors", DEVICE, "reinterpret_cast<uintptr_t>(first) % (sizeof(T) * N) == 0 && ", ""),
    # loops and indices
    Bug("rest of the row starts late", KERNEL, "i = t + K * width; i < vectors",
        "i = t + (K + 1) * width; i < vectors"),
    Bug("the same row again", KERNEL, "fetch(row + int64_t(gridDim.x) * groups);", "fetch(row);"),
    Bug("rows past the end fetched", KERNEL, "const int vectors = row < rows ? cols / V : 0;",
        "const int vectors = cols / V;"),
    Bug("rest of dweight not cleared", KERNEL, "Vec<float, N>::load_if(false, partial).store(partial + c);", ";"),
    Bug("blocks share a row of partial", KERNEL, "  partial += int64_t(blockIdx.x) * cols;\n", ""),
    Bug("blocks share rows", KERNEL, "first += int64_t(gridDim.x) * groups", "first += groups"),
    Bug("last group left out", KERNEL, "group < groups; group++", "group < groups - 1; group++"),
    Bug("last part left out", KERNEL, "part < parts; part", "part < parts - 1; part"),
    Bug("sum over half the lanes", DEVICE, "int offset = width / 2", "int offset = width / 4"),
    Bug("planes collide in the banks", KERNEL, "kBackwardThreads + kWarp / V", "kBackwardThreads"),
    # arithmetic
    Bug("eps forgotten", KERNEL, "/ cols + eps)", "/ cols)"),
    Bug("offset forgotten in y", KERNEL, "* rstd * (offset + weight[j])", "* rstd * weight[j]"),
    Bug("offset forgotten in dx", KERNEL, "dy[j] * (offset + weight[j])", "dy[j] * weight[j]"),
    Bug("offset forgotten in the mean", KERNEL, "du * (offset + w[j]);\n      }\n    }", "du * w[j];\n      }\n    }"),
    Bug("mean is a sum", KERNEL, "row_sum(dot, turn++) / cols", "row_sum(dot, turn++)"),
    Bug("dh forgotten", KERNEL, " + dh[j];", ";"),
    Bug("dh forgotten in the rest", KERNEL, "load_if(dh != nullptr, dh_row", "load_if(false, dh_row"),
    Bug("rstd forgotten in dx", KERNEL, "x[j] * rstd * mean", "x[j] * mean"),
    Bug("dweight of one row only", KERNEL, "dweight[k][j] += du", "dweight[k][j] = du"),
    Bug("halves swapped", DEVICE, "__floats2bfloat162_rn(lo, hi)", "__floats2bfloat162_rn(hi, lo)"),
    Bug("cut off instead of rounded", DEVICE, "  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);",
        "  return __float_as_uint(lo) >> 16 | (__float_as_uint(hi) & 0xffff0000u);\n"
        "  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);"),
    Bug("rounded twice", KERNEL, "y[j] = h[j] * rstd *", "y[j] = unpack<X>(pack<X>(h[j] * rstd, 0.f), 0) *"),
    Bug("norm of the unrounded sum", KERNEL, "    squares += sum_of_squares(kept[k]);\n",
        "    for (int j = 0; j < V; j++) squares += kAdd ? exact[k][j] * exact[k][j] : kept[k][j] * kept[k][j];\n"),
]

# What a bug needs besides.
ALSO = {
    "norm of the unrounded sum": [
        (KERNEL, "      kept[k] = add(in[k], kept[k]);\n",
         "      for (int j = 0; j < V; j++) exact[k][j] = in[k][j] + kept[k][j];\n"
         "      kept[k] = add(in[k], kept[k]);\n"),
        (KERNEL, "  float squares = 0.f;\n", "  float squares = 0.f, exact[K][V];\n"),
    ],
}
# fmt: on


def plant(bug: Bug, csrc: Path) -> None:
    for file, text, instead in [(bug.file, bug.text, bug.instead), *ALSO.get(bug.name, [])]:
        source = (csrc / file).read_text()
        assert text in source, f"{bug.name}: {file} has changed, its text isn't there: {text!r}"
        (csrc / file).write_text(source.replace(text, instead))


def trial(csrc: Path, scratch: Path, script: str = "rms_norm_trials.py", *words: str) -> str:
    """Builds the kernels in csrc and runs the checks of a script on them; what they say."""
    kernels = [*sorted(csrc.glob("*/*_cuda.cu")), *sorted(csrc.glob("bind_cuda*.cpp"))]
    module = simt_builder.link("_simt", kernels, csrc, cache=scratch / "objects")
    command = [sys.executable, str(Path(__file__).with_name(script)), str(module), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode < 0:
        return f"CAUGHT: the process died: {done.returncode}"
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def parameters_of(bugs: list[Bug]) -> list[Any]:
    """A parameter for each; all but the quick ones are slow tests."""
    return [
        pytest.param(b, id=f"{b.file.split('/')[0]}-{b.name}", marks=() if b.quick else pytest.mark.slow) for b in bugs
    ]


def in_a_copy(bug: Bug, folder: Path) -> Path:
    """A copy of the sources with the bug in them."""
    csrc = folder / "csrc"
    shutil.copytree(simt_builder.CSRC, csrc)
    plant(bug, csrc)
    return csrc


@pytest.mark.parametrize("bug", parameters_of(BUGS))
@pytest.mark.usefixtures("built_simt")  # all that a bug doesn't touch is compiled by then
def test_planted_bug_is_noticed(bug: Bug, tmp_path: Path) -> None:
    said = trial(in_a_copy(bug, tmp_path), tmp_path)
    print(said)
    assert said.startswith("CAUGHT"), said


def test_every_bug_still_fits_the_source(tmp_path: Path) -> None:
    for number, bug in enumerate(BUGS):
        in_a_copy(bug, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.usefixtures("built_simt")
def test_nothing_is_noticed_without_a_bug(tmp_path: Path) -> None:
    assert trial(simt_builder.CSRC, tmp_path) == "NOTHING NOTICED"
