"""Cross-entropy of logits, and of a linear layer's logits that are never all in memory, in eager PyTorch.

For a row of logits x (of the linear form: x = W h + b) with target class y, and w = 1 without class weights:

    x_c = c * tanh(x_c / c)                                           (softcap c > 0)
    lse = log(sum_c exp(x_c))
    nll = w_y (lse - x_y)
    loss = (1 - eps) nll + eps / V sum_c w_c (lse - x_c) + z lse^2    (eps: label_smoothing, z: z_loss)
    loss = 0                                                          (y is ignore_index)

    mean: sum of losses / sum of w_y over the rows that are not ignored; sum; none

Backward of one row, p = softmax(x), e_y = 1 at the target:  dx = dloss * (((1 - eps) w_y + eps / V sum_c w_c) p
- (1 - eps) w_y e_y - eps / V w + 2 z lse p) (* (1 - (x/c)^2)), and zero where ignored. Linear: dh = dx W, dW = dx^T h.

Shapes: logits (..., V), target (...), weight (V,), loss and lse (...). Linear: input (..., C), linear_weight (V, C),
linear_bias (V,). N rows, V classes (vocabulary), C hidden. The lse of an ignored row is never used and may be anything.
Rounding: in float32 (float64 for float64). loss and lse stay float32, dlogits is rounded once. In the linear form
logits are float32 from the inputs as they are, dW is summed in float32 over all rows and rounded once.
Source: torch.nn.functional.cross_entropy; z-loss: de Brebisson and Vincent 2016, arXiv:1604.08859; linear form: Wijmans
et al. 2024, arXiv:2411.09009.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..dispatch import Impl
from ..spec import Cost, draw


class TargetError(IndexError, ValueError):
    """A target that is no class: an IndexError, as torch's cross_entropy raises, and a ValueError, as all bad input."""


LOGITS_BYTES = 256 << 20  # of float32 logits that the linear form makes at a time; its softmax takes as much again


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
) -> Tensor:
    """The loss, by the formula above; arguments as the public function's, unchecked."""
    loss = row_losses(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap)
    return reduce(loss, target, weight, ignore_index, reduction)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss of input @ linear_weight.T + linear_bias, chunk by chunk; backward computes a chunk's logits again."""
    acc = torch.promote_types(input.dtype, torch.float32)
    hidden, wide = input.reshape(-1, input.shape[-1]), linear_weight.to(acc)
    bias = None if linear_bias is None else linear_bias.to(acc)
    flat = target.reshape(-1)

    def chunk(hidden: Tensor, wide: Tensor, bias: Tensor | None, flat: Tensor) -> tuple[Tensor, Tensor]:
        logits = linear(hidden, wide, bias)
        loss = row_losses(logits, flat, weight, ignore_index, label_smoothing, z_loss, softcap)
        return loss, logits.detach().argmax(-1) if return_predictions else flat[:0]

    spans = chunks(hidden.shape[0], linear_weight.shape[0])
    losses, predictions = [], []
    for begin, end in spans:
        rows = hidden[begin:end], wide, bias, flat[begin:end]
        if len(spans) > 1 and torch.is_grad_enabled():
            loss, predicted = checkpoint(chunk, *rows, use_reentrant=False, preserve_rng_state=False)
        else:
            loss, predicted = chunk(*rows)
        losses.append(loss)
        predictions.append(predicted)
    loss = reduce(torch.cat(losses).view(target.shape), target, weight, ignore_index, reduction)
    return (loss, torch.cat(predictions).view(target.shape)) if return_predictions else loss


