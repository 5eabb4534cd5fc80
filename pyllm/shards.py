"""Token ids on disk: shards that are memory-mapped, so that a corpus may be larger than memory and opens at once.

A shard is three files. `00000.tokens` are the ids, little-endian uint16, or uint32 where the vocabulary is larger than
65536. `00000.offsets` are int64 positions of the documents' first tokens. `00000.json` is the header: counts, the
vocabulary's size and the tokenizer's fingerprint, so that no shard is read with a tokenizer that didn't make it.

Every document stands behind the token that starts one:   <|endoftext|> doc 1 <|endoftext|> doc 2 ...
where the next document's start is the end that the model has to predict; or, for tokenizers that have a token of its
own for the beginning,   <s> doc 1 </s> <s> doc 2 </s> ...
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .documents import Item
from .tokenizer import Tokenizer

FORMAT = "pyllm-tokens-1"
SHARD_TOKENS = 1 << 27  # 256 MB of uint16
TRAIN, VALIDATION = "train", "validation"


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that give every text the same ids."""
    return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()[:16]


class ShardWriter:
    """Writes documents of one side into shards.

    Args:
        folder: made if needed.
        header: what every shard's header says besides its counts.
        vocab_size: decides the width of an id.
        start, end: ids before and behind every document; None: nothing.
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, Any],
        vocab_size: int,
        start: int | None,
        end: int | None,
        shard_tokens: int = SHARD_TOKENS,
    ):
        self.folder, self.header, self.vocab_size = folder, dict(header), vocab_size
        self.start, self.end, self.limit = start, end, shard_tokens
        self.dtype = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
        folder.mkdir(parents=True, exist_ok=True)
        self.count = self.written = self.documents = self.bytes = 0
        self.tokens: Any = None
        self.offsets: Any = None

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """One more document, which stands for so many bytes of text."""
        ids = np.asarray(ids)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise ValueError(
                f"data: token id {bad} is outside the vocabulary of {self.vocab_size}; "
                "do the token files and the tokenizer belong together?"
            )
        if self.tokens is None or self.written >= self.limit:
            self._close()
            name = self.folder / f"{self.count:05d}"
            self.tokens = open(f"{name}.tokens", "wb")  # noqa: SIM115  (closed by _close, many documents later)
            self.offsets = open(f"{name}.offsets", "wb")  # noqa: SIM115
            self.written = self.documents = self.bytes = 0
        np.array([self.written], dtype="<i8").tofile(self.offsets)
        before, behind = ([] if id is None else [id] for id in (self.start, self.end))
        row = np.array([*before, *ids.tolist(), *behind], dtype=self.dtype)
        row.tofile(self.tokens)
        self.written += len(row)
        self.documents += 1
        self.bytes += num_bytes

    def _close(self) -> None:
        if self.tokens is None:
            return
        for file in (self.tokens, self.offsets):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        header = {
            "format": FORMAT, "dtype": self.dtype.name, "tokens": self.written, "documents": self.documents,
            "bytes": self.bytes, "vocab_size": self.vocab_size, **self.header,
        }  # fmt: skip
        (self.folder / f"{self.count:05d}.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        self.count, self.tokens = self.count + 1, None

    def close(self) -> None:
        """Finish the last shard."""
        self._close()


@dataclass
class TokenShards:
    """The shards of a folder as one row of ids that is never in memory as a whole.

    Attributes:
        tokens, documents, bytes: of all shards together; bytes are the text's own.
        masked_ends: no document's end predicts the next one's beginning (it has a token of its own).
    """

    folder: Path
    headers: list[dict[str, Any]] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    offsets: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> TokenShards:
        """
        Raises:
            ValueError: no shards, a damaged one, or one that another tokenizer made; says which and what to do.
        """
        found = cls(Path(folder))
        names = sorted(found.folder.glob("[0-9]*.json"))
        if not names:
            raise ValueError(f"data: {folder} holds no shards of tokens (00000.json, 00000.tokens, 00000.offsets)")
        for name in names:
            try:
                header = json.loads(name.read_text(encoding="utf-8"))
                kind, tokens, documents = header["format"], int(header["tokens"]), int(header["documents"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"data: {name} is not the header of a shard: {error!r}") from error
            if kind != FORMAT:
                raise ValueError(f"data: {name} is of format {kind!r}, this version reads {FORMAT!r}; tokenise again")
            if tokenizer is not None and header["tokenizer"] != tokenizer_fingerprint(tokenizer):
                raise ValueError(
                    f"data: {name} was made by another tokenizer ({header['tokenizer']}, {header['vocab_size']} "
                    f"tokens) than the one in use ({tokenizer_fingerprint(tokenizer)}, {tokenizer.vocab_size} tokens)"
                )
            dtype = np.dtype(header["dtype"]).newbyteorder("<")
            found.rows.append(_map(name.with_suffix(".tokens"), dtype, tokens))
            found.offsets.append(_map(name.with_suffix(".offsets"), np.dtype("<i8"), documents))
            found.headers.append(header)
        found.begins = np.cumsum([0, *(len(row) for row in found.rows)])
        return found

    begins: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    @property
    def tokens(self) -> int:
        return int(self.begins[-1])

    @property
    def documents(self) -> int:
        return sum(len(offsets) for offsets in self.offsets)

    @property
    def bytes(self) -> int:
        return sum(int(header["bytes"]) for header in self.headers)

    @property
    def vocab_size(self) -> int:
        return int(self.headers[0]["vocab_size"])

    @property
    def masked_ends(self) -> bool:
        return bool(self.headers[0]["masked_ends"])

    def fingerprint(self) -> str:
        """Of the content's description and its first and last tokens: cheap, and told apart from other data."""
        state = hashlib.sha256()
        for header, row in zip(self.headers, self.rows, strict=True):
            state.update(json.dumps(header, sort_keys=True).encode() + row[:4096].tobytes() + row[-4096:].tobytes())
        return state.hexdigest()[:16]

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` ids from position `start` on, and where among them documents begin.

        The row goes round: behind the last token comes the first.

        Returns:
            (count,) int64, and the increasing indices, in [0, count), of documents' first tokens.
        """
        ids = np.empty(count, dtype=np.int64)
        firsts, done = [], 0
        position = start % self.tokens
        while done < count:
            shard = int(np.searchsorted(self.begins, position, side="right")) - 1
            inside = position - int(self.begins[shard])
            take = min(count - done, len(self.rows[shard]) - inside)
            ids[done : done + take] = self.rows[shard][inside : inside + take]
            offsets = self.offsets[shard]
            low, high = np.searchsorted(offsets, [inside, inside + take])
            firsts.append(np.asarray(offsets[low:high]) - inside + done)
            done += take
            position = (position + take) % self.tokens
        return ids, np.concatenate(firsts)


def _map(file: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if not file.is_file():
        raise ValueError(f"data: {file} is missing")
    size, needed = file.stat().st_size, count * dtype.itemsize
    if size != needed:
        what = "is cut short" if size < needed else "is longer than its header says"
        raise ValueError(f"data: {file} {what}: {size} bytes, its header needs {needed}; remove the folder to redo it")
    if not count:
        raise ValueError(f"data: {file} is empty")
    return np.memmap(file, dtype=dtype, mode="r", shape=(count,))


def tokenise(
    items: Iterable[Item],
    tokenizer: Tokenizer,
    folder: Path,
    share: float,
    description: Mapping[str, Any] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Documents to `folder/train` and `folder/validation`; the folder appears when everything is written, or never.

    Args:
        share: of the documents that go to validation.
        description: written to `folder/source.json`, to recognise the data by.
    Raises:
        ValueError: no document at all, none to train on, or an id outside the vocabulary.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if end is None:
        raise ValueError("data: the tokenizer has no end-of-text token to put between documents")
    masked = start is not None and start != end
    header = {"tokenizer": tokenizer_fingerprint(tokenizer), "masked_ends": masked}
    if not masked:
        start, end = end, None
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    sides = {
        name: ShardWriter(temporary / name, header, tokenizer.vocab_size, start, end, shard_tokens)
        for name in (TRAIN, VALIDATION)
    }
    for item, ids in _encoded(items, tokenizer):
        size = len(item.text) if item.ids is None else len(tokenizer.decode_bytes(ids.tolist(), skip_special=True))
        sides[VALIDATION if item.is_validation(share) else TRAIN].add(ids, size)
    for writer in sides.values():
        writer.close()
    if not sides[TRAIN].count:
        shutil.rmtree(temporary)
        raise ValueError(f"data: no document to train on with a validation share of {share}")
    source = json.dumps(description or {}, indent=2) + "\n"
    (temporary / "source.json").write_text(source, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _encoded(items: Iterable[Item], tokenizer: Tokenizer, group: int = 1 << 20) -> Iterator[tuple[Item, np.ndarray]]:
    """Documents with their ids; about `group` bytes of text at a time, which the tokenizer spreads over threads."""

    def flush() -> Iterator[tuple[Item, np.ndarray]]:
        texts: list[str] = []
        for item in waiting:
            try:
                texts.append(item.text.decode("utf-8"))
            except UnicodeDecodeError:  # no text in UTF-8: byte by byte, below
                texts.append("")
        for item, text, ids in zip(waiting, texts, tokenizer.encode_batch(texts), strict=True):
            row = ids if text or not item.text else tokenizer.encode_bytes(item.text)
            yield item, np.asarray(row if item.ids is None else item.ids, dtype=np.int64)

    waiting: list[Item] = []
    size = 0
    for item in items:
        waiting.append(item)
        size += len(item.text)
        if size >= group or len(waiting) >= 4096:
            yield from flush()
            waiting, size = [], 0
    yield from flush()
