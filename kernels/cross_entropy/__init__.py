"""Cross-entropy, of logits and of a linear layer's logits that are never all in memory. Formulas: `reference.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..dispatch import Impl, Op, apply, lazy, needs_grad, once, once_differentiable, requested
from ..spec import Spec
from . import bindings, bindings_cuda, reference, step, yardstick

_TRITON = f"{__name__}.triton_cross_entropy:cross_entropy"
_TRITON_LINEAR = f"{__name__}.triton_linear_cross_entropy:linear_cross_entropy"


def _why_not_triton(logits: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> list[str]:
    return triton_support.why_not(logits, weight)


def _why_not_triton_linear(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None, *_: Any
) -> list[str]:
    return triton_support.why_not(input, linear_weight, linear_bias, weight)


IMPLS = {
    "triton": Impl(lazy(f"{_TRITON}_fwd"), lazy(f"{_TRITON}_bwd"), _why_not_triton),
    "cuda": bindings_cuda.CUDA,
    "cpu": bindings.CPU,
    "eager": reference.EAGER,
}
LINEAR_IMPLS = {
    "triton": Impl(lazy(f"{_TRITON_LINEAR}_fwd"), lazy(f"{_TRITON_LINEAR}_bwd"), _why_not_triton_linear),
    "cuda": bindings_cuda.CUDA_LINEAR,
    "cpu": bindings.CPU_LINEAR,
    "eager": reference.EAGER_LINEAR,
}

# Fewer logits than these go to torch's own cross-entropy when nobody names a backend.
SMALL = 1 << 15


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the softmax of every row of logits against its target class, as torch.nn.functional's.

    Args:
        logits: (..., V), classes last; floating point, any strides.
        target: (...), class indices as int64 or int32.
        weight: (V,) a factor for every class, floating point; no gradient flows to it.
        ignore_index: rows with this target have loss and gradient 0 and don't count in a mean.
        reduction: "mean" divides the sum by the sum of the targets' weights (their number, without weights); "sum";
            "none" gives a loss per row. The mean of no rows at all is NaN with a zero gradient, as torch's.
        label_smoothing: in [0, 1], the share of the target's probability that is spread over all classes.
        z_loss: adds z_loss * lse^2 to every row that isn't ignored, where lse is the row's log-sum-exp. A mean divides
            it as it divides the rest; class weights don't multiply it.
        softcap: c > 0 replaces every logit x by c * tanh(x / c) first (Gemma 2).
        backend: "triton", "cuda", "cpu", "eager", or None to choose.
    Returns:
        A scalar, or (...) for "none", in float32 whatever the logits' dtype (float64 for float64). The gradient is
        computed in float32 and rounded once.
    Raises:
        ValueError: shapes, dtypes, devices or options don't fit.
        IndexError: a target is neither a class nor ignore_index, on CPU. On a GPU, where to ask would stall the stream,
            such a row's loss and gradient are NaN.
        BackendError: a named backend can't run this; its reasons are listed.
    """
    if not logits.is_floating_point():
        raise ValueError(f"cross_entropy: logits must be floating point, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"cross_entropy: logits must be (..., V) with at least one class, got {tuple(logits.shape)}")
    _check("cross_entropy", "logits", logits, target, weight, logits.shape[-1], reduction)
    _check_options("cross_entropy", label_smoothing, z_loss, softcap)
    if logits.numel() < SMALL and logits.is_cpu and not z_loss and not softcap and requested(backend) is None:
        (logits,) = once(logits)
        return bindings.by_torch(logits, target, weight, ignore_index, label_smoothing, reduction)
    args = (logits, target, weight, ignore_index, float(label_smoothing), float(z_loss), float(softcap))
    chosen = CROSS_ENTROPY.select(backend, logits.device, *args)
    if chosen == "eager":
        (logits,) = once(logits)
        loss = reference.row_losses(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap)
    elif needs_grad(logits):
        return apply(_CrossEntropy, *args, reduction, chosen)
    else:
        loss = CROSS_ENTROPY.fwd(*args, chosen)[0]
    return reference.reduce(loss, target, weight, ignore_index, reduction)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_predictions: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_entropy(input @ linear_weight.T + linear_bias, target)` without all logits in memory at any time.

    Args:
        input: (..., C), the last hidden states; floating point, any strides.
        linear_weight: (V, C), the output layer, in input's dtype.
        target: (...), class indices as int64 or int32.
        linear_bias: (V,), floating point.
        weight, ignore_index, reduction, label_smoothing, z_loss, softcap, backend: as in `cross_entropy`.
        return_predictions: also return the most likely class of every row, which costs little here.
    Returns:
        The loss as in `cross_entropy`, in float32; with return_predictions (loss, int64 (...)). Logits are float32 from
        the inputs as they are, a bounded number of rows at a time; the gradient of linear_weight is summed in float32
        over all rows and rounded once. Under autocast input, linear_weight and linear_bias are cast to its dtype.
    Raises:
        ValueError, IndexError, BackendError: as `cross_entropy`.
    Source: Wijmans et al. 2024, arXiv:2411.09009.
    """
    if not input.is_floating_point():
        raise ValueError(f"linear_cross_entropy: input must be floating point, got {input.dtype}")
    input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
    if input.dim() == 0:
        raise ValueError("linear_cross_entropy: input must be (..., C), got a scalar")
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1] or linear_weight.shape[0] == 0:
        raise ValueError(
            f"linear_cross_entropy: linear_weight must be (V, {input.shape[-1]}), V at least 1 and C as in input, "
            f"got {tuple(linear_weight.shape)}"
        )
    V = linear_weight.shape[0]
    if linear_weight.dtype != input.dtype:
        raise ValueError(
            f"linear_cross_entropy: linear_weight must have input's dtype {input.dtype}, got {linear_weight.dtype}"
        )
    if linear_bias is not None and (tuple(linear_bias.shape) != (V,) or not linear_bias.is_floating_point()):
        raise ValueError(
            f"linear_cross_entropy: linear_bias must be ({V},) floating point, "
            f"got {tuple(linear_bias.shape)} {linear_bias.dtype}"
        )
    for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if t is not None and t.device != input.device:
            raise ValueError(f"linear_cross_entropy: {name} must be on input's device {input.device}, got {t.device}")
    _check("linear_cross_entropy", "input", input, target, weight, V, reduction)
    _check_options("linear_cross_entropy", label_smoothing, z_loss, softcap)
    options = (ignore_index, float(label_smoothing), float(z_loss), float(softcap), return_predictions)
    args = (input, linear_weight, target, linear_bias, weight, *options)
    chosen = LINEAR_CROSS_ENTROPY.select(backend, input.device, *args)
    if chosen == "eager":
        # One by one: together all of them would get a gradient as soon as one wants it.
        (input,), (linear_weight,) = once(input), once(linear_weight)
        (linear_bias,) = (None,) if linear_bias is None else once(linear_bias)
        return reference.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            return_predictions=return_predictions,
        )
    if not needs_grad(input, linear_weight, linear_bias):
        loss, _, predictions = LINEAR_CROSS_ENTROPY.fwd(*args, chosen)
    elif step.pays(target.numel(), V, reduction, chosen) and not hasattr(input, "device_mesh"):  # no rank has all rows
        loss, predictions = apply(step.LinearStep, *args)
    else:
        loss, predictions = apply(_LinearCrossEntropy, *args, chosen)
    loss = reference.reduce(loss, target, weight, ignore_index, reduction)
    return (loss, predictions) if return_predictions else loss


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    assert tensors[0] is not None
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors)


def _check(op: str, name: str, rows: Tensor, target: Tensor, weight: Tensor | None, V: int, reduction: str) -> None:
    if target.shape != rows.shape[:-1]:
        raise ValueError(
            f"{op}: target must have a class for every row of {name} {tuple(rows.shape)}, whose last dimension is "
            f"{'the classes' if name == 'logits' else 'C'}: {tuple(rows.shape[:-1])}, got {tuple(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: target must be class indices, int64 or int32, got {target.dtype}")
    if target.device != rows.device:
        raise ValueError(f"{op}: target must be on {name}'s device {rows.device}, got {target.device}")
    if weight is not None:
        if tuple(weight.shape) != (V,) or not weight.is_floating_point():
            raise ValueError(f"{op}: weight must be ({V},) floating point, got {tuple(weight.shape)} {weight.dtype}")
        if weight.device != rows.device:
            raise ValueError(f"{op}: weight must be on {name}'s device {rows.device}, got {weight.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check_options(op: str, label_smoothing: float, z_loss: float, softcap: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    for name, value in (("z_loss", z_loss), ("softcap", softcap)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{op}: {name} must be 0 (off) or positive and finite, got {value}")


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fwd_fake(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    acc = _acc(logits.dtype)
    return logits.new_empty(target.shape, dtype=acc), logits.new_empty(target.shape, dtype=acc)


def _bwd_fake(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _linear_fwd_fake(input: Tensor, linear_weight: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    acc = _acc(input.dtype)
    predictions = target.new_empty(target.shape if rest[-1] else 0, dtype=torch.int64)
    return input.new_empty(target.shape, dtype=acc), input.new_empty(target.shape, dtype=acc), predictions


def _linear_bwd_fake(
    dloss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    lse: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs_input, needs_weight, needs_bias = rest[-3:]
    bias = lse.new_empty(0) if linear_bias is None else linear_bias
    given = (input, needs_input), (linear_weight, needs_weight), (bias, needs_bias)
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in given)


_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"
CROSS_ENTROPY = Op(
    "cross_entropy",
    f"(Tensor logits, Tensor target, Tensor? weight, {_OPTIONS}) -> (Tensor, Tensor)",
    _fwd_fake,
    IMPLS,
    bwd_schema=f"(Tensor dloss, Tensor logits, Tensor lse, Tensor target, Tensor? weight, {_OPTIONS}) -> Tensor",
    bwd_fake=_bwd_fake,
)
LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    "(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, "
    f"{_OPTIONS}, bool return_predictions) -> (Tensor, Tensor, Tensor)",
    _linear_fwd_fake,
    LINEAR_IMPLS,
    bwd_schema="(Tensor dloss, Tensor input, Tensor linear_weight, Tensor lse, Tensor target, Tensor? linear_bias, "
    f"Tensor? weight, {_OPTIONS}, bool needs_input, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    bwd_fake=_linear_bwd_fake,
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float,
        reduction: str,
        backend: str,
    ) -> Tensor:
        """The reduced loss: autograd has one node to walk where the reduction's own would be four."""
        options = (ignore_index, label_smoothing, z_loss, softcap, backend)
        loss, lse = CROSS_ENTROPY.fwd(logits, target, weight, *options)
        divisor = reference.divisor(loss, target, weight, ignore_index) if reduction == "mean" else None
        ctx.save_for_backward(logits, lse, target, weight, divisor)
        ctx.options, ctx.reduction = options, reduction
        if reduction == "none":
            return loss
        return loss.sum() if divisor is None else loss.sum() / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        *saved, divisor = ctx.saved_tensors
        if ctx.reduction != "none":
            dloss = (dloss if divisor is None else dloss / divisor).expand(saved[2].shape)
        return CROSS_ENTROPY.bwd(dloss, *saved, *ctx.options), *[None] * 8


class _LinearCrossEntropy(torch.autograd.Function):
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
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        options = (ignore_index, label_smoothing, z_loss, softcap)
        loss, lse, predictions = LINEAR_CROSS_ENTROPY.fwd(
            input, linear_weight, target, linear_bias, weight, *options, return_predictions, backend
        )
        ctx.save_for_backward(input, linear_weight, lse, target, linear_bias, weight)
        ctx.options, ctx.backend = options, backend
        ctx.mark_non_differentiable(predictions)
        return loss, predictions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        grads = LINEAR_CROSS_ENTROPY.bwd(dloss, *ctx.saved_tensors, *ctx.options, *needs, ctx.backend)
        dinput, dweight, dbias = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        return dinput, dweight, None, dbias, *[None] * 7


SPECS = {
    "cross_entropy": Spec(
        cross_entropy,
        reference.cross_entropy,
        yardstick.cross_entropy,
        CROSS_ENTROPY,
        reference.CASES,
        reference.cross_entropy_inputs,
        ("logits",),
        reference.cross_entropy_cost,
        reference.longest,
    ),
    "linear_cross_entropy": Spec(
        linear_cross_entropy,
        reference.linear_cross_entropy,
        yardstick.linear_cross_entropy,
        LINEAR_CROSS_ENTROPY,
        reference.LINEAR_CASES,
        reference.linear_cross_entropy_inputs,
        ("input", "linear_weight", "linear_bias"),
        reference.linear_cross_entropy_cost,
        reference.longest,
    ),
}
