"""Sampling: what a processor does to the scores of the next token, and how a token is drawn.

Names: B rows, V vocab, t tokens so far.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """-inf below the k-th largest score; ties with it stay."""
    kth = scores.topk(min(k, scores.shape[-1]), dim=-1).values[..., -1:]
    return scores.masked_fill(scores < kth, -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """-inf outside the smallest set of likeliest tokens whose probabilities reach p; one token stays at least."""
    ascending, order = scores.sort(dim=-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -1] = False
    return scores.masked_fill(drop.scatter(-1, order, drop), -math.inf)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """-inf for tokens less likely than p times the likeliest."""
    probabilities = scores.softmax(-1)
    drop = probabilities < p * probabilities.amax(-1, keepdim=True)
    drop.scatter_(-1, probabilities.argmax(-1, keepdim=True), False)
    return scores.masked_fill(drop, -math.inf)


class Draws:
    """Draws a token per row by inverting the cumulative distribution at one uniform number per row and step."""

    def __init__(self, B: int, steps: int, seed: int | None, generator: torch.Generator | None, device: torch.device):
        self.generator, self.device, self.B = generator, device, B
        self.step = 0
        self.numbers: Tensor | None = None
        if seed is not None:
            # On the CPU whatever the model's device, so that a seed means the same everywhere.
            streams = [torch.Generator().manual_seed(mix_seed(seed, row)) for row in range(B)]
            drawn = [torch.rand(steps, generator=stream, dtype=torch.float64) for stream in streams]
            self.numbers = torch.stack(drawn, dim=1).to(device)  # (steps, B)

    def __call__(self, probabilities: Tensor) -> Tensor:
        if self.numbers is not None:
            uniform = self.numbers[self.step]
        else:
            source = self.generator.device if self.generator is not None else self.device
            uniform = torch.rand(self.B, generator=self.generator, dtype=torch.float64, device=source).to(self.device)
        self.step += 1
        return draw_tokens(probabilities, uniform)


def draw_tokens(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Per row the first token at which the running sum of probabilities exceeds uniform times their sum.

    Args:
        probabilities: (B, V).  uniform: (B,) float64 in [0, 1).
    Returns:
        (B,) int64; a token of probability 0 is never drawn.
    """
    running = probabilities.to(torch.float64).cumsum(-1)
    # Just under 1, so that rounding can't carry the product to the sum itself, beyond the last token.
    threshold = uniform.clamp(max=1 - 2.0**-40)[:, None] * running[:, -1:]
    return torch.searchsorted(running, threshold, right=True)[:, 0]


def mix_seed(seed: int, row: int) -> int:
    """A seed for a row, unlike those of its neighbours (the finaliser of splitmix64)."""
    x = (seed + (row + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) % 2**63
