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

from benchmarks import budget
from benchmarks.cases import CPU_CASES
from pyllm.kernels import OPS
from pyllm.kernels.extension import cpu

ROUNDS = 31
TURN = 0.05
HURRY = 900.0  # seconds: with less left, rounds are fewer, and torch.compile, which takes ten seconds a case, meets
RUSH = 150.0  # in float32 only each op's first, and with less than this none
SLOW = 0.25  # of what is left: a case may take no more of it
FAR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # ours from eager, relative, at the size that is timed
COMPILED = {id(next(case for case in CPU_CASES if case.op == name)) for name in {case.op for case in CPU_CASES}}


def assert_same(ours, eager, dtype):
    """A coarse look at full size, which costs nothing beside the timing; a small one has been judged by `check`."""
    for mine, theirs in zip(ours, eager, strict=True):
        far = float((mine.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-30))
        assert far < FAR[dtype], f"ours and eager's gradients are {far:.1e} apart"


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
    budget.rounds(deadline, 0.0, ROUNDS)
    if not benchmark.enabled and threads > 1:
        pytest.skip("benchmarks are disabled: every case runs once, small, with one thread")
    hurried = left < HURRY
    spec = OPS[case.op]
    inputs, make = case.few().call(dtype)
    check(spec, functools.partial(spec.function, backend="cpu"), inputs)  # a wrong kernel isn't timed
    if not benchmark.enabled:
        benchmark(make("cpu"))
        return
    inputs, make = case.call(dtype)
    eager, ours = make("eager"), make("cpu")
    rivals = {"eager": eager, "again": eager}
    costs = [spec.cost(inputs, backward) for backward in (False, True)]
    budget.rounds(deadline, 2 * budget.expected(sum(cost.flops for cost in costs), dtype), ROUNDS, SLOW)
    start = time.perf_counter()
    wanted = eager()
    budget.rounds(deadline, 2 * (time.perf_counter() - start), ROUNDS, SLOW)
    assert_same(ours(), wanted, dtype)
    del wanted
    if not hurried or (left > RUSH and id(case) in COMPILED and dtype is torch.float32):
        rivals["compile"] = make("compile")

    # glibc gives memory back to the system after every call until the process has freed something large, as any
    # training has: without this, page faults are timed, of which eager has more.
    del_me = torch.ones(31 << 20, dtype=torch.uint8)
    del del_me
    once = TURN
    for _ in range(3):
        once = min(turn(call, 1) for call in rivals.values())
        ours()
        if once > 0.5:
            break
    calls = max(1, round(TURN / once))
    rounds = budget.rounds(deadline, (len(rivals) + 1) * once * calls, 9 if hurried else ROUNDS, SLOW)
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
