"""Files to documents: plain text, JSON lines, parquet and token ids, read one document at a time.

Whatever the format, a document ends up as bytes of text or as an array of token ids, and its side of the split between
training and validation follows from a hash of that content: no order, file name or machine has a say, and the same
document twice is on one side twice.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import TEXT_SUFFIXES, Corpus, python_corpus

BUILT_IN = "python"  # the name of the corpus that needs no download
JSON_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TOKEN_SUFFIXES = frozenset({".npy", ".bin"})
PIECE = 1 << 16  # bytes: longer text files are cut, so that one file can be on both sides of the split


@dataclass(frozen=True)
class Item:
    """A document: `text` in bytes, or `ids`, which no tokenizer has to make any more."""

    text: bytes = b""
    ids: np.ndarray | None = None
    validation: bool | None = None  # None: the hash decides

    def digest(self) -> bytes:
        content = self.text if self.ids is None else np.ascontiguousarray(self.ids, dtype="<u4").tobytes()
        return hashlib.sha256(content).digest()

    def is_validation(self, share: float) -> bool:
        """Whether this document belongs to the validation side, which gets `share` of all."""
        if self.validation is not None:
            return self.validation and share > 0
        return int.from_bytes(self.digest()[:8], "big") < share * 2**64


def files(sources: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files behind paths and folders, in a fixed order; the built-in corpus has none.

    Raises:
        ValueError: a path doesn't exist, a folder holds nothing that can be read, a file's format is unknown.
    """
    found: list[Path] = []
    known = TEXT_SUFFIXES | JSON_SUFFIXES | TOKEN_SUFFIXES | {".parquet"}
    for source in sources:
        if source == BUILT_IN:
            continue
        path = Path(source)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in known)
            if not inside:
                raise ValueError(f"data: folder {path} holds no file of a known kind ({' '.join(sorted(known))})")
            found.extend(inside)
        elif path.is_file():
            found.append(path)  # a file named by hand is text, whatever its name, unless its suffix says otherwise
        else:
            raise ValueError(f"data: {path} does not exist; give files, folders or {BUILT_IN!r}, the built-in corpus")
    for path in found:
        if path.stat().st_size == 0:
            raise ValueError(f"data: {path} is empty")
    return found


def read(sources: Iterable[str | os.PathLike[str]], text_key: str = "text", end: int | None = None) -> Iterator[Item]:
    """Every document of some files, folders or the built-in corpus, in a fixed order.

    Args:
        text_key: where the text is in a JSON object or a parquet row.
        end: the id that ends a document in files of token ids; None takes each file as one document.
    Raises:
        ValueError: naming file, line or row, and what is wrong with it.
    """
    sources = list(sources)
    if BUILT_IN in sources:
        corpus = _built_in()
        for side, documents in ((False, corpus.train), (True, corpus.validation)):
            yield from (Item(document.data, validation=side) for document in documents)
    for path in files(sources):
        suffix = _suffix(path)
        if suffix in JSON_SUFFIXES:
            yield from _json_lines(path, text_key)
        elif suffix == ".parquet":
            yield from _parquet(path, text_key)
        elif suffix in TOKEN_SUFFIXES:
            yield from _token_file(path, end)
        else:
            yield from _text(path)


def fingerprint(sources: Iterable[str | os.PathLike[str]]) -> list[Any]:
    """What tells whether sources changed since they were tokenised: names, sizes and times of change."""
    sources = list(sources)
    stats = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files(sources)]
    return [*([_built_in().digest()] if BUILT_IN in sources else []), *stats]


@functools.cache
def _built_in() -> Corpus:
    """Read once, though a run asks several times: to recognise it, for a tokenizer, for the tokens."""
    return python_corpus()


def _suffix(path: Path) -> str:
    """The suffix that says what a file holds: the one in front of .gz where it is compressed."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def _text(path: Path) -> Iterator[Item]:
    """A text file; a long one as pieces of about PIECE bytes, cut at line ends."""
    with _open(path) as file:
        while piece := file.read(PIECE):
            yield Item(piece + file.readline())


def _json_lines(path: Path, key: str) -> Iterator[Item]:
    found = False
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                shown = line[:60].decode("utf-8", "replace").strip()
                raise ValueError(f"data: {path}, line {number} is not valid JSON ({error}): {shown}") from error
            text = value.get(key) if isinstance(value, dict) else None
            if not isinstance(text, str):
                what = f"keys {sorted(value)[:8]}" if isinstance(value, dict) else type(value).__name__
                raise ValueError(f"data: {path}, line {number} needs a string under {key!r}, got {what} (--text-key)")
            found = True
            yield Item(text.encode("utf-8", "surrogatepass"))
    if not found:
        raise ValueError(f"data: {path} holds no document, only blank lines")


def _parquet(path: Path, key: str) -> Iterator[Item]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"data: {path} needs the package pyarrow: pip install pyarrow")
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises several types of its own
        raise ValueError(f"data: {path} is not a parquet file that can be read: {error}") from error
    if key not in table.schema_arrow.names:
        raise ValueError(f"data: {path} has no column {key!r}, only {', '.join(table.schema_arrow.names)} (--text-key)")
    row = 0
    for batch in table.iter_batches(columns=[key]):
        for text in batch.column(0).to_pylist():
            row += 1
            if not isinstance(text, str):
                raise ValueError(f"data: {path}, row {row} needs a string in column {key!r}, got {type(text).__name__}")
            yield Item(text.encode("utf-8", "surrogatepass"))
    if not row:
        raise ValueError(f"data: {path} holds no row")


def _token_file(path: Path, end: int | None) -> Iterator[Item]:
    """Ids in numpy's format, or raw little-endian uint16 as llm.c and nanoGPT write them (.bin)."""
    if path.suffix.lower() == ".npy":
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"data: {path} is not a numpy array that can be read: {error}") from error
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
            raise ValueError(f"data: {path} must be a 1-D array of integers, got {ids.dtype} of shape {ids.shape}")
    else:
        if path.stat().st_size % 2:
            raise ValueError(f"data: {path} must hold uint16 ids, but its size of {path.stat().st_size} bytes is odd")
        ids = np.memmap(path, dtype="<u2", mode="r")
    ends = np.array([], dtype=np.int64) if end is None else np.flatnonzero(ids == end)
    start = 0
    for stop in [*ends.tolist(), len(ids)]:
        if stop > start:
            yield Item(ids=ids[start:stop])
        start = stop + 1
