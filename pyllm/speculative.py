"""Speculative decoding: somebody guesses the next few tokens, and one pass of the model over all of them tells how far
the guess is right. What comes out is what the model alone would have given; only the number of passes differs.

Greedy: guesses are taken as long as they are the argmax. Sampling, where the guess is certain (prompt lookup): the
model draws with the number that it would have drawn with anyway, and goes on as long as it draws the guess: with a seed
even the tokens are the same. Sampling from a draft model q: a guess x is taken with probability min(1, p(x) / q(x)), or
else replaced by a draw from max(p - q, 0); the result is distributed as p (Leviathan et al. 2022, arXiv:2211.17192;
Chen et al. 2023, arXiv:2302.01318). One prompt at a time.

Names: t tokens so far, k guesses, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .cache import KVCache
from .decode import Decoder
from .processors import Processor, apply
from .sampling import Draws, draw_tokens

if TYPE_CHECKING:
    from .generate import Call
    from .model import LlamaForCausalLM


class Drafts(Protocol):
    """Who guesses. `most`: guesses at a time."""

    most: int

    def guess(self, ids: Tensor, k: int, process: list[Processor], draws: Draws | None) -> tuple[Tensor, Tensor | None]:
        """At most k tokens after ids (1, t): (guesses,), and what they were drawn from, (guesses, V); None: certain."""


class PromptLookup:
    """Guesses that what followed the last few tokens when they occurred before follows them again.

    Args:
        most: guesses at a time.
        ngram: how many of the last tokens are looked for; fewer if they are not found.
    Source: Saxena 2023, "Prompt Lookup Decoding".
    """

    def __init__(self, most: int, ngram: int = 2):
        self.most, self.ngram = most, ngram

    def guess(self, ids: Tensor, k: int, process: list[Processor], draws: Draws | None) -> tuple[Tensor, Tensor | None]:
        row = ids[0]
        t = len(row)
        for n in range(min(self.ngram, t - 1), 0, -1):
            windows = row[:-1].unfold(0, n, 1)  # (t - n, n), each with a token behind it
            hits = (windows == row[t - n :]).all(1).nonzero()
            if len(hits):
                after = int(hits[0]) + n
                return row[after : after + k], None
        return row[:0], None


class DraftModel:
    """Guesses what a smaller model would say.

    Args:
        most: guesses at a time.
    """

    def __init__(self, model: LlamaForCausalLM, most: int):
        self.model, self.most = model, most
        self.cache = KVCache()
        self.decoder: Decoder | None = None

    def guess(self, ids: Tensor, k: int, process: list[Processor], draws: Draws | None) -> tuple[Tensor, Tensor | None]:
        t = ids.shape[1]
        self.cache.crop(t - 1)  # guesses that were refused
        if self.decoder is None:
            ids = ids.to(self.model.device)
            self.decoder = Decoder(self.model, ids, None, self.cache)
        row, drawn_from = ids, []
        for _ in range(k):
            scores = apply(process, row, self.decoder.step(row))
            if draws is None:
                token = scores.argmax(-1)
            else:
                drawn_from.append(scores.softmax(-1))
                token = draws.tokens(drawn_from[-1])
            row = torch.cat((row, token[:, None]), dim=1)
        return row[0, t:], torch.cat(drawn_from) if drawn_from else None


def speculate(
    call: Call, decoder: Decoder, drafts: Drafts, process: list[Processor], draws: Draws | None
) -> Iterator[Tensor]:
    """The tokens of a call, (1, new) at a time; fills in `call.out` and `call.t`."""
    with torch.no_grad():
        logits = decoder.prefill()[:, None]  # (1, 1, V) after the newest token, and after each guess
    guesses, drawn_from = call.out[0, :0], None
    ended = False
    while not ended:
        with torch.no_grad():
            start = call.t
            for i in range(len(guesses) + 1):
                scores = apply(process, call.out[:, : call.t], logits[:, i])
                call.keep(scores, logits[:, i])
                guess = guesses[i] if i < len(guesses) else None
                token = _choose(scores, guess, None if drawn_from is None else drawn_from[i : i + 1], draws)
                call.out[0, call.t] = token
                call.t += 1
                done = call.stopping and bool(call.stopping(call.out[:, : call.t], scores)[0])
                ended = call.t == call.limit or bool(done)
                if ended or guess is None or int(token) != int(guess):
                    break
            new = call.out[:, start : call.t].clone()
        yield new
        if ended:
            break
        with torch.no_grad():
            assert decoder.cache is not None
            decoder.cache.crop(call.t - 1)  # guesses that were refused
            k = min(drafts.most, call.limit - call.t - 1)
            guesses, drawn_from = drafts.guess(call.out[:, : call.t], k, process, draws) if k else (guesses[:0], None)
            row = torch.cat((call.out[:, : call.t], guesses[None]), dim=1)
            logits = decoder.steps(row, len(guesses) + 1)
    assert decoder.cache is not None
    decoder.cache.crop(call.t - 1)


def _choose(scores: Tensor, guess: Tensor | None, drawn_from: Tensor | None, draws: Draws | None) -> Tensor:
    """The next token, () int64: the guess if it stands."""
    if draws is None:
        return scores.argmax(-1)[0]
    p = scores.softmax(-1)  # (1, V)
    if guess is None or drawn_from is None:
        return draws.tokens(p)[0]
    if bool(draws.numbers(1)[0, 0] * drawn_from[0, guess] < p[0, guess]):
        return guess
    return draw_tokens((p - drawn_from).clamp(min=0.0), draws.numbers(1)[:, 0])[0]
