"""Collects what the benchmarks measured of their rivals and prints it as one table at the end."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.journal import Journal, begun
from benchmarks.table import gpu_table

ROWS = pytest.StashKey[list[dict[str, Any]]]()
GPU_ROWS = pytest.StashKey[list[dict[str, Any]]]()
CEILINGS = pytest.StashKey[roofline.Ceilings]()
CPU_CEILINGS = pytest.StashKey[dict[str, dict[str, float]]]()
JOURNAL = pytest.StashKey[Journal]()
STARTED = pytest.StashKey[tuple[float, list[str]]]()
WRITTEN = pytest.StashKey[dict[str, int]]()
# Kinds of benchmark, the most wanted first, and their shares of the budget; what one doesn't use the next ones have.
GPU = torch.cuda.is_available()
SHARES = {
    "test_gpu.py": 0.7 if GPU else 0.0,
    "test_cpu.py": 0.5,
    "test_train.py": 0.1,
    "test_generate.py": 0.2,
    "test_recurrence.py": 0.12,
    "test_kv_heads.py": 0.08,
}
ORDER = tuple(SHARES)
CPU_BUDGET = 480.0
LATER = ("compile", "eager again")  # compiling takes seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget",
        type=float,
        default=float("inf") if GPU else CPU_BUDGET,
        help=f"seconds; cases beyond it are shed. {CPU_BUDGET:g} where there is no GPU; inf: all cases, every rival",
    )
    parser.addoption("--journal", type=Path, help="append what happens to this file; tests begun in it are left out")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[GPU_ROWS] = []
    config.stash[JOURNAL] = Journal(config.getoption("--journal"))
    config.stash[WRITTEN] = {"cpu": 0, "gpu": 0}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=importance)
    file = config.getoption("--journal")
    if file is not None and (done := begun(file)):
        again = [item for item in items if item.nodeid in done]
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if item.nodeid not in done]


def importance(item: pytest.Item) -> tuple[int, int, bool]:
    """What comes first: by kind, on a GPU by case, then those who are quickly timed."""
    kind = ORDER.index(item.path.name) if item.path.name in ORDER else len(ORDER)
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    case = parameters.get("case")
    return kind, getattr(case, "priority", 0), parameters.get("who") in LATER


def pytest_sessionstart(session: pytest.Session) -> None:
    machine: dict[str, Any] = {}
    if session.config.getoption("--journal") is not None:
        pytest_benchmark_update_machine_info(session.config, machine)
        session.config.stash[JOURNAL].write(machine=machine)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Begin and end of each test, and in between the rows that it added."""
    journal = item.config.stash[JOURNAL]
    journal.write(begin=item.nodeid)
    OUTCOMES[item.nodeid] = ("passed", "")
    result = yield
    written = item.config.stash[WRITTEN]
    for kind, key in (("cpu", ROWS), ("gpu", GPU_ROWS)):
        for row in item.config.stash[key][written[kind] :]:
            for contender in contenders(row):
                journal.row(contender)
        written[kind] = len(item.config.stash[key])
    outcome, why = OUTCOMES.pop(item.nodeid)
    journal.write(end=item.nodeid, outcome=outcome, why=why)
    return result


OUTCOMES: dict[str, tuple[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        OUTCOMES[report.nodeid] = ("failed", str(crash.message if crash is not None else report.longrepr)[:500])
    elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        OUTCOMES[report.nodeid] = ("skipped", report.longrepr[2].removeprefix("Skipped: "))


def contenders(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row of the CPU's table has one time per contender; the journal has one row per contender."""
    if "who" in row:
        yield row
        return
    about = {k: v for k, v in row.items() if k not in CPU_WHO}
    for name, who in CPU_WHO.items():
        if row.get(name) is not None:
            yield {"passed": "step", "bytes": 0, "flops": 0, "spread": 0.0, **about, "who": who, "seconds": row[name]}


CPU_WHO = {"eager": "eager", "ours": "cpu", "again": "eager again", "compile": "compile", "torch": "torch"}


def cpu_ceilings(config: pytest.Config) -> None:
    """Once a run that keeps a journal: what the CPU reaches with one thread and with all."""
    journal = config.stash[JOURNAL]
    if journal.file is None or CPU_CEILINGS in config.stash:
        return
    config.stash[CPU_CEILINGS] = found = {}
    before = torch.get_num_threads()
    for threads in sorted({1, before}):
        torch.set_num_threads(threads)
        found[str(threads)] = roofline.measure_cpu()._asdict()
    torch.set_num_threads(before)
    journal.write(ceilings=found)


@pytest.fixture
def journal(request: pytest.FixtureRequest) -> Journal:
    """Where a benchmark writes its rows."""
    if not torch.cuda.is_available():
        cpu_ceilings(request.config)
    return request.config.stash[JOURNAL]


@pytest.fixture
def deadline(request: pytest.FixtureRequest) -> float:
    """time.monotonic() after which benchmarks of this kind are shed."""
    config = request.config
    if config.getoption("benchmark_disable"):  # everything once, for its correctness
        return float("inf")
    budget = config.getoption("--budget")
    if STARTED not in config.stash:
        kinds = {item.path.name for item in request.session.items}
        config.stash[STARTED] = (time.monotonic(), [kind for kind in ORDER if kind in kinds])
    start, kinds = config.stash[STARTED]
    kind = request.node.path.name
    if kind not in kinds or budget == float("inf"):
        return start + budget
    until = sum(SHARES[k] for k in kinds[: kinds.index(kind) + 1]) / (sum(SHARES[k] for k in kinds) or 1.0)
    return start + until * budget


@pytest.fixture
def record_gpu(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Rows of the GPU table. The first to ask has the ceilings measured."""
    if CEILINGS not in request.config.stash:
        request.config.stash[CEILINGS] = roofline.measure()
        request.config.stash[JOURNAL].write(ceilings=request.config.stash[CEILINGS]._asdict())
    return request.config.stash[GPU_ROWS]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a figure needs beside it: the card, versions, commit, and the ceilings of this very run."""
    import pyllm

    machine_info.update(python=platform.python_version(), torch=torch.__version__, pyllm=pyllm.__version__)
    machine_info.update(processor=processor(), cores=os.cpu_count(), system=platform.platform())
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


def processor() -> str:
    """The CPU's name, and the instruction set that the C++ kernels chose."""
    from pyllm.kernels.extension import cpu

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {cpu.module.isa}" if cpu.module is not None else name


@pytest.fixture
def record(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Rows of the closing table: op, case, dtype, threads, medians in seconds, the promised ratio."""
    cpu_ceilings(request.config)
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
        compiled = f"{row['compile'] / row['ours']:.2f}x" if "compile" in row else ""
        verdict = "" if floor is None else f">= {floor:g}: {'kept' if ratio >= floor else 'MISSED'}"
        terminalreporter.write_line(
            f"{row['op']:<14}{row['case']:<30}{row['dtype']:<10}{row['threads']:<9}{row['eager'] * 1e3:>10.3f}"
            f"{row['ours'] * 1e3:>10.3f}{ratio:>7.2f}x{row['noise']:>7.0%}{compiled:>11}  {verdict}"
        )
    terminalreporter.write_line(
        "forward + backward; eager as in Hugging Face's Llama; medians of interleaved rounds; noise: eager twice; "
        "x compile: torch.compile's time over ours"
    )
