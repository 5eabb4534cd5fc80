"""Tests of the tests: bugs planted in the loss's C++, each of which the trials of native/loss_trials.py must notice.

A bug is a change of the source's text. When a text is no longer found, the source has changed: adapt the bug to it. The
same trials run once under AddressSanitizer and UndefinedBehaviorSanitizer without a bug.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from harness.cpu_kernels import load
from harness.mutants import Bug

HERE = Path(__file__).parent / "native"
CSRC = Path(__file__).parents[2] / "csrc"
LOSS, SOFTMAX = "cross_entropy/cross_entropy_cpu.cpp", "common/softmax.h"
GEMM, PACK = "linear/linear_cpu.cpp", "linear/pack.h"

# fmt: off
BUGS = {
    LOSS: [
        Bug("sum not rescaled when the maximum rises", "for (V& t : total) t *= scale;", "", quick=True),
        Bug("first tile only", "first < end; first += kTile", "first < min64(end, begin + kTile); first += kTile"),
        Bug("maximum of the first piece only", "s.top = larger(a.top, b.top);", "s.top = a.top;"),
        Bug("pieces not rescaled", "a.total * lane(exp_below(V{} - up_a))", "a.total"),
        Bug("rows of -inf so far rescaled", "from == S(-kInfinity) ? S(0) : to - from", "to - anchor(from)"),
        Bug("ignored rows not written", "store_out<kStream>(grad + begin + i, V{}, m); });\n    return;",
            "(void)i, (void)m; });\n    return;"),
        Bug("target not subtracted", "  if (inside) {", "  if (false) {"),
        Bug("target that begins a piece forgotten", "begin <= y && y < end", "begin < y && y < end"),
        Bug("gradient scaled after the target", "exp_below(v - lse) * share - minus",
            "(exp_below(v - lse) - minus) * share"),
        Bug("smoothing without the log", "(s.spread + o.weight_sum * log_total)", "s.spread"),
        Bug("spread not moved with the maximum", "s.spread += s.shares * up;", ""),
        Bug("spread of pieces not moved", "(b.spread + b.shares * up_b)", "b.spread"),
        Bug("half of z-loss's gradient", "share += 2 * o.z_loss", "share += o.z_loss"),
        Bug("z-loss not squared", "if (o.z_loss != 0) loss += o.z_loss * lse * lse;",
            "if (o.z_loss != 0) loss += o.z_loss * lse;"),
        Bug("softcap's slope forgotten", "slope = S(1) - t * t;", "slope = splat<V>(1.f);"),
        Bug("softcap forgotten at the target", "capped_scalar<VecOf<T>>(value(x + y), o))", "value(x + y))"),
        Bug("class weight forgotten at the target", "log_total) * o.weight_of(y);", "log_total);"),
        Bug("class weights of the first tile in all", "load(o.weight + first + i, m)", "load(o.weight + i, m)"),
        Bug("last of equals predicted", "highest > s.best", "highest >= s.best"),
        Bug("32-bit row offset", "+ row * a.x_stride", "+ int(row) * int(a.x_stride)"),
        Bug("one dloss for all rows", "[row * a.dloss_stride]", "[0]"),
        Bug("last row left out", "row < end; row++) forward_row", "row < end - 1; row++) forward_row"),
    ],
    SOFTMAX: [
        Bug("a lane past the end", "return lane < m.n ? v", "return lane <= m.n ? v", quick=True),
        Bug("exponents wrap", "max(splat<Vec>(-88.f), x)", "x"),
        Bug("tanh without its sign", "to_bits(far) | (to_bits(x) & 0x80000000u)", "to_bits(far)"),
        Bug("tanh's polynomial too far out", "size < 0.625f ? near", "size < 2.f ? near"),
    ],
    GEMM: [
        Bug("pieces of K overwrite each other", "k > 0 || g.accumulate", "g.accumulate", quick=True),
        Bug("chunks overwrite each other", "k > 0 || g.accumulate", "k > 0"),
        Bug("bias forgotten", "if (bias) v += load(bias + n, part);", ""),
        Bug("bias of the first columns for all", "static_cast<const float*>(g.bias) + n",
            "static_cast<const float*>(g.bias)"),
        Bug("whole tiles at the right edge", "rows == kMR && cols == kNR", "rows == kMR"),
        Bug("whole tiles at the lower edge", "rows == kMR && cols == kNR", "cols == kNR"),
        Bug("three rows as two", "if (rows > 2) return tile<4>", "if (rows > 3) return tile<4>"),
        Bug("threads share columns", "(i * each + min64(i, extra))", "(i * each)"),
        Bug("rows of b in the wrong piece", "n, cols, k, K, packed_b", "n, cols, 0, K, packed_b"),
        Bug("rows of a in the wrong block", "top + m, rows, k, K, packed_a", "top, rows, k, K, packed_a"),
        Bug("last odd row not summed", "if (m < a.M) even +=", "if (m < a.M - 1) even +="),
        Bug("sums start anew with every chunk", "if (a.accumulate) sum +=", "if (false) sum +="),
    ],
    PACK: [
        Bug("lanes exchanged", "_MM_SHUFFLE(3, 2, 3, 2)", "_MM_SHUFFLE(2, 3, 3, 2)"),
        Bug("halves exchanged", "permute2f128_ps(r[i], r[4 + i], 0x20)", "permute2f128_ps(r[4 + i], r[i], 0x20)"),
        Bug("last column for all", "min64(w + i, width - 1)", "(width - 1)"),
        Bug("rest of K left out", "  for (; k < K; k++)\n    for (int64_t w = 0; w < W; w++)",
            "  for (; k < K - 1; k++)\n    for (int64_t w = 0; w < W; w++)"),
    ],
}
# fmt: on
PATH = os.pathsep.join(str(HERE.parents[i]) for i in (1, 2))
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


@pytest.fixture(scope="module")
def avx2() -> None:
    try:
        load("avx2")
    except ImportError as error:
        pytest.skip(str(error))


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def build(csrc: Path, folder: Path, *flags: str, ready: Path | None = None, changed: str = "") -> Path:
    """A module of the loss's kernels, for AVX2. ready: a folder with the objects that a change leaves as they are."""
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{d}" for d in (csrc, pybind11.get_include(), sysconfig.get_path("include"))]
    common = [*compiler(), "-std=c++17", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    kernel = ["-mavx2", "-mfma", "-mf16c", "-DPYLLM_ISA=avx2"]
    sources = {csrc / LOSS: kernel, csrc / GEMM: kernel, csrc / "bind_cpu_loss.cpp": [], HERE / "loss_module.cpp": []}
    rebuilt = {SOFTMAX: LOSS, PACK: GEMM}.get(changed, changed)
    objects, runs = [], []
    for source, own in sources.items():
        target = (ready or folder) / f"{source.stem}.o"
        if ready is None or source == csrc / rebuilt:
            target = folder / target.name
            command = [*common, *flags, *own, *includes, "-c", str(source), "-o", str(target)]
            runs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        objects.append(str(target))
    for run in runs:
        _, said = run.communicate(timeout=600)
        assert run.returncode == 0, said
    module = folder / f"_loss{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*compiler(), "-shared", "-fopenmp", *flags, *objects, "-o", str(module)], check=True, timeout=600)
    return module


@pytest.fixture(scope="module")
def ready(avx2: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the kernels as they are."""
    folder = tmp_path_factory.mktemp("ready")
    build(CSRC, folder)
    return folder


def trial(module: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(HERE / "loss_trials.py"), str(module)],
        capture_output=True, text=True, timeout=900, env={**os.environ, **environment, "PYTHONPATH": PATH},
    )  # fmt: skip
    assert done.stdout.startswith("loaded"), done.stderr  # or a module that can't be imported would look like a find
    return f"CAUGHT {done.stderr[-2000:]}" if done.returncode else done.stdout.removeprefix("loaded").strip()


def plant(file: str, bug: Bug, folder: Path) -> Path:
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    source = (csrc / file).read_text()
    assert bug.text in source, f"{bug.name}: {file} has changed, its text isn't there: {bug.text!r}"
    (csrc / file).write_text(source.replace(bug.text, bug.instead))
    return csrc


EVERY = [pytest.param(f, b, id=b.name, marks=pytest.mark.slow) for f, bugs in BUGS.items() for b in bugs]


@pytest.mark.parametrize(("file", "bug"), EVERY)
def test_planted_bug_is_noticed(file: str, bug: Bug, ready: Path, tmp_path: Path):
    said = trial(build(plant(file, bug, tmp_path), tmp_path, ready=ready, changed=file))
    print(said)
    assert said.startswith("CAUGHT"), said


def test_every_bug_still_fits_the_source():
    for file, bugs in BUGS.items():
        source = (CSRC / file).read_text()
        for bug in bugs:
            assert bug.text in source, f"{bug.name}: {file} has changed, its text isn't there: {bug.text!r}"


@pytest.mark.slow
def test_nothing_is_noticed_without_a_bug(ready: Path):
    assert trial(next(ready.glob("_loss*"))) == "NOTHING NOTICED"


@pytest.mark.slow
@pytest.mark.usefixtures("avx2")
def test_sanitizers_find_nothing(tmp_path: Path):
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        found = subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        libraries.append(found)
    module = build(CSRC, tmp_path, *SANITIZE)
    said = trial(module, LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0")
    assert said == "NOTHING NOTICED", said
