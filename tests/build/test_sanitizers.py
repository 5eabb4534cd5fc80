"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and a planted error that they must find.

The module is built once more, in a copy of the tree, and the generic tests of all ops with a "cpu" row run there, and
the decoding engine's: torch's tensors come from malloc, so that an access one element outside of one is seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness.cpu_kernels import ISAS, load

ROOT = Path(__file__).parents[2]
GXX = shutil.which(os.environ.get("CXX") or "c++")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
OPTIMISE = "-O1"  # the checks make -O3 take minutes


def library(name: str) -> str:
    """Where the compiler has one of its libraries; its bare name where it has none."""
    assert GXX is not None
    return subprocess.run([GXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GXX is None, reason="no C++ compiler"),
    pytest.mark.skipif(GXX is not None and not os.path.isabs(library("libasan.so")), reason="no libasan"),
]


def build(tree: Path) -> None:
    environment = {
        **os.environ,
        "CXX": f"{GXX} {FLAGS}",
        "CXXFLAGS": OPTIMISE,
        "PYLLM_BUILD": "cpu",
        "PYTHONPATH": str(tree),
    }
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def run_tests(tree: Path, isa: str, *selection: str) -> subprocess.CompletedProcess[str]:
    # Leaks: Python itself never frees all. libstdc++ comes with libasan, or a thrown exception is not recognised.
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(tree),
        "PYLLM_CPU_ISA": isa,
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", *selection]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=3000)


def supported(isa: str) -> None:
    try:
        load(isa)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of all that the tests need, with a module that watches itself."""
    copy = tmp_path_factory.mktemp("sanitized") / "tree"
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "build", ".git", ".venv", "*.egg-info")
    for folder in ("csrc", "kernels", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=left_out)
    shutil.copytree(ROOT / "pyllm", copy / "pyllm", symlinks=True, ignore=left_out)
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, copy / file)
    build(copy)
    return copy


# AVX-512 reads and writes a row's last elements by masked instructions, which the sanitizer does not look into; the
# other instruction sets do it one by one.
@pytest.mark.parametrize("isa", ISAS)
def test_all_ops_are_clean(tree, isa):
    """Every case of every op, forward and backward, on one thread and several; float32 and bfloat16."""
    supported(isa)
    done = run_tests(tree, isa, "tests/ops/test_cpu_threads.py", "-k", "same_bits")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_called_directly_are_clean(tree, isa):
    """Vector tails, strides, addresses that are aligned to nothing."""
    supported(isa)
    files = "tests/ops/test_cpu_kernels.py", "tests/ops/test_cpu_rotary.py"
    done = run_tests(tree, isa, *files, "-k", f"{isa} and not past_the_cache")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_the_decoding_engine_is_clean(tree, isa):
    """Whole steps in every dtype, caches that are long, rings or trees; packed weights."""
    supported(isa)
    done = run_tests(tree, isa, *ENGINE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


ENGINE = (
    "tests/model/test_engine.py",
    "tests/model/test_quantized.py",
    "-k",
    "equals_the_models or long_caches or rings or trees or mates or rounded_weights or rows_and_threads",
)
SWIGLU = ("tests/ops/test_cpu_threads.py", "-k", "same_bits and swiglu")
PLANTED = {  # what the sanitizer calls it, file, what is there, what is put there instead, the tests that are run
    "overread": (
        "heap-buffer-overflow",
        "csrc/swiglu/swiglu_cpu.cpp",
        "body(row, first, min64(kTile, cols - first));",
        "body(row, first, min64(kTile, cols - first) + 1);",
        SWIGLU,
    ),
    "overflow": (
        "runtime error: signed integer overflow",
        "csrc/swiglu/swiglu_cpu.cpp",
        "const int64_t per_row = (cols + kTile - 1) / kTile;",
        "const int64_t per_row = (cols + kTile - 1) / kTile + (int(cols) * 2000000000 == int(rows));",
        SWIGLU,
    ),
    "engine": (
        "heap-buffer-overflow",
        "csrc/decode/product.h",
        "const int outputs = int(min64(kOutputs, end - n));",
        "const int outputs = int(min64(kOutputs, end - n)) + 1;",
        ENGINE,
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_found(tree, name):
    what, file, right, wrong, tests = PLANTED[name]
    source = tree / file
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    try:
        build(tree)
        done = run_tests(tree, "base", *tests)
    finally:
        source.write_text(text)
    assert done.returncode != 0
    assert what in done.stdout + done.stderr
