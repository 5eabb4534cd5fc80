"""The attention reference, dense and by blocks, against brute force and torch's own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from harness.reference import CLOSE, assert_same_grads, randn

from pyllm.kernels import use_backend
from pyllm.kernels.attention import attention, attention_decode
from pyllm.kernels.attention import eager as attention_eager
from pyllm.kernels.attention import reference as attention_reference


@pytest.fixture(autouse=True)
def _eager():
    with use_backend("eager"):
        yield


def brute_force(q, k, v, visible, scale, softcap=0.0, sinks=None):
    """One query, one head, one list of keys at a time, in float64."""
    B, T, H, _ = q.shape
    S, Hkv = k.shape[1:3]
    q, k, v = q.double(), k.double(), v.double()
    out, lse = torch.zeros_like(q), q.new_full((B, H, T), -math.inf)
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        keys = [j for j in range(S) if visible(b, i, j)]
        scores = torch.stack([q[b, i, h] @ k[b, j, h // (H // Hkv)] * scale for j in keys]) if keys else q.new_empty(0)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat((scores, sinks[h].double().view(1)))
        if len(scores):
            lse[b, h, i] = torch.logsumexp(scores, 0)
            p = torch.softmax(scores, 0)
            out[b, i, h] = sum(
                (p[n] * v[b, j, h // (H // Hkv)] for n, j in enumerate(keys)), torch.zeros_like(q[0, 0, 0])
            )
    return out, lse


@pytest.mark.parametrize(
    ("T", "S", "options", "visible"),
    [
        (5, 5, dict(), lambda i, j, d: True),
        (5, 5, dict(causal=True), lambda i, j, d: j <= i),
        (3, 7, dict(causal=True), lambda i, j, d: j <= i + d),
        (7, 3, dict(causal=True), lambda i, j, d: j <= i + d),
        (6, 6, dict(causal=True, window=3), lambda i, j, d: i - 3 < j <= i),
        (4, 9, dict(causal=True, window=3), lambda i, j, d: i + d - 3 < j <= i + d),
        (6, 6, dict(window=2), lambda i, j, d: abs(i - j) < 2),
        (5, 8, dict(window=(2, 1)), lambda i, j, d: i + d - 2 <= j <= i + d + 1),
        (5, 5, dict(window=(-1, 1)), lambda i, j, d: j <= i + 1),
        (5, 5, dict(window=(1, -1)), lambda i, j, d: j >= i - 1),
        (5, 5, dict(window=(1, 3), causal=True), lambda i, j, d: i - 1 <= j <= i),
        (9, 2, dict(window=(1, 0)), lambda i, j, d: i + d - 1 <= j <= i + d),
        (4, 4, dict(causal=True, softcap=2.0), lambda i, j, d: j <= i),
        (4, 4, dict(softmax_scale=-0.5), lambda i, j, d: True),
        (3, 0, dict(), lambda i, j, d: True),
    ],
    ids=lambda v: "sees" if callable(v) else str(v),
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_by_brute_force(T, S, options, visible, with_sinks):
    B, H, Hkv, D = 2, 4, 2, 3
    q, k, v = randn(B, T, H, D), randn(B, S, Hkv, D), randn(B, S, Hkv, D)
    sinks = randn(H) if with_sinks else None
    scale = options.get("softmax_scale", D**-0.5)
    expected, expected_lse = brute_force(
        q, k, v, lambda b, i, j: visible(i, j, S - T), scale, options.get("softcap", 0.0), sinks
    )
    for function in (attention, attention_reference.attention):
        out, lse = function(q, k, v, sinks=sinks, return_lse=True, **options)
        torch.testing.assert_close(out.double(), expected, **CLOSE)
        torch.testing.assert_close(lse.double(), expected_lse, **CLOSE)


@pytest.mark.parametrize(("H", "Hkv"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torch(H, Hkv, causal):
    """Long enough for several blocks of queries."""
    q, k, v = randn(2, 150, H, 16, grad=True), randn(2, 150, Hkv, 16, grad=True), randn(2, 150, Hkv, 16, grad=True)
    theirs = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    for function in (attention, attention_reference.attention):
        assert_same_grads(function(q, k, v, causal=causal), theirs, [q, k, v], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [c for c, p in attention_reference.CASES.items() if "lengths" not in p])
def test_grouped_heads_equal_repeated_ones(case):
    parameters = attention_reference.CASES[case]
    inputs = attention_reference.attention_inputs(**parameters, dtype=torch.float64)
    group = parameters["H"] // parameters["Hkv"]
    repeated = {n: inputs[n].repeat_interleave(group, 2) for n in ("k", "v")}
    torch.testing.assert_close(attention(**inputs), attention(**{**inputs, **repeated}))


@pytest.mark.parametrize("options", [dict(), dict(causal=True), dict(causal=True, window=4, softcap=3.0)], ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_packed_equals_one_sequence_at_a_time(options, with_sinks):
    lengths, key_lengths = (70, 0, 5, 1, 4), (70, 3, 9, 0, 2)
    cu_q, cu_k = (attention_reference.cu_seqlens(n) for n in (lengths, key_lengths))
    tail = 3  # rows past the last sequence
    q = randn(sum(lengths) + tail, 4, 8, dtype=torch.float64, grad=True)
    k, v = (randn(sum(key_lengths) + tail, 2, 8, dtype=torch.float64, grad=True) for _ in range(2))
    sinks = randn(4, dtype=torch.float64, grad=True) if with_sinks else None
    leaves = [q, k, v] + ([sinks] if with_sinks else [])
    outs, lses = [], []
    for b in range(len(lengths)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        out, lse = attention(q[None, rows], k[None, keys], v[None, keys], sinks=sinks, return_lse=True, **options)
        outs.append(out[0])
        lses.append(lse[0])
    for function in (attention, attention_reference.attention):
        out, lse = function(q, k, v, sinks=sinks, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options)
        assert torch.equal(out[-tail:], torch.zeros_like(out[-tail:]))
        assert_same_grads(out[:-tail], torch.cat(outs), leaves, **CLOSE)
        torch.testing.assert_close(lse[:, :-tail], torch.cat(lses, 1))


def test_packed_mask_without_asking_the_device():
    """The GPU's way through a packed batch, which the CPU doesn't take by itself."""
    lengths = (3, 0, 5)
    cu = attention_reference.cu_seqlens(lengths)
    q, k, v = randn(9, 2, 4), randn(9, 1, 4), randn(9, 1, 4)
    args = (q, k, v, None, cu, cu, 0.5, -1, 0, 0.0)
    expected = attention_eager.attention_fwd(*args)
    upstream = torch.randn_like(q)
    grads = attention_eager.attention_bwd(upstream, None, *args[:3], *expected, *args[3:])

    def whole(q, k, cu_q, cu_k, left, right):
        where = attention_reference.positions(q.shape[0], k.shape[0], cu_q, cu_k, q.device)
        yield slice(None), slice(None), attention_reference.visible(*where, left, right)

    before = attention_eager._pieces
    attention_eager._pieces = whole
    try:
        got = attention_eager.attention_fwd(*args)
        got_grads = attention_eager.attention_bwd(upstream, None, *args[:3], *got, *args[3:])
    finally:
        attention_eager._pieces = before
    for a, b in zip((*got, *got_grads), (*expected, *grads), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", attention_reference.CASES)
def test_nothing_to_attend_gives_no_nan(case):
    inputs = attention_reference.attention_inputs(**attention_reference.CASES[case], dtype=torch.float32)
    for function in (attention, attention_reference.attention):
        leaves = {n: inputs[n].clone().requires_grad_() for n in ("q", "k", "v", "sinks") if n in inputs}
        out, lse = function(**{**inputs, **leaves}, return_lse=True)
        grads = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), list(leaves.values()))
        assert out.isfinite().all()
        assert not lse.isnan().any()
        assert all(g.isfinite().all() for g in grads)
    if case == "causal-T9-S4-empty-rows":
        assert torch.equal(out[:, :5], torch.zeros_like(out[:, :5]))
        assert (lse[..., :5] == -math.inf).all()
        assert lse[..., 5:].isfinite().all()


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("options", [dict(), dict(window=4), dict(softcap=2.0), dict(softmax_scale=0.1)], ids=str)
def test_decode_equals_attention_to_the_valid_keys(T, options):
    B, S, H, Hkv, D = 4, 12, 4, 2, 8
    lengths = torch.tensor([12, T, 7, 0])
    q, k, v = randn(B, T, H, D), randn(B, S, Hkv, D), randn(B, S, Hkv, D)
    for b, n in enumerate(lengths.tolist()):
        k[b, n:], v[b, n:] = math.inf, math.nan  # whoever reads past the valid keys shows it
    got = attention_decode(q, k.nan_to_num(posinf=1e4), v.nan_to_num(nan=1e4), lengths, **options)
    for b, n in enumerate(lengths.tolist()):
        one = attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal=True, **options)
        torch.testing.assert_close(got[b : b + 1], one, **CLOSE)


def test_decode_refuses_a_gradient():
    q, k = randn(1, 1, 2, 4, grad=True), randn(1, 3, 1, 4)
    with pytest.raises(ValueError, match=r"attention\(\.\.\., causal=True\)"):
        attention_decode(q, k, k, torch.tensor([3]))
    with torch.no_grad():
        attention_decode(q, k, k, torch.tensor([3]))
