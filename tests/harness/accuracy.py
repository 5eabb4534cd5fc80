"""How a kernel is judged: against float64, with the error that eager PyTorch makes at the same dtype as the measure.

truth      the reference in float64 on the very inputs the kernel got
yardstick  the reference at the kernel's dtype: float32 arithmetic, rounded where the op's contract lets it round

For every output and gradient, per row (last dimension): the L2 error and the largest error are at most twice the
yardstick's, plus one unit in the last place of the row's largest element (a value near a tie may round either way),
plus sqrt(n) float32 epsilons for an n-term sum (another order of the same sum). A row's yardstick is at least the
median row's, relative to its size, since a row of few elements can be exact by luck. Over the whole tensor in half
precision: no worse than the yardstick (of several, below, the worst) but for 5 %. There is no absolute tolerance to
tune. Rows of a single element have no norm to compare a cancellation with: give rows of seven and more.

A row's error may be the luck of a few roundings (scores of 300 and 301, of which only the difference counts; a gradient
in which the errors of all queries add up or cancel). So a result over the limit is judged once more by the worst of 8
yardsticks that round differently: in float32 their inputs are off by an epsilon, in half precision they draw again what
is random in them, which is nothing but the rounding of attention's out (`eager._off_by_luck`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


class InaccurateError(AssertionError):
    """A result is farther from the truth than its dtype excuses."""


def run(function: Callable[..., Any], inputs: dict[str, Any], wrt: tuple[str, ...], seed: int = 7) -> dict[str, Tensor]:
    """Outputs ("out0", ...) and, for a fixed random upstream gradient, gradients ("d<argument>") of function(**inputs).

    The upstream gradient is drawn in float32 and rounded to the dtype of the *given* inputs, so that runs in float64
    of the same inputs see the same numbers.
    """
    leaves = {k: inputs[k].detach().clone().requires_grad_() for k in wrt if inputs.get(k) is not None}
    outputs = function(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    differentiable = [out for out in outputs if out.requires_grad]
    if not differentiable:
        assert not wrt, "no output has a gradient"
        return results
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(out.shape, generator=generator).to(_GRAIN[0]).to(out) for out in differentiable]
    grads = torch.autograd.grad(differentiable, list(leaves.values()), upstream, allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


_GRAIN = [torch.bfloat16]  # upstream gradients are exact in every dtype under test: bfloat16 fits float32 and float64


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in float64: what the truth is computed from."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def nudged(inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """The inputs, every element off by about a float32 epsilon."""
    generator = torch.Generator().manual_seed(seed)

    def off(x: Tensor) -> Tensor:
        return x * (1 + EPS32 * torch.randn(x.shape, generator=generator).to(x.device))

    return {k: off(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def assert_accurate(
    name: str, got: Tensor, truth: Tensor, yardstick: Tensor, terms: int = 1, more: Sequence[Tensor] = ()
) -> float:
    """The rule at the top; returns the worst ratio of error to limit.

    terms: of the longest sum behind got. more: further yardsticks, of which each row's worst counts.
    """
    if got.shape != truth.shape or got.dtype != yardstick.dtype:
        raise InaccurateError(
            f"{name}: is {tuple(got.shape)} {got.dtype}, should be {tuple(truth.shape)} {yardstick.dtype}"
        )
    if got.numel() == 0:
        return 0.0
    if not got.is_floating_point():
        if not torch.equal(got, truth.to(got.dtype)):
            raise InaccurateError(f"{name}: {(got != truth).sum()} of {got.numel()} integers differ")
        return 0.0
    columns = got.shape[-1] if got.dim() else 1
    tensors = (got, truth, yardstick, *more)
    got_rows, true_rows, *yards = (t.detach().to(truth.device).double().reshape(-1, columns) for t in tensors)
    special = ~true_rows.isfinite()
    if not torch.equal(special, ~got_rows.isfinite()) or not torch.equal(
        got_rows[special].nan_to_num(nan=123.0), true_rows[special].nan_to_num(nan=123.0)
    ):
        raise InaccurateError(f"{name}: NaN or infinity where the truth has none, or the other way round")
    error = (got_rows - true_rows).masked_fill(special, 0.0)
    yard_errors = [(y - true_rows).masked_fill(special | ~y.isfinite(), 0.0) for y in yards]
    true_rows = true_rows.masked_fill(special, 0.0)

    largest = true_rows.abs().amax(1)
    ulp = _ulp(largest, got.dtype)
    order = math.sqrt(terms) * (EPS32 if got.dtype != torch.float64 else torch.finfo(torch.float64).eps)
    worst = 0.0
    for what, size, measures, scale in (
        ("L2", error.norm(dim=1), [e.norm(dim=1) for e in yard_errors], true_rows.norm(dim=1)),
        ("largest", error.abs().amax(1), [e.abs().amax(1) for e in yard_errors], largest),
    ):
        measure = torch.stack(measures).amax(0)
        typical = (measure / scale.clamp_min(1e-300)).median() * scale
        limit = 2 * torch.maximum(measure, typical) + ulp + order * scale
        ratio = (size / limit.clamp_min(1e-300)).nan_to_num(0.0)
        row = int(ratio.argmax())
        if size[row] > limit[row]:
            raise InaccurateError(
                f"{name}: {what} error of row {row} is {size[row]:.3e}, allowed {limit[row]:.3e} "
                f"(yardstick {measure[row]:.3e}, typical {typical[row]:.3e}, row {scale[row]:.3e})"
            )
        worst = max(worst, float(ratio[row]))
    if got.dtype in (torch.bfloat16, torch.float16):
        mine, eager = error.norm(), max(e.norm() for e in yard_errors)
        spread = ulp.max() + order * true_rows.norm()
        if mine > 1.05 * eager + spread:
            raise InaccurateError(f"{name}: whole error {mine:.3e} is worse than eager's own {eager:.3e}")
    return worst


def _ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance to the next number of the dtype above |x|; the smallest one where x is 0."""
    finfo = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.clamp_min(finfo.tiny)))
    return torch.ldexp(torch.full_like(x, finfo.eps), exponent.int())


def _again(spec: Any, inputs: dict[str, Any], wrt: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    """Another yardstick of the same inputs: see the rule at the top."""
    dtypes = {v.dtype for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return run(spec.yardstick, nudged(inputs, seed) if dtypes == {torch.float32} else inputs, wrt)


def check(
    spec: Any,
    function: Callable[..., Any],
    inputs: dict[str, Any],
    wrt: tuple[str, ...] | None = None,
    given: dict[str, Any] | None = None,
) -> float:
    """Runs `function(**inputs)` forward and backward and judges every result; the worst ratio of error to limit.

    given: what `function` is called with where that differs in layout from `inputs` (the same values).
    """
    wrt = spec.grads if wrt is None else wrt
    got = run(function, given or inputs, wrt)
    truth = run(spec.eager, wide(inputs), wrt)
    yardstick = run(spec.yardstick, inputs, wrt)
    more: list[dict[str, Tensor]] = []
    worst = 0.0
    for name, value in got.items():
        terms = spec.weight_sums.get(name[1:], spec.sums)(inputs)
        try:
            worst = max(worst, assert_accurate(name, value, truth[name], yardstick[name], terms))
        except InaccurateError:
            more = more or [_again(spec, inputs, wrt, seed) for seed in range(8)]
            others = [y[name] for y in more]
            worst = max(worst, assert_accurate(name, value, truth[name], yardstick[name], terms, others))
    return worst
