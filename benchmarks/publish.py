"""python -m benchmarks publish: docs/results.md and the README's table, made of the result files in benchmarks/results.

No figure in the docs is typed. A results file is committed, this command is run, and a test compares what it would
write with what is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import plots, report, results
from benchmarks.report import Block
from benchmarks.rivals import NAMES

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- made by python -m benchmarks publish -->", "<!-- end -->"
README_ROWS = 40
TABLE = ".table.json"  # what `python -m benchmarks cpu --json` writes


def files(folder: Path = RESULTS) -> list[Path]:
    """Committed results, newest first; a GPU's before a CPU's."""
    found = [(results.load(file), file) for file in folder.glob("*.json") if not file.name.endswith(TABLE)]
    found.sort(key=lambda pair: ("gpu" in pair[0]["machine"], pair[0].get("date", ""), pair[1].name), reverse=True)
    return [file for _, file in found]


def page(folder: Path = RESULTS) -> str:
    """docs/results.md."""
    parts = [
        "# Results",
        "What was measured, where, when, and how to measure it again. This page is made by "
        "`python -m benchmarks publish` from the files in `benchmarks/results`; nothing on it is typed. Times are "
        "medians; `x eager` is the time of eager PyTorch (in the form of Hugging Face's modules) over the contender's, "
        "`≈` marks what eager differs from itself by; `of roofline` is the floor of bytes and operations at the rates "
        "measured in the same run, over the time; `of equal copy` is the time torch takes to copy as many bytes, over "
        "the time.",
    ]
    found = files(folder)
    if not any("gpu" in results.load(file)["machine"] for file in found):
        parts.append("**On a GPU nothing has been measured yet.** `python -m benchmarks run --out DIR` is the command.")
    for file in found:
        run = results.load(file)
        blocks = list(report.contents(run, pictures(run)))
        for block in blocks:
            if block.kind == "picture":
                block.file = f"results/{file.stem}/{block.file}"
        text = report.markdown(blocks).rstrip("\n")
        parts.append(re.sub(r"^(#+) ", r"#\1 ", text, flags=re.MULTILINE))
    parts += [promises(file) for file in sorted(folder.glob(f"*{TABLE}"))]
    return "\n\n".join(parts) + "\n"


def promises(file: Path) -> str:
    """What the CPU kernels are held to, line by line: kept or missed."""
    runs = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for run in runs:
        for line in run["lines"]:
            sides = {who: (r["ratio"], r["of_minima"], min(r["n"], line["n"])) for who, r in line["rivals"].items()}
            if "peak" in line:
                sides["memory"] = (line["peak"]["ratio"], line["peak"]["ratio"], 1)
            for who, (ratio, of_minima, n) in sides.items():
                target = line["targets"].get(who)
                said = "" if target is None else f">= {target:g}: {'kept' if ratio >= target else '**missed**'}"
                first = [line["line"], line["dtype"], str(run["threads"]), who]
                rows.append([*first, f"{ratio:.2f}", f"{of_minima:.2f}", str(n), said])
    head = ["work", "dtype", "threads", "rival", "x, by medians", "by minima", "rounds", "promised"]
    roofs = "; ".join(
        f"{run['threads']} thread{'s' * (run['threads'] > 1)}: read {run['roofline']['read'] / 1e9:.1f} GB/s, triad "
        f"{run['roofline']['triad'] / 1e9:.1f} GB/s, sgemm {run['roofline']['sgemm'] / 1e9:.0f} GFLOP/s"
        for run in runs
    )
    return report.markdown([
        Block("heading", f"What the CPU kernels are held to ({file.name.removesuffix(TABLE)}, {runs[0]['isa']})"),
        Block("text", f"`python -m benchmarks cpu`; torch {runs[0]['torch']}, held to the same instruction set. "
              f"{roofs}. Time of the rival over ours; of memory: the rival's peak over ours."),
        Block("table", head=head, rows=rows),
    ]).rstrip("\n")  # fmt: skip


def headlines(folder: Path = RESULTS) -> list[Path]:
    """The files whose speed-ups the README shows: of a GPU and of a CPU the newest that have any."""
    found: dict[bool, Path] = {}
    for file in files(folder):
        run = results.load(file)
        if len(list(readme_table(run))) > 2:
            found.setdefault("gpu" in run["machine"], file)
    return [found[on_gpu] for on_gpu in (True, False) if on_gpu in found]


def pictures(run: dict[str, Any]) -> list[str]:
    """Names of the plots that `plots.draw` makes of a run."""
    return [f"{p.__name__}.png" for p in plots.PICTURES if p(run) is not None]


def readme_table(run: dict[str, Any]) -> Iterator[str]:
    return gpu_table(run) if "gpu" in run["machine"] else cpu_table(run)


def cpu_table(run: dict[str, Any]) -> Iterator[str]:
    """Speed-ups over eager, one line an op and case: dtypes and threads side by side."""
    cells: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for (op, passed, case, dtype, threads), members in results.groups(run["rows"]).items():
        mine = next((members[who] for who in ("cpu", "pyllm") if who in members), None)
        first = results.base(members)
        if mine is None or first is None or passed not in ("step", "whole text"):
            continue
        ratio = members[first]["seconds"] / mine["seconds"]
        cells.setdefault((op, case), {})[dtype, threads] = f"{ratio:.1f}x"
    columns = sorted({column for row in cells.values() for column in row}, key=lambda c: (c[0] != "float32", c[1]))
    yield (
        "| over eager (whole models: over transformers) | "
        + " | ".join(f"{d}, {n} thread{'s' * (n > 1)}" for d, n in columns)
        + " |"
    )
    yield "|---" * (len(columns) + 1) + "|"
    for (op, case), row in list(cells.items())[:README_ROWS]:
        yield f"| `{op}` {case} | " + " | ".join(row.get(column, "") for column in columns) + " |"


def gpu_table(run: dict[str, Any]) -> Iterator[str]:
    """Time and share of the floor of what runs by default, and the rivals' times over it: forward, backward alone."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for (op, passed, case, _, _), members in results.groups(run["rows"]).items():
        mine = next((members[who] for who in by_default(op, case) if who in members), None)
        if mine is None or passed not in ("forward", "backward", "step"):
            continue
        said = [report.duration(mine["seconds"])]
        if mine.get("copy"):
            said.append(f"{mine['copy'] / mine['seconds']:.0%} of a copy")
        elif share := results.of_roofline(mine, run["ceilings"]):
            said.append(f"{share:.0%} of roofline")
        said += [
            f"{times(members[who]['seconds'] / mine['seconds'])} {who}"
            for who in ("eager", *NAMES)
            if who in members and not (who == "torch" and "cuDNN" in members)  # SDPA's kernels stand there by name
        ]
        cells.setdefault((op, case), {})[passed] = ", ".join(said)
    yield "| bfloat16 | forward | backward alone |"
    yield "|---|---|---|"
    for (op, case), row in list(cells.items())[:README_ROWS]:
        back = row.get("backward") or (f"(with forward) {row['step']}" if "step" in row else "")
        yield f"| `{op}` {case} | {row.get('forward', '')} | {back} |"


