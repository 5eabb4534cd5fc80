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
