"""A benchmark run's journal: one JSON object a line, written as things happen, so that nothing measured is ever lost.

    {"machine": {...}}                 once per process: versions, processor, card, commit
    {"ceilings": {...}}                what this machine reaches, measured in the run
    {"begin": test}                    before a test: after a crash this tells which one it was
    {"row": {...}}                     one contender of one case
    {"end": test, "outcome": ..., "why": ...}
    {"phase": title, "exit": code, "seconds": s}    by the runner

`results.py` makes a results.json of it. With `--journal FILE` tests that the file says were begun are not run again:
whoever restarts after a crash goes on behind it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class Journal:
    """Appends to a file; without one it keeps rows for the closing table only.

    Args:
        file: of any length already, or None.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self.rows: list[dict[str, Any]] = []

    def write(self, **entry: Any) -> None:
        """One line, on the disk before this returns."""
        if self.file is None:
            return
        line = json.dumps(finite(entry), default=str) + "\n"
        with self.file.open("a", encoding="utf-8") as out:
            out.write(line)
            out.flush()
            os.fsync(out.fileno())

    def row(self, row: dict[str, Any]) -> None:
        """One contender of one case: op, case, passed, dtype, who, seconds (median), spread, bytes, flops, ..."""
        self.rows.append(row)
        self.write(row=row)


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become None, in lists and objects too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def read(file: Path) -> list[dict[str, Any]]:
    """All entries; a last line that a crash cut off is left out."""
    found = []
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                found.append(entry)
    return found


def begun(file: Path) -> set[str]:
    """Tests that need not be started again: finished, or crashed."""
    return {entry["begin"] for entry in read(file) if "begin" in entry}
