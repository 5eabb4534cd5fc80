"""Strides, offsets, sizes: an op's result may not depend on how its inputs lie in memory."""

from __future__ import annotations

import functools

import pytest
import torch
from harness.accuracy import check, run
from harness.machines import DTYPES, arguments, machine, prepared, served
from torch import Tensor

from pyllm.kernels import BACKENDS, OPS, BackendError


def transposed(x: Tensor) -> Tensor:
    """The same values, first and last dimension swapped in memory: the last one isn't dense."""
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else strided(x)


def misaligned(x: Tensor) -> Tensor:
    """The same values one element past an aligned address."""
    buffer = x.new_zeros(x.numel() + 1)
    buffer[1:] = x.flatten()
    return buffer[1:].view(x.shape)


def padded(x: Tensor) -> Tensor:
    """The same values as the left part of wider rows; NaN in the rest, which nobody may read."""
    buffer = x.new_full((*x.shape[:-1], x.shape[-1] + 5), float("nan"))
    buffer[..., : x.shape[-1]] = x
    return buffer[..., : x.shape[-1]]


def strided(x: Tensor) -> Tensor:
    """The same values in every other element."""
    buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    buffer[..., ::2] = x
    return buffer[..., ::2]


LAYOUTS = (transposed, misaligned, padded, strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_inputs_may_lie_anyhow(name, backend, layout, dtype):
    spec = OPS[name]
    with machine(backend) as device:
        inputs = prepared(name, backend, device, dtype)
        laid = {k: layout(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}

        def call(**given):
            # run() clones its leaves, which would undo the layout: put the laid tensors back in the graph
            return spec.function(
                **{k: layout(v) if k in spec.grads and isinstance(v, Tensor) else v for k, v in given.items()},
                backend=backend,
            )

        check(spec, call, inputs, given={**laid, **{k: inputs[k] for k in spec.grads if k in inputs}})


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [n for n, s in OPS.items() if s.op.bwd is not None])
def test_upstream_gradients_may_lie_anyhow(name, backend, layout):
    spec = OPS[name]
    with machine(backend) as device:
        inputs = prepared(name, backend, device)

        def through(lay, **given):
            outputs = spec.function(**given, backend=backend)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(_Relay.apply(out, lay) if out.dim() else out for out in outputs)

        check(spec, functools.partial(through, layout), inputs)


class _Relay(torch.autograd.Function):
    """Identity whose gradient arrives in another layout."""

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.layout(grad), None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [n for n, s in OPS.items() if s.op.bwd is not None])
def test_expanded_upstream_gradient(name, backend):
    """out.sum().backward() hands every op a gradient with strides 0."""
    spec = OPS[name]
    with machine(backend) as device:
        inputs = prepared(name, backend, device)

        def total(**given):
            outputs = spec.function(**given, backend=backend)
            return sum(out.float().sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,)))

        def expected(**given):
            outputs = spec.eager(**given)
            return sum(out.double().sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,)))

        got = run(total, inputs, spec.grads)
        truth = run(expected, inputs, spec.grads)
        for key in (k for k in got if k.startswith("d")):
            torch.testing.assert_close(got[key], truth[key], rtol=1e-3, atol=1e-3 * float(truth[key].abs().max() or 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_the_same_bits_every_time(name, backend):
    spec = OPS[name]
    with machine(backend) as device:
        inputs = prepared(name, backend, device)
        first, second = (run(functools.partial(spec.function, backend=backend), inputs, spec.grads) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


SHAPES = [(0, 8), (4, 0), (0, 0), (1, 1), (1,), (5, 1), (1, 13), (2, 0, 3), (2, 3, 5, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_of_any_size(backend, shape):
    served("rms_norm", backend)
    spec = OPS["add_rms_norm"]
    with machine(backend) as device:
        inputs = spec.inputs(shape, eps=0.1, dtype=torch.float32, device=device)
        if reasons := spec.op.why_not(backend, *arguments(inputs, spec.op)):
            pytest.skip(f"{backend}: {'; '.join(reasons)}")
        check(spec, functools.partial(spec.function, backend=backend), inputs)


MIXED = [(x, r, w) for x in DTYPES for r in DTYPES for w in DTYPES if len({x, r, w}) > 1]


@pytest.mark.parametrize(("x", "residual", "weight"), MIXED, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", ["triton", "cuda", "cpu"])
def test_mixed_dtypes(backend, x, residual, weight):
    """Norm weights stay float32 in half-precision models, and a residual stream may be wider than its branches."""
    spec = OPS["add_rms_norm"]
    with machine(backend) as device:
        inputs = spec.inputs((5, 72), dtype=torch.float32, device=device)
        inputs.update(x=inputs["x"].to(x), residual=inputs["residual"].to(residual), weight=inputs["weight"].to(weight))
        if reasons := spec.op.why_not(backend, *arguments(inputs, spec.op)):
            assert backend == "cuda"
            assert residual not in (x, torch.float32), reasons  # the only refusal there may be
            pytest.skip(f"{backend}: {'; '.join(reasons)}")
        check(spec, functools.partial(spec.function, backend=backend), inputs)


def test_float64_does_not_mix():
    inputs = OPS["add_rms_norm"].inputs((5, 72), dtype=torch.float64)
    inputs["residual"] = inputs["residual"].float()
    with pytest.raises(BackendError, match="float64 goes with float64 only"):
        OPS["add_rms_norm"].function(**inputs, backend="cpu")
