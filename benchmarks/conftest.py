"""Collects what the benchmarks measured of their rivals and prints it as one table at the end."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.table import gpu_table

ROWS = pytest.StashKey[list[dict[str, Any]]]()
GPU_ROWS = pytest.StashKey[list[dict[str, Any]]]()
CEILINGS = pytest.StashKey[roofline.Ceilings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", type=float, default=float("inf"), help="seconds; GPU cases beyond it are shed")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[GPU_ROWS] = []


@pytest.fixture(scope="session")
def deadline(request: pytest.FixtureRequest) -> float:
    """time.monotonic() after which GPU cases are shed."""
    return time.monotonic() + request.config.getoption("--budget")


@pytest.fixture
def record_gpu(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Rows of the GPU table. The first to ask has the ceilings measured."""
    if CEILINGS not in request.config.stash:
        request.config.stash[CEILINGS] = roofline.measure()
    return request.config.stash[GPU_ROWS]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a figure needs beside it: the card, versions, commit, and the ceilings of this very run."""
    import pyllm

    machine_info.update(python=platform.python_version(), torch=torch.__version__, pyllm=pyllm.__version__)
    root = Path(__file__).parents[1]
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    machine_info["commit"] = git.stdout.strip()
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        machine_info.update(gpu=card.name, gpu_memory=card.total_memory, multiprocessors=card.multi_processor_count)
        machine_info["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        machine_info["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    if CEILINGS in config.stash:
        machine_info["ceilings"] = config.stash[CEILINGS]._asdict()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Rows of the closing table: op, case, dtype, threads, medians in seconds, the promised ratio."""
    return request.config.stash[ROWS]


@pytest.fixture(params=["one thread", "all threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's thread count, which the C++ kernels share."""
    before = torch.get_num_threads()
    wanted = 1 if request.param == "one thread" else before
    if wanted == 1 and request.param == "all threads":
        pytest.skip("this machine gives torch one thread")
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if gpu_rows := config.stash.get(GPU_ROWS, []):
        terminalreporter.section(f"kernels on {torch.cuda.get_device_name()}")
        for line in gpu_table(gpu_rows, config.stash[CEILINGS]):
            terminalreporter.write_line(line)
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    from pyllm.kernels.extension import cpu

    terminalreporter.section(f"C++ kernels ({cpu.module.isa}) against eager PyTorch {torch.__version__}")
    terminalreporter.write_line(
        f"{'op':<14}{'case':<30}{'dtype':<10}{'threads':<9}{'eager ms':>10}{'ours ms':>10}{'ratio':>8}{'noise':>8}"
        f"{'x compile':>11}  promise"
    )
    for row in rows:
        ratio, floor = row["eager"] / row["ours"], row["floor"]
        verdict = "" if floor is None else f">= {floor:g}: {'kept' if ratio >= floor else 'MISSED'}"
        terminalreporter.write_line(
            f"{row['op']:<14}{row['case']:<30}{row['dtype']:<10}{row['threads']:<9}{row['eager'] * 1e3:>10.3f}"
            f"{row['ours'] * 1e3:>10.3f}{ratio:>7.2f}x{row['noise']:>7.0%}{row['compile'] / row['ours']:>10.2f}x"
            f"  {verdict}"
        )
    terminalreporter.write_line(
        "forward + backward; eager as in Hugging Face's Llama; medians of interleaved rounds; noise: eager twice; "
        "x compile: torch.compile's time over ours"
    )
