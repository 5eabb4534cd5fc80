"""The C++ kernels against eager PyTorch on this machine's CPU: `pytest benchmarks --benchmark-only -k cpu`."""

from __future__ import annotations

import functools
import statistics
import time

import pytest
import torch
from harness.accuracy import check

from benchmarks.cases import CPU_CASES
from pyllm.kernels import OPS
from pyllm.kernels.extension import cpu

ROUNDS = 31


@pytest.mark.skipif(cpu.module is None, reason=cpu.reason or "built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: f"{c.op}-{c.title}")
def test_cpu_against_eager(benchmark, case, dtype, threads, record):
    """Eager, ours, eager again, round by round, so that whatever else the machine does falls on all three."""
    spec = OPS[case.op]
    inputs, make = case.call(dtype)
    check(spec, functools.partial(spec.function, backend="cpu"), inputs)  # a wrong kernel isn't timed
    eager, ours = make("eager"), make("cpu")
    seconds: dict[str, list[float]] = {"eager": [], "again": []}

    def timed(who):
        start = time.perf_counter()
        eager()
        seconds[who].append(time.perf_counter() - start)

    def before_each_round():
        timed("eager")
        timed("again")

    for _ in range(3):
        eager()
        ours()
    benchmark.group = f"{case.op} {case.title} {str(dtype)[6:]}"
    benchmark.pedantic(ours, setup=before_each_round, rounds=ROUNDS)
    if not benchmark.enabled:
        return
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    row = dict(
        op=case.op, case=case.title, dtype=str(dtype)[6:], threads=threads, floor=case.floor[dtype],
        eager=medians["eager"], ours=benchmark.stats.stats.median,
        noise=abs(medians["eager"] / medians["again"] - 1),
    )  # fmt: skip
    record.append(row)
    benchmark.extra_info.update(row, ratio=row["eager"] / row["ours"])
