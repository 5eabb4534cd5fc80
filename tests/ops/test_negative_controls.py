"""The tests are tested: planted bugs that the numerics rule must reject, and correct variants that it must accept."""

from __future__ import annotations

import pytest
import torch
from harness.accuracy import InaccurateError, check

from pyllm.kernels import OPS
from pyllm.kernels.rms_norm import reference


def norm(x, weight, eps=1e-6, *, offset=0.0, squares=None, divisor=0, use_eps=True, scale_last=1.0, early=False):
    """The reference with knobs that break it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squared = wide.square() if squares is None else wide.to(squares).square().to(wide.dtype)
    mean = squared.sum(-1, keepdim=True) / (x.shape[-1] + divisor)
    rstd = torch.rsqrt(mean + (eps if use_eps else 0.0))
    unit = wide * rstd
    if early:  # rounds before the weight, as Hugging Face does: allowed there, not here
        unit = unit.to(x.dtype).to(wide.dtype)
    rows = torch.ones(x.shape[0], 1, dtype=wide.dtype)
    rows[-1] = scale_last
    return (unit * (weight.to(wide.dtype) + offset) * rows).to(x.dtype)


BUGS = {
    "epsilon dropped": (dict(use_eps=False), torch.float32, "small"),
    "epsilon dropped, bfloat16": (dict(use_eps=False), torch.bfloat16, "small"),
    "mean over n - 1": (dict(divisor=-1), torch.float32, "plain"),
    "mean over n + 1": (dict(divisor=1), torch.float32, "plain"),
    "squares in bfloat16": (dict(squares=torch.bfloat16), torch.float32, "plain"),
    "last row 1 % off, bfloat16": (dict(scale_last=1.01), torch.bfloat16, "plain"),
    "last row 0.01 % off": (dict(scale_last=1.0001), torch.float32, "plain"),
    "rounded before the weight, bfloat16": (dict(early=True), torch.bfloat16, "plain"),
}


def inputs(dtype, variant, shape=(40, 1000)):
    generator = torch.Generator().manual_seed(5)
    return reference.rms_norm_inputs(shape, dtype=dtype, generator=generator, variant=variant)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_rejected(bug):
    knobs, dtype, variant = BUGS[bug]
    with pytest.raises(InaccurateError):
        check(OPS["rms_norm"], lambda **given: norm(**given, **knobs), inputs(dtype, variant))


@pytest.mark.parametrize("variant", ["plain", "small", "offset", "correlated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_correct_variant_is_accepted(dtype, variant):
    """Another order of summation, nothing else: no false alarm."""

    def reordered(x, weight, eps, offset):
        flipped = norm(x.flip(-1), weight.flip(-1), eps, offset=offset)
        return flipped.flip(-1)

    check(OPS["rms_norm"], reordered, inputs(dtype, variant))


class Broken(torch.autograd.Function):
    """RMSNorm whose backward has a knob."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, bug):
        y, rstd = reference.rms_norm_fwd(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.bug = offset, bug
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = reference.rms_norm_bwd(dy, x, weight, rstd, ctx.offset)
        if ctx.bug == "dweight misses the last row":
            dweight = reference.rms_norm_bwd(dy[:-1], x[:-1], weight, rstd[:-1], ctx.offset)[1]
        elif ctx.bug == "dx misses the projection":
            dx = (dy * (weight + ctx.offset) * rstd[..., None]).to(x.dtype)
        elif ctx.bug == "dx forgets the offset":
            dx = reference.rms_norm_bwd(dy, x, weight, rstd, 0.0)[0]
        elif ctx.bug == "one element of dx not written":
            dx[3, 5] = float("nan")
        return dx, dweight, None, None, None


@pytest.mark.parametrize(
    "bug",
    [
        "dweight misses the last row",
        "dx misses the projection",
        "dx forgets the offset",
        "one element of dx not written",
    ],
)
def test_planted_backward_bug_is_rejected(bug):
    given = {**inputs(torch.float32, "plain"), "offset": 0.5}
    check(OPS["rms_norm"], lambda x, weight, eps, offset: Broken.apply(x, weight, eps, offset, ""), given)
    with pytest.raises(InaccurateError):
        check(OPS["rms_norm"], lambda x, weight, eps, offset: Broken.apply(x, weight, eps, offset, bug), given)


def test_wrong_dtype_and_shape_are_rejected():
    spec, given = OPS["rms_norm"], inputs(torch.bfloat16, "plain")
    with pytest.raises(InaccurateError, match="float32"):
        check(spec, lambda **g: norm(**g).float(), given)
    with pytest.raises(InaccurateError):
        check(spec, lambda **g: norm(**g)[:-1], given)