def row_losses(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """The loss of every row, before any reduction."""
    return _losses(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap)[0]


def _losses(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    logp = torch.log_softmax(x, -1)
    weight = None if weight is None else weight.detach().to(x.dtype)
    pick = _nll if x.device.type == "cpu" else _nll_unchecked
    loss = pick(logp.reshape(-1, logp.shape[-1]), target.reshape(-1).long(), weight, ignore_index).view(target.shape)
    ignored = target == ignore_index
    if label_smoothing:
        smooth = -(logp if weight is None else logp * weight).sum(-1).masked_fill(ignored, 0.0)
        loss = (1 - label_smoothing) * loss + label_smoothing / logp.shape[-1] * smooth
    lse = None
    if z_loss or with_lse:
        # Exact wherever the maximum is: log_softmax subtracts it first, which logsumexp's result no longer shows.
        top = x.detach().argmax(-1, keepdim=True)
        lse = (x.gather(-1, top) - logp.gather(-1, top)).squeeze(-1)
        if z_loss:
            loss = loss + (z_loss * lse.square()).masked_fill(ignored, 0.0)
    return loss, lse


def _nll(logp: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """-w_y logp_y, 0 where ignored; TargetError for a target out of range, which only CPUs can tell at no cost."""
    try:
        return F.nll_loss(logp, target, weight, ignore_index=ignore_index, reduction="none")
    except IndexError:
        check_targets(target, logp.shape[-1], ignore_index)
        raise


def check_targets(target: Tensor, V: int, ignore_index: int) -> None:
    """TargetError for a target out of range, where it costs nothing to ask: on a CPU."""
    if target.device.type != "cpu":
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= V))]
    if len(wrong):
        raise TargetError(f"target must be a class in [0, {V}) or ignore_index ({ignore_index}), got {int(wrong[0])}")


