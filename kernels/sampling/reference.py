"""Drawing the next token from logits, in eager PyTorch.

    s = logits / temperature
    top-k    drop s below the k-th largest; ties with it stay                    (Fan et al. 2018, arXiv:1805.04833)
    top-p    of the rest drop, in ascending order, while the sum of softmax(s) is at most 1 - p: the least likely
             tokens; among equal ones the first columns; one always stays       (Holtzman et al. 2019, arXiv:1904.09751)
    min-p    of the rest drop what is less likely than p times the likeliest     (Nguyen et al. 2024, arXiv:2407.01082)
    token    the first column at which the running sum of what stays exceeds uniform times its whole

The number `uniform` in [0, 1) is given: the same numbers draw the same tokens, on any device, by any backend, but for
rounding where a sum comes within it of a limit. NaN counts as -inf; a row's +inf share it among them; a row in which
nothing is larger than -inf gives token 0.

Shapes: logits (B, V), uniform (B,) float64, tokens (B,) int64. Computed in float32, float64 for float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..spec import Cost, draw


def keep_top_k(scores: Tensor, k: int, keep: int = 1) -> Tensor:
    """-inf below the k-th largest score; ties with it stay, and at least `keep` tokens."""
    kth = scores.topk(min(max(k, keep), scores.shape[-1]), dim=-1).values[..., -1:]
    return scores.masked_fill(scores < kth, -math.inf)


def keep_top_p(scores: Tensor, p: float, keep: int = 1, stable: bool = False) -> Tensor:
    """-inf outside the smallest set of likeliest tokens whose probabilities reach p, and at least `keep` tokens.

    stable: of equal scores the first columns go; else whichever torch's sort has it, as in transformers.
    """
    ascending, order = scores.sort(dim=-1, stable=stable)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -keep:] = False
    return scores.masked_fill(drop.scatter(-1, order, drop), -math.inf)


def keep_min_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """-inf for tokens less likely than p times the likeliest; at least `keep` stay."""
    probabilities = scores.softmax(-1)
    drop = probabilities < p * probabilities.amax(-1, keepdim=True)
    likeliest = probabilities.topk(min(keep, scores.shape[-1]), dim=-1).indices
    return scores.masked_fill(drop.scatter_(-1, likeliest, False), -math.inf)


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


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """The formula above."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    top = scores.amax(-1, keepdim=True)
    scores = torch.where(top == math.inf, torch.where(scores == math.inf, 0.0, -math.inf).to(scores), scores)
    hopeless = top == -math.inf
    scores = scores.masked_fill(hopeless, 0.0)
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature  # the other way round large logits overflow
    if 0 < top_k < scores.shape[-1]:
        scores = keep_top_k(scores, top_k)
    if top_p < 1:
        scores = keep_top_p(scores, top_p, stable=True)
    if min_p > 0:
        scores = keep_min_p(scores, min_p)
    return draw_tokens(scores.softmax(-1), uniform).masked_fill(hopeless[:, 0], 0)


def sample_fwd(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    return sample(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def why_not(*_: Any) -> list[str]:
    return []


EAGER = Impl(sample_fwd, None, why_not)


# For tests and benchmarks.
CASES: Mapping[str, Mapping[str, Any]] = {
    "7x33": dict(shape=(7, 33)),
    "3x1000-temperature": dict(shape=(3, 1000), temperature=0.7),
    "5x257-top-k": dict(shape=(5, 257), top_k=20),
    "5x257-top-p": dict(shape=(5, 257), top_p=0.8),
    "4x515-all": dict(shape=(4, 515), temperature=1.3, top_k=50, top_p=0.9, min_p=0.05),
    "6x40-ties": dict(shape=(6, 40), top_k=9, top_p=0.53, levels=4),
    "2x1": dict(shape=(2, 1), top_p=0.5),
}


def inputs(
    shape: tuple[int, int],
    levels: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    variant: str = "plain",
) -> dict[str, Any]:
    """Keyword arguments of `sample`. levels: logits have no more than so many values, so that most of them tie."""
    logits = 3.0 * draw(*shape, dtype=torch.float32, generator=generator, variant=variant)
    if levels:
        logits = (logits / 3.0 * levels).round().remainder(levels)
    return dict(
        logits=logits.to(dtype).to(device),
        uniform=torch.rand(shape[0], dtype=torch.float64, generator=generator).to(device),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )


def cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """Logits are read once; an exponential and a sum each."""
    logits = inputs["logits"]
    return Cost(logits.numel() * logits.element_size() + 16 * logits.shape[0], 4 * logits.numel())
