"""What every op owes torch and its caller: registration, compile, checkpointing, autocast, and hands off the rest."""

from __future__ import annotations

import functools

import pytest
import torch
from harness.accuracy import run
from harness.machines import arguments, machine, prepared
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyllm.kernels import BACKENDS, OPS

DIFFERENTIABLE = [n for n, s in OPS.items() if s.op.bwd is not None]


def detached(inputs: dict) -> dict:
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_registered_op_passes_opcheck(name, backend):
    """Schema, fake implementation and functionalisation of forward and backward."""
    spec = OPS[name]
    with machine(backend) as device:
        inputs = detached(prepared(name, backend, device))
        recorded: list[tuple] = []
        before = spec.op.fwd, spec.op.bwd

        def recording(op):
            def call(*args):
                recorded.append((op, args))
                return op(*args)

            call._schema = op._schema
            return call

        impls = spec.op.impls
        # The public function differentiates eager itself: under another name eager goes through the registered op too.
        called = "cpu" if backend == "eager" else backend
        spec.op.fwd, spec.op.bwd = recording(before[0]), recording(before[1]) if before[1] else None
        spec.op.impls = {**impls, called: impls[backend]}
        try:
            run(functools.partial(spec.function, backend=called), inputs, spec.grads)
        finally:
            spec.op.fwd, spec.op.bwd = before
            spec.op.impls = impls
        assert [op for op, _ in recorded] == [op for op in before if op is not None]
        for op, args in recorded:
            args = [a.detach() if isinstance(a, Tensor) else a for a in args[:-1]]
            torch.library.opcheck(op.overload, (*args, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_torch_compile_fullgraph(name, backend):
    """One graph, forward and backward, the same numbers; and no stale choice when the context changes."""
    spec = OPS[name]
    with machine(backend) as device:
        inputs = prepared(name, backend, device)
        torch._dynamo.reset()
        plain = functools.partial(spec.function, backend=backend)
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager", dynamic=False)
        expected, got = run(plain, inputs, spec.grads), run(compiled, inputs, spec.grads)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_activation_checkpointing(name, backend):
    spec = OPS[name]
    with machine(backend) as device:
        inputs = prepared(name, backend, device)
        plain = functools.partial(spec.function, backend=backend)
        again = functools.partial(checkpoint, plain, use_reentrant=False)
        expected, got = run(plain, inputs, spec.grads), run(again, inputs, spec.grads)
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_backward_is_a_clear_error(name, backend):
    spec = OPS[name]
    with machine(backend) as device:
        inputs = detached(prepared(name, backend, device))
        leaves = {k: inputs[k].requires_grad_() for k in spec.grads if inputs.get(k) is not None}
        outputs = spec.function(**inputs, backend=backend)
        out = outputs[0] if isinstance(outputs, tuple) else outputs
        upstream = torch.randn(out.shape, device=device).to(out.dtype).requires_grad_()
        grads = torch.autograd.grad(out, list(leaves.values()), upstream, create_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            sum(g.sum() for g in grads if g is not None).backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_inputs_stay_as_they_were(name, backend):
    spec = OPS[name]
    with machine(backend) as device:
        inputs = prepared(name, backend, device)
        kept = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
        leaves = {k: inputs[k].requires_grad_() for k in spec.grads if inputs.get(k) is not None}
        outputs = spec.function(**inputs, backend=backend)
        outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.requires_grad]
        upstream = [torch.randn(out.shape, device=device).to(out.dtype) for out in outputs]
        sent = [u.clone() for u in upstream]
        if outputs:
            torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
        for key, value in kept.items():
            assert torch.equal(inputs[key].detach(), value), key
        assert all(torch.equal(a, b) for a, b in zip(upstream, sent, strict=True))


class Fenced:
    """Every tensor an op allocates lies between guard bands and starts as NaN."""

    BAND = 64

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.buffers: list[tuple[Tensor, int]] = []

        def fenced_new(x, *size, dtype=None, device=None, **_):
            size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            return self.fence(tuple(size), dtype or x.dtype, device or x.device)

        monkeypatch.setattr(Tensor, "new_empty", fenced_new)
        monkeypatch.setattr(torch, "empty_like", lambda x, dtype=None, **_: fenced_new(x, x.shape, dtype=dtype))
        monkeypatch.setattr(
            torch, "empty", lambda size, dtype=torch.float32, device="cpu", **_: self.fence(tuple(size), dtype, device)
        )

    def fence(self, size, dtype, device) -> Tensor:
        count = 1
        for extent in size:
            count *= extent
        buffer = torch.full((count + 2 * self.BAND,), float("nan") if dtype.is_floating_point else 77, dtype=dtype)
        buffer = buffer.to(device)
        buffer[: self.BAND] = buffer[self.BAND + count :] = 77
        self.buffers.append((buffer, count))
        return buffer[self.BAND : self.BAND + count].view(size)

    def intact(self) -> None:
        for buffer, count in self.buffers:
            band = torch.cat((buffer[: self.BAND], buffer[self.BAND + count :]))
            assert bool((band == 77).all()), "a kernel wrote outside its output"


FENCED = [  # the interpreter takes seconds for a case: all of them are `slow`
    pytest.param(name, backend, case, id=f"{name}-{backend}-{case}",
                 marks=[pytest.mark.slow] if backend == "triton" and i > 1 else [])
    for name, spec in OPS.items()
    for backend in ("triton", "cuda", "cpu") if backend in spec.op.impls
    for i, case in enumerate(spec.cases)
]  # fmt: skip


@pytest.mark.parametrize(("name", "backend", "case"), FENCED)
def test_every_output_element_is_written_and_nothing_beside_it(name, backend, case, monkeypatch):
    spec = OPS[name]
    with machine(backend) as device, monkeypatch.context() as patch:
        inputs = spec.inputs(**spec.cases[case], dtype=torch.float32, device=device)
        if reasons := spec.op.why_not(backend, *arguments(inputs, spec.op)):
            pytest.skip(f"{backend}: {'; '.join(reasons)}")
        expected = run(functools.partial(spec.function, backend=backend), inputs, spec.grads)
        fence = Fenced(patch)
        got = run(functools.partial(spec.function, backend=backend), inputs, spec.grads)
        assert fence.buffers, "the op allocated nothing that could be fenced"
        fence.intact()
    for key, value in expected.items():
        assert torch.equal(got[key].isnan(), value.isnan()), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_under_autocast_gradients_keep_their_leaves_dtype(name, backend):
    spec = OPS[name]
    function = functools.partial(spec.function, backend=backend)
    with machine(backend) as device:
        inputs = prepared(name, backend, device)
        with torch.autocast(device, dtype=torch.bfloat16):
            got = run(function, inputs, spec.grads)
        exact = run(function, inputs, spec.grads)
    for key in spec.grads:
        if f"d{key}" not in got:
            continue
        assert got[f"d{key}"].dtype == inputs[key].dtype
        scale = float(exact[f"d{key}"].abs().max()) or 1.0
        assert float((got[f"d{key}"] - exact[f"d{key}"]).abs().max()) <= 0.05 * scale, key
