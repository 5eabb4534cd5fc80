"""Processors: what is done to the scores of the next token before it is chosen, in transformers' order.

A processor is a function of the ids so far (B, t) and the scores (B, V), float32, and returns new scores; it never
writes what it was given. When beams are searched, the scores are log probabilities.

Names: B rows, T prompt length, t tokens so far, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .options import GenerationConfig
from .sampling import keep_epsilon, keep_eta, keep_min_p, keep_top_k, keep_top_p, keep_typical

Processor = Callable[[Tensor, Tensor], Tensor]


class RepetitionPenalty:
    """Scores of tokens that occurred, padding of the prompt excepted, are divided by the penalty, or multiplied if < 0.

    Source: Keskar et al. 2019, arXiv:1909.05858.
    """

    def __init__(self, penalty: float, mask: Tensor | None, prompt_length: int):
        self.penalty = penalty
        self.padding = None if mask is None else mask[:, :prompt_length] == 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        V = scores.shape[1]
        if self.padding is not None:
            ids = ids.clone()
            ids[:, : self.padding.shape[1]].masked_fill_(self.padding, V)
        occurred = torch.zeros(len(ids), V + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)[:, :V]
        return torch.where(occurred, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)


class NoRepeatNGram:
    """-inf for every token that would complete a sequence of n tokens for the second time in its row."""

    def __init__(self, n: int):
        self.n = n

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        t = ids.shape[1]
        if t < self.n:
            return scores
        windows = ids.unfold(1, self.n, 1)  # (B, t - n + 1, n)
        last = ids[:, t + 1 - self.n :]  # (B, n - 1), what the next token would complete
        again = (windows[..., :-1] == last[:, None]).all(-1)
        banned = torch.zeros(len(ids), scores.shape[1] + 1, dtype=torch.bool, device=ids.device)
        banned.scatter_(1, torch.where(again, windows[..., -1], scores.shape[1]), True)
        return scores.masked_fill(banned[:, :-1], -math.inf)


class SequenceBias:
    """Adds a number to the score of the last token of a sequence, where all before it have just been written."""

    def __init__(self, biases: Mapping[tuple[int, ...], float], device: torch.device):
        def tensor(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.groups = []  # per length: (what comes before, the last token, the bias)
        for length in sorted({len(tokens) for tokens in biases}):
            found = [(tokens, bias) for tokens, bias in biases.items() if len(tokens) == length]
            before = tensor([tokens[:-1] for tokens, _ in found], torch.int64).view(len(found), length - 1)
            last = tensor([tokens[-1] for tokens, _ in found], torch.int64)
            self.groups.append((before, last, tensor([bias for _, bias in found], torch.float32)))

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        total = torch.zeros_like(scores)
        for before, last, bias in self.groups:
            n = before.shape[1]
            if n > ids.shape[1]:
                continue
            tail = ids[:, ids.shape[1] - n :]
            hits = (tail[:, None] == before).all(-1)  # (B, sequences)
            total.index_add_(1, last, torch.where(hits, bias, 0.0).to(total.dtype))
        return scores + total


def no_bad_words(words: Iterable[Iterable[int]], eos: list[int], device: torch.device) -> SequenceBias | None:
    """Sequences that are never completed. An end token alone stays allowed."""
    biases = {tuple(word): -math.inf for word in words}
    biases = {word: bias for word, bias in biases.items() if word not in {(e,) for e in eos}}
    return SequenceBias(biases, device) if biases else None


def suppress(tokens: list[int], device: torch.device, when: Callable[[int], bool] | None = None) -> Processor:
    """-inf for some tokens: always, or when(length so far)."""
    chosen = torch.tensor(tokens, dtype=torch.int64, device=device)

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if when is not None and not when(ids.shape[1]):
            return scores
        return scores.index_fill(1, chosen, -math.inf)

    return process


def force(tokens: list[int], device: torch.device, length: int) -> Processor:
    """At this length nothing but these tokens, all alike."""
    chosen = torch.tensor(tokens, dtype=torch.int64, device=device)

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] != length:
            return scores
        return torch.full_like(scores, -math.inf).index_fill_(1, chosen, 0.0)

    return process


def decay_length(start: int, factor: float, eos: list[int], device: torch.device) -> Processor:
    """From length `start` on end tokens gain |score| (factor^(tokens since) - 1)."""
    chosen = torch.tensor(eos, dtype=torch.int64, device=device)

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        since = ids.shape[1] - start
        if since <= 0:
            return scores
        ends = scores[:, chosen]
        gain = (ends.abs() * (factor**since - 1)).masked_fill(~ends.isfinite(), 0.0)
        return scores.index_copy(1, chosen, ends + gain)

    return process


def finite(ids: Tensor, scores: Tensor) -> Tensor:
    """NaN becomes 0, infinities the largest numbers there are."""
    limits = torch.finfo(scores.dtype)
    return scores.nan_to_num(nan=0.0, posinf=limits.max, neginf=limits.min)


def normalised(ids: Tensor, scores: Tensor) -> Tensor:
    return scores.log_softmax(-1)


def processors(
    config: GenerationConfig,
    mask: Tensor | None,
    T: int,
    limit: int,
    device: torch.device,
    custom: Iterable[Processor] = (),
) -> list[Processor]:
    """All that the options ask for, in transformers' order.

    Args:
        mask: (B, T or more), 0 at the prompts' padding, which does not count as text; None where nothing is padded.
        limit: length at which generation ends.
    """
    c, eos = config, config.eos_ids
    found: list[Processor] = []
    if c.sequence_bias is not None:
        found.append(SequenceBias(c.sequence_bias, device))
    if c.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenalty(float(c.repetition_penalty), mask, T))
    if c.no_repeat_ngram_size:
        found.append(NoRepeatNGram(c.no_repeat_ngram_size))
    if c.bad_words_ids is not None:
        found += [p for p in [no_bad_words(c.bad_words_ids, eos, device)] if p is not None]
    shortest = (c.min_length or 0) if c.min_new_tokens is None else T + c.min_new_tokens
    if eos and shortest > T:
        found.append(suppress(eos, device, lambda t: t < shortest))
    if c.forced_bos_token_id is not None:
        found.append(force([c.forced_bos_token_id], device, 1))
    if c.forced_eos_token_id is not None:
        forced = c.forced_eos_token_id
        found.append(force([forced] if isinstance(forced, int) else list(forced), device, limit - 1))
    if c.remove_invalid_values:
        found.append(finite)
    if c.exponential_decay_length_penalty is not None and eos:
        start, factor = c.exponential_decay_length_penalty
        found.append(decay_length(T + int(start), float(factor), eos, device))
    if c.suppress_tokens:
        found.append(suppress(list(c.suppress_tokens), device))
    if c.begin_suppress_tokens:
        begin = T if T > 1 or c.forced_bos_token_id is None else T + 1
        found.append(suppress(list(c.begin_suppress_tokens), device, lambda t: t == begin))
    found.extend(custom)
    if c.do_sample:
        found.extend(warpers(c))
    if c.renormalize_logits:
        found.append(normalised)
    return found


def draw_options(config: GenerationConfig) -> dict[str, Any] | None:
    """What the warpers do as options of `pyllm.kernels.sample`, None where they do more than it can."""
    c = config
    if c.beams > 1 or c.epsilon_cutoff or c.eta_cutoff or c.renormalize_logits or not (c.typical_p or 1.0) >= 1.0:
        return None
    return {
        "temperature": 1.0 if c.temperature is None else float(c.temperature),
        "top_k": 50 if c.top_k is None else int(c.top_k),
        "top_p": 1.0 if c.top_p is None else float(c.top_p),
        "min_p": 0.0 if c.min_p is None else float(c.min_p),
    }


def warpers(config: GenerationConfig) -> list[Processor]:
    """What shapes the distribution that is sampled from. None of it reads the ids."""
    c = config
    # With beams so many tokens survive that a beam goes on even if it takes every end token.
    keep = 1 if c.beams == 1 else max(1, len(c.eos_ids)) + 1
    found: list[Processor] = []

    def add(filter: Callable[..., Tensor], value: float | int) -> None:
        found.append(lambda ids, scores: filter(scores, value, keep))

    temperature, top_k = c.temperature, 50 if c.top_k is None else c.top_k
    if temperature not in (None, 1.0):
        found.append(lambda ids, scores: scores / temperature)
    if top_k:
        add(keep_top_k, top_k)
    if c.top_p is not None and c.top_p < 1.0:
        add(keep_top_p, c.top_p)
    if c.min_p is not None:
        add(keep_min_p, c.min_p)
    if c.typical_p is not None and c.typical_p < 1.0:
        add(keep_typical, c.typical_p)
    if c.epsilon_cutoff:
        add(keep_epsilon, c.epsilon_cutoff)
    if c.eta_cutoff:
        add(keep_eta, c.eta_cutoff)
    return found


def apply(process: Iterable[Processor], ids: Tensor, scores: Tensor) -> Tensor:
    """One processor after the other."""
    for processor in process:
        scores = processor(ids, scores)
    return scores
