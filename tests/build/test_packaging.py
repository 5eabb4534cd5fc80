"""Builds and installs, each in a fresh virtual environment, from a copy of the tree (marker: packaging).

The environments borrow this one's torch through a .pth file: what is tested is pyllm's own build, not torch's download.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging
ROOT = Path(__file__).parents[2]
# Builds after the wheel's, the same sources: whether they are built and found is asked, not how fast they run.
QUICK = {"PYLLM_BUILD": "cpu", "CXXFLAGS": "-O1"}
ARM = "aarch64-linux-gnu-g++"

# Run from an empty folder: what users see after an installation.
WORKS = """
import torch, pyllm
from pyllm.kernels import _cpu, describe, rms_norm
x = torch.randn(5, 100, requires_grad=True)
y = rms_norm(x, torch.ones(100), backend="cpu")
y.sum().backward()
expected = torch.nn.functional.rms_norm(x, (100,), torch.ones(100), 1e-6)
assert torch.allclose(y, expected, atol=1e-5), (y - expected).abs().max()
print(describe("cpu"))
print("from", pyllm.__file__)
"""


def call(*command: object, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYLLM", "TRITON", "COV"))}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, env={**environment, **env}, timeout=900
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the files that git knows or would add, symbolic links as links."""
    target = tmp_path_factory.mktemp("tree")
    listed = call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in listed:
        source = ROOT / name
        if source.exists() or source.is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target


@pytest.fixture
def environment(tmp_path) -> Path:
    """Python of a fresh virtual environment that can see this one's packages but not its pyllm."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    site = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    )
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def borrowed_pyllm_is_hidden(python: Path, cwd: Path) -> None:
    """An editable pyllm of this environment would be found through the .pth file: it must come after the fresh one."""
    where = call(python, "-c", "import pyllm; print(pyllm.__file__)", cwd=cwd).stdout.strip()
    assert not where.startswith(str(ROOT)), where


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    """A wheel from pip's isolated build: CPU, and CUDA where there is nvcc (one architecture, for time)."""
    out = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, ".", cwd=tree, PYLLM_CUDA_ARCHS="90")
    return next(out.glob("*.whl"))


def test_wheel_holds_what_it_should(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.startswith("pyllm/kernels/_cpu.") and n.endswith(".so") for n in names)
    assert "pyllm/kernels/rms_norm/triton_rms_norm.py" in names
    assert "pyllm/model.py" in names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "benchmarks/", "csrc/"))]
    assert (any("/_cuda." in n for n in names)) == (shutil.which("nvcc") is not None)


def test_wheel_works_from_anywhere(wheel, environment, tmp_path):
    call(environment, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path)
    borrowed_pyllm_is_hidden(environment, tmp_path)
    assert "cpu" in call(environment, "-c", WORKS, cwd=tmp_path).stdout
    assert "rms_norm" in call(environment.parent / "pyllm", "kernels", cwd=tmp_path).stdout


def test_compiled_modules_depend_on_no_torch_and_no_cuda_library(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for module in tmp_path.glob("pyllm/kernels/*.so"):
        needed = call("ldd", module, cwd=tmp_path).stdout
        assert not any(word in needed for word in ("torch", "c10", "libcuda", "cudart")), needed
        symbols = call("nm", "-D", "--undefined-only", module, cwd=tmp_path).stdout
        assert "c10" not in symbols
        assert "at::" not in symbols


def test_portable_code_is_not_replaced_by_avx(wheel, tmp_path):
    """No weak symbol: the linker may keep any copy of one, also the copy compiled with AVX."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    module = next(tmp_path.glob("pyllm/kernels/_cpu.*"))
    symbols = call("nm", "-C", "--defined-only", module, cwd=tmp_path).stdout.splitlines()
    inside = [line for line in symbols if any(f"pyllm::{isa}::" in line for isa in ("base", "avx2", "avx512"))]
    assert inside, "the check looks for namespaces that are not there"
    weak = [line for line in inside if " W " in line or " V " in line]
    assert not weak, weak[:5]


def test_sdist_builds_a_wheel(tree, environment, tmp_path):
    call(sys.executable, "-m", "build", "--sdist", "-o", tmp_path, ".", cwd=tree)
    sdist = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert any(n.endswith("csrc/common/simd.h") for n in names)
    assert any(n.endswith("pyllm/kernels/rms_norm/reference.py") for n in names)
    call(environment, "-m", "pip", "install", "--no-deps", sdist, cwd=tmp_path, **QUICK)
    borrowed_pyllm_is_hidden(environment, tmp_path)
    assert "cpu" in call(environment, "-c", WORKS, cwd=tmp_path).stdout


@pytest.mark.parametrize("mode", ["editable", "plain"])
def test_pip_install(tree, environment, tmp_path, mode):
    flags = ["-e"] if mode == "editable" else []
    call(environment, "-m", "pip", "install", "--no-deps", *flags, tree, cwd=tmp_path, **QUICK)
    text = call(environment, "-c", WORKS, cwd=tmp_path).stdout
    assert f"from {tree}" in text if mode == "editable" else f"from {tmp_path}" in text


def test_the_installed_torch_stays(tree, environment, tmp_path):
    """With a torch in range, installing pyllm plans no other torch."""
    plan = call(environment, "-m", "pip", "install", "--dry-run", tree, cwd=tmp_path, PYLLM_BUILD="cpu").stdout
    assert "Would install" in plan
    assert "torch-" not in plan.split("Would install")[1]


def test_what_the_build_says(tree, tmp_path):
    """One plain line per compiled part; CUDA asked for without nvcc is an error with the remedy."""
    build = (sys.executable, "setup.py", "--quiet", "--version")
    text = call(*build, cwd=tree, CUDA_HOME="/nowhere").stderr
    assert "pyllm: building pyllm.kernels._cpu for" in text
    assert "pyllm: skipping pyllm.kernels._cuda: CUDA_HOME=/nowhere has no bin/nvcc" in text
    assert "skipping pyllm.kernels._cuda: PYLLM_BUILD=cpu" in call(*build, cwd=tree, PYLLM_BUILD="cpu").stderr
    refused = call(*build, cwd=tree, check=False, CUDA_HOME="/nowhere", PYLLM_BUILD="cuda")
    assert refused.returncode != 0
    assert "install the CUDA toolkit, or set CUDA_HOME" in refused.stderr
    wrong = call(*build, cwd=tree, check=False, PYLLM_BUILD="gpu")
    assert wrong.returncode != 0
    assert "PYLLM_BUILD must be auto, cpu or cuda, got 'gpu'" in wrong.stderr


@pytest.mark.skipif(shutil.which(ARM) is None, reason=f"no {ARM} (Debian: g++-aarch64-linux-gnu)")
def test_cpu_kernels_compile_for_aarch64(tmp_path):
    flags = ["-std=c++17", "-O2", "-fPIC", "-fopenmp", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DPYLLM_ISA=base"]
    for source in sorted((ROOT / "csrc").glob("*/*_cpu.cpp")):
        call(ARM, *flags, f"-I{ROOT / 'csrc'}", "-c", source, "-o", tmp_path / "out.o", cwd=tmp_path)
