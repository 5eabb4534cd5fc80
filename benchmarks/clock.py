"""Device time: CUDA events as pytest-benchmark's timer, a cold L2, no launch gaps.

pytest-benchmark calls its timer before and after the timed call and subtracts. So the clock is a type: `Instant()`
records an event, subtracting two waits for the later and gives the device's seconds between them. What comes between is
device work alone, because `Cold` has the GPU busy while the host enqueues: it flushes L2 and then spins for longer than
the host needs to enqueue one call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

GRAPH_BELOW = 20e-6  # seconds: shorter calls are timed many at once, since an event itself takes a microsecond or two
SPIN_HZ = 2.0e9  # cycles a second at most: a slower clock only makes the spin longer


class Instant:
    """A moment on the current stream."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: Instant) -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) * 1e-3


class Cold:
    """Called before a timed call: empties L2 and keeps the GPU busy until the call is enqueued.

    Args:
        host_seconds: what it takes the host to enqueue one call.
    """

    def __init__(self, host_seconds: float):
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.scratch = torch.empty(2 * size, dtype=torch.int8, device="cuda")
        self.cycles = int(2 * host_seconds * SPIN_HZ)

    def __call__(self) -> None:
        self.scratch.zero_()
        torch.cuda._sleep(self.cycles)


def probe(call: Callable[[], Any], calls: int = 5) -> tuple[float, float]:
    """(device, host) seconds per call, roughly: enough to choose how to time it."""
    call()
    torch.cuda.synchronize()
    start, began = Instant(), time.perf_counter()
    for _ in range(calls):
        call()
    host = (time.perf_counter() - began) / calls
    return (Instant() - start) / calls, host


def graph(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """All calls in one CUDA graph, to be replayed without the host. Warmed up first, as capture demands."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    return captured


def warm_up(call: Callable[[], Any], seconds: float = 0.2) -> None:
    """Calls until the clocks are up and everything is compiled."""
    call()
    torch.cuda.synchronize()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()
        torch.cuda.synchronize()
