"""results.json: what a run has measured, in one form for every op, backend, rival and machine.

version, command, date, commit
machine     processor or card, threads, versions
ceilings    copy, read (bytes/s), matmul, matmul32 (FLOP/s), of the same run
phases      [title, exit, seconds]
rows        one per contender of a case: op, case, passed, dtype, threads, who, seconds (median), spread,
            bytes, flops, and by kind peak, host, copy (seconds of a copy of as many bytes), tokens, ...
missing     {contender: reason} that were not there;  shed: tests left out, or cut short, for want of time
failed      {test: why};  crashed: tests during which the process died
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import journal

VERSION = 1
SHED = "shed: the time budget is used up"


def collect(entries: Iterable[dict[str, Any]], **about: Any) -> dict[str, Any]:
    """Results of a journal's entries, complete or not."""
    found: dict[str, Any] = {
        "version": VERSION, **about, "machine": {}, "ceilings": {}, "phases": [], "rows": [], "missing": {}, "shed": [],
        "failed": {}, "crashed": [],
    }  # fmt: skip
    open_test: str | None = None
    for entry in entries:
        if "machine" in entry:
            found["machine"].update(entry["machine"])
        elif "ceilings" in entry:
            found["ceilings"] = entry["ceilings"]
        elif "row" in entry:
            found["rows"].append(entry["row"])
        elif "phase" in entry:
            found["phases"].append({"title": entry["phase"], "exit": entry["exit"], "seconds": entry["seconds"]})
        elif "begin" in entry:
            if open_test is not None:
                found["crashed"].append(open_test)
            open_test = entry["begin"]
        elif "end" in entry:
            open_test = None if entry["end"] == open_test else open_test
            why = str(entry.get("why", ""))
            if entry["outcome"] == "failed":
                found["failed"][entry["end"]] = why
            elif entry["outcome"] == "skipped" and why.startswith("shed: "):
                found["shed"].append(entry["end"])
            elif entry["outcome"] == "skipped":
                found["missing"].setdefault(why, []).append(entry["end"])
    if open_test is not None:
        found["crashed"].append(open_test)
    return found


def write(file: Path, results: dict[str, Any]) -> None:
    """All or nothing: a reader never sees half a file."""
    replace(file, json.dumps(journal.finite(results), indent=1, default=str) + "\n")


def replace(file: Path, text: str) -> None:
    """Writes beside the file, then renames."""
    beside = file.with_name(file.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def load(path: Path) -> dict[str, Any]:
    """A results.json, or the folder of a run, finished or not.

    Raises:
        ValueError: there is none, or it is no results file of a version that can be read.
    """
    if path.is_dir():
        if (path / "journal.jsonl").exists():
            before = json.loads((path / "results.json").read_text()) if (path / "results.json").exists() else {}
            about = {k: before[k] for k in ("command", "date", "commit") if k in before}
            return collect(journal.read(path / "journal.jsonl"), **about)
        path = path / "results.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: a results.json, or the folder of a run, is needed")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ValueError(f"{path} is no results.json of version {VERSION} (python -m benchmarks run writes them)")
    return found


Key = tuple[str, str, str, str, int]


def groups(rows: Iterable[dict[str, Any]]) -> dict[Key, dict[str, dict[str, Any]]]:
    """(op, pass, case, dtype, threads) to {contender: row}. A contender measured twice counts with its last time."""
    found: dict[Key, dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["op"], row.get("passed", ""), row["case"], row["dtype"], int(row.get("threads") or 0))
        found.setdefault(key, {})[row["who"]] = row
    return found


def base(members: dict[str, dict[str, Any]]) -> str | None:
    """Whom the others are compared with: eager PyTorch, of a whole model transformers."""
    return next((who for who in ("eager", "transformers") if who in members), None)


def noise(members: dict[str, dict[str, Any]]) -> float:
    """What the one compared with differs from itself by: a smaller difference means nothing."""
    who = base(members)
    if who is None:
        return 0.0
    if f"{who} again" in members:
        return abs(members[who]["seconds"] / members[f"{who} again"]["seconds"] - 1)
    return float(members[who].get("noise") or 0.0)


def matrix_rate(ceilings: dict[str, Any], dtype: str) -> float | None:
    """FLOP/s that products of a dtype may reach. A CPU without instructions for half precision multiplies it slowest
    of all; a kernel that multiplies in float32 instead has float32's rate."""
    names = ("matmul32",) if dtype == "float32" else ("matmul", "matmul32")
    return max((ceilings[name] for name in names if ceilings.get(name)), default=None)


def of_roofline(row: dict[str, Any], ceilings: dict[str, Any]) -> float | None:
    """Floor time over measured time, None where no floor is known. A CPU has ceilings per number of threads."""
    if any(isinstance(v, dict) for v in ceilings.values()):
        ceilings = ceilings.get(str(row.get("threads")), {})
    rate = matrix_rate(ceilings, row["dtype"])
    if not ceilings.get("copy") or not rate or not (row.get("bytes") or row.get("flops")):
        return None
    floor = max((row.get("bytes") or 0) / ceilings["copy"], (row.get("flops") or 0) / rate)
    return floor / row["seconds"]
