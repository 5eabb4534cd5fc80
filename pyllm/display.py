"""What a run shows: a live panel in a terminal, plain lines in a pipe or a log, and a picture of the loss."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float]]

PLAIN_EVERY = 5.0  # seconds between lines when nobody sees a live panel


@dataclass
class Status:
    """Where a run stands. Losses are in bits per byte of text, so that training, validation and zip share one axis."""

    step: int = 0
    seconds: float = 0.0
    limit: float = 0.0  # seconds that training may take in all
    fraction: float = 0.0
    loss: float = float("nan")  # nats per token, averaged over the last steps
    validation: float | None = None  # bits per byte of the quick validation subset
    speed: float = 0.0  # tokens/s
    train_curve: list[tuple[float, float]] = field(default_factory=list)  # (seconds, bits per byte)
    validation_curve: list[tuple[float, float]] = field(default_factory=list)

    def line(self) -> str:
        validation = "  -  " if self.validation is None else f"{self.validation:.3f}"
        left = max(0.0, self.seconds / self.fraction - self.seconds) if self.fraction > 0 else self.limit
        return (
            f"step {self.step:5d} | loss {self.loss:.3f} | validation {validation} bits/byte | "
            f"{self.speed:7,.0f} tokens/s | {duration(left)} left"
        )


def duration(seconds: float) -> str:
    """1:05 for 65 seconds."""
    whole = int(seconds + 0.5)
    return f"{whole // 60}:{whole % 60:02d}"


def plot(
    curve: Points,
    dots: Points = (),
    levels: Mapping[str, float] | None = None,
    width: int = 72,
    height: int = 12,
    unicode: bool = True,
) -> str:
    """A curve in characters. A character cell holds 2 x 4 dots of Unicode's Braille patterns, so the line is fine.

    Args:
        curve: (x, y) points, joined.
        dots: (x, y) points, marked one by one.
        levels: horizontal lines by name.
        unicode: False draws with `*`, `o` and `-`.
    """
    levels = dict(levels or {})
    points = [*curve, *dots]
    if len(points) < 2:
        return ""
    label = 7  # columns for the y axis
    columns, rows = max(10, width - label - 1), max(3, height)
    xs = [x for x, _ in points]
    # The first steps are far above everything that follows: cut the axis where the curve has lost its first 4%.
    heights = sorted(y for _, y in points)
    high = max([heights[int(0.96 * (len(heights) - 1))], *levels.values()])
    low = min([heights[0], *levels.values()])
    pad = 0.05 * ((high - low) or 1.0)
    low, high = low - pad, high + pad
    left, right = min(xs), max(xs)
    right = right if right > left else left + 1.0

    def column(x: float, scale: int) -> int:
        return min(scale * columns - 1, int((x - left) / (right - left) * scale * columns))

    def row(y: float, scale: int) -> int:
        return min(scale * rows - 1, max(0, int((high - min(y, high)) / (high - low) * scale * rows)))

    cells = [[" "] * columns for _ in range(rows)]
    for y in levels.values():
        cells[row(y, 1)] = ["┄" if unicode else "-"] * columns
    raised: dict[tuple[int, int], int] = {}  # cell -> bit pattern of its raised Braille dots
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [dot row][dot column]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        a, b, c, d = column(x0, 2), row(y0, 4), column(x1, 2), row(y1, 4)
        steps = max(abs(c - a), abs(d - b), 1)
        for i in range(steps + 1):
            px, py = round(a + (c - a) * i / steps), round(b + (d - b) * i / steps)
            cell = (py // 4, px // 2)
            raised[cell] = raised.get(cell, 0) | bits[py % 4][px % 2]
    for (r, c), pattern in raised.items():
        cells[r][c] = chr(0x2800 + pattern) if unicode else "*"
    for x, y in dots:
        cells[row(y, 1)][column(x, 1)] = "●" if unicode else "o"
    bar = "│" if unicode else "|"
    lines = [f"{high - (high - low) * (r + 0.5) / rows:{label}.2f}{bar}" + "".join(cells[r]) for r in range(rows)]
    for name, y in levels.items():
        r = row(y, 1)
        lines[r] = lines[r][: -len(name) - 2] + f" {name} "
    ends = f"{duration(left)}", f"{duration(right)}"
    axis = " " * label + ("└" if unicode else "+") + ("─" if unicode else "-") * columns
    below = " " * (label + 1) + ends[0] + " " * max(1, columns - len(ends[0]) - len(ends[1])) + ends[1]
    return "\n".join([*lines, axis, below])


def picture(path: Path, status: Status, levels: Mapping[str, float]) -> str:
    """Write the loss curve as a PNG; returns why not where matplotlib can't be used, else nothing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no picture of the loss, matplotlib can't be imported: {error} (pip install matplotlib)"
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")  # not pyplot: no window system, no global state
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if status.train_curve:
        axes.plot(*zip(*status.train_curve, strict=True), color="#9ab7d3", linewidth=1, label="training, per step")
    if status.validation_curve:
        axes.plot(*zip(*status.validation_curve, strict=True), color="#1f5a99", marker="o", ms=4, label="validation")
    for i, (name, y) in enumerate(levels.items()):
        axes.axhline(y, color=("#b3541e", "#6a994e")[i % 2], linestyle="--", linewidth=1, label=f"{name} ({y:.2f})")
    everything = [y for _, y in (*status.train_curve, *status.validation_curve)]
    if everything:
        axes.set_ylim(min([*everything, *levels.values()]) - 0.1, min(max(everything), 5.0))
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("bits per byte of text (lower is better)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
    return ""


class Display:
    """Plain lines: for logs, pipes and terminals without rich."""

    def __init__(self, levels: Mapping[str, float] | None = None):
        self.levels = dict(levels or {})
        self.last = -PLAIN_EVERY
        self.unicode = "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def say(self, text: str = "") -> None:
        """A line that stays."""
        print(text, flush=True)

    def update(self, status: Status, force: bool = False) -> None:
        """Show where the run stands, as often as suits the medium."""
        now = time.perf_counter()
        if force or now - self.last >= PLAIN_EVERY:
            self.last = now
            self.say(status.line())

    def sample(self, status: Status, prompt: str, text: str) -> None:
        """Show what the model writes by now: `text`, which begins with the prompt."""
        self.say(f"\n--- after {duration(status.seconds)}, the model continues {prompt!r}:")
        self.say(indent(text))
        self.say()

    def curve(self, status: Status) -> None:
        """Show the whole loss curve, at the end."""
        drawn = plot(status.train_curve, status.validation_curve, self.levels, unicode=self.unicode)
        if drawn:
            dot = "●" if self.unicode else "o"
            self.say(f"\nbits per byte over time (line: training, {dot}: validation)\n{drawn}\n")


class LiveDisplay(Display):
    """A panel at the bottom of the terminal, redrawn in place; samples scroll away above it."""

    def __init__(self, levels: Mapping[str, float] | None = None):
        super().__init__(levels)
        from rich.console import Console
        from rich.live import Live

        self.console = Console(highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveDisplay:
        self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.live.stop()

    def say(self, text: str = "") -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def update(self, status: Status, force: bool = False) -> None:
        now = time.perf_counter()
        if not force and now - self.last < 0.5:
            return
        self.last = now
        from rich.console import Group
        from rich.text import Text

        width = min(100, self.console.width)
        done = int(status.fraction * (width - 7))
        bar = "█" * done + "░" * (width - 7 - done) if self.unicode else "#" * done + "." * (width - 7 - done)
        drawn = Text(plot(status.train_curve, status.validation_curve, self.levels, width, 10, self.unicode))
        drawn.highlight_regex("[\u2801-\u28ff]+", "cyan")
        drawn.highlight_regex("●", "bold yellow")
        drawn.highlight_regex("┄+", "green")
        line = Text(status.line(), style="bold", no_wrap=True, overflow="crop")
        self.live.update(Group(line, Text(f"{bar} {status.fraction:4.0%}"), drawn), refresh=True)

    def sample(self, status: Status, prompt: str, text: str) -> None:
        from rich.panel import Panel
        from rich.text import Text

        shown = Text(text)
        shown.stylize("bold cyan", 0, len(prompt.rstrip(" ")))
        self.console.print(Panel(shown, title=f"after {duration(status.seconds)}", title_align="left", width=100))


def make_display(levels: Mapping[str, float] | None = None, plain: bool = False) -> Display:
    """The display that fits where the output goes."""
    if not plain and sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        return LiveDisplay(levels)
    return Display(levels)


def indent(text: str, by: str = "    ") -> str:
    return "\n".join(by + line for line in text.splitlines())
