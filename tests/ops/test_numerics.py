"""Every op on every backend, forward and backward, judged against float64 (harness/accuracy.py)."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from harness.accuracy import assert_accurate, check, run, wide
from harness.machines import DTYPES, arguments, machine, served

from pyllm.kernels import BACKENDS, OPS
from pyllm.kernels.spec import VARIANTS

# Quick: every case in every dtype on plain inputs, and every variant on the first case. The whole grid is `slow`.
GRID = [
    pytest.param(
        name, backend, case, dtype, variant,
        id=f"{name}-{backend}-{case}-{str(dtype)[6:]}-{variant}",
        marks=[] if variant == "plain" or case == next(iter(spec.cases)) else [pytest.mark.slow],
    )
    for name, spec in OPS.items()
    for backend, case, dtype, variant in itertools.product(BACKENDS, spec.cases, DTYPES, VARIANTS)
    if backend in spec.op.impls
]  # fmt: skip


def make(name, case, dtype, variant, device):
    generator = torch.Generator().manual_seed(11)
    return OPS[name].inputs(**OPS[name].cases[case], dtype=dtype, device=device, generator=generator, variant=variant)


@pytest.mark.parametrize(("name", "backend", "case", "dtype", "variant"), GRID)
def test_forward_and_backward(name, backend, case, dtype, variant, record_property):
    spec = OPS[name]
    with machine(backend) as device:
        inputs = make(name, case, dtype, variant, device)
        if reasons := spec.op.why_not(backend, *arguments(inputs, spec.op)):
            pytest.skip(f"{backend}: {'; '.join(reasons)}")
        worst = check(spec, functools.partial(spec.function, backend=backend), inputs)
    record_property("error_over_limit", round(worst, 3))


@pytest.mark.parametrize("name", [n for n, s in OPS.items() if s.op.bwd is not None])
@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("second", BACKENDS)
def test_any_forward_meets_any_backward(name, first, second):
    """What forward saves is part of the contract: the op's backward takes it from whichever backend's forward."""
    if first == second:
        pytest.skip("the same backend: test_forward_and_backward has it")
    served(name, first)
    served(name, second)
    spec = OPS[name]
    with machine(first), machine(second):
        inputs = make(name, next(iter(spec.cases)), torch.float32, "plain", "cpu" if "cpu" in (first, second) else None)
        for backend in (first, second):
            if reasons := spec.op.why_not(backend, *arguments(inputs, spec.op)):
                pytest.skip(f"{backend}: {'; '.join(reasons)}")
        mine, theirs = spec.op.impls[first], spec.op.impls[second]
        spec.op.impls = {**spec.op.impls, first: mine._replace(bwd=theirs.bwd)}
        if first == "eager":  # the public function takes eager by autograd: go through the registered op instead
            spec.op.impls = {**spec.op.impls, second: theirs._replace(fwd=mine.fwd)}
        try:
            check(spec, functools.partial(spec.function, backend=second if first == "eager" else first), inputs)
        finally:
            spec.op.impls = {**spec.op.impls, first: mine, second: theirs}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_float64(name, backend):
    served(name, backend)
    spec = OPS[name]
    inputs = make(name, next(iter(spec.cases)), torch.float64, "plain", "cpu")
    if reasons := spec.op.why_not(backend, *arguments(inputs, spec.op)):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    got = run(functools.partial(spec.function, backend=backend), inputs, spec.grads)
    truth = run(spec.eager, wide(inputs), spec.grads)
    for key, value in got.items():
        assert_accurate(key, value, truth[key], truth[key], terms=10_000)


@pytest.mark.parametrize("name", [n for n, s in OPS.items() if s.op.bwd is not None])
def test_eager_backward_is_the_gradient_of_its_forward(name):
    """The reference's own backward (which meets other backends' forwards) against autograd of the reference."""
    spec = OPS[name]
    eager, other = spec.op.impls["eager"], "cpu"
    inputs = make(name, next(iter(spec.cases)), torch.float64, "plain", "cpu")
    before = spec.op.impls
    spec.op.impls = {**before, other: eager}  # under another name, so that the public function takes the op's path
    try:
        got = run(functools.partial(spec.function, backend=other), inputs, spec.grads)
    finally:
        spec.op.impls = before
    truth = run(spec.eager, inputs, spec.grads)
    for key, value in got.items():
        assert_accurate(key, value, truth[key], truth[key], terms=10_000)
