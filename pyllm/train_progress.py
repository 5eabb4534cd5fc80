"""How a run shows where it stands, and how it is told to stop."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from typing import Any

from .display import Display, Status, duration


@dataclass
class Progress(Status):
    """Where a run stands, in steps."""

    steps: int = 0
    mfu: float = 0.0  # share of the machine's measured rate of matrix products that useful work makes up
    skipped: int = 0

    def line(self) -> str:
        validation = "" if self.validation is None else f" | validation {self.validation:.3f} bits/byte"
        left = max(0.0, self.seconds / self.fraction - self.seconds) if self.fraction > 0 else 0.0
        skipped = f" | {self.skipped} skipped" if self.skipped else ""
        train = f" ({self.train_curve[-1][1]:.3f} bits/byte)" if self.train_curve else ""
        return (
            f"step {self.step}/{self.steps} | loss {self.loss:.3f}{train}{validation} | {self.speed:,.0f} tokens/s | "
            f"MFU {self.mfu:.0%} | {duration(left)} left{skipped}"
        )


class Signals:
    """Ctrl-C and SIGTERM end a run after the step it is in, with a checkpoint. A second Ctrl-C ends it at once."""

    def __init__(self, run: Any):
        self.run = run
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            self.before = {s: signal.signal(s, self.told) for s in (signal.SIGINT, signal.SIGTERM)}

    def told(self, number: int, frame: Any) -> None:
        if self.run.stopping is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.run.stopping = signal.Signals(number).name

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Silent(Display):
    """What all ranks but the first show."""

    def say(self, text: str = "") -> None:
        pass


def difference(name: str, saved: Any, now: Any) -> str:
    """What differs between a checkpoint and a run, in words: the first difference of two dicts."""
    if isinstance(saved, dict) and isinstance(now, dict):
        name, saved, now = next(
            (f"{name}: {k}", saved.get(k), now.get(k)) for k in {**saved, **now} if saved.get(k) != now.get(k)
        )
    return f"{name} ({saved}, now {now})"
