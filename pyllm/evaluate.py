"""`pyllm evaluate`: what a saved model is worth, in numbers that can be compared.

Perplexity and bits per byte of texts, multiple choice with and without examples, and learning in context. Prints a
table; writes evaluation.json, and the curves as in_context.png.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine
from .choices import UNSPECIFIC, Accuracy, Question, answer_questions, read_questions
from .corpus import python_corpus
from .incontext import TASKS, accuracy_by_shots
from .likelihood import Perplexity, loss_by_position, perplexity
from .questions import UNSPECIFIC as WHAT_IT_DOES
from .questions import docstring_pairs, examination
from .terminal import load

RECORD = "evaluation.json"
PICTURE = "in_context.png"
BUILTIN = "builtin"
TEXT_LIMIT = 200_000  # bytes of the built-in validation text


@dataclass(frozen=True)
class Options:
    """What the command line decides. With neither text nor choices nor tasks: all that is built in."""

    model: str
    text: tuple[str, ...] = ()  # files, or "builtin"
    choices: tuple[str, ...] = ()  # JSONL files, or "builtin"
    tasks: tuple[str, ...] = ()  # names of in-context tasks
    shots: tuple[int, ...] = (0,)  # of multiple choice
    shots_from: str | None = None  # JSONL file that the examples come from
    task_shots: tuple[int, ...] = (0, 1, 2, 4, 8)
    chat: bool = False
    system: str | None = None
    window: int | None = None
    stride: int | None = None
    limit: int | None = None  # of questions, and of episodes
    out: str = "pyllm-evaluation"
    seed: int = 0
    backend: str = "auto"


def run(options: Options) -> dict[str, Any]:
    """The whole evaluation; returns what evaluation.json holds."""
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    if any(k < 0 for k in (*options.shots, *options.task_shots)):
        raise ValueError("--shots and --task-shots must not be negative")
    if unknown := sorted(set(options.tasks) - set(TASKS)):
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {unknown[0]!r}")
    if not (options.text or options.choices or options.tasks):
        options = dataclasses.replace(options, text=(BUILTIN,), choices=(BUILTIN,), tasks=tuple(TASKS))
    # What can be wrong with files is found before the model is loaded, and a folder that can't be written at once.
    texts = {name: _text(name) for name in options.text}
    questions = {name: _questions(name, options) for name in options.choices}
    pool = None if options.shots_from is None else read_questions(options.shots_from)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    probe = out / f"{RECORD}.tmp"
    probe.write_text("")
    probe.unlink()
    model, tokenizer = load(Path(options.model), options.backend)
    say(f"{options.model}: {model.num_parameters() / 1e6:.2f} M parameters, on {model.device}\n")
    record: dict[str, Any] = {
        "model": options.model,
        "parameters": model.num_parameters(),
        "versions": machine.versions(),
        "options": dataclasses.asdict(options),
    }
    start = time.perf_counter()
    measured: dict[str, Any] = {"text": {}, "choices": {}, "tasks": {}}
    positions: dict[str, list[tuple[int, int, float]]] = {}
    rows: dict[str, list[Accuracy]] = {}
    for name, text in texts.items():
        found = perplexity(model, tokenizer, text, options.window, options.stride)
        positions[name] = []
        if found.tokens > found.window:
            positions[name] = loss_by_position(model, tokenizer, text, options.window)
        say(text_table(name, found, positions[name]))
        measured["text"][name] = {**dataclasses.asdict(found), "loss_by_position": positions[name]}
    for name, asked in questions.items():
        unspecific = WHAT_IT_DOES if name == BUILTIN else UNSPECIFIC
        how: dict[str, Any] = {"chat": options.chat, "system": options.system, "unspecific": unspecific}
        rows[name] = [
            answer_questions(model, tokenizer, asked, shots=k, pool=pool, seed=options.seed, **how)
            for k in options.shots
        ]
        say(accuracy_table(f"multiple choice: {name}", rows[name]))
        measured["choices"][name] = [dataclasses.asdict(row) for row in rows[name]]
    curves: dict[str, list[Accuracy]] = {}
    for name in options.tasks:
        count = options.limit or 200
        curves[name] = accuracy_by_shots(model, tokenizer, name, options.task_shots, count, options.seed)
        ceilings = [TASKS[name].ceiling(k) for k in options.task_shots]
        say(accuracy_table(f"in context: {name}", curves[name], ceilings))
        measured["tasks"][name] = [
            {**dataclasses.asdict(row), "ceiling": ceiling} for row, ceiling in zip(curves[name], ceilings, strict=True)
        ]
    record.update(measured, seconds=round(time.perf_counter() - start, 1))
    probe.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    probe.replace(out / RECORD)
    drawn = picture(out / PICTURE, positions, curves)
    say(f"written to {out / RECORD}" + (f" and {out / PICTURE}" if drawn == "" else f"; {drawn}"))
    return record


def _text(name: str) -> str:
    if name == BUILTIN:  # what the demo doesn't learn from
        whole = b"\n\n\n".join(document.data for document in python_corpus().validation)
        return whole[:TEXT_LIMIT].decode("utf-8", "ignore")
    try:
        text = Path(name).read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {name}") from None
    if not text.strip():
        raise ValueError(f"{name} holds no text: it is empty")
    return text


def _questions(name: str, options: Options) -> list[Question]:
    if name == BUILTIN:
        return examination(docstring_pairs(), options.limit)
    return read_questions(name)[: options.limit]


def text_table(name: str, found: Perplexity, positions: Sequence[tuple[int, int, float]]) -> str:
    """Of a text."""
    lines = [
        f"text: {name}, {found.num_bytes} bytes, {found.tokens} tokens, windows of {found.window} that advance by "
        f"{found.stride}",
        f"    perplexity     {found.perplexity:10.3f}   per token, each scored once with at least "
        f"{found.window - found.stride} tokens of context",
        f"    bits per byte  {found.bits_per_byte:10.3f}",
    ]
    if positions:
        lines.append("    loss by tokens of context (nats): " + "  ".join(_position(row) for row in positions))
    return "\n".join(lines) + "\n"


def _position(row: tuple[int, int, float]) -> str:
    begin, end, loss = row
    return f"{begin if begin == end else f'{begin}-{end}'}: {loss:.2f}"


def accuracy_table(title: str, rows: Sequence[Accuracy], ceilings: Sequence[float] | None = None) -> str:
    """Accuracies by number of shots."""
    contrast = any(row.contrast is not None for row in rows)
    head = f"    {'shots':>5} {'right':>16} {'per byte':>9}" + f" {'contrast':>9}" * contrast + f" {'chance':>7}"
    lines = [f"{title}, {rows[0].count} questions" if rows else title, head + " best possible" * (ceilings is not None)]
    for i, row in enumerate(rows):
        line = f"    {row.shots:>5} {f'{row.accuracy:.1%} ± {row.error:.1%}':>16} {row.normalized:>9.1%}"
        line += f" {row.contrast:>9.1%}" if contrast and row.contrast is not None else ""
        line += f" {row.chance:>7.1%}"
        if ceilings is not None:
            line += f" {ceilings[i]:>13.1%}"
        lines.append(line + (f"  ({row.cut} prompts cut to what the model can read)" if row.cut else ""))
    return "\n".join(lines) + "\n"


def picture(path: Path, positions: dict[str, list[tuple[int, int, float]]], curves: dict[str, list[Accuracy]]) -> str:
    """Write the curves as a PNG; returns why not where there is none, else nothing."""
    positions = {name: rows for name, rows in positions.items() if rows}
    panels = bool(positions) + bool(curves)
    if not panels:
        return "no picture, as nothing was measured that has a curve"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no picture, matplotlib can't be imported: {error} (pip install matplotlib)"
    figure = Figure(figsize=(5.5 * panels, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if positions:
        axes = figure.add_subplot(1, panels, 1)
        for name, rows in positions.items():
            axes.plot(
                [(b * e) ** 0.5 for b, e, _ in rows], [loss for *_, loss in rows], marker="o", label=Path(name).name
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("loss (nats per token)")
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
    if curves:
        axes = figure.add_subplot(1, panels, panels)
        for name, points in curves.items():
            xs, ys = [row.shots for row in points], [row.accuracy for row in points]
            axes.errorbar(xs, ys, [row.error for row in points], marker="o", capsize=3, label=name)
        axes.axhline(next(iter(curves.values()))[0].chance, color="grey", linestyle="--", linewidth=1, label="guessing")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("examples in the prompt")
        axes.set_ylabel("answers that are right")
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
    figure.savefig(path)
    return ""


def say(text: str = "") -> None:
    print(text, flush=True)