def times(ratio: float) -> str:
    """0.95x, 1.20x, 12x."""
    return f"{ratio:.{2 if ratio < 9.995 else 0}f}x"


def by_default(op: str, case: str) -> tuple[str, ...]:
    """Contenders of ours, the one that runs by default first (`kernels/attention/gluon_choice.py`)."""
    gluon = ("triton, Gluon",) * (op == "attention" and not case.startswith("D64"))
    return (*gluon, "triton", "cuda", "cpu", "pyllm")


def readme(text: str, folder: Path = RESULTS) -> str:
    """The README with the tables between its two marks made anew."""
    tables = []
    for file in headlines(folder):
        run = results.load(file)
        machine = run["machine"]
        where = machine.get("gpu") or f"{machine.get('processor', '')}, {machine.get('cores')} cores"
        about = f"{where}; torch {machine.get('torch')}; {run['date'][:10]}; `{run['command']}`"
        tables += [*readme_table(run), "", f"({about}; `benchmarks/results/{file.name}`.)", ""]
    made, count = re.subn(
        re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: "\n".join([BEGIN, "", *tables, END]), text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"README.md must have {BEGIN} ... {END} once, found {count} times")
    return made


def publish() -> list[Path]:
    """Writes the page, its pictures and the README's table; returns the files."""
    made = [ROOT / "docs/results.md"]
    results.replace(made[0], page())
    for file in files():
        made += plots.draw(made_folder(file), results.load(file))
    if headlines():
        results.replace(ROOT / "README.md", readme((ROOT / "README.md").read_text()))
        made.append(ROOT / "README.md")
    return made


def made_folder(file: Path) -> Path:
    folder = ROOT / "docs/results" / file.stem
    folder.mkdir(parents=True, exist_ok=True)
    return folder
