"""A conversation with a model: what has been said, as the model was taught to read it, and the next reply.

The cache of the last turn is kept. A new turn feeds only what differs from what it holds, so that the cost of a turn is
that of its own words, however long the conversation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from .cache import KVCache
from .decode import cache_window
from .model import LlamaForCausalLM
from .text import TextPieces
from .tokenizer import CHAT_TOKENS, END_OF_TEXT, Tokenizer

# Tokens by which models end a turn, besides their own end tokens.
TURN_ENDS = (CHAT_TOKENS[1], "<|eot_id|>", "<|end|>", "<end_of_turn>")

# For models that were never taught to chat: a transcript, which every text model has seen some of.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOPS = ("\nUser:", "\nSystem:", "\nAssistant:")


def opening(tokenizer: Tokenizer) -> list[int]:
    """Ids that a text starts with: what the tokenizer adds by itself (beginning of text), or, in a vocabulary whose
    only mark is the end of a text, that."""
    backend = tokenizer.backend
    bare = backend.encode("x", add_special_tokens=False).ids
    whole = backend.encode("x", add_special_tokens=True).ids
    if len(whole) > len(bare):
        found = [whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        return list(found[0]) if found else []
    end = tokenizer.token_id(END_OF_TEXT)
    chats = tokenizer.config.get("chat_template") or tokenizer.token_id(CHAT_TOKENS[0]) is not None
    return [end] if end is not None and end == tokenizer.eos_token_id and not chats else []


class Chat:
    """A conversation.

    Args:
        system: instructions that stand before everything, or None.
        options: of `generate`.
    Attributes:
        messages: [{"role": "user", "content": "..."}, ...], the system prompt first.
        plain: whether the model has no chat format, so that a transcript is written for it to continue.
        tokens: how many the last reply had.
        dropped: how many of the oldest messages the last reply had no room for.
    """

    def __init__(self, model: LlamaForCausalLM, tokenizer: Tokenizer, system: str | None = None, **options: Any):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        own = tokenizer.config.get("chat_template") is not None
        self.plain = not own and tokenizer.token_id(CHAT_TOKENS[0]) is None
        self.stops = PLAIN_STOPS if self.plain else ()
        self.system = system
        self.tokens = self.dropped = self.turns = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages: list[dict[str, str]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self._cache, self._held = KVCache(window=cache_window(self.model)), list[int]()

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant's next words begin."""
        tokenizer = self.tokenizer
        if self.plain:
            made = Tokenizer(tokenizer.backend, {**tokenizer.config, "chat_template": PLAIN_TEMPLATE})
            return opening(tokenizer) + tokenizer.encode(made.apply_chat_template(messages, True).rstrip(" "))
        special = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special]
        if not any(name in message["content"] for message in messages for name in special):
            return tokenizer.encode(tokenizer.apply_chat_template(messages, True), allow_special=True)
        # Somebody wrote "<|im_end|>" or its like: text of theirs, which must not end their turn. Each message is
        # rendered as a mark that no text has, and its own text is put in its place token by token.
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        text = tokenizer.apply_chat_template(
            [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)], True
        )
        ids: list[int] = []
        for message, mark in zip(messages, marks, strict=True):
            before, _, text = text.partition(mark)
            ids += tokenizer.encode(before, allow_special=True) + tokenizer.encode(message["content"])
        return ids + tokenizer.encode(text, allow_special=True)

    def reply(self, text: str) -> Iterator[str]:
        """Say something; yields the answer in pieces, which are also kept as a message, at an interrupt what there is.

        Raises:
            ValueError: the message alone is longer than the model can read.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._fitting()
        except Exception:
            self.messages.pop()
            raise
        said: list[str] = []
        try:
            for piece in self._stream(ids):
                said.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said).strip()})
            self.turns += 1

    def _fitting(self) -> list[int]:
        """The conversation's ids, without the oldest messages where all of them are too long for the model."""
        room = self.model.config.max_position_embeddings
        wanted = min(self.options.get("max_new_tokens", 256), room // 4)
        start = 1 if self.messages[0]["role"] == "system" else 0
        for dropped in range(0, len(self.messages) - start, 2):
            self.dropped = dropped
            ids = self.encode(self.messages[:start] + self.messages[start + dropped :])
            if len(ids) + wanted <= room:
                return ids
        if len(ids) < room:
            return ids
        raise ValueError(f"the message has {len(ids)} tokens with what goes around it, and the model can read {room}")

    def _stream(self, ids: list[int]) -> Iterator[str]:
        model, cache = self.model, self._cache
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._held, ids[:-1], strict=False))
        cache.crop(len(list(same)))
        options: dict[str, Any] = {"max_new_tokens": 256, "eos_token_id": self._ends(), **self.options}
        options["max_new_tokens"] = min(options["max_new_tokens"], model.config.max_position_embeddings - len(ids))
        if options.get("seed") is not None:
            options["seed"] += self.turns  # or all turns would draw alike
        inputs = torch.tensor([ids], device=model.device)
        mask = torch.ones_like(inputs)
        pieces, heard = TextPieces(self.tokenizer), HoldBack(self.stops)
        new: list[int] = []
        self.tokens = 0
        try:
            for id in model.stream(inputs, mask, past_key_values=cache, **options):
                new.append(id)
                self.tokens += 1
                if out := heard.put(pieces.put([id])):
                    yield out
                if heard.stopped:
                    break
            if out := heard.put(pieces.end()) + heard.end():
                yield out
        finally:
            self._held = (ids + new)[: len(cache)]  # an interrupted pass has counted nothing

    def _ends(self) -> list[int]:
        config = self.model.generation_config
        given = config.eos_token_id if config is not None and config.eos_token_id is not None else None
        given = self.model.config.eos_token_id if given is None else given
        ids = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
        ids += [i for i in (self.tokenizer.eos_token_id, *map(self.tokenizer.token_id, TURN_ENDS)) if i is not None]
        return sorted({i for i in ids if i < self.model.config.vocab_size})


class HoldBack:
    """Lets text through up to one of some strings, and keeps back what may be the beginning of one."""

    def __init__(self, stops: Iterable[str]):
        self.stops, self.held, self.stopped = tuple(stops), "", False

    def put(self, text: str) -> str:
        if self.stopped:
            return ""
        self.held += text
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            out, self.held = self.held[: min(found)], ""
            return out
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        at = len(self.held) - keep
        out, self.held = self.held[:at], self.held[at:]
        return out

    def end(self) -> str:
        out, self.held = self.held, ""
        return out


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a command line for `generate`: those that are set, sampling unless the temperature is 0."""
    found = {name: value for name, value in options.items() if value is not None}
    if found.get("temperature") == 0:
        sampling = ("temperature", "top_k", "top_p", "min_p")
        return {name: value for name, value in found.items() if name not in sampling} | {"do_sample": False}
    return found | {"do_sample": True}
