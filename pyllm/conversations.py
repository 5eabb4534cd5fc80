"""Conversations to learn from: read, rendered by the model's own template, and marked where the assistant speaks.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}      a line of JSONL
    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello.<|im_end|>\\n                          rendered
                                                       ^^^^^^^^^^^^^^^^                                learned from

Which tokens are the assistant's is read off the rendered text, never from a guess at what headers look like. Templates
may say so themselves (`{% generation %}`). Of all others it is found by rendering beginnings: what a conversation up to
an answer lacks to the one with the answer is that answer, with whatever the template puts behind it to end a turn.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .inputs import IGNORE
from .template import Span
from .text import TokenBytes
from .tokenizer import Tokenizer

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")
OPEN_PACKS = 64  # packs that are filled at a time


@dataclass(frozen=True)
class Example:
    """A conversation as tokens, and which of them are learned from."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]

    @property
    def count(self) -> int:
        """Tokens to learn from: a first token has nothing before it and is none."""
        return sum(self.supervised[1:])

    def cut(self, length: int) -> Example:
        """The first `length` tokens."""
        return Example(self.ids[:length], self.supervised[:length])


def read_conversations(path: str | os.PathLike[str], system: str | None = None) -> list[list[Message]]:
    """The conversations of a JSONL file: a line each, {"messages": [{"role": ..., "content": ...}, ...]}.

    Args:
        system: a system prompt for those that have none.
    Raises:
        ValueError: naming file, line and what is wrong with it. Nothing is skipped but empty lines.
    """
    found = []
    for number, line in enumerate(_lines(Path(path)), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from error
        if not isinstance(row, dict) or "messages" not in row:
            raise ValueError(f'{where}: needs {{"messages": [...]}}, got {line.strip()[:60]}')
        messages = check_messages(row["messages"], where)
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        found.append(messages)
    if not found:
        raise ValueError(f"{path} holds no conversation: it is empty")
    return found


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not UTF-8: {error}") from error
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None


def check_messages(messages: object, where: str) -> list[Message]:
    """The messages of a conversation that has at least one answer.

    Raises:
        ValueError: an unknown role, a text that is none, a system prompt that isn't first, no answer.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list of at least one message, got {str(messages)[:60]}")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where}: message {i} needs role and content, got {str(message)[:60]}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"{where}: message {i} has the unknown role {role!r}; known: {', '.join(ROLES)}")
        if role == "system" and i > 1:
            raise ValueError(f"{where}: message {i} is a system prompt, which may only come first")
        if not isinstance(content, str):
            raise ValueError(f"{where}: the content of message {i} must be a text, got {str(content)[:60]}")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: the content of message {i} is no text: {error}") from error
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: no message of the assistant, so there is nothing to learn from")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def answers(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """The rendered text of a conversation and the characters in it that are the assistant's.

    Raises:
        ValueError: the template has no `{% generation %}` blocks, and renders the beginning of a conversation
            differently from the whole, so that answers can't be told from what surrounds them.
    """
    whole, spans = tokenizer.render_chat(messages)
    if spans:
        return whole, [(begin, end) for begin, end in spans if begin < end]
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], True)
        after = whole if i + 1 == len(messages) else tokenizer.apply_chat_template(messages[: i + 1])
        if not after.startswith(before) or not whole.startswith(after):
            inner, outer = (before, after) if not after.startswith(before) else (after, whole)
            at = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(inner, outer, strict=False)))
            raise ValueError(
                f"chat template: which tokens are the answer in message {i + 1} can't be told, because the template "
                f"writes the conversation's beginning differently when more follows: {inner[at : at + 30]!r} becomes "
                f"{outer[at : at + 30]!r}. Put {{% generation %}} and {{% endgeneration %}} around what the assistant "
                "says in the template, or end the conversation with this message"
            )
        end = len(after)
        # Line breaks behind the token that ends a turn are the template's: nobody will ever ask for them.
        ended = after.rstrip()
        if len(ended) > len(before) and any(ended.endswith(token) for token in tokenizer.special_tokens):
            end = len(ended)
        if len(before) < end:
            spans.append((len(before), end))
    return whole, spans


def encode(tokenizer: Tokenizer, messages: Sequence[Message]) -> Example:
    """A conversation as tokens. One is supervised if it begins within an answer.

    Special tokens that somebody wrote into a message are text, and are encoded as text.
    """
    contents = [message["content"] for message in messages]
    if not any(token in content for content in contents for token in tokenizer.special_tokens):
        whole, spans = answers(tokenizer, messages)
        return _encode_pieces(tokenizer, [(whole, True)], spans)
    # As `Chat.encode`: rendered with marks in the contents' places, which are then put in as text.
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    rest, spans = answers(tokenizer, marked)
    pieces, shifted, at = [], spans, 0
    for mark, content in zip(marks, contents, strict=True):
        before, found, rest = rest.partition(mark)
        if not found:
            raise ValueError("chat template: it leaves out or rearranges messages; which tokens are whose is unclear")
        pieces += [(before, True), (content, False)]
        at += len(before)
        shifted = [
            (begin + (len(content) - len(mark)) * (begin > at), end + (len(content) - len(mark)) * (end > at))
            for begin, end in shifted
        ]
        at += len(content)
    return _encode_pieces(tokenizer, [*pieces, (rest, True)], shifted)


def _encode_pieces(tokenizer: Tokenizer, pieces: Iterable[tuple[str, bool]], spans: Sequence[Span]) -> Example:
    ids: list[int] = []
    supervised: list[bool] = []
    offset = 0
    for text, special in pieces:
        found, places = tokenizer.encode_offsets(text, allow_special=special)
        ids += found
        for begin, _ in places:
            supervised.append(any(start <= offset + begin < end for start, end in spans))
        offset += len(text)
    return Example(tuple(ids), tuple(supervised))


def preview(tokenizer: Tokenizer, example: Example, color: bool = True, limit: int = 2000) -> str:
    """The text of an example with what is learned from in green, or between ⟦ and ⟧ where there are no colours."""
    opens, closes, rest = ("\x1b[1;32m", "\x1b[0m", "\x1b[2m") if color else ("⟦", "⟧", "")
    table = TokenBytes(tokenizer)
    parts = []
    for learned, group in itertools.groupby(zip(example.ids, example.supervised, strict=True), lambda pair: pair[1]):
        text = b"".join(table[id] for id, _ in group).decode("utf-8", "replace")
        text = "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)  # no other escapes
        parts.append(f"{opens if learned else rest}{text}{closes if learned or color else ''}")
    shown = "".join(parts)
    return shown if len(shown) <= limit else shown[:limit] + f"{closes if color else ''} ..."


def is_validation(messages: Sequence[Message], share: float) -> bool:
    """Which side of the split a conversation falls on: by a hash of its words, so that copies stay together."""
    state = hashlib.sha256(json.dumps([[m["role"], m["content"]] for m in messages]).encode())
    return int.from_bytes(state.digest()[:8], "big") < share * 2**64


# Packing


@dataclass
class Packs:
    """Some packs: rows of conversations, end to end. They see nothing of each other.

    Attributes:
        rows: (ids (N,), targets (N,) with -100 where nothing is learned, cu_seqlens (documents + 1,) int32) per pack.
        count: targets in them.
    """

    rows: list[tuple[Tensor, Tensor, Tensor]]
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """That of a batch with as many targets: (1, targets + 1)."""
        return 1, self.count + 1

    def to(self, device: torch.device, non_blocking: bool = False) -> Packs:
        rows = [
            (ids.to(device), targets.to(device), ends.to(device, non_blocking=non_blocking))
            for ids, targets, ends in self.rows
        ]
        return Packs(rows, self.count)


def pack(examples: Sequence[Example], length: int) -> list[list[int]]:
    """Indices of examples by pack, none longer than `length` tokens: each example goes where it fits first.

    At most 64 packs are open at a time, so that a million examples are packed in one pass.
    """
    done: list[list[int]] = []
    filling: list[tuple[int, list[int]]] = []  # (tokens, examples)
    for i, example in enumerate(examples):
        size = len(example.ids)
        if size > length:
            raise ValueError(f"pack: example {i} has {size} tokens, a pack {length}; cut it before")
        for j, (used, members) in enumerate(filling):
            if used + size <= length:
                filling[j] = (used + size, [*members, i])
                break
        else:
            filling.append((size, [i]))
            if len(filling) > OPEN_PACKS:
                fullest = max(range(len(filling)), key=lambda j: filling[j][0])
                done.append(filling.pop(fullest)[1])
    return done + [members for _, members in filling]


def make_packs(examples: Sequence[Example], groups: Iterable[Sequence[int]]) -> Packs:
    """Packs of examples as tensors. Targets are shifted: each position has the next token, if that is learned from."""
    rows, count = [], 0
    for group in groups:
        ids, targets, ends = list[int](), list[int](), [0]
        for i in group:
            example = examples[i]
            ids += example.ids
            pairs = zip(example.ids[1:], example.supervised[1:], strict=True)
            targets += [id if learned else IGNORE for id, learned in pairs]
            targets += [IGNORE] * bool(example.ids)  # behind the last token comes nothing, and no other conversation
            ends.append(len(ids))
            count += example.count
        rows.append((torch.tensor(ids), torch.tensor(targets), torch.tensor(ends, dtype=torch.int32)))
    return Packs(rows, count)


class PackedBatches:
    """Endless batches of packs, shuffled and packed anew every epoch; the same ones for the same seed.

    Args:
        length: tokens of a pack, at most.
        batch: packs of a batch, at most: an epoch's last batch takes what is left.
    """

    def __init__(self, examples: Sequence[Example], length: int, batch: int, seed: int = 0):
        if length < 2 or batch < 1:
            raise ValueError(f"PackedBatches: needs length >= 2 and batch >= 1, got {length} and {batch}")
        if not examples:
            raise ValueError("PackedBatches: there is no example")
        self.examples, self.length, self.batch = examples, length, batch
        self.generator = torch.Generator().manual_seed(seed)

    def epoch(self) -> list[list[list[int]]]:
        """The batches of the next epoch, as indices of examples by pack."""
        order = torch.randperm(len(self.examples), generator=self.generator).tolist()
        packs = [[order[i] for i in group] for group in pack([self.examples[i] for i in order], self.length)]
        packs = [packs[i] for i in torch.randperm(len(packs), generator=self.generator).tolist()]
        return [packs[i : i + self.batch] for i in range(0, len(packs), self.batch)]

    def steps_per_epoch(self) -> int:
        """About as many as any epoch has; packing differs a little from one to the next."""
        return -(-len(pack(self.examples, self.length)) // self.batch)

    def __iter__(self) -> Iterator[Packs]:
        while True:
            for groups in self.epoch():
                yield make_packs(self.examples, groups)
