"""Defects that users of kernel libraries have met, one test each: here those that concern RMSNorm and SwiGLU.

Shown elsewhere, for every op and backend:
- outputs left unwritten: test_contract.py::test_every_output_element_is_written_and_nothing_beside_it
- refused or changed by torch.compile: test_contract.py::test_torch_compile_fullgraph
- a second backward undefined: test_contract.py::test_second_backward_is_a_clear_error
- inputs and upstream gradients overwritten: test_contract.py::test_inputs_stay_as_they_were
- strides not honoured, expanded gradients: test_layouts.py
- mixed dtypes refused: test_layouts.py::test_mixed_dtypes; tensors on two devices: test_errors.py
Other ops have files of their own (test_defects_<op>.py).
"""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from harness.accuracy import check
from harness.layouts import counted, far_apart
from harness.machines import DTYPES, machine, served
from harness.mutants import padded
from torch import Tensor

from pyllm.kernels import OPS, BackendError, add_rms_norm, rms_norm, swiglu, swiglu_packed, triton_support

NAMES = ("rms_norm", "add_rms_norm", "swiglu", "swiglu_packed")
KERNELS = ("triton", "cuda", "cpu")
REDUCE = "pyllm.kernels.triton_reduce"
MODULES = dict(
    zip(NAMES, [f"pyllm.kernels.{op}.triton_{op}" for op in ("rms_norm", "rms_norm", "swiglu", "swiglu")], strict=True)
)
named = pytest.mark.parametrize("name", NAMES)
on_kernels = pytest.mark.parametrize("backend", KERNELS)


def make(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", **how) -> dict:
    return OPS[name].inputs(shape, dtype=dtype, device=device, generator=torch.Generator().manual_seed(5), **how)


@named
@on_kernels
def test_in_place_writes_that_autograd_does_not_see(name, backend):
    """A graph walked twice gives the same gradients; a saved tensor that was changed meanwhile is an error."""
    served(name, backend)
    spec = OPS[name]
    with machine(backend) as device:
        inputs = make(name, (5, 40), device=device)
        leaves = {k: inputs[k].requires_grad_() for k in spec.grads}
        doubled = {k: v * 2 for k, v in leaves.items()}
        outputs = spec.function(**{**inputs, **doubled}, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.randn(out.shape, device=device) for out in outputs]
        walk = functools.partial(torch.autograd.grad, outputs, list(leaves.values()), upstream, retain_graph=True)
        for first, second in zip(walk(), walk(), strict=True):
            assert torch.equal(first, second)
        saved = outputs[1] if name == "add_rms_norm" else doubled[spec.grads[0]]
        with torch.no_grad():
            saved.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            walk()


@pytest.mark.parametrize("cols", [40, 8200, 32771])
@named
def test_offsets_past_32_bits(name, cols):
    """Rows that start past 2^31 elements, in every tensor that is read by its strides."""
    spec = OPS[name]
    impl = spec.op.impls["triton"]
    inputs = make(name, (3, cols), torch.float16)
    arguments = [inputs[a.name] for a in spec.op.fwd._schema.arguments[:-1]]

    def far(values):
        return [far_apart(v) if isinstance(v, Tensor) and v.dim() == 2 else v for v in values]

    def same(got, expected):
        got, expected = ((t,) if isinstance(t, Tensor) else t for t in (got, expected))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    results = impl.fwd(*arguments)
    same(impl.fwd(*far(arguments)), results)
    results = (results,) if isinstance(results, Tensor) else results
    dy = torch.randn_like(results[0])
    if name == "add_rms_norm":
        grads = [dy, torch.randn_like(dy), results[1], inputs["weight"], results[2], 0.0]
    elif name == "rms_norm":
        grads = [dy, inputs["x"], inputs["weight"], results[1], 0.0]
    else:
        grads = [dy, *arguments]
    same(impl.bwd(*far(grads)), impl.bwd(*grads))


@named
def test_strided_inputs_are_not_copied(name, monkeypatch):
    """Chunks of a wider tensor, padded rows, gradients expanded over rows: read where they lie."""
    spec = OPS[name]
    with machine("triton") as device:
        inputs = make(name, (5, 40), device=device)
        leaves = {k: inputs[k].requires_grad_() for k in spec.grads}
        laid = {**inputs, **{k: padded(v) for k, v in leaves.items() if v.dim() > 1}}

        def copied(self, *_, **__):
            assert self.is_contiguous(), "copied"
            return self

        monkeypatch.setattr(Tensor, "contiguous", copied)
        outputs = spec.function(**laid, backend="triton")
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(
            outputs, list(leaves.values()), [torch.randn_like(out[0]).expand_as(out) for out in outputs]
        )


@pytest.mark.parametrize("cols", [40, 32771])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@named
def test_launches_are_few(name, dtype, cols, monkeypatch):
    """One forward; backward one, or two where the rows' parts of dweight are added up. A float32 weight adds none."""
    spec = OPS[name]
    seen = counted(monkeypatch, importlib.import_module(MODULES[name]), importlib.import_module(REDUCE))
    with machine("triton") as device:
        inputs = make(name, (5, cols), dtype, device)
        if "weight" in inputs:
            inputs["weight"] = inputs["weight"].float()
        leaves = [inputs[k].requires_grad_() for k in spec.grads]
        out = spec.function(**inputs, backend="triton")
        out = out[0] if isinstance(out, tuple) else out
        assert len(seen) == 1
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert len(seen) == (3 if "norm" in name else 2), seen


@named
@on_kernels
def test_no_ceiling_on_the_row(name, backend):
    """Peers stop at 65536 columns."""
    served(name, backend)
    if backend == "cuda":
        pytest.skip("tests/simt has wide rows; this many columns take the SIMT machine minutes")
    spec = OPS[name]
    with machine(backend) as device:
        inputs = make(name, (2, 131072 + 3), device=device)
        check(spec, functools.partial(spec.function, backend=backend), inputs)


@pytest.mark.parametrize("add", [False, True])
@on_kernels
def test_float32_weight_in_a_half_precision_model(backend, add):
    """Its gradient stays float32; the output is in the activation's dtype, through autocast too."""
    served("rms_norm", backend)
    with machine(backend) as device:
        x, weight = torch.randn(4, 72, device=device).bfloat16(), torch.rand(72, device=device).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            y = add_rms_norm(x, x, weight, backend=backend)[0] if add else rms_norm(x, weight, backend=backend)
        (grad,) = torch.autograd.grad(y.float().sum(), weight)
    assert (y.dtype, grad.dtype) == (torch.bfloat16, torch.float32)


@on_kernels
def test_norm_weights_train(backend):
    """Their gradient is there, whether or not x wants one, and it is the sum over every row."""
    served("rms_norm", backend)
    with machine(backend) as device:
        weight = torch.ones(24, device=device).requires_grad_()
        x = torch.randn(301, 24, device=device)
        expected = torch.autograd.grad(rms_norm(x, weight, backend="eager").square().sum(), weight)[0]
        for wanted in (False, True):
            x = x.detach().requires_grad_(wanted)
            weight.grad = None
            rms_norm(x, weight, backend=backend).square().sum().backward()
            assert (x.grad is not None) == wanted
            torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-4)


