"""python -m benchmarks report DIR: report.md and one self-contained report.html of what a run measured, with its plots.

A report is a list of blocks (headings, paragraphs, tables, pictures); markdown and HTML are two ways to write it down.
Any run can be reported: one that was killed half-way, one in which nothing could be measured.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.results import base, groups, noise, of_roofline, replace

TITLES = {
    "recurrence": "Recurrent nets and a Transformer of equal size",
    "kv heads": "Multi-head, grouped-query, multi-query",
}


@dataclass
class Block:
    """heading: `text`; text: a paragraph; table: `head`, `rows`; picture: a file beside the report, `text` its alt."""

    kind: str
    text: str = ""
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    file: str = ""


def write(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Draws the plots, writes report.md and report.html, and returns all files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(folder, results)
    blocks = list(contents(results, [file.name for file in pictures]))
    replace(folder / "report.md", markdown(blocks))
    replace(folder / "report.html", page(blocks, folder))
    return [folder / "report.md", folder / "report.html", *pictures]


def contents(results: dict[str, Any], pictures: list[str]) -> Iterator[Block]:
    machine = results["machine"]
    yield Block(
        "title", f"pyllm on {machine.get('gpu') or machine.get('processor') or 'a machine that was not recorded'}"
    )
    yield from about(results)
    for name, alt in (
        ("speedup.png", "time of eager over time of each contender, the gray band is eager against itself"),
        ("roofline.png", "operations per second over operations per byte, under the ceilings of this run"),
    ):
        if name in pictures:
            yield Block("picture", alt, file=name)
    ops: dict[str, list[Any]] = {}
    for key, members in groups(results["rows"]).items():
        ops.setdefault(key[0], []).append((key, members))
    if not ops:
        yield Block("text", "Nothing was measured.")
    for op, cases in sorted(ops.items(), key=lambda item: (item[0] in TITLES, item[0])):
        yield Block("heading", TITLES.get(op, op))
        if (file := f"{op.replace(' ', '_')}.png") in pictures:
            yield Block("picture", TITLES.get(op, op), file=file)
        yield table(op, cases, results["ceilings"])
    yield from left_out(results)


def about(results: dict[str, Any]) -> Iterator[Block]:
    """Machine, versions, ceilings, phases."""
    machine = results["machine"]
    facts = [[k, str(results[k])] for k in ("date", "commit", "command") if results.get(k)]
    facts += [[k, str(v)] for k, v in machine.items() if v not in ("", None) and k != "commit"]
    yield Block("table", head=["", "value"], rows=facts)
    for threads, found in ceilings_of(results["ceilings"]):
        yield Block("text", f"Measured in this run{threads}: " + ", ".join(
            f"{label} {rate_words(found[k], unit)}"
            for k, label, unit in (
                ("copy", "copy", "B/s"), ("read", "read", "B/s"),
                ("matmul", "bfloat16 product", "FLOP/s"), ("matmul32", "float32 product", "FLOP/s"),
            ) if found.get(k)
        ) + ".")  # fmt: skip
    if results["phases"]:
        rows = [
            [p["title"], "ok" if p["exit"] == 0 else f"exit {p['exit']}", f"{p['seconds']:.0f}"]
            for p in results["phases"]
        ]
        yield Block("table", head=["phase", "result", "seconds"], rows=rows)


def rate_words(value: float, unit: str) -> str:
    """11.7 GB/s, 166 GFLOP/s, 800 TFLOP/s: of operations the larger unit as soon as there is one of it."""
    scale, prefix = (1e12, "T") if unit == "FLOP/s" and value >= 1e12 else (1e9, "G")
    return f"{value / scale:,.{0 if value / scale >= 20 else 1}f} {prefix}{unit}"


def ceilings_of(ceilings: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """A card has one set, a CPU one per number of threads."""
    if any(isinstance(v, dict) for v in ceilings.values()):
        return [(f" with {n} thread{'s' * (n != '1')}", v) for n, v in sorted(ceilings.items())]
    return [("", ceilings)] if ceilings else []


def table(op: str, cases: list[Any], ceilings: dict[str, Any]) -> Block:
    """Every contender of every case of an op."""
    rows = []
    for (_, passed, case, dtype, threads), members in sorted(cases, key=lambda item: order(item[0])):
        first, band = base(members), noise(members)
        for who, row in members.items():
            if who.endswith(" again"):
                continue
            ratio = "" if first is None else f"{members[first]['seconds'] / row['seconds']:.2f}"
            if first is not None and who != first and abs(members[first]["seconds"] / row["seconds"] - 1) <= band:
                ratio = "≈ " + ratio
            share = of_roofline(row, ceilings)
            rows.append([
                case, passed, dtype, str(threads or ""), who,
                duration(row["seconds"]), duration(row.get("spread") or 0.0),
                f"{row['bytes'] / row['seconds'] / 1e9:.0f}" if row.get("bytes") else "",
                f"{row['flops'] / row['seconds'] / 1e9:,.0f}" if row.get("flops") else "",
                f"{share:.0%}" if share else "",
                f"{row['copy'] / row['seconds']:.0%}" if row.get("copy") else "",
                ratio,
                f"{row['tokens'] / row['seconds']:,.0f}" if row.get("tokens") else "",
                f"{(row.get('peak') or row.get('cache')) / 2**20:,.0f}" if row.get("peak") or row.get("cache") else "",
            ])  # fmt: skip
    rival = " or ".join(sorted({str(base(members)) for _, members in cases} - {"None"}))
    columns = "case|pass|dtype|threads|who|time|+-|GB/s|GFLOP/s|of roofline|of equal copy|x "
    head = [*f"{columns}{rival}".split("|"), "tokens/s", "MiB"]
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return Block("table", head=[head[i] for i in kept], rows=[[row[i] for i in kept] for row in rows])


def order(key: Any) -> tuple[Any, ...]:
    """Cases by name, but the numbers in them by size."""
    return tuple(tuple((0, float(w), "") if w.isdigit() else (1, 0.0, w) for w in str(part).split()) for part in key)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    if not seconds:
        return ""
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    value = seconds / scale
    return f"{value:.{max(0, 2 - int(math.log10(value))) if value >= 1 else 2}f} {unit}"


NAMED = 60  # benchmarks that were not run, by name


def left_out(results: dict[str, Any]) -> Iterator[Block]:
    """What this run does not say."""
    yield Block("heading", "What is not here")
    said = False
    for title, names in (
        ("Shed, because the time was used up", results["shed"]),
        ("The process died in", results["crashed"]),
    ):
        if names:
            said = True
            listed = sorted(short(n) for n in names)
            more = f", and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
            yield Block("text", f"{title} ({len(names)}): " + ", ".join(listed[:NAMED]) + more + ".")
    if results["failed"]:
        said = True
        rows = [[short(name), why] for name, why in results["failed"].items()]
        yield Block("table", head=["failed, and not timed", "why"], rows=rows)
    if results["missing"]:
        said = True
        rows = [[why, str(len(names))] for why, names in sorted(results["missing"].items())]
        yield Block("table", head=["skipped, because", "benchmarks"], rows=rows)
    if not said:
        yield Block("text", "Everything was measured.")


def short(nodeid: str) -> str:
    return nodeid.rsplit("::", 1)[-1]


# Two ways to write blocks down


def markdown(blocks: list[Block]) -> str:
    parts = []
    for block in blocks:
        if block.kind in ("title", "heading"):
            parts.append(("# " if block.kind == "title" else "## ") + block.text)
        elif block.kind == "text":
            parts.append(block.text)
        elif block.kind == "picture":
            parts.append(f"![{block.text}]({block.file})")
        else:
            lines = [block.head, ["---"] * len(block.head), *block.rows]
            parts.append(
                "\n".join(
                    "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
                    for row in lines
                )
            )
    return "\n\n".join(parts) + "\n"


STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--link:#2f6fb5}
body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem} h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;margin:1rem 0}
.wide{overflow-x:auto}
td,th{padding:.15rem .6rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{cursor:pointer;white-space:nowrap;position:sticky;top:0;background:Canvas} th:hover{color:var(--link)}
th[data-way="1"]::after{content:" \\25b2"} th[data-way="-1"]::after{content:" \\25bc"}
tr:hover td{background:var(--soft)} td.number{text-align:right;white-space:nowrap} img{max-width:100%;background:white}
"""
# Sorting: numbers (with their units) by value, all else by text; a second click turns the order round.
SCRIPT = """
const units={s:1,ms:1e-3,us:1e-6};
function value(text){const m=text.replace(/,/g,'').match(/^(?:\\u2248 )?(-?[\\d.]+)\\s*(s|ms|us|%)?$/);
  return m?parseFloat(m[1])*(units[m[2]]||1):null}
document.querySelectorAll('th').forEach(th=>th.addEventListener('click',()=>{
  const table=th.closest('table'),column=[...th.parentNode.children].indexOf(th),way=th.dataset.way==='1'?-1:1;
  table.querySelectorAll('th').forEach(other=>delete other.dataset.way);th.dataset.way=way;
  const rows=[...table.tBodies[0].rows];
  rows.sort((a,b)=>{const x=a.cells[column].textContent,y=b.cells[column].textContent,u=value(x),v=value(y);
    return way*(u!==null&&v!==null?u-v:(u!==null)-(v!==null)||x.localeCompare(y))});
  rows.forEach(row=>table.tBodies[0].append(row))}));
"""


def page(blocks: list[Block], folder: Path) -> str:
    """One file: styles, script and pictures inside."""
    body = []
    for block in blocks:
        text = html.escape(block.text)
        if block.kind in ("title", "heading"):
            body.append(f"<h1>{text}</h1>" if block.kind == "title" else f"<h2>{text}</h2>")
        elif block.kind == "text":
            body.append(f"<p>{text}</p>")
        elif block.kind == "picture":
            data = base64.b64encode((folder / block.file).read_bytes()).decode()
            body.append(f'<img alt="{text}" src="data:image/png;base64,{data}">')
        else:
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.head)
            rows = "".join("<tr>" + "".join(map(cell_of, row)) + "</tr>" for row in block.rows)
            body.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>')
    title = html.escape(next(block.text for block in blocks if block.kind == "title"))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><body>{''.join(body)}<script>{SCRIPT}</script></body></html>\n"
    )


NUMBER = re.compile(r"(≈ )?-?[\d.,]+ ?(s|ms|us|%)?")


def cell_of(cell: str) -> str:
    return f"<td{' class=number' if NUMBER.fullmatch(cell) else ''}>{html.escape(cell)}</td>"
