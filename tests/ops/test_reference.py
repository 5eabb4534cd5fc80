"""The references of RoPE and SwiGLU against other people's, and of every op against numerical differentiation."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from harness.accuracy import run
from harness.reference import CLOSE, assert_same_grads, randn
from torch.autograd import gradcheck

from pyllm.kernels import OPS, use_backend
from pyllm.kernels.attention import attention
from pyllm.kernels.attention import reference as attention_reference
from pyllm.kernels.cross_entropy import cross_entropy, linear_cross_entropy
from pyllm.kernels.rope import apply_rope
from pyllm.kernels.rope import reference as rope_reference
from pyllm.kernels.swiglu import swiglu, swiglu_packed


@pytest.fixture(autouse=True)
def _eager():
    with use_backend("eager"):
        yield


def test_rope_equals_transformers():
    from model.reference import transformers  # which knows how to import it beside our own folder `kernels`

    llama = transformers.models.llama.modeling_llama
    q, k = randn(2, 4, 9, 16, grad=True), randn(2, 2, 9, 16, grad=True)  # (B, H, T, D)
    cos, sin = (t.expand(2, 9, 16) for t in rope_reference.tables(9, 16))
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin)
    got = apply_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for mine, theirs, leaf in zip(got, expected, (q, k), strict=True):
        assert_same_grads(mine.transpose(1, 2), theirs, [leaf], **CLOSE)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_multiplication_by_a_complex_number(interleaved):
    D, T = 12, 5
    q, k = randn(1, T, 2, D, dtype=torch.float64), randn(1, T, 1, D, dtype=torch.float64)
    cos, sin = (t.double() for t in rope_reference.tables(T, D, interleaved=interleaved))
    half = cos[:, ::2] if interleaved else cos[:, : D // 2]
    turn = torch.polar(torch.ones_like(half), torch.atan2(sin[:, ::2] if interleaved else sin[:, : D // 2], half))

    def rotate(x):
        pairs = x.unflatten(-1, (D // 2, 2)) if interleaved else x.unflatten(-1, (2, D // 2)).transpose(-1, -2)
        y = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn[:, None])
        return y.flatten(-2) if interleaved else y.transpose(-1, -2).flatten(-2)

    for got, x in zip(apply_rope(q, k, cos, sin, interleaved=interleaved), (q, k), strict=True):
        torch.testing.assert_close(got, rotate(x))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_table_forms_agree(interleaved):
    """Half, full and per-batch tables, positions and packed tokens: the same angles, the same numbers."""
    B, T, D = 2, 6, 16
    q, k = randn(B, T, 4, D), randn(B, T, 2, D)
    call = functools.partial(apply_rope, interleaved=interleaved)
    full = rope_reference.tables(20, D, interleaved=interleaved)
    half = rope_reference.tables(20, D, interleaved=interleaved, half=True)
    expected = call(q, k, *full)
    positions = torch.arange(T)
    forms = {
        "half": call(q, k, *half),
        "batch": call(q, k, *(t[:T].expand(B, T, D) for t in full)),
        "batch of one": call(q, k, *(t[None, :T] for t in full)),
        "positions": call(q, k, *full, position_ids=positions),
        "batched positions": call(q, k, *half, position_ids=positions.expand(B, T)),
        "one row of int32 positions": call(q, k, *half, position_ids=positions[None].int()),
    }
    for name, got in forms.items():
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), name
    packed = call(q.flatten(0, 1), k.flatten(0, 1), *full, position_ids=positions.repeat(B))
    for a, b in zip(packed, expected, strict=True):
        assert torch.equal(a.view_as(b), b)


def test_rope_partial_rotation_passes_the_rest():
    q, k = randn(1, 4, 2, 10), randn(1, 4, 2, 10)
    cos, sin = rope_reference.tables(4, 4)
    got, _ = apply_rope(q, k, cos, sin, rotary_dim=4)
    inner, _ = apply_rope(q[..., :4], k[..., :4], cos, sin)
    assert torch.equal(got[..., 4:], q[..., 4:])
    assert torch.equal(got[..., :4], inner)
    as_half, _ = apply_rope(q, k, cos, sin)  # four columns are at most D / 2: a half table of R = 8
    assert not torch.equal(as_half, got)


@pytest.mark.parametrize("bad", [-1, 6])
def test_rope_position_out_of_range(bad):
    q, k = randn(1, 2, 1, 4), randn(1, 2, 1, 4)
    with pytest.raises(ValueError, match=f"position_ids .*{bad}"):
        apply_rope(q, k, *rope_reference.tables(6, 4), position_ids=torch.tensor([0, bad]))


def test_swiglu_equals_torch():
    gate, up = randn(5, 33, grad=True), randn(5, 33, grad=True)
    assert_same_grads(swiglu(gate, up), F.silu(gate) * up, [gate, up], **CLOSE)
    packed = torch.cat((gate, up), -1)
    torch.testing.assert_close(swiglu_packed(packed), swiglu(gate, up), **CLOSE)


@pytest.mark.parametrize("name", ["attention", "linear_cross_entropy"])
def test_autocast_casts_and_computes_in_float32(name):
    """The inputs are rounded to the autocast dtype; the products of the reference must not be."""
    q, k, h, w = randn(1, 40, 2, 16), randn(1, 40, 1, 16), randn(9, 64), randn(50, 64)
    half = [t.bfloat16() for t in (q, k, h, w)]
    target = torch.randint(50, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        if name == "attention":
            got, expected = attention(q, k, k), attention_reference.attention(half[0], half[1], half[1])
            assert got.dtype == torch.bfloat16
        else:
            got = linear_cross_entropy(h, w, target)
            with torch.autocast("cpu", enabled=False):
                expected = F.cross_entropy(half[2].float() @ half[3].float().T, target)
    torch.testing.assert_close(got, expected)


D64 = dict(dtype=torch.float64, grad=True)
CU = attention_reference.cu_seqlens((3, 0, 2))
SEGMENTS = dict(cu_seqlens_q=CU, cu_seqlens_k=attention_reference.cu_seqlens((2, 1, 4)))
HALF = tuple(t.double() for t in rope_reference.tables(5, 4, half=True))
TARGET = torch.tensor([1, -100, 3, 0])
CHECKS = {
    "rope": (lambda q, k: apply_rope(q, k, *HALF), [(1, 3, 2, 6), (1, 3, 1, 6)]),
    "rope-interleaved-positions": (
        lambda q, k: apply_rope(q, k, *HALF, interleaved=True, position_ids=torch.tensor([4, 0, 2])),
        [(1, 3, 2, 6), (1, 3, 1, 6)],
    ),
    "swiglu": (swiglu, [(3, 5), (3, 5)]),
    "swiglu_packed": (swiglu_packed, [(3, 6)]),
    **{
        f"attention-{options}": (functools.partial(attention, return_lse=True, **options), shapes)
        for options, shapes in [
            (dict(), [(1, 3, 4, 2), (1, 4, 2, 2), (1, 4, 2, 2)]),
            (dict(causal=True), [(2, 4, 2, 3), (2, 4, 1, 3), (2, 4, 1, 3)]),
            (dict(causal=True, window=2, softcap=1.5), [(1, 3, 2, 2), (1, 5, 2, 2), (1, 5, 2, 2)]),
            (dict(causal=True, **SEGMENTS), [(5, 2, 2), (7, 1, 2), (7, 1, 2)]),
        ]
    },
    "attention-sinks": (
        lambda q, k, v, sinks: attention(q, k, v, sinks=sinks, causal=True, softcap=2.0, return_lse=True),
        [(1, 4, 2, 3), (1, 3, 1, 3), (1, 3, 1, 3), (2,)],
    ),
    **{
        f"cross_entropy-{options}": (lambda x, o=options: cross_entropy(x, TARGET, **o), [(4, 5)])
        for options in (
            dict(),
            dict(reduction="none", label_smoothing=0.2),
            dict(weight=torch.arange(1.0, 6.0, dtype=torch.float64), label_smoothing=0.1),
            dict(z_loss=0.1, softcap=1.0),
        )
    },
    "linear_cross_entropy": (
        lambda x, w, b: linear_cross_entropy(x, w, TARGET, linear_bias=b, label_smoothing=0.1, z_loss=0.1, softcap=2.0),
        [(4, 3), (5, 3), (5,)],
    ),
}


def finite(function):
    """The finite outputs of a function, alone: lse is -inf where there is nothing to attend, and has no derivative."""

    def call(*args, **kwargs):
        outputs = function(*args, **kwargs)
        return tuple(out[out.isfinite()] for out in (outputs if isinstance(outputs, tuple) else (outputs,)))

    return call


@pytest.mark.parametrize("name", CHECKS)
def test_gradcheck(name):
    function, shapes = CHECKS[name]
    leaves = [randn(*shape, **D64) for shape in shapes]
    assert gradcheck(finite(function), leaves)


@pytest.mark.parametrize("options", [dict(causal=True), dict(causal=True, window=2, softcap=1.5), SEGMENTS], ids=str)
def test_gradcheck_of_the_dense_reference(options):
    packed = "cu_seqlens_q" in options
    shapes = [(5, 2, 2), (7, 1, 2), (7, 1, 2)] if packed else [(1, 5, 2, 2), (1, 3, 2, 2), (1, 3, 2, 2)]
    leaves = [randn(*shape, **D64) for shape in (*shapes, (2,))]

    def call(q, k, v, sinks):
        return attention_reference.attention(q, k, v, sinks=sinks, return_lse=True, **options)

    assert gradcheck(call, leaves)
    assert gradcheck(finite(lambda q, k, v: attention_reference.attention(q, k, v, **options)), leaves[:3])


BACKWARDS = [(name, case) for name, spec in OPS.items() if spec.op.bwd is not None for case in spec.cases]


@pytest.mark.parametrize(("name", "case"), BACKWARDS)
def test_written_out_backward_is_the_gradient(name, case):
    """What the registered op computes by the formula, against autograd of the reference, in float64."""
    spec = OPS[name]
    generator = torch.Generator().manual_seed(2)
    inputs = spec.inputs(**spec.cases[case], dtype=torch.float64, generator=generator)
    before = spec.op.impls
    spec.op.impls = {"cpu": before["eager"]}  # by another name, under which the public function calls the op
    try:
        got = run(functools.partial(spec.function, backend="cpu"), inputs, spec.grads)
    finally:
        spec.op.impls = before
    expected = run(spec.eager, inputs, spec.grads)
    assert got.keys() == expected.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


EMPTY = {
    "swiglu": [dict(gate=(0, 8), up=(0, 8)), dict(gate=(4, 0), up=(4, 0)), dict(gate=(), up=())],
    "swiglu_packed": [dict(gate_up=(0, 8)), dict(gate_up=(4, 0))],
    "apply_rope": [
        dict(q=(0, 3, 2, 4), k=(0, 3, 1, 4), cos=(3, 4), sin=(3, 4)),
        dict(q=(2, 0, 2, 4), k=(2, 0, 1, 4), cos=(3, 4), sin=(3, 4)),
        dict(q=(2, 3, 0, 4), k=(2, 3, 1, 4), cos=(3, 4), sin=(3, 4)),
    ],
    "attention": [
        dict(q=(0, 3, 4, 8), k=(0, 3, 2, 8), v=(0, 3, 2, 8)),
        dict(q=(2, 0, 4, 8), k=(2, 3, 2, 8), v=(2, 3, 2, 8)),
        dict(q=(2, 3, 4, 8), k=(2, 0, 2, 8), v=(2, 0, 2, 8)),
        dict(q=(2, 3, 0, 8), k=(2, 3, 2, 8), v=(2, 3, 2, 8)),
        dict(q=(2, 3, 4, 0), k=(2, 3, 2, 0), v=(2, 3, 2, 0)),
    ],
}


@pytest.mark.parametrize(
    ("name", "shapes"), [(n, s) for n, sizes in EMPTY.items() for s in sizes], ids=lambda v: str(v)
)
def test_empty_sizes(name, shapes):
    function = dict(swiglu=swiglu, swiglu_packed=swiglu_packed, apply_rope=apply_rope, attention=attention)[name]
    leaves = {n: torch.randn(shape).requires_grad_(n not in ("cos", "sin")) for n, shape in shapes.items()}
    outputs = function(**leaves)
    first = next(iter(leaves.values()))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if name != "swiglu_packed":
        assert outputs[0].shape == first.shape
    wanted = [t for t in leaves.values() if t.requires_grad]
    grads = torch.autograd.grad(sum(out.sum() for out in outputs), wanted)
    assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(grads, wanted, strict=True))
