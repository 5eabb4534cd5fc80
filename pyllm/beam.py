"""Beam search: of all continuations keep the n with the highest probability, and beams that are sampled.

A step scores the V continuations of each of a prompt's n beams by the sum of their log probabilities and takes the
best K of them, enough that n go on even if every end token is among them. Those that end are candidates for the result,
with score sum / (generated length)^length_penalty; the best n of the others are the new beams.

All is as in transformers, the order among equals too, since `topk` is asked the same questions.

Names: P prompts, n beams per prompt, K candidates per prompt, L length at which generation ends, T prompt length, t
tokens so far, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import engine
from .cache import KVCache
from .decode import Decoder
from .options import GenerationConfig
from .processors import Processor, apply
from .sampling import Draws
from .stopping import Stopping
from .tree import TokenTree

if TYPE_CHECKING:
    from .model import LlamaForCausalLM

NEVER = -1.0e9  # a score that no sequence reaches


@dataclass
class Found:
    """The results, best first: sequences (P * m, T + new), their scores (P * m,), and the rows of `scores` that each
    token came from, (P * m, new), -1 behind the end. Per step scores and logits (P * n, V), if they were to be kept."""

    sequences: Tensor
    sequences_scores: Tensor
    beam_indices: Tensor
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


@dataclass
class Hypotheses:
    """Sequences of each prompt: ids (P, x, L), scores (P, x), rows they came from (P, x, L - T), whether they ended."""

    ids: Tensor
    scores: Tensor
    rows: Tensor
    ended: Tensor

    def take(self, index: Tensor) -> Hypotheses:
        """Those at index (P, y)."""
        wide = index[:, :, None]
        return Hypotheses(
            self.ids.take_along_dim(wide, 1),
            self.scores.gather(1, index),
            self.rows.take_along_dim(wide, 1),
            self.ended.gather(1, index),
        )

    def join(self, other: Hypotheses) -> Hypotheses:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Hypotheses(*(torch.cat(pair, dim=1) for pair in pairs))


@torch.no_grad()
def search(
    model: LlamaForCausalLM,
    ids: Tensor,
    mask: Tensor | None,
    cache: KVCache | None,
    config: GenerationConfig,
    limit: int,
    pad: int | None,
    process: list[Processor],
    stopping: Stopping,
    draws: Draws | None,
) -> Found:
    """Continue prompts (P, T), padded on the left; `draws` samples the candidates instead of taking the best."""
    (P, T), n, device = ids.shape, config.beams, ids.device
    penalty = 1.0 if config.length_penalty is None else config.length_penalty
    early = config.early_stopping or False
    eos = config.eos_ids
    # What stands behind a short result. transformers takes the end token also where pad_token_id is 0.
    blank = (pad or eos[0]) if eos else (pad or 0)
    feed = Beams(model, ids, mask, cache, config, limit)

    start = torch.full((P, n, limit), blank, dtype=torch.int64, device=device)
    start[:, :, :T] = ids[:, None]
    rows = torch.full((P, n, limit - T), -1, dtype=torch.int32, device=device)
    running = Hypotheses(
        start, torch.zeros(P, n, device=device), rows, torch.zeros(P, n, dtype=torch.bool, device=device)
    )
    running.scores[:, 1:] = NEVER  # at first all beams are the same
    best = Hypotheses(start, torch.full_like(running.scores, NEVER), rows, running.ended)
    hopeful = torch.ones(P, 1, dtype=torch.bool, device=device)  # prompts whose results may still get better
    offset = torch.arange(P, device=device)[:, None] * n
    result = Found(start, running.scores, rows)
    logits = feed.prefill()  # (P * n, V)
    V = logits.shape[1]
    K = min(max(2, 1 + len(eos)) * n, n * V)
    for t in range(T, limit):
        so_far = running.ids[:, :, :t].flatten(0, 1)
        logp = apply(process, so_far, logits.log_softmax(-1))
        if config.return_dict_in_generate:
            result.scores += [logp] if config.output_scores else []
            result.logits += [logits] if config.output_logits else []
        total = (logp.view(P, n, V) + running.scores[:, :, None]).view(P, n * V)
        if draws is None:
            score, index = total.topk(K)
        else:
            index = draws.several(total.log_softmax(-1), K)
            score = total.gather(1, index)

        candidates = running.take(index // V)  # (P, K)
        candidates.scores = score
        candidates.ids[:, :, t] = index % V
        candidates.rows[:, :, t - T] = (index // V + offset).to(torch.int32)
        done = stopping(candidates.ids[:, :, : t + 1].flatten(0, 1), logp).view(P, K) | (t + 1 == limit)

        best = _finished(best, candidates, done, hopeful, n, (t + 1 - T) ** penalty, early is True)
        candidates.scores = score + done * NEVER
        running = candidates.take(candidates.scores.topk(n).indices)

        horizon = limit - T if early == "never" and penalty > 0.0 else t + 1 - T
        ceiling = running.scores[:, :1] / horizon**penalty
        worst = torch.where(best.ended, best.scores.amin(1, keepdim=True), NEVER)
        hopeful = hopeful & (ceiling > worst).any(1, keepdim=True)
        if not bool(hopeful.any() & ~(best.ended.all() & (early is True)) & ~done.all()):
            break
        logits = feed.step(running.ids[:, :, : t + 1], running.rows[:, :, t - T].long() - offset)

    best = best.take(torch.arange(config.sequences, device=device).expand(P, -1))
    longest = int((best.rows >= 0).sum(2).max())
    result.sequences = best.ids.flatten(0, 1)[:, : T + longest]
    result.sequences_scores = best.scores.flatten()
    result.beam_indices = best.rows.flatten(0, 1)[:, :longest]
    return result


def _finished(
    best: Hypotheses, candidates: Hypotheses, done: Tensor, hopeful: Tensor, n: int, divisor: float, early: bool
) -> Hypotheses:
    """The best n of what had ended before and of the candidates that end now. Only the first n candidates count: the
    others are there to go on if all of those end."""
    ended = done & (torch.arange(done.shape[1], device=done.device) < n)
    score = candidates.scores / divisor
    full = best.ended.all(1, keepdim=True) & early
    for barred in (full, ~hopeful, ~ended):
        score = score + barred * NEVER
    merged = best.join(Hypotheses(candidates.ids, score, candidates.rows, ended))
    return merged.take(merged.scores.topk(n).indices)


class Beams:
    """Feeds beams to a model. With a cache the beams of a prompt are a tree in one row of it (`tree.py`): nothing in
    the cache is copied when they are reordered."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        ids: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        config: GenerationConfig,
        limit: int,
    ):
        self.n, self.cache = config.beams, cache
        self.decoder = Decoder(model, ids, mask, cache, config.prefill_chunk_size)
        self.tree: TokenTree | None = None
        T, new = ids.shape[1], limit - ids.shape[1]
        self.columns = T + self.n * new
        if cache is not None:  # dead branches are cleared away when they outnumber the living
            cache.capacity = min(self.columns, T + 2 * new + 32 * self.n)

    def prefill(self) -> Tensor:
        """Logits after each prompt, alike for its beams, (P * n, V)."""
        logits = self.decoder.prefill().repeat_interleave(self.n, 0)
        if self.cache is None:
            rows = torch.arange(len(self.decoder.ids), device=logits.device).repeat_interleave(self.n)
            self.decoder.expand(rows)
        else:
            self.tree = TokenTree(self.cache, self.n, self.columns)
        return logits

    def step(self, ids: Tensor, beams: Tensor) -> Tensor:
        """Logits after ids (P, n, t), of which beam i goes on from what was beam beams[p, i]; (P * n, V)."""
        if self.tree is None:
            return self.decoder.step(ids.flatten(0, 1))
        if self.tree.appended:  # before that all beams are the prompt
            self.tree.reorder(beams)
        model = self.decoder.model
        newest, positions = ids[:, :, -1], self.tree.grow()
        assert self.cache is not None
        logits = engine.step(model, newest, positions, self.cache, keep=self.n)
        if logits is None:
            logits = model(newest, None, positions, self.cache, use_cache=True).logits.to(torch.float32)
        return logits.flatten(0, 1)
