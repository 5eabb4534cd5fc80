"""What this computer has, and how fast things are on it."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def cores() -> int:
    """CPU cores that this process may use: its affinity, and a container's quota, which `os.cpu_count` ignores."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        count = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(count, quota) if quota else count)


def _cgroup_quota() -> int | None:
    """Cores that a container may use at a time, rounded up; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, -(-int(quota) // int(period)))


def cpu_name() -> str:
    """As the processor calls itself."""
    info = Path("/proc/cpuinfo")  # Linux
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe() -> str:
    """One line on the hardware."""
    count = cores()
    text = f"{cpu_name()}, {count} core{'s' if count > 1 else ''} usable, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {text}"
    return text


def versions() -> dict[str, str]:
    """What a result should be read together with."""
    from . import __version__

    return {"pyllm": __version__, "python": platform.python_version(), "torch": torch.__version__}


def medians(rivals: Mapping[int, Callable[[], object]], rounds: int = 3) -> dict[int, float]:
    """Median seconds of each of some functions, called in turns, so that a disturbance hits all alike."""
    times: dict[int, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        run()  # the first call starts threads and fills caches
    for _ in range(rounds):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured) for name, measured in times.items()}


def best(call: Callable[[], object], rounds: int = 3, seconds: float = 0.0) -> float:
    """Seconds of the quickest of at least so many calls, after one that doesn't count: others only lost time to
    disturbances."""
    call()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < rounds or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def matmul_peak(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seconds: float = 0.3) -> float:
    """FLOP/s that large matrix products reach here and now, with torch's threads: what MFU is a share of.

    Measured, as no table knows a laptop's clock, its cooling and what else it runs.
    """
    device = torch.device(device)
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * size**3 / best(product, seconds=seconds)


def copy_peak(device: torch.device | str = "cpu", seconds: float = 0.2) -> float:
    """Bytes/s of a copy too large for any cache, counting what is read and what is written."""
    device = torch.device(device)
    source = torch.ones(1 << 26 if device.type == "cuda" else 1 << 24, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * source.nbytes / best(copy, seconds=seconds)


def memory() -> int:
    """Bytes of main memory that this process may use: a container's limit where it is lower."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return found
    return found if limit == "max" else min(found, int(limit))


def peak_allocated(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that a call has allocated at one time, on top of what was there before it.

    On a CPU the profiler reports every allocation, that of C++ kernels through torch's allocator included.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
