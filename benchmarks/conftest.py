"""Collects what the benchmarks measured of their rivals and prints it as one table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


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
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    from pyllm.kernels.extension import cpu

    terminalreporter.section(f"C++ kernels ({cpu.module.isa}) against eager PyTorch {torch.__version__}")
    terminalreporter.write_line(
        f"{'op':<14}{'case':<30}{'dtype':<10}{'threads':<9}{'eager ms':>10}{'ours ms':>10}{'ratio':>8}{'noise':>8}"
        "  promise"
    )
    for row in rows:
        ratio, floor = row["eager"] / row["ours"], row["floor"]
        verdict = "" if floor is None else f">= {floor:g}: {'kept' if ratio >= floor else 'MISSED'}"
        terminalreporter.write_line(
            f"{row['op']:<14}{row['case']:<30}{row['dtype']:<10}{row['threads']:<9}{row['eager'] * 1e3:>10.3f}"
            f"{row['ours'] * 1e3:>10.3f}{ratio:>7.2f}x{row['noise']:>7.0%}  {verdict}"
        )
    terminalreporter.write_line(
        "forward + backward; eager as in Hugging Face's Llama; medians of interleaved rounds; noise: eager twice"
    )
