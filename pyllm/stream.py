"""Text as it is generated: an iterator of pieces, and a streamer that hands them on.

A streamer, as transformers defines it, is an object with put(ids), called with the prompt and then with every token,
and end(). Those of transformers work with `generate` too.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from .text import TextPieces


def pieces(steps: Iterator[Tensor], tokenizer: Any) -> Iterator[Any]:
    """Of one row's tokens: pieces of text that are not empty, or without a tokenizer ids."""
    text = None if tokenizer is None else TextPieces(tokenizer)

    def run() -> Iterator[Any]:
        for tokens in steps:
            ids = tokens.flatten().tolist()
            if text is None:
                yield from ids
            elif piece := text.put(ids):
                yield piece
        if text is not None and (rest := text.end()):
            yield rest

    return run()


class TextStreamer:
    """Calls write(piece) with text as soon as its characters are complete; prints it by default.

    Args:
        tokenizer: a pyllm.Tokenizer, a fast tokenizer of transformers or a tokenizers.Tokenizer.
        skip_prompt: leave out what generation starts from.
        skip_special_tokens: leave out special tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        skip_special_tokens: bool = True,
        write: Callable[[str], Any] | None = None,
    ):
        self.text = TextPieces(tokenizer, skip_special_tokens, first=not skip_prompt)
        self.skip_prompt = skip_prompt
        self.write = write or (lambda piece: print(piece, end="", flush=True))
        self._prompt_is_next = True

    def put(self, ids: Tensor) -> None:
        if ids.dim() > 1 and ids.shape[0] > 1:
            raise ValueError(f"TextStreamer: one row at a time, got {ids.shape[0]}")
        is_prompt, self._prompt_is_next = self._prompt_is_next, False
        if is_prompt and self.skip_prompt:
            return
        if piece := self.text.put(ids.flatten().tolist()):
            self.write(piece)

    def end(self) -> None:
        if piece := self.text.end():
            self.write(piece)
        self._prompt_is_next = True


class TextIteratorStreamer(TextStreamer):
    """An iterator over the text, for a thread other than the one that generates."""

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, skip_special_tokens: bool = True):
        self._queue: queue.Queue[str | None] = queue.Queue()
        super().__init__(tokenizer, skip_prompt, skip_special_tokens, self._queue.put)

    def end(self) -> None:
        super().end()
        self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        while (piece := self._queue.get()) is not None:
            yield piece
