"""Tokens to text as they come: the bytes of every token, and characters as soon as they are whole.

A token of a byte-level vocabulary may end in the middle of a character, so that text can't be made of tokens one by
one. Bytes can; and of bytes an incremental decoder gives out every character that is complete.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable
from typing import Any


@functools.cache
def byte_alphabet() -> tuple[dict[int, str], dict[str, int]]:
    """The byte-level alphabet: each byte as one visible character, so that tokens can be stored as JSON strings.

    Printable bytes stand for themselves, the other 68 for the characters from U+0100 on ("Ġ" is the space). The table
    is GPT-2's; every byte-level tokenizer.json is written in it.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    forward = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return forward, {character: byte for byte, character in forward.items()}


class TokenBytes:
    """What bytes every token stands for, of any tokenizer with a `tokenizers` backend.

    Byte-level vocabularies (Llama 3, Qwen, pyllm's own) spell bytes in the alphabet above; those that came from
    SentencePiece (Llama 2, Mistral) write a space as "▁" and a lone byte as "<0x0A>", and drop a text's first space.

    Args:
        tokenizer: a pyllm.Tokenizer, a fast tokenizer of transformers, or a tokenizers.Tokenizer.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "backend", None) or tokenizer
        if not hasattr(backend, "id_to_token") or not hasattr(backend, "decoder"):
            raise ValueError(
                "tokenizer must be a pyllm.Tokenizer, a fast tokenizer of transformers or a tokenizers.Tokenizer, "
                f"got {type(tokenizer)}"
            )
        self._backend = backend
        self._added = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
        self.special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        state = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        decoder = json.dumps(state, ensure_ascii=False)
        self.sentencepiece = any(mark in decoder for mark in ('"ByteFallback"', '"Metaspace"', "▁"))
        self.strips_space = self.sentencepiece and ('"Strip"' in decoder or '"Metaspace"' in decoder)
        self._table: dict[int, bytes] = {}

    def __getitem__(self, id: int) -> bytes:
        found = self._table.get(id)
        if found is None:
            found = self._table[id] = self._spell(id)
        return found

    def _spell(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        token = self._backend.id_to_token(id)
        if token is None:
            return b""  # a hole in the numbering, or a row of the embedding that no token has
        if self.sentencepiece:
            byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        to_byte = byte_alphabet()[1]
        if all(character in to_byte for character in token):
            return bytes(to_byte[character] for character in token)
        return token.encode()


class TextPieces:
    """Token ids in, text out, in pieces that are valid UTF-8 each.

    Args:
        skip_special: leave out special tokens.
        first: the next token begins a text, whose first space a SentencePiece vocabulary drops.
    """

    def __init__(self, tokens: TokenBytes | Any, skip_special: bool = True, first: bool = False):
        self.tokens = tokens if isinstance(tokens, TokenBytes) else TokenBytes(tokens)
        self.skip_special, self.first = skip_special, first
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, ids: Iterable[int]) -> str:
        """The characters that are complete now. Bytes that can't be part of any become U+FFFD."""
        data = b"".join(self.tokens[id] for id in ids if not (self.skip_special and id in self.tokens.special))
        if data and self.first:
            data = data[1:] if self.tokens.strips_space and data.startswith(b" ") else data
            self.first = False
        return self._decoder.decode(data)

    def end(self) -> str:
        """What is left: U+FFFD for a character that never was finished."""
        return self._decoder.decode(b"", final=True)


def to_text(tokenizer: Any, ids: Iterable[int], skip_special: bool = True, first: bool = False) -> str:
    """The text of some ids."""
    pieces = TextPieces(tokenizer, skip_special, first)
    return pieces.put(ids) + pieces.end()