def _nll_unchecked(logp: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The same, but a target out of range makes its row NaN: torch's own check would end the process's CUDA context."""
    V = logp.shape[-1]
    safe = target.clamp(0, V - 1)
    nll = -logp.gather(-1, safe[:, None]).squeeze(-1)
    if weight is not None:
        nll = nll * weight[safe]
    ignored = target == ignore_index
    return nll.masked_fill(ignored, 0.0) * torch.where((safe == target) | ignored, 1.0, torch.nan)


def reduce(loss: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    """Row losses by "mean", "sum" or "none". A mean over nothing is NaN, as torch's."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / divisor(loss, target, weight, ignore_index)


def divisor(loss: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean divides the sum of row losses by: the rows that count, or the sum of their targets' weights."""
    counted = target != ignore_index
    if weight is None:
        return counted.sum()
    shares = weight.detach().to(loss.dtype)[target.long().clamp(0, weight.shape[0] - 1)]
    return shares.masked_fill(~counted, 0.0).sum()


def linear(hidden: Tensor, wide: Tensor, bias: Tensor | None) -> Tensor:
    """Logits (N, V) in wide's dtype, whatever autocast would have."""
    with full_precision(hidden.device.type):
        return F.linear(hidden.to(wide.dtype), wide, bias)


def chunks(N: int, V: int) -> list[tuple[int, int]]:
    """(begin, end) of the rows whose logits are made together: as many as LOGITS_BYTES hold, in even shares."""
    most = max(1, LOGITS_BYTES // (4 * max(1, V)))
    count = max(1, -(-N // most))
    step = max(1, -(-N // count))
    return [(begin, min(begin + step, N)) for begin in range(0, N, step)] or [(0, 0)]


def full_precision(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off, under which float32 products would silently be taken in half precision."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# What a backend owes the two ops. Backward is written out: inside a registered op there may be no autograd.
def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    loss, lse = _losses(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, with_lse=True)
    assert lse is not None
    return loss, lse


def cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    lse: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    *,
    as_kernel: bool = False,
) -> Tensor:
    """dlogits. as_kernel: p from the saved lse, which is float32 and may be a unit in the last place off."""
    x, V = logits.to(lse.dtype), logits.shape[-1]
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    if as_kernel:
        grad = torch.exp(x - torch.nextafter(lse, torch.full_like(lse, torch.inf)).unsqueeze(-1))
    else:
        grad = torch.softmax(x, -1)
    ignored = target == ignore_index
    y = target.long().clamp(0, V - 1)
    # A target out of range, which only gets here on a GPU, makes its row NaN.
    dloss = (dloss.to(lse.dtype) * torch.where((y == target) | ignored, 1.0, torch.nan)).masked_fill(ignored, 0.0)
    wide = None if weight is None else weight.to(lse.dtype)
    at_target = (1 - label_smoothing) * dloss * (1.0 if wide is None else wide[y])
    everywhere = label_smoothing / V * dloss
    share = at_target + everywhere * (V if wide is None else wide.sum())
    if z_loss:
        share = share + 2 * z_loss * (lse * dloss).masked_fill(ignored, 0.0)
    grad.mul_(share.unsqueeze(-1)).scatter_add_(-1, y.unsqueeze(-1), -at_target.unsqueeze(-1))
    if label_smoothing:
        grad -= everywhere.unsqueeze(-1) * (1.0 if wide is None else wide)
    if softcap:
        grad *= 1 - (x / softcap).square()
    return grad.to(logits.dtype).contiguous()


def linear_cross_entropy_fwd(
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
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, wide, bias, flat = _wide(input, linear_weight, linear_bias, target)
    loss, lse = wide.new_empty(flat.shape), wide.new_empty(flat.shape)
    predictions = flat.new_empty(flat.shape if return_predictions else 0, dtype=torch.int64)
    for begin, end in chunks(hidden.shape[0], wide.shape[0]):
        rows = slice(begin, end)
        logits = linear(hidden[rows], wide, bias)
        loss[rows], lse[rows] = cross_entropy_fwd(
            logits, flat[rows], weight, ignore_index, label_smoothing, z_loss, softcap
        )
        if return_predictions:
            predictions[rows] = logits.argmax(-1)
    return loss.view(target.shape), lse.view(target.shape), predictions.view(target.shape if return_predictions else 0)


def linear_cross_entropy_bwd(
    dloss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    lse: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_input: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = True,
    *,
    as_kernel: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dinput, dlinear_weight, dlinear_bias), empty where not needed. as_kernel: dlogits are rounded too."""
    hidden, wide, bias, flat = _wide(input, linear_weight, linear_bias, target)
    dloss, lse = dloss.reshape(-1), lse.reshape(-1)
    needs_bias = needs_bias and bias is not None
    dinput = input.new_empty(hidden.shape if needs_input else 0)
    dweight = wide.new_zeros(wide.shape if needs_weight else 0)
    dbias = wide.new_zeros(wide.shape[0] if needs_bias else 0)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    with full_precision(input.device.type):
        for begin, end in chunks(hidden.shape[0], wide.shape[0]):
            rows = slice(begin, end)
            x = hidden[rows].to(wide.dtype)
            logits = F.linear(x, wide, bias)
            grad = cross_entropy_bwd(dloss[rows], logits, lse[rows], flat[rows], weight, *options, as_kernel=as_kernel)
            if as_kernel:
                grad = grad.to(input.dtype).to(wide.dtype)
            if needs_input:
                dinput[rows] = grad @ wide
            if needs_weight:
                dweight.addmm_(grad.t(), x)
            if needs_bias:
                dbias += grad.sum(0)
    dinput = dinput.view(input.shape) if needs_input else dinput
    return dinput, dweight.to(linear_weight.dtype), dbias if linear_bias is None else dbias.to(linear_bias.dtype)


def _wide(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    acc = torch.promote_types(input.dtype, torch.float32)
    bias = None if linear_bias is None else linear_bias.to(acc)
    return input.reshape(-1, input.shape[-1]), linear_weight.to(acc).contiguous(), bias, target.reshape(-1)


def why_not(*_: Any) -> list[str]:
    return []


EAGER = Impl(cross_entropy_fwd, cross_entropy_bwd, why_not)
EAGER_LINEAR = Impl(linear_cross_entropy_fwd, linear_cross_entropy_bwd, why_not)


# For tests and benchmarks.
CASES: Mapping[str, Mapping[str, Any]] = {
    "9x50": dict(shape=(9, 50)),
    "2x7x1000-ignored": dict(shape=(2, 7, 1000), ignored=0.4),
    "none-5x33": dict(shape=(5, 33), reduction="none", ignored=0.2),
    "sum-smooth-weight-8x129": dict(shape=(8, 129), reduction="sum", label_smoothing=0.1, weighted=True, ignored=0.3),
    "mean-weight-12x40": dict(shape=(12, 40), weighted=True, ignored=0.3),
    "zloss-softcap-6x257": dict(shape=(6, 257), z_loss=1e-2, softcap=10.0, scale=8.0),
    "3x4097-far-below-zero": dict(shape=(3, 4097), shift=-1000.0),
    "4x3-all-ignored-sum": dict(shape=(4, 3), reduction="sum", ignored=1.0),
    "1-class": dict(shape=(4, 1)),
}
LINEAR_CASES: Mapping[str, Mapping[str, Any]] = {
    "9x32-50": dict(shape=(9, 32), V=50),
    "2x5x24-101-predictions": dict(shape=(2, 5, 24), V=101, ignored=0.3, return_predictions=True),
    "7x16-33-bias-smooth": dict(shape=(7, 16), V=33, bias=True, label_smoothing=0.1, reduction="sum"),
    "6x16-65-weight-zloss-softcap": dict(shape=(6, 16), V=65, weighted=True, z_loss=1e-2, softcap=5.0),
    "5x8-17-none": dict(shape=(5, 8), V=17, reduction="none", ignored=0.3),
}


def _targets(
    shape: tuple[int, ...], V: int, ignored: float, device: torch.device | str, generator: torch.Generator | None
) -> Tensor:
    target = torch.randint(V, shape, generator=generator)
    return target.masked_fill(torch.rand(shape, generator=generator) < ignored, -100).to(device)


def cross_entropy_inputs(
    shape: tuple[int, ...],
    ignored: float = 0.0,
    weighted: bool = False,
    scale: float = 1.0,
    shift: float = 0.0,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    variant: str = "plain",
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments of `cross_entropy`; `ignored` is the share of rows whose target is ignore_index."""
    logits = draw(*shape, dtype=dtype, device=device, generator=generator, variant=variant) * scale + shift
    inputs = dict(logits=logits, target=_targets(shape[:-1], shape[-1], ignored, device, generator), **options)
    if weighted:
        inputs["weight"] = torch.rand(shape[-1], generator=generator).to(device) + 0.5
    return inputs


def linear_cross_entropy_inputs(
    shape: tuple[int, ...],
    V: int,
    ignored: float = 0.0,
    weighted: bool = False,
    bias: bool = False,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    variant: str = "plain",
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments of `linear_cross_entropy`."""
    how: dict[str, Any] = dict(dtype=dtype, device=device, generator=generator)
    inputs = dict(
        input=draw(*shape, variant=variant, **how),
        linear_weight=draw(V, shape[-1], **how) * shape[-1] ** -0.5,
        target=_targets(shape[:-1], V, ignored, device, generator),
        **options,
    )
    if bias:
        inputs["linear_bias"] = draw(V, **how)
    if weighted:
        inputs["weight"] = torch.rand(V, generator=generator).to(device) + 0.5
    return inputs


def cross_entropy_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """Forward reads the logits; backward reads them again and writes their gradient. Target, loss and lse besides."""
    logits, target = inputs["logits"], inputs["target"]
    rows = target.numel() * (target.element_size() + 8)
    moved = logits.numel() * logits.element_size() * (2 if backward else 1)
    return Cost(moved + rows, logits.numel() * (5 if backward else 4))


def linear_cross_entropy_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """One product of N x C by C x V forward, two backward; no logits are read or written."""
    h, w, target = inputs["input"], inputs["linear_weight"], inputs["target"]
    moved = (h.numel() + w.numel()) * h.element_size() * (2 if backward else 1)
    rows = target.numel() * (target.element_size() + 8)
    return Cost(moved + rows, 2 * h.numel() * w.shape[0] * (2 if backward else 1))


def longest(inputs: dict[str, Any]) -> int:
    """Terms of the longest sum: classes of a row, rows of a reduced loss, hidden elements of a logit."""
    x = inputs["logits"] if "logits" in inputs else inputs["input"]
    V = inputs["linear_weight"].shape[0] if "linear_weight" in inputs else x.shape[-1]
    return max(int(V), inputs["target"].numel(), int(x.shape[-1]))
