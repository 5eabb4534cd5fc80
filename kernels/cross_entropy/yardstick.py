"""What a kernel's error is measured against: the reference, rounded where the contract lets a kernel round.

The saved lse is float32 and so may be a unit in the last place off; the linear form may round dlogits to the inputs'
dtype before the two products that use them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference

Options = tuple[int, float, float, float]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
        loss, lse = reference.cross_entropy_fwd(logits, target, weight, *options)
        ctx.save_for_backward(logits, lse, target, weight)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return reference.cross_entropy_bwd(dloss, *ctx.saved_tensors, *ctx.options, as_kernel=True), None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, linear_weight: Tensor, target: Tensor, bias: Any, weight: Any, options: Options
    ) -> tuple[Tensor, Tensor]:
        loss, lse, predictions = reference.linear_cross_entropy_fwd(
            input, linear_weight, target, bias, weight, *options, True
        )
        ctx.save_for_backward(input, linear_weight, lse, target, bias, weight)
        ctx.options = options
        ctx.mark_non_differentiable(predictions)
        return loss, predictions

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dinput, dweight, dbias = reference.linear_cross_entropy_bwd(
            dloss, *ctx.saved_tensors, *ctx.options, as_kernel=True
        )
        return dinput, dweight, None, None if ctx.saved_tensors[4] is None else dbias, None, None


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean", **options: Any
) -> Tensor:
    """`reference.cross_entropy`, rounded as a kernel may."""
    chosen = _options(**options)
    loss = _CrossEntropy.apply(logits, target, weight, chosen)
    return reference.reduce(loss, target, weight, chosen[0], reduction)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    return_predictions: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.linear_cross_entropy`, rounded as a kernel may."""
    chosen = _options(**options)
    loss, predictions = _Linear.apply(input, linear_weight, target, linear_bias, weight, chosen)
    loss = reference.reduce(loss, target, weight, chosen[0], reduction)
    return (loss, predictions) if return_predictions else loss


def _options(
    ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0
) -> Options:
    return ignore_index, label_smoothing, z_loss, softcap
