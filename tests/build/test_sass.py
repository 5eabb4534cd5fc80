"""What nvcc makes of the kernels, read back without a GPU: registers, spills, shared memory, width of memory accesses.

`sass_budget.json` maps regular expressions of "sm_90 kernel<template arguments>" to limits, as `budget.py` reads them.
Counts are of instructions in the machine code (SASS).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
import budget  # noqa: E402

BUDGET = budget.read(HERE / "sass_budget.json")
ARCHS = ("80", "90", "100")
COUNTED = {
    "LDG.128": r"\bLDG\.E\S*\.128",
    "STG.128": r"\bSTG\.E\S*\.128",
    "LDGSTS": r"\bLDGSTS\.E\S*\.128",  # cp.async of 16 bytes
    "LDSM": r"\bLDSM\b",  # ldmatrix
    "HMMA": r"\bHMMA\b",
    "HGMMA": r"\bHGMMA\b",  # wgmma
    "UTMALDG": r"\bUTMALDG\b",  # boxes by TMA
    "LDL": r"\bLDL\b",  # loads and stores of spilled registers
    "STL": r"\bSTL\b",
    "FP64": r"\bD(ADD|MUL|FMA)\b",  # a double slipped in: 1/64 of the speed
}

Kernels = dict[str, Counter]


def find_nvcc() -> str | None:
    found = shutil.which("nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return found or (str(usual) if usual.is_file() else None)


def find_cuobjdump() -> str | None:
    """CUDA's own, or the one that Triton carries."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(carried) if carried.is_file() else None


def dump(*options: str) -> str:
    tool = find_cuobjdump()
    assert tool is not None
    return subprocess.run([tool, *options], capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> dict[str, str]:
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = []
    for name in plain.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|pyllm::|^void |\((bool|int)\)", "", name)
        name = name.split(">(")[0] + ">" if ">(" in name else name.split("(")[0]
        short.append(name.replace("__nv_bfloat16", "bf16").replace("__half", "f16"))
    return dict(zip(names, short, strict=True))


def read(binary: Path) -> Kernels:
    """Resources and counted instructions of every kernel in an object file."""
    kernels: dict[tuple[str, str], Counter] = {}
    arch = function = ""
    for line in dump("--dump-resource-usage", str(binary)).splitlines():
        if m := re.search(r"arch = (sm_\w+)", line):
            arch = m[1]
        elif m := re.search(r"Function (\S+):", line):
            function = m[1]
        elif "REG:" in line:
            value = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            found = Counter(registers=value["REG"], stack=value["STACK"] + value["LOCAL"], shared=value["SHARED"])
            kernels[arch, function] = found
    for line in dump("-sass", str(binary)).splitlines():
        if m := re.search(r"arch = (sm_\w+)", line):
            arch = m[1]
        elif m := re.search(r"Function : (\S+)", line):
            function = m[1]
        elif "/*" in line:
            for name, pattern in COUNTED.items():
                kernels[arch, function][name] += bool(re.search(pattern, line))
    names = demangled(sorted({f for _, f in kernels}))
    return {f"{a} {names[f]}": counts for (a, f), counts in kernels.items()}


@pytest.fixture(scope="module", params=sorted({p.parent.name for p in ROOT.glob("csrc/*/*_cuda.cu")}))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Those of an op, from all of its source files."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    if find_cuobjdump() is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor Triton's")
    scratch = tmp_path_factory.mktemp("sass")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-DPYLLM_SM90A"]

    def compiled(source: Path) -> Kernels:
        out = scratch / f"{source.stem}.o"
        archs = ["90a"] if source.name.endswith("_sm90a_cuda.cu") else ARCHS
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        command = [nvcc, *flags, *gencode, "-c", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # So it says when it must wait for each wgmma before the next, or leaves setmaxnreg out.
        assert "Potential Performance Loss" not in done.stderr + done.stdout, done.stderr
        return read(out)

    found: Kernels = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for part in pool.map(compiled, sorted((ROOT / "csrc" / request.param).glob("*_cuda.cu"))):
            found.update(part)
    return found


@pytest.mark.slow
def test_kernels_keep_their_budget(kernels: Kernels) -> None:
    assert {name.split()[0] for name in kernels} - {"sm_90a"} == {f"sm_{a}" for a in ARCHS}
    over = budget.broken(BUDGET, kernels)
    assert not over, "\n".join(over)


@pytest.mark.slow
def test_every_line_of_the_budget_is_about_a_kernel(kernels: Kernels) -> None:
    """A pattern that matches nothing would let everything through. Holds for the patterns that name this file's op."""
    ops = {name.split()[1].split("_kernel")[0].split("_")[0] for name in kernels}
    about = {p: limits for p, limits in BUDGET.items() if any(p.startswith(op) for op in ops)}
    assert about
    unused = budget.unused(about, list(kernels))
    assert not unused, f"patterns that match nothing: {unused}"
