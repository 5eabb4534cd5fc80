"""QK-norm fused with RoPE: what it equals, how it rounds, and what it and RoPE must move, counted by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from harness.accuracy import check, run
from harness.machines import machine
from harness.reference import CLOSE, assert_same_grads, randn
from torch.autograd import gradcheck

from pyllm.kernels import OPS, apply_rope, qk_norm_rope, rms_norm
from pyllm.kernels.rope import reference
from pyllm.kernels.spec import Cost

SPEC = OPS["qk_norm_rope"]
BACKENDS = ["triton", "cpu", "eager"]


@pytest.mark.parametrize("interleaved", [False, True])
def test_equals_norm_then_rotation(interleaved):
    q, k, q_weight, k_weight = leaves = [randn(*s, grad=True) for s in [(2, 5, 4, 24), (2, 5, 1, 24), (24,), (24,)]]
    cos, sin = reference.tables(5, 16, interleaved=interleaved)
    how = dict(interleaved=interleaved, rotary_dim=16)
    mine = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, 1e-5, offset=1.0, **how)
    normed = rms_norm(q, q_weight, 1e-5, offset=1.0), rms_norm(k, k_weight, 1e-5, offset=1.0)
    theirs = apply_rope(*normed, cos, sin, **how)
    flat = [torch.cat([x.flatten() for x in pair]) for pair in (mine, theirs)]
    assert_same_grads(*flat, leaves, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_once(backend):
    """In bfloat16 it is the float32 result rounded, but for near ties; norm and rotation, rounded each, are not."""
    with machine(backend) as device:
        inputs = SPEC.inputs(B=1, T=9, H=2, Hkv=1, D=64, dtype=torch.bfloat16, device=device)
        exact = qk_norm_rope(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})[0]
        once = qk_norm_rope(**inputs, backend=backend)[0]
        normed = rms_norm(inputs["q"], inputs["q_weight"]), rms_norm(inputs["k"], inputs["k_weight"])
        twice = apply_rope(*normed, inputs["cos"], inputs["sin"])[0]
    assert (once != exact.bfloat16()).float().mean() < 0.01
    assert (twice != exact.bfloat16()).float().mean() > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    shapes = [(1, 3, 2, 6), (1, 3, 1, 6), (6,), (6,)]
    leaves = [randn(*shape, dtype=torch.float64, grad=True) for shape in shapes]
    cos, sin = (t.double() for t in reference.tables(5, 4, half=True))
    positions = torch.tensor([4, 0, 2])
    assert gradcheck(
        lambda *x: qk_norm_rope(*x, cos, sin, 1e-3, offset=0.5, interleaved=interleaved, position_ids=positions), leaves
    )


@pytest.mark.parametrize("name", ["qk_norm_rope", "apply_rope"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "T", "H", "Hkv"), [(0, 3, 2, 1), (2, 0, 2, 1), (2, 3, 0, 1), (2, 3, 1, 0)])
def test_empty_sizes(name, backend, B, T, H, Hkv):
    spec = OPS[name]
    with machine(backend) as device:
        inputs = spec.inputs(B=2, T=3, H=1, Hkv=1, D=4, dtype=torch.float32, device=device)
        inputs.update(q=torch.randn(B, T, H, 4, device=device), k=torch.randn(B, T, Hkv, 4, device=device))
        results = [run(functools.partial(spec.function, backend=b), inputs, spec.grads) for b in (backend, "eager")]
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], **CLOSE)


@pytest.mark.parametrize(("x", "weight"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_another_dtype(backend, x, weight):
    with machine(backend) as device:
        inputs = SPEC.inputs(B=2, T=5, H=3, Hkv=2, D=24, dtype=getattr(torch, x), device=device)
        inputs["q_weight"] = inputs["q_weight"].to(getattr(torch, weight))  # and k's stays as it is
        check(SPEC, functools.partial(qk_norm_rope, backend=backend), inputs)


def test_float32_gradient_of_the_weights_over_many_tokens():
    """3000 terms: sums in half precision would be off by percents."""
    inputs = SPEC.inputs(B=1, T=1500, H=2, Hkv=1, D=8, dtype=torch.float16)
    check(SPEC, functools.partial(qk_norm_rope, backend="eager"), inputs)


# By hand, for B 2, T 3, H 4, Hkv 1, D 8, R 6 in bfloat16: 2 * 3 * 5 = 30 heads, 240 elements, 480 bytes.
HEADS, ELEMENTS, BYTES = 30, 240, 480
COSTS = {
    # q, k and back; 3 rows of 3 columns, cos and sin, float32; 3 operations for each of 6 elements of a head
    "apply_rope": (Cost(2 * BYTES + 3 * 3 * 2 * 4, HEADS * 6 * 3), Cost(2 * BYTES + 72, HEADS * 18)),
    # the same, and rstd written or read (4 bytes a head) and two weights of 8 read; backward reads q and k besides and
    # writes the weights' gradients
    "qk_norm_rope": (
        Cost(2 * BYTES + 72 + 4 * HEADS + 2 * 8 * 2, 4 * ELEMENTS + HEADS * 18),
        Cost(3 * BYTES + 72 + 4 * HEADS + 2 * 2 * 8 * 2, 9 * ELEMENTS + HEADS * 18),
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_cost_by_hand(name):
    spec = OPS[name]
    inputs = spec.inputs(B=2, T=3, H=4, Hkv=1, D=8, R=6, dtype=torch.bfloat16)
    assert (spec.cost(inputs, False), spec.cost(inputs, True)) == COSTS[name]
    # A table for each of two batch rows: three more rows of angles.
    batch = spec.inputs(B=2, T=3, H=4, Hkv=1, D=8, R=6, table="batch", dtype=torch.bfloat16)
    assert spec.cost(batch, False).bytes == COSTS[name][0].bytes + 72
    # Six tokens at any of nine positions: six int64 numbers and at most six rows.
    chosen = spec.inputs(B=2, T=3, H=4, Hkv=1, D=8, R=6, positions=True, dtype=torch.bfloat16)
    assert spec.cost(chosen, False).bytes == COSTS[name][0].bytes + 72 + 6 * 8
    packed = spec.inputs(B=0, T=6, H=4, Hkv=1, D=8, R=6, dtype=torch.bfloat16)
    assert spec.cost(packed, False).bytes == COSTS[name][0].bytes + 72


def test_fusing_saves_two_passes_of_four():
    """What the fusion is for: q and k are read and written once instead of twice."""
    inputs = SPEC.inputs(B=1, T=64, H=32, Hkv=8, D=128, dtype=torch.bfloat16)
    norm = sum(OPS["rms_norm"].cost(dict(x=inputs[x], weight=inputs[f"{x}_weight"]), False).bytes for x in ("q", "k"))
    apart = norm + OPS["apply_rope"].cost(inputs, False).bytes
    assert SPEC.cost(inputs, False).bytes < 0.52 * apart


def test_close_to_the_models_own_norm():
    """Qwen3RMSNorm and Hugging Face's rotation, in float32."""
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3", reason="transformers is not installed")
    q, k = randn(2, 7, 4, 16), randn(2, 7, 2, 16)
    cos, sin = reference.tables(7, 16)
    norms = [qwen3.Qwen3RMSNorm(16, 1e-6) for _ in range(2)]
    for norm in norms:
        norm.weight.data.normal_()
    theirs = qwen3.apply_rotary_pos_emb(
        *(n(x).transpose(1, 2) for n, x in zip(norms, (q, k), strict=True)), cos[None], sin[None]
    )
    mine = qk_norm_rope(q, k, *(norm.weight for norm in norms), cos, sin)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.transpose(1, 2), **CLOSE)
