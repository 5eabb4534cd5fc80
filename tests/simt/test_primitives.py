"""Every wrapper of PTX in csrc/common, kernel by kernel, by the same sources: on a GPU or else on the SIMT machine.

The machine shows that the kernels here use the wrappers rightly; only the GPU shows that the asm strings say the same.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import simt_builder
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / "primitives" / name for name in ("primitives.cu", "primitives_sm90a.cu", "primitives_bind.cpp")]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HOPPER = not GPU or torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="the GPU is not a Hopper (compute capability 9.0)")


@pytest.fixture(scope="module")
def primitives(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if GPU:
        return simt_builder.load(_compiled(tmp_path_factory.mktemp("primitives")), "_primitives")
    if reason := simt_builder.why_not():
        pytest.skip(reason)
    return simt_builder.load(simt_builder.link("_primitives", SOURCES), "_primitives")


def _compiled(folder: Path) -> Path:
    """The module for this machine's GPU."""
    import pybind11

    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        pytest.skip("no nvcc")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + "a" * HOPPER
    out = folder / f"_primitives{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [s for s in SOURCES if HOPPER or not s.stem.endswith("sm90a")]
    includes = (simt_builder.CSRC, HERE / "primitives", pybind11.get_include(), sysconfig.get_path("include"))
    flags = ["-std=c++17", "-O2", "-shared", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr"]
    flags += [
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        *["-DPYLLM_SM90A"] * HOPPER,
        *(f"-I{d}" for d in includes),
    ]
    done = subprocess.run([nvcc, *flags, *map(str, sources), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def run(module: Any, name: str, a: Tensor, b: Tensor | None, out: Tensor, n: int = 0, hopper: bool = False) -> Tensor:
    """out, as the kernel has filled it; on the CPU under the memory checker."""
    laid = [None if x is None else x.to(DEVICE).contiguous() for x in (a, b, out)]
    pointers = [0 if x is None else x.data_ptr() for x in laid]
    stream = torch.cuda.current_stream().cuda_stream if GPU else 0
    if not GPU:
        module.configure(check=True)
        module.clear_buffers()
        for x in laid:
            if x is not None:
                module.add_buffer(x.data_ptr(), x.numel() * x.element_size(), "an operand")
    (module.run_hopper if hopper else module.run)(name, *pointers, n, stream)
    if GPU:
        torch.cuda.synchronize()
    result = laid[2]
    assert result is not None
    return result.cpu()


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def words(x: Tensor) -> Tensor:
    """16-bit elements, two to a 32-bit word."""
    return x.contiguous().view(torch.int16).view(torch.int32)


def test_exp2(primitives: ModuleType) -> None:
    x = torch.cat([torch.linspace(-126, 127, 1001), torch.tensor([-float("inf"), 0.0, 1.0, -1.0])])
    got, want = run(primitives, "exp2", x, None, nan(x.numel()), x.numel()), torch.exp2(x.double())
    assert got[-4:].tolist() == [0.0, 1.0, 2.0, 0.5]
    assert ((got.double() - want).abs() <= 2 * want * 2.0**-23).all()


def test_exp(primitives: ModuleType) -> None:
    x = torch.cat([torch.linspace(-60, 0, 1001), torch.tensor([-float("inf"), 0.0])])
    got, want = run(primitives, "exp", x, None, nan(x.numel()), x.numel()), torch.exp(x.double())
    assert got[-2:].tolist() == [0.0, 1.0]
    assert ((got.double() - want).abs() <= (3 + 2 * x.abs()) * want * 2.0**-24)[:-2].all()


def test_max_keeps_nan(primitives: ModuleType) -> None:
    x, y = normal(500), normal(500, seed=1)
    x[::7], y[::5], x[3], y[4] = float("nan"), float("nan"), float("inf"), -float("inf")
    got = run(primitives, "max_nan", x, y, nan(500), 500)
    assert torch.equal(got.nan_to_num(nan=123.0), torch.maximum(x, y).nan_to_num(nan=123.0))


def test_tf32(primitives: ModuleType) -> None:
    x = normal(500)
    got = run(primitives, "tf32", x, None, torch.zeros(500, dtype=torch.int32), 500)
    assert (got & 0x1FFF == 0).all()
    assert ((got.view(torch.float32) - x).abs() <= x.abs() * 2.0**-11).all()


def test_cp_async(primitives: ModuleType) -> None:
    x = normal(1024)
    there = (torch.arange(1024) // 4 % 3 != 0).float()
    want = (x * there).view(2, 512).flip(1).flatten()
    assert torch.equal(run(primitives, "cp_async", x, None, nan(1024), 1024), want)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(primitives: ModuleType, transposed: bool) -> None:
    x = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    name = "ldmatrix" + "_transposed" * transposed
    got = run(primitives, name, x, None, torch.zeros(32, 4, dtype=torch.int32))
    want = (x.mT if transposed else x).contiguous().view(4, 32, 2)  # lane 4 g + t: row g, elements 2t and 2t + 1
    assert torch.equal(got, words(want).view(4, 32).T)


@pytest.mark.parametrize(
    ("name", "dtype", "depth"),
    [
        ("mma_bfloat16", torch.bfloat16, 16), ("mma_float16", torch.float16, 16), ("mma_float32", torch.float32, 8),
        ("mma_tf32", torch.float32, 8),
    ],
)  # fmt: skip
def test_mma(primitives: ModuleType, name: str, dtype: torch.dtype, depth: int) -> None:
    a, b = normal(16, depth, dtype=dtype), normal(8, depth, dtype=dtype, seed=1)
    want = a.double() @ b.double().T
    error = (run(primitives, name, a, b, nan(16, 8)) - want).abs().max()
    assert error < (2e-2 if name == "mma_tf32" else 3e-6)
    assert name != "mma_tf32" or error > 1e-5


def test_tile(primitives: ModuleType) -> None:
    x = normal(32, 96, dtype=torch.float16)
    assert torch.equal(run(primitives, "tile", x, None, nan(32, 96, dtype=torch.float16)), x.roll(-1, 0))


@needs_hopper
@pytest.mark.parametrize("row", [0, 36, 70, -5])
def test_box(primitives: ModuleType, row: int) -> None:
    x = normal(2, 100, 3, 200, dtype=torch.float16)
    got = run(primitives, "box", x, None, nan(64, 64, dtype=torch.float16), row, hopper=True)
    want = torch.zeros(64, 64, dtype=torch.float16)
    first, last = max(row, 0), min(row + 64, 100)
    want[first - row : last - row] = x[1, first:last, 1, 64:128]
    assert torch.equal(got, want)


@needs_hopper
@pytest.mark.parametrize("N", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("operand", ["rows", "columns"])
def test_wgmma(primitives: ModuleType, operand: str, dtype: torch.dtype, N: int) -> None:
    a = normal(64, 128, dtype=dtype)
    b = normal(*((N, 128) if operand == "rows" else (128, N)), dtype=dtype, seed=1)
    name = f"wgmma_{operand}_{str(dtype).removeprefix('torch.')}_{N}"
    want = a.double() @ (b.T if operand == "rows" else b).double()
    got = run(primitives, name, a, b, nan(64, N), hopper=True)
    assert (got - want).abs().max() < 5e-5


@needs_hopper
def test_fence(primitives: ModuleType) -> None:
    b = normal(64, 64, dtype=torch.bfloat16)
    got = run(primitives, "fence", b, b, nan(64, 64), hopper=True)
    assert (got - b.double() @ b.double().T).abs().max() < 5e-5


@needs_hopper
def test_ring(primitives: ModuleType) -> None:
    x = torch.arange(128 * 9, dtype=torch.float32)
    want = x.view(9, 128).sum(0).roll(-1)
    assert torch.equal(run(primitives, "ring", x, None, nan(128), x.numel(), hopper=True), want)


def test_every_wrapper_is_tried() -> None:
    """Functions of csrc/common that hold PTX, by name, in the kernels above."""
    tried = "".join(source.read_text() for source in SOURCES)
    for header in ("mma.cuh", "hopper.cuh"):
        text = (simt_builder.CSRC / "common" / header).read_text()
        functions = re.findall(r"\n(?:template <[^\n]*>\n)?(?:PYLLM_PRIMITIVE|__device__ __forceinline__|  __device__ "
                               r"__forceinline__) \w+(?:<\w+>)? (\w+)\(", text)  # fmt: skip
        assert len(functions) > 5
        for name in functions:
            assert re.search(rf"\b{name}\b", tried) or name in INSIDE, f"{name} of {header} has no kernel"


INSIDE = {
    "split_tf32": "mma<float>", "load_a": "attention's tests", "load_b_rows": "attention's tests",
    "load_b_columns": "attention's tests", "a_of_products": "attention's tests", "address": "Mbarrier",
}  # fmt: skip
