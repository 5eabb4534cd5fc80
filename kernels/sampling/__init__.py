"""Drawing the next token: temperature, top-k, top-p, min-p and the draw in one. The formula is in `reference.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Op
from ..spec import Spec
from . import bindings_cuda, reference

IMPLS = {"cuda": bindings_cuda.CUDA, "eager": reference.EAGER}


def sample(
    logits: Tensor,
    uniform: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draws a token for every row of logits.

    Filters apply in Hugging Face's order: temperature, top-k, top-p of what top-k leaves, min-p.

    Args:
        logits: (B, V), any strides. They are not normalised, and may hold -inf for what must not be drawn.
        uniform: (B,) float64 in [0, 1) on logits' device: the draw is a function of these. None: drawn from `generator`
            (torch.rand, also within a CUDA graph).
        temperature: above 0; logits are divided by it.
        top_k: draw among the k likeliest tokens and those that tie with the k-th. None or 0: all.
        top_p: draw among the likeliest tokens whose probabilities reach p, 0 to 1. 1: all.
        min_p: drop tokens less likely than min_p times the likeliest, 0 to 1. 0: none.
        generator: a torch.Generator, instead of the device's own, where uniform is None.
        backend: "cuda", "eager", or None to choose.
    Returns:
        (B,) int64 tokens. A row without any logit above -inf gives 0; NaN counts as -inf.
    Raises:
        ValueError: shapes, dtypes, devices or options are wrong; V is 0.
        BackendError: a named backend can't run this; its reasons are listed.
    Source: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2019, arXiv:1904.09751 (top-p); Nguyen et al.
        2024, arXiv:2407.01082 (min-p).
    """
    k = 0 if top_k is None else top_k
    _check(logits, temperature, k, top_p, min_p)
    logits = logits.detach()  # what is drawn has no gradient
    if uniform is None:
        place = logits.device if generator is None else generator.device
        uniform = torch.rand(logits.shape[0], generator=generator, dtype=torch.float64, device=place).to(logits.device)
    elif uniform.shape != logits.shape[:1] or uniform.dtype != torch.float64:
        raise ValueError(
            f"sample: uniform must be ({logits.shape[0]},) float64, a number for every row, got {tuple(uniform.shape)} "
            f"{uniform.dtype}"
        )
    elif uniform.device != logits.device:
        raise ValueError(f"sample: uniform must be on logits' device {logits.device}, got {uniform.device}")
    args = (logits, uniform, float(temperature), k, float(top_p), float(min_p))
    return SAMPLE.fwd(*args, SAMPLE.select(backend, logits.device, *args))


def _check(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample: logits must be (B, V) with V at least 1, got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"sample: logits must be floating point, got {logits.dtype}")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"sample: temperature must be above 0 and finite, got {temperature!r}; argmax is its limit at 0"
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"sample: top_k must be a whole number, 0 or more, got {top_k!r}")
    for name, p in (("top_p", top_p), ("min_p", min_p)):
        if not 0 <= p <= 1:
            raise ValueError(f"sample: {name} must be between 0 and 1, got {p!r}")


def _fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


SAMPLE = Op(
    "sample",
    "(Tensor logits, Tensor uniform, float temperature, int top_k, float top_p, float min_p) -> Tensor",
    _fake,
    IMPLS,
    order={"cpu": ("eager",), "cuda": ("cuda", "eager")},
)

SPECS = {
    "sample": Spec(
        sample, reference.sample, reference.sample, SAMPLE, reference.CASES, reference.inputs, (), reference.cost,
        lambda inputs: inputs["logits"].shape[-1],
    )
}  # fmt: skip
