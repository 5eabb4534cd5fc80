"""Bugs planted in attention's C++: the checks of harness/attention_cpu.py must catch each.

A bug is a change of the source's text. When a text is no longer found, the source has changed: adapt the bug to it.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from harness import attention_cpu as checks
from harness.mutants import Bug, in_a_process

from pyllm.kernels import extension

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = ("attention_fwd", "attention_bwd", "attention_few")
SECONDS = 900  # of a trial, after which it counts as a hang: it takes some ten
compiler = shutil.which("c++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler is None, reason="no C++ compiler"),
    pytest.mark.skipif(extension.cpu.module is None, reason=extension.cpu.reason or "built"),
]

# fmt: off
BUGS = {
    "vector_math.h": [
        Bug("last coefficient of 2^x", "1.5353362e-4f", "0.f"),
        Bug("small powers not flushed", "clamp(x, -127.f, 128.f)", "clamp(x, -126.f, 128.f)"),
        Bug("small powers wrap", "clamp(x, -127.f, 128.f)", "x"),
        Bug("tanh by its far form alone", "size < 0.625f ? near", "size < 0.f ? near"),
        Bug("tanh without its sign", "to_bits(far) | (to_bits(x) & 0x80000000u)", "to_bits(far)"),
        Bug("a lane too many", "(lane < near(end - start))", "(lane <= near(end - start))"),
        Bug("a lane too few", "(lane >= near(at - start))", "(lane > near(at - start))"),
    ],
    "decode_cpu.h": [
        Bug("out not faded", "load(out + d, Full{}) * fade", "load(out + d, Full{})"),
        Bug("sum not faded", "*l *= fade;\n    for (int64_t d = 0; d < width", "for (int64_t d = 0; d < width"),
        Bug("runs not weighted", "load(out + i * out_step + d, Full{}) * weight", "load(out + i * out_step + d, Full{})"),
        Bug("sums of runs not weighted", "l[i * step] * weight :", "l[i * step] :"),
        Bug("block of a paged key", "table[s / block_size] * block", "table[0] * block"),
        Bug("key of a block", "s % block_size * step", "0 * step"),
        Bug("padding of a row", "for (int64_t i = n; i < width; i++) to[i] = 0;", ""),
        Bug("last row of a group of heads", "for (; r < a.rows; r++) rows_from", "for (; r + 1 < a.rows; r++) rows_from"),
    ],
    "sequences.h": [
        Bug("first query on the first key", "row / s.group + s.S - s.T", "row / s.group"),
        Bug("a key too many", "at + a.right + 1", "at + a.right + 2"),
        Bug("window a key short", "max64(at - a.left, 0)", "max64(at - a.left + 1, 0)"),
        Bug("heads of a group", "(head * s.group + row % s.group) * stride.h", "(head + row % s.group) * stride.h"),
        Bug("32-bit tokens", "(s.q_row + row / s.group) * stride.t", "int32_t((s.q_row + row / s.group) * stride.t)"),
        Bug("32-bit sequences", "b * ks.b + s.k_row", "int32_t(b * ks.b) + s.k_row"),
        Bug("lse without its sum", "(m + log2(l)) * kLn2<S>", "m * kLn2<S>"),
        Bug("rows of no sequence not written", "const int64_t first = shape.cu_q[shape.B], n", "const int64_t first = shape.T, n"),
        Bug("softcap's scale", "a.scale / a.softcap : ", "a.scale : "),
    ],
    "tiles.h": [
        Bug("rows of a tile's rest", "if (rows >= 2) some(Index<2>{});", ""),
        Bug("second vector", "return cols - col <= Compute<S>::kLanes;", "return cols - col <= kPanel<S>;"),
        Bug("panels of the left factor", "depth -= kStep, a += a_panel", "depth -= kStep"),
        Bug("values before the window", "seen = s + i >= span.first && s + i < span.end;", "seen = s + i < span.end;"),
    ],
    "blocks.h": [
        Bug("last panel of a strip", "(end + kStep - 1) / kStep", "end / kStep"),
        Bug("first panel of a strip", "min64(first, n) / kStep", "(min64(first, n) + kStep - 1) / kStep"),
        Bug("a wave too large", "sum + size(end) <= budget", "true"),
        Bug("panels of a strip's first key", "scores + first * panel + row * kStep", "scores + row * kStep"),
    ],
    "attention_fwd_cpu.cpp": [
        Bug("out not faded", "load(out + x * kLanes, Full{}) * fade", "load(out + x * kLanes, Full{})"),
        Bug("sum not faded", "    *l *= fade;\n", ""),
        Bug("sink not in the sum", "room.l[r] = room.m[r] > -__builtin_inff() ? 1 : 0;", "room.l[r] = 0;"),
        Bug("sink in other units", "% s.group] * kLog2E<S>", "% s.group]"),
        Bug("blocks of the wrong job", "jobs[j + 1].task - 1 - task", "(jobs[j + 1].task - 1 - task) / 2"),
        Bug("softcap in other units", "S(shape.softcap) * kLog2E<S>", "S(shape.softcap)"),
        Bug("last block of keys", "key < seen.end; key += kKeys", "key + kKeys <= seen.end || key == 0; key += kKeys"),
    ],
    "attention_bwd_cpu.cpp": [
        Bug("delta without dlse", "- (a.dlse ? static_cast<const S*>(a.dlse)[at] : S(0));", ";"),
        Bug("slope of the softcap", "slope = 1.f - s * s;", ""),
        Bug("dS of unseen keys", "d = inside(d, key + x * kLanes, seen.first, seen.end, 0);", ""),
        Bug("P of unseen keys", "e = inside(e, key + x * kLanes, seen.first, seen.end, 0);", ""),
        Bug("rows of the first strip alone", "const int64_t row = strip * kTileRows, depth = min64(strips_end * kTileRows, rows) - row;", "const int64_t row = 0, depth = min64(strips_end * kTileRows, rows);"),
        Bug("first task's sums only", "task < count; task++) {\n                if", "task < 1; task++) {\n                if"),
        Bug("sums of a task that saw nothing", "if (key < seen[task].first || key >= seen[task].end) continue;", ""),
        Bug("scale of dq", "* S(a.shape.scale), m);", ", m);"),
        Bug("scale of dk", "shape.softcap != 0 ? shape.softcap : kLn2<double>", "1"),
        Bug("last slice of keys", "s.S * (slice + 1) / kSlices", "s.S / kSlices * (slice + 1)"),
        Bug("block of a stretch", "room.lse += block * kRows, ", ""),
        Bug("keys of the next step", "end = min64(end, room.span[rows - 1].end);", "end = room.span[rows - 1].end;"),
        Bug("sinks of all batch entries", "b < batch; b++) {", "b < 1; b++) {"),
    ],
    "attention_few_cpu.cpp": [
        Bug("sink in every split", "const bool sink = a.sinks && split == 0;", "const bool sink = a.sinks;"),
        Bug("splits overlap", "min64(begin + keys, seen.end)", "min64(begin + keys + 1, seen.end)"),
        Bug("last split", "(longest + keys - 1) / keys", "longest / keys"),
        Bug("rows of another head", "q + at * width, span", "q, span"),
        Bug("a sequence without keys not written", "if (n == 0) continue;", "if (n == 0 || s.S == 0) continue;"),
    ],
}
# fmt: on
PAIRS = [pytest.param(file, bug, id=f"{file}-{bug.name}") for file, bugs in BUGS.items() for bug in bugs]


def build(folder: Path, file: str = "", bug: Bug | None = None) -> Path:
    """The module, with the bug in it; only the objects that can have changed are compiled again."""
    import pybind11

    avx2 = extension.cpu.module.isa != "base"
    flags = ["-std=c++17", "-O1", "-fPIC", "-fopenmp", f"-DPYLLM_ISA={'avx2' if avx2 else 'base'}", "-w"]
    flags += ["-mavx2", "-mfma", "-mf16c"] if avx2 else []
    changed = folder / "csrc"
    shutil.copytree(CSRC, changed)
    if bug is not None:
        source = (changed / "attention" / file).read_text()
        assert bug.text in source, f"{bug.name}: the source has changed, this text isn't there: {bug.text!r}"
        (changed / "attention" / file).write_text(source.replace(bug.text, bug.instead))
    flags += [f"-I{d}" for d in (changed, pybind11.get_include(), sysconfig.get_path("include"))]
    kernels = [f"attention/{name}_cpu.cpp" for name in KERNELS]
    sources = [Path(__file__).parent / "native/attention_module.cpp", changed / "bind_cpu_attention.cpp"]
    sources += [changed / name for name in kernels]
    objects = []
    for source in sources:
        kept = folder.parent / f"unchanged_{source.stem}.o"  # the folders of all bugs are neighbours
        fresh = bug is None or (source.parent.name == "attention" and (file.endswith(".h") or file == source.name))
        made = folder / f"{source.stem}.o" if fresh and bug is not None else kept
        if fresh or not kept.exists():
            subprocess.run([compiler or "", *flags, "-c", str(source), "-o", str(made)], check=True)
        objects.append(str(made))
    module = folder / "attention_module.so"
    subprocess.run([compiler or "", "-shared", "-fopenmp", *objects, "-o", str(module)], check=True)
    return module


def trial(path: Path) -> str:
    """What the checks say of a module; empty when they find nothing."""
    spec = importlib.util.spec_from_file_location("attention_module", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        checks.check_exp(module)
        checks.check_tanh(module)
        for name in checks.CASES:
            checks.check_accuracy(module, name, torch.float32)
        checks.check_accuracy(module, "packed", torch.bfloat16)
        for name in checks.DECODE:
            checks.check_decode(module, name, torch.float32)
        checks.check_unseen_values(module)
        checks.check_offsets(module)
        checks.check_waves(module)
    except Exception as found:  # whatever a bug provokes
        return f"{type(found).__name__}: {found}"
    return ""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attention")


def test_no_false_alarm(shelf: Path):
    folder = shelf / "none"
    folder.mkdir()
    module = build(folder)
    assert in_a_process(lambda: trial(module), SECONDS) == ""


@pytest.mark.parametrize(("file", "bug"), PAIRS)
def test_planted_bug_is_noticed(shelf: Path, file: str, bug: Bug, request: pytest.FixtureRequest):
    folder = shelf / request.node.callspec.id.replace("/", "_")
    folder.mkdir()
    module = build(folder, file, bug)
    try:
        assert in_a_process(lambda: trial(module), SECONDS), "nobody noticed"
    finally:
        shutil.rmtree(folder)
