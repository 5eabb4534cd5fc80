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
TURN = 0.05


@pytest.mark.skipif(cpu.module is None, reason=cpu.reason or "built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: f"{c.op}-{c.title}")
def test_cpu_against_eager(benchmark, case, dtype, threads, record):
    """Eager, ours, eager again, round by round, so that whatever else the machine does falls on all three.

    A turn is as many calls as take eager about TURN seconds: a single call of a small op would be timed with the
    caches, the branch predictors and the allocator in the state that its rival left them in.
    """
    spec = OPS[case.op]
    inputs, make = case.call(dtype)
    check(spec, functools.partial(spec.function, backend="cpu"), inputs)  # a wrong kernel isn't timed
    eager, ours = make("eager"), make("cpu")

    def turn(call, calls):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    # glibc gives memory back to the system after every call until the process has freed something large, as any
    # training has: without this, page faults are timed, of which eager has more.
    del_me = torch.ones(31 << 20, dtype=torch.uint8)
    del del_me
    for _ in range(3):
        once = turn(eager, 1)
        ours()
    calls = max(1, round(TURN / once))
    seconds: dict[str, list[float]] = {"eager": [], "again": []}

    def before_each_round():
        for rival in seconds.values():
            rival.append(turn(eager, calls))

    benchmark.group = f"{case.op} {case.title} {str(dtype)[6:]}"
    benchmark.extra_info["calls"] = calls  # pytest-benchmark's own table is of a whole turn
    benchmark.pedantic(turn, args=(ours, calls), setup=before_each_round, rounds=ROUNDS)
    if not benchmark.enabled:
        return
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    row = dict(
        op=case.op, case=case.title, dtype=str(dtype)[6:], threads=threads, floor=case.floor[dtype],
        eager=medians["eager"], ours=benchmark.stats.stats.median / calls,
        noise=abs(medians["eager"] / medians["again"] - 1),
    )  # fmt: skip
    record.append(row)
    benchmark.extra_info.update(row, ratio=row["eager"] / row["ours"])
