"""Sampling: which tokens may be drawn, and how one is drawn.

Every `keep_...` sets scores of some tokens to -inf and never to less than `keep` survivors; ties are resolved as
transformers resolves them, and probabilities equal its own.

Names: B rows, V vocab.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernels.sampling.reference import draw_tokens, keep_min_p, keep_top_k, keep_top_p

__all__ = ["Draws", "draw_tokens", "keep_epsilon", "keep_eta", "keep_min_p", "keep_top_k", "keep_top_p", "keep_typical"]


def keep_typical(scores: Tensor, mass: float, keep: int = 1) -> Tensor:
    """-inf outside the tokens whose surprise is nearest to the entropy and whose probabilities reach `mass` (Meister
    et al. 2022, arXiv:2202.00666)."""
    logp = scores.log_softmax(-1)
    entropy = -(logp.exp() * logp).nansum(-1, keepdim=True)
    distance, order = (-logp - entropy).abs().sort(dim=-1)
    reached = scores.gather(-1, order).softmax(-1).cumsum(-1)
    last = (reached < mass).sum(-1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
    drop = distance > distance.gather(-1, last)
    drop[..., :keep] = False
    return scores.masked_fill(drop.scatter(-1, order, drop), -math.inf)


def keep_epsilon(scores: Tensor, epsilon: float, keep: int = 1) -> Tensor:
    """-inf for tokens less likely than epsilon (Hewitt et al. 2022, arXiv:2210.15191)."""
    return _keep_above(scores, scores.softmax(-1) < epsilon, keep)


def keep_eta(scores: Tensor, epsilon: float, keep: int = 1) -> Tensor:
    """-inf below min(epsilon, sqrt(epsilon) exp(-entropy)): an unsure model may say what is rare (the same paper)."""
    logp = scores.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp.clamp(min=torch.finfo(scores.dtype).min)).sum(-1, keepdim=True)
    eta = torch.clamp(math.sqrt(epsilon) * torch.exp(-entropy), max=epsilon)
    return _keep_above(scores, scores.softmax(-1) < eta, keep)


def _keep_above(scores: Tensor, drop: Tensor, keep: int) -> Tensor:
    kth = scores.topk(min(keep, scores.shape[-1]), dim=-1).values[..., -1:]
    return scores.masked_fill(drop & (scores < kth), -math.inf)


class Draws:
    """Random numbers for the rows of a batch. With a seed every row has a stream of its own, made of the seed and the
    row's number, so that what the other rows hold does not matter, nor the device."""

    def __init__(self, rows: int, seed: int | None, generator: torch.Generator | None, device: torch.device):
        self.rows, self.generator, self.device = rows, generator, device
        self.streams = None
        if seed is not None:
            self.streams = [torch.Generator().manual_seed(mix_seed(seed, row)) for row in range(rows)]

    def numbers(self, n: int) -> Tensor:
        """The next n uniform numbers of every row: (rows, n) float64 in [0, 1)."""
        if self.streams is not None:
            drawn = [torch.rand(n, generator=stream, dtype=torch.float64) for stream in self.streams]
            return torch.stack(drawn).to(self.device)
        source = self.generator.device if self.generator is not None else self.device
        made = torch.rand(self.rows, n, generator=self.generator, dtype=torch.float64, device=source)
        return made.to(self.device)

    def ahead(self, steps: int) -> Tensor:
        """What numbers(1) gives in so many steps, (steps, rows)."""
        if self.streams is not None:
            return self.numbers(steps).T.contiguous()
        return torch.stack([self.numbers(1)[:, 0] for _ in range(steps)])

    def tokens(self, probabilities: Tensor) -> Tensor:
        """One token per row, (rows,), from (rows, V)."""
        return draw_tokens(probabilities, self.numbers(1)[:, 0])

    def several(self, logp: Tensor, k: int) -> Tensor:
        """k different columns per row, (rows, k), one after the other in proportion to exp(logp) (rows, V).

        The k largest of logp + Gumbel noise are such a draw (Kool et al. 2019, arXiv:1903.06059).
        """
        tiny = torch.finfo(torch.float64).tiny
        noise = -(-self.numbers(logp.shape[1]).clamp(min=tiny).log()).clamp(min=tiny).log()
        return (logp.to(torch.float64) + noise).topk(k, dim=-1).indices


def mix_seed(seed: int, row: int) -> int:
    """A seed for a row, unlike those of its neighbours (the finaliser of splitmix64)."""
    x = (seed + (row + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) % 2**63
