"""linear_cross_entropy for training on a CPU: gradients are computed in the forward, while a chunk's logits are there.

Backward would have to make the logits again: 8NVC FLOPs instead of 6NVC (N rows, V classes, C hidden). But forward does
not know dloss, the upstream gradient of every row's loss. After a sum or a mean it is the same number in every row, so
forward computes with `scale` in its place and backward multiplies by dloss / scale. Where that is 1, nothing is left to
do: scale is what the mean's gradient will be, 1 / (rows that count). Where the rows' dloss differ after all, backward
falls back to the op's own, which makes the logits again.

The unfinished gradients are float32 and not rounded: they cost V C floats from forward to backward, which is next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import Impl, Op
from . import bindings

# A few thousand logits take microseconds either way. Below this, training goes through the op's own forward and
# backward, which the tests that all ops share then judge.
LEAST_LOGITS = 4096


def pays(rows: int, V: int, reduction: str, backend: str) -> bool:
    """Whether training takes this way: gradients equal in all rows, large enough."""
    return backend == "cpu" and reduction != "none" and rows * V >= LEAST_LOGITS


def _bwd(
    dloss: Tensor, scale: Tensor, dinput: Tensor, dweight: Tensor, dbias: Tensor, input: Tensor, linear_weight: Tensor,
    lse: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dinput, dlinear_weight, dlinear_bias), empty where not needed."""
    factor = common_factor(dloss, scale, target, options[0])
    if factor is None:
        assert bindings.CPU_LINEAR.bwd is not None
        return bindings.CPU_LINEAR.bwd(dloss, input, linear_weight, lse, target, linear_bias, weight, *options)
    bias_dtype = dbias.dtype if linear_bias is None else linear_bias.dtype
    finished = _finished(dinput, factor, input.dtype), _finished(dweight, factor, linear_weight.dtype)
    needs_input = options[-3]
    return finished[0].view(input.shape if needs_input else (0,)), finished[1], _finished(dbias, factor, bias_dtype)


def common_factor(dloss: Tensor, scale: Tensor, target: Tensor, ignore_index: int) -> float | None:
    """dloss / scale, if it is the same in all rows that count; else None."""
    counted = dloss.reshape(-1)[target.reshape(-1) != ignore_index]
    if counted.numel() == 0:
        return 1.0
    if not bool((counted == counted[0]).all()):
        return None
    return float(counted[0].to(scale.dtype) / scale)


def _finished(gradient: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once, in memory of its own."""
    if factor == 1.0:
        return gradient.to(dtype, copy=True)
    result = torch.empty(gradient.shape, dtype=dtype)
    for piece, unfinished in zip(result.split(_PIECE), gradient.split(_PIECE), strict=True):
        piece.copy_(unfinished * factor)
    return result


_PIECE = 1024  # rows: torch would make a float32 copy of all of them before it rounds


def _fwd_fake(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    predict, needs_input, needs_weight, needs_bias = rest[-4:]
    dtype = bindings.acc(input.dtype)
    V, C = linear_weight.shape
    N = target.numel()
    shapes = (N, C) if needs_input else (0,), (V, C) if needs_weight else (0,)
    bias = (V if needs_bias and linear_bias is not None else 0,)
    return (
        input.new_empty(target.shape, dtype=dtype), input.new_empty(target.shape, dtype=dtype),
        target.new_empty(target.shape if predict else (0,), dtype=torch.int64),
        *(input.new_empty(shape, dtype=dtype) for shape in ((), *shapes, bias)),
    )  # fmt: skip


def _bwd_fake(
    dloss: Tensor, scale: Tensor, dinput: Tensor, dweight: Tensor, dbias: Tensor, input: Tensor, linear_weight: Tensor,
    lse: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    bias_dtype = dbias.dtype if linear_bias is None else linear_bias.dtype
    return (
        input.new_empty(input.shape if rest[-3] else (0,)), linear_weight.new_empty(dweight.shape),
        dbias.new_empty(dbias.shape, dtype=bias_dtype),
    )  # fmt: skip


_LAYER = "Tensor? linear_bias, Tensor? weight"
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"
_NEEDS = "bool needs_input, bool needs_weight, bool needs_bias"
LINEAR_STEP = Op(
    "linear_cross_entropy_step",
    f"(Tensor input, Tensor linear_weight, Tensor target, {_LAYER}, {_OPTIONS}, bool return_predictions, {_NEEDS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    {"cpu": Impl(bindings.linear_step, _bwd, bindings.CPU_LINEAR.why_not)},
    bwd_schema="(Tensor dloss, Tensor scale, Tensor dinput, Tensor dweight, Tensor dbias, Tensor input, "
    f"Tensor linear_weight, Tensor lse, Tensor target, {_LAYER}, {_OPTIONS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    bwd_fake=_bwd_fake,
)


class LinearStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        return_predictions: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.options = (ignore_index, label_smoothing, z_loss, softcap)
        ctx.needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        given = (input, linear_weight, target, linear_bias, weight)
        loss, lse, predictions, *unfinished = LINEAR_STEP.fwd(
            *given, *ctx.options, return_predictions, *ctx.needs, "cpu"
        )
        ctx.save_for_backward(*unfinished, input, linear_weight, lse, target, linear_bias, weight)
        ctx.mark_non_differentiable(predictions)
        return loss, predictions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = None if torch.compiler.is_compiling() else _as_they_are(dloss, *ctx.saved_tensors, ctx.options[0])
        if grads is None:
            grads = LINEAR_STEP.bwd(dloss, *ctx.saved_tensors, *ctx.options, *ctx.needs, "cpu")
        dinput, dweight, dbias = (grad if needed else None for grad, needed in zip(grads, ctx.needs, strict=True))
        return dinput, dweight, None, dbias, *[None] * 6


def _as_they_are(dloss: Tensor, *saved: Any) -> tuple[Tensor, ...] | None:
    """The forward's own gradients, where they are float32 and need no factor: no second tensor of the matrix's size."""
    scale, dinput, dweight, dbias, input, linear_weight, _, target, linear_bias, _, ignore_index = saved
    bias_dtype = dbias.dtype if linear_bias is None else linear_bias.dtype
    if (input.dtype, linear_weight.dtype, bias_dtype) != (dinput.dtype, dweight.dtype, dbias.dtype):
        return None
    if common_factor(dloss, scale, target, ignore_index) != 1.0:
        return None
    return dinput.view(input.shape) if dinput.dim() == 2 else dinput, dweight, dbias
