"""The cost of every op, bytes and useful FLOPs, against counts made by hand and, for products, by torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pyllm.kernels import OPS
from pyllm.kernels.attention.reference import cu_seqlens

HALF, FLOAT, INT = 2, 4, 8  # bytes of bfloat16, float32, int64


def cost(name: str, backward: bool = False, *args, dtype: torch.dtype = torch.bfloat16, **case) -> tuple[int, int]:
    return tuple(OPS[name].cost(OPS[name].inputs(*args, dtype=dtype, **case), backward))


def test_rms_norm():
    # 6 rows of 10. Forward: x in, y out, the weight, a float32 rstd a row; a square, a sum, times rstd, times weight.
    assert cost("rms_norm", shape=(2, 3, 10)) == (60 * HALF * 2 + 10 * HALF + 6 * FLOAT, 60 * 4)
    # Backward: dy and x in, dx out; weight and its gradient; rstd. Nine operations an element: ^ = x rstd, g = dy w,
    # g ^ and its sum, g - ^ mean (two), times rstd, dy ^ and its sum.
    assert cost("rms_norm", True, shape=(2, 3, 10)) == (60 * HALF * 3 + 2 * 10 * HALF + 6 * FLOAT, 60 * 9)


def test_add_rms_norm():
    # The residual in and the sum out besides, one addition; backward: the sum's own gradient in, one addition.
    assert cost("add_rms_norm", shape=(6, 10)) == (60 * HALF * 4 + 10 * HALF + 6 * FLOAT, 60 * 5)
    assert cost("add_rms_norm", True, shape=(6, 10)) == (60 * HALF * 4 + 2 * 10 * HALF + 6 * FLOAT, 60 * 10)


def test_a_wider_residual_and_weight_cost_more():
    spec = OPS["add_rms_norm"]
    inputs = spec.inputs((6, 10), dtype=torch.bfloat16)
    inputs.update(residual=inputs["residual"].float(), weight=inputs["weight"].float())
    assert spec.cost(inputs, False).bytes == 60 * (HALF + FLOAT) * 2 + 10 * FLOAT + 6 * FLOAT


@pytest.mark.parametrize("name", ["swiglu", "swiglu_packed"])
def test_swiglu(name):
    # 4 rows of F = 10. Forward: gate and up in, y out; exp, 1 +, 1 /, times gate, times up.
    assert cost(name, shape=(4, 10)) == (40 * HALF * 3, 40 * 5)
    # Backward: dy, gate, up in, two gradients out; s again (3), gate s, dy times it, 1 - s, gate times it, 1 +, dy up,
    # times s, times the bracket.
    assert cost(name, True, shape=(4, 10)) == (40 * HALF * 5, 40 * 11)


def test_rope():
    # B = 2, T = 5, 4 + 2 heads of D = 8, half-width tables (5, 4) of float32. q and k in and out, cos and sin once;
    # every element is two products and an addition. The conjugate costs the same.
    case = dict(B=2, T=5, H=4, Hkv=2, D=8, table="half")
    elements = 2 * 5 * (4 + 2) * 8
    expected = (elements * HALF * 2 + 2 * 5 * 4 * FLOAT, elements * 3)
    assert cost("apply_rope", **case) == expected
    assert cost("apply_rope", True, **case) == expected
    # A full-width table repeats its half: that need not be read. A table per sequence must.
    assert cost("apply_rope", **{**case, "table": "full"}) == expected
    per_sequence = elements * HALF * 2 + 2 * 2 * 5 * 4 * FLOAT
    assert cost("apply_rope", **{**case, "table": "batch"})[0] == per_sequence
    # R = 4 of 8: half of the elements turn; all of them are copied to the output.
    assert cost("apply_rope", **case, R=4) == (elements * HALF * 2 + 2 * 5 * 2 * FLOAT, elements // 2 * 3)


ATTENTION = dict(B=2, T=3, S=5, H=4, Hkv=2, D=8)
Q, KV, LSE = 2 * 3 * 4 * 8, 2 * 5 * 2 * 8, 2 * 3 * 4  # elements of q (and out), of k (and v), of lse
# Which of the 5 keys each of the 3 queries sees; the last query sits on the last key.
PAIRS = {
    "all": (dict(), 3 * 5),
    "causal": (dict(causal=True), 3 + 4 + 5),
    "window of 2": (dict(causal=True, window=2), 2 + 2 + 2),
    "window of 4": (dict(causal=True, window=4), 3 + 4 + 4),
    "two-sided window of 2": (dict(window=2), 3 + 3 + 2),
}


@pytest.mark.parametrize("masked", PAIRS)
def test_attention(masked):
    options, pairs = PAIRS[masked]
    moved = (2 * Q + 2 * KV) * HALF + LSE * FLOAT
    # A pair is a product of D with q and one with v: 4 D operations, for each of 4 heads and 2 sequences.
    assert cost("attention", **ATTENTION, **options) == (moved, 4 * 8 * pairs * 4 * 2)
    # Backward: q, k, v, out, dout and lse in, three gradients out: five products where forward has two.
    assert cost("attention", True, **ATTENTION, **options) == (
        (Q * 3 + KV * 2 + Q + KV * 2) * HALF + LSE * FLOAT,
        10 * 8 * pairs * 4 * 2,
    )


def test_packed_attention():
    # Sequences of 3, 0 and 2, causal: 1 + 2 + 3, nothing, 1 + 2 pairs; no pair crosses from one to another.
    inputs = OPS["attention"].inputs(H=4, Hkv=2, D=8, lengths=(3, 0, 2), causal=True, dtype=torch.bfloat16)
    assert torch.equal(inputs["cu_seqlens_q"], cu_seqlens((3, 0, 2)))
    moved = (2 * 5 * 4 * 8 + 2 * 5 * 2 * 8) * HALF + 5 * 4 * FLOAT
    assert tuple(OPS["attention"].cost(inputs, False)) == (moved, 4 * 8 * 4 * (6 + 3))


def test_attention_equals_torchs_count():
    """torch counts every pair, masked or not: so without a mask, and a head for every head."""
    q, k, v = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (3, 5, 5))
    with FlopCounterMode(display=False) as counter:
        out = torch.softmax(q @ k.mT, -1) @ v
    assert counter.get_total_flops() == cost("attention", **{**ATTENTION, "Hkv": 4})[1]
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # Plain autograd keeps the scores; a kernel that doesn't computes them again, the fifth product.
    assert counter.get_total_flops() * 5 // 4 == cost("attention", True, **{**ATTENTION, "Hkv": 4})[1]


@pytest.mark.parametrize(("window", "keys", "pairs"), [(None, 5 + 3, 5 + 4 + 3 + 2), (3, 4 + 3, 3 + 3 + 3 + 2)])
def test_attention_decode(window, keys, pairs):
    # 2 new tokens of 2 sequences whose caches hold 5 and 3 keys. Only keys that some query sees are read.
    inputs = OPS["attention_decode"].inputs(2, 2, 9, 4, 2, 8, window=window, dtype=torch.bfloat16)
    inputs["cache_seqlens"] = torch.tensor([5, 3], dtype=torch.int32)
    q = 2 * 2 * 4 * 8
    moved = (2 * keys * 2 * 8 + 2 * q) * HALF
    assert tuple(OPS["attention_decode"].cost(inputs, False)) == (moved, 4 * 8 * 4 * pairs)


def test_cross_entropy():
    # 6 rows of V = 10: logits once, an int64 target, a float32 loss and lse a row; maximum, minus it, exp, sum.
    assert cost("cross_entropy", shape=(2, 3, 10)) == (60 * HALF + 6 * (INT + 2 * FLOAT), 60 * 4)
    # Backward: logits again and their gradient out; target, the loss's gradient and lse; - lse, exp, - 1, scale, round.
    assert cost("cross_entropy", True, shape=(2, 3, 10)) == (2 * 60 * HALF + 6 * (INT + 2 * FLOAT), 60 * 5)


def test_linear_cross_entropy():
    # 6 rows of C = 4, V = 10. Input and weight in; both again and their gradients out. No logits.
    rows = 6 * (INT + 2 * FLOAT)
    assert cost("linear_cross_entropy", shape=(6, 4), V=10) == ((6 * 4 + 10 * 4) * HALF + rows, 2 * 6 * 4 * 10)
    assert cost("linear_cross_entropy", True, shape=(6, 4), V=10) == (
        2 * (6 * 4 + 10 * 4) * HALF + rows,
        2 * 2 * 6 * 4 * 10,
    )


def test_linear_cross_entropy_equals_torchs_count():
    inputs = OPS["linear_cross_entropy"].inputs((6, 4), 10, dtype=torch.float32)
    x, w = inputs["input"].requires_grad_(), inputs["linear_weight"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        loss = torch.nn.functional.cross_entropy(x @ w.T, inputs["target"])
    assert counter.get_total_flops() == OPS["linear_cross_entropy"].cost(inputs, False).flops
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == OPS["linear_cross_entropy"].cost(inputs, True).flops


def test_linear():
    # 6 rows, 4 inputs, 10 outputs, a bias. x, weight and bias in, y out; a product and an addition an output.
    assert cost("linear", shape=(6, 4), outputs=10, bias=True) == (
        (24 + 40 + 10 + 60) * HALF,
        2 * 6 * 4 * 10 + 60,
    )
    # Backward: dy, x and weight in, their gradients and the bias's out; two products, a sum over rows.
    assert cost("linear", True, shape=(6, 4), outputs=10, bias=True) == (
        (60 + 2 * 24 + 2 * 40 + 10) * HALF,
        2 * 2 * 6 * 4 * 10 + 60,
    )


def test_sample():
    # 6 logits a row, a number and a token of 8 bytes each; a difference, a quotient, an exponential and a sum a logit.
    assert cost("sample", shape=(5, 6)) == (30 * HALF + 5 * 16, 4 * 30)


ELSEWHERE = {"qk_norm_rope": "test_qk_norm_rope.py", "rope_append_kv": "test_rope_append.py"}


def test_every_op_is_counted():
    counted = {name for name in globals() if name.startswith("test_")}
    for name in OPS:
        if name in ELSEWHERE:
            assert "def test_cost_by_hand" in (Path(__file__).parent / ELSEWHERE[name]).read_text(), name
        else:
            assert any(name.removeprefix("apply_").removesuffix("_packed") in test for test in counted), name
