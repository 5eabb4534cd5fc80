"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType


class Staging:
    """A folder is filled under another name beside its place, and moved there when it is complete.

    Made at the beginning of a run, so that a place that can't be written fails before the work and not after it.

        with Staging(out) as staging:
            ...write to staging.folder
            staging.publish()

    Without `publish`, for whatever reason, nothing is left behind and what was at the place is untouched.

    Args:
        out: where the folder is to appear. What is there is replaced.
    """

    def __init__(self, out: Path):
        self.out = out
        self.folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Staging:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)  # of a process that was killed and had our number
        self.folder.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Move the folder to its place."""
        old = self.folder.with_suffix(".old")
        if self.out.exists():
            os.replace(self.out, old)
        try:
            os.replace(self.folder, self.out)
        except BaseException:
            if old.exists():
                os.replace(old, self.out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(out: Path, mark: str, flag: str = "--out") -> None:
    """Refuse to replace a folder that this command didn't write: one that holds files, but none called `mark`.

    Raises:
        ValueError: naming the folder.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{flag} {out} is a file; choose another name")
    if out.is_dir() and any(out.iterdir()) and not (out / mark).is_file():
        raise ValueError(
            f"{flag} {out} holds files, but no {mark}, so it was not written by this; choose another folder"
        )
