"""The C++ kernels against eager PyTorch and torch.compile on this CPU: `pytest benchmarks --benchmark-only -k cpu`.

The whole table of promises, models included, in one command: `python -m benchmarks cpu`.
"""

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
from pyllm.kernels.products import torch_is_fast

ROUNDS = 31
TURN = 0.05
HURRY = 900.0  # seconds: with less left, rounds are fewer, and torch.compile, which takes ten seconds a case, meets
RUSH = 150.0  # in float32 only each op's first, and with less than this none
SLOW = 0.25  # of what is left: a case may take no more of it
HALF_RATE = 3e9  # operations a second of torch's products in half precision where the CPU has no instructions for them
COMPILED = {id(next(case for case in CPU_CASES if case.op == name)) for name in {case.op for case in CPU_CASES}}


def too_long(once, rivals, left):
    """Whether two rounds of calls that take so long are more than a case may have."""
    return once * 2 * len(rivals) > SLOW * left


def turn(call, calls):
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.skipif(cpu.module is None, reason=cpu.reason or "built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: f"{c.op}-{c.title}")
def test_cpu_against_eager(benchmark, case, dtype, threads, record, deadline):
    """Eager, torch.compile, ours, eager again, round by round: whatever else the machine does falls on all of them.

    A turn is as many calls as take eager about TURN seconds: a single call of a small op would be timed with the
    caches, the branch predictors and the allocator in the state that its rival left them in.
    """
    left = deadline - time.monotonic()
    if left < 0:
        pytest.skip("shed: the time budget is used up")
    if not benchmark.enabled and threads > 1:
        pytest.skip("benchmarks are disabled: every case runs once, with one thread")
    hurried = left < HURRY
    spec = OPS[case.op]
    inputs, make = case.call(dtype)
    eager, ours = make("eager"), make("cpu")
    rivals = {"eager": eager, "again": eager}
    costs = [spec.cost(inputs, backward) for backward in (False, True)]
    if benchmark.enabled:
        # In half precision on a CPU without instructions for it, to try a call of eager may take a minute by itself.
        rate = float("inf") if torch_is_fast(dtype) else HALF_RATE
        once = sum(cost.flops for cost in costs) / rate
        once = once if too_long(once, rivals, left) else turn(eager, 1)
        if too_long(once, rivals, left):
            pytest.skip(f"shed: a call of eager takes some {once:.0f} s, and {left:.0f} s of the time budget are left")
    check(spec, functools.partial(spec.function, backend="cpu"), inputs)  # a wrong kernel isn't timed
    if not benchmark.enabled:
        benchmark(ours)
        return
    if not hurried or (left > RUSH and id(case) in COMPILED and dtype is torch.float32):
        rivals["compile"] = make("compile")

    # glibc gives memory back to the system after every call until the process has freed something large, as any
    # training has: without this, page faults are timed, of which eager has more.
    del_me = torch.ones(31 << 20, dtype=torch.uint8)
    del del_me
    for _ in range(3 if once < 0.5 else 1):
        once = min(turn(call, 1) for call in rivals.values())
        ours()
    calls = max(1, round(TURN / once))
    rounds = 9 if hurried else ROUNDS
    if left != float("inf"):
        rounds = max(2, min(rounds, int(SLOW * left / (len(rivals) * once * calls))))
    seconds: dict[str, list[float]] = {who: [] for who in rivals}

    def before_each_round():
        for who, call in rivals.items():
            seconds[who].append(turn(call, calls))

    benchmark.group = f"{case.op} {case.title} {str(dtype)[6:]}"
    benchmark.extra_info["calls"] = calls  # pytest-benchmark's own table is of a whole turn
    benchmark.pedantic(turn, args=(ours, calls), setup=before_each_round, rounds=rounds)
    spread = benchmark.stats.stats.iqr
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    row = dict(
        op=case.op, case=case.title, dtype=str(dtype)[6:], threads=threads, floor=case.floor[dtype],
        ours=benchmark.stats.stats.median / calls, noise=abs(medians["eager"] / medians["again"] - 1), **medians,
        bytes=sum(cost.bytes for cost in costs), flops=sum(cost.flops for cost in costs), spread=spread / calls,
    )  # fmt: skip
    record.append(row)
    benchmark.extra_info.update(row, ratio=row["eager"] / row["ours"])
