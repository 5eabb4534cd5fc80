"""What the machine can do, measured in the same run, and what a kernel makes of it. No ceiling is typed in.

score = floor time / measured time, where floor time is the larger of bytes / copy bandwidth and FLOPs / matrix rate.
Bytes are what an algorithm must read and write, once, the same number for every rival (`Spec.cost`).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.clock import Cold, Instant, probe, warm_up
from pyllm.kernels.spec import Cost


class Ceilings(NamedTuple):
    """Measured on this machine, in this run."""

    copy: float  # bytes/s of a large device copy, counting what is read and what is written
    read: float  # bytes/s of a large sum
    matmul: float  # FLOP/s of an 8192^3 bfloat16 product
    matmul32: float  # FLOP/s of a 4096^3 float32 product without tf32


class Score(NamedTuple):
    """What a time means."""

    bandwidth: float  # bytes/s
    rate: float  # FLOP/s
    of_copy: float  # bandwidth over a copy's
    of_roofline: float  # floor time over measured time


def measure(rounds: int = 20) -> Ceilings:
    """About a second on a GPU with 8 GB free."""
    size = min(1 << 30, torch.cuda.mem_get_info()[0] // 8)
    big = torch.randn(size // 4, device="cuda")
    other = torch.empty_like(big)
    half = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    full = [torch.randn(4096, 4096, device="cuda") for _ in range(2)]
    return Ceilings(
        copy=2 * big.nbytes / _median(lambda: other.copy_(big), rounds),
        read=big.nbytes / _median(big.sum, rounds),
        matmul=2 * 8192**3 / _median(lambda: half[0] @ half[1], rounds),
        matmul32=2 * 4096**3 / _median(lambda: full[0] @ full[1], rounds),
    )


@functools.cache
def equal_copy(size: int, rounds: int = 20) -> float:
    """Seconds of torch's copy on the GPU that reads and writes `size` bytes together: a kernel of as many bytes has to
    be launched, to ramp up and to end as well, which the rate of a large copy doesn't tell."""
    source = torch.empty(max(1, size // 2), dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    return _median(lambda: target.copy_(source), rounds, 0.02)


def measure_cpu(rounds: int = 7) -> Ceilings:
    """The same of this CPU, at torch's present number of threads; matrices of 1024. About a second."""
    big = torch.randn(1 << 25)  # 128 MiB: beyond any cache but a server's
    other = torch.empty_like(big)
    full = [torch.randn(1024, 1024) for _ in range(2)]
    half = [matrix.bfloat16() for matrix in full]

    def median(call: Callable[[], Any]) -> float:
        call()
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    return Ceilings(
        copy=2 * big.nbytes / median(lambda: other.copy_(big)),
        read=big.nbytes / median(big.sum),
        matmul=2 * 1024**3 / median(lambda: half[0] @ half[1]),
        matmul32=2 * 1024**3 / median(lambda: full[0] @ full[1]),
    )


def _median(call: Callable[[], Any], rounds: int, warm: float = 0.1) -> float:
    warm_up(call, warm)
    cold = Cold(probe(call)[1])
    seconds = []
    for _ in range(rounds):
        cold()
        start = Instant()
        call()
        seconds.append(Instant() - start)
    return statistics.median(seconds)


def score(cost: Cost, seconds: float, ceilings: Ceilings, dtype: torch.dtype) -> Score:
    """`seconds` against the floor of `cost`."""
    rate = ceilings.matmul32 if dtype == torch.float32 else ceilings.matmul
    floor = max(cost.bytes / ceilings.copy, cost.flops / rate)
    bandwidth = cost.bytes / seconds
    return Score(bandwidth, cost.flops / seconds, bandwidth / ceilings.copy, floor / seconds)