@named
def test_tensors_where_triton_cannot_reach_them(name, monkeypatch):
    """A reason, not "Pointer argument cannot be accessed"; and the automatic choice goes on without."""
    monkeypatch.setattr(triton_support, "INTERPRET", False)
    spec = OPS[name]
    inputs = make(name, (5, 40))
    with pytest.raises(BackendError, match="a tensor is on cpu: Triton needs a GPU"):
        spec.function(**inputs, backend="triton")
    spec.function(**inputs)
    away = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with pytest.raises(BackendError, match="a tensor is on meta"):
        spec.function(**away, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@on_kernels
def test_rms_norm_of_large_and_lopsided_rows(backend, dtype):
    """Squares that overflow the dtype, one element that outweighs the row, rows of zeros, rows below epsilon."""
    served("rms_norm", backend)
    spec = OPS["rms_norm"]
    with machine(backend) as device:
        inputs = make("rms_norm", (6, 200), dtype, device, variant="correlated")
        x = inputs["x"]
        x[0] *= 3e3
        x[1, 7] = 6e4
        x[2] = 0.0
        x[3] *= 1e-4
        check(spec, functools.partial(spec.function, backend=backend), inputs)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy: infinity is what is wanted
@pytest.mark.parametrize("packed", [False, True])
@on_kernels
def test_swiglu_of_a_gate_that_overflows_exp(backend, packed):
    """Element by element against float64: no NaN, the relative error of exp at most (|gate| float32 epsilons)."""
    served("swiglu_packed" if packed else "swiglu", backend)
    with machine(backend) as device:
        gate = torch.cat((torch.linspace(-120, 120, 961), torch.tensor([-3e38, -1e4, 1e4, 3e38]))).to(device)
        up = torch.full_like(gate, 0.5)
        if packed:
            both = torch.cat((gate, up)).requires_grad_()
            y = swiglu_packed(both, backend=backend)
            dgate, dup = torch.autograd.grad(y.sum(), both)[0].chunk(2)
        else:
            gate, up = gate.requires_grad_(), up.requires_grad_()
            y = swiglu(gate, up, backend=backend)
            dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    g = gate.detach().double()
    s = torch.sigmoid(g)
    slope = s * (1 + g * (1 - s))
    # The slope crosses zero near -1.28: its error is that of its terms. Below 1e-37 float32 ends.
    terms = {"y": g.abs() * s, "dup": g.abs() * s, "dgate": s * (1 + g.abs() * (1 - s))}
    allowed = 6e-8 * (8 + g.abs().clamp(max=200))
    for key, got, true in (("y", y / 0.5, g * s), ("dup", dup, g * s), ("dgate", dgate / 0.5, slope)):
        error = (got.detach().double() - true).abs()
        assert got.isfinite().all(), key
        assert (error <= allowed * terms[key] + 1e-35).all(), key
