"""What a run leaves to read: log.csv with a row per step, and TensorBoard's files where that is installed."""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    "step",
    "seconds",
    "tokens",
    "loss",
    "bits_per_byte",
    "validation_loss",
    "validation_bits_per_byte",
    "gradient_norm",
    "learning_rate_scale",
    "tokens_per_second",
    "mfu",
)


class TrainLog:
    """Rows of numbers, written as they come.

    A run that goes on from step n keeps the rows up to n and drops what came after it, which is trained again. A disk
    that is full stops no training: the rows wait in memory and are written when there is room.

    Args:
        folder: of the run.
        step: the last step that counts.
    """

    def __init__(self, folder: Path, step: int):
        self.file = folder / "log.csv"
        self.rows = [row for row in read_log(self.file) if int(row["step"]) <= step]
        self.problem: OSError | None = None
        self.whole = False  # whether the file holds all rows but those that are still to come
        self.board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, row: Mapping[str, Any]) -> None:
        """One step's numbers; what is not known is left out."""
        self.rows.append({name: _short(row.get(name)) for name in COLUMNS})
        try:
            if not self.whole:  # at the start, and after a failure
                temporary = self.file.with_suffix(".tmp")
                self._write(temporary, "w", self.rows)
                temporary.replace(self.file)
            else:
                self._write(self.file, "a", self.rows[-1:])
            self.whole, self.problem = True, None
        except OSError as error:
            self.whole, self.problem = False, error
        if self.board is not None:
            for name, value in row.items():
                if value is not None and name not in ("step", "tokens"):
                    self.board.add_scalar(name, value, int(row["step"]))

    def _write(self, file: Path, mode: str, rows: list[dict[str, str]]) -> None:
        with open(file, mode, newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, COLUMNS)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    def curve(self, column: str) -> list[tuple[float, float]]:
        """(seconds, value) of the rows that have this value."""
        return [(float(row["seconds"]), float(row[column])) for row in self.rows if row[column]]

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_log(file: Path) -> list[dict[str, str]]:
    """The rows of a log.csv; a last one that was cut off by a crash is left out."""
    if not file.is_file():
        return []
    with open(file, newline="", encoding="utf-8", errors="replace") as opened:
        rows = list(csv.DictReader(opened))
    return [{name: row[name] for name in COLUMNS} for row in rows if _complete(row)]


def _complete(row: Mapping[str, str | None]) -> bool:
    try:
        return all(row[name] is not None for name in COLUMNS) and int(row["step"] or "") >= 0
    except (KeyError, ValueError):
        return False


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else str(value)
