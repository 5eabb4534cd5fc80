"""Laws that hold for every input, tried on inputs that hypothesis chooses."""

from __future__ import annotations

import pytest
import torch
from harness.machines import machine, served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyllm.kernels import apply_rope, attention, cross_entropy, rms_norm, swiglu

quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = st.integers(0, 2**31)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@quick
@given(rows=st.integers(1, 9), cols=st.integers(2, 300), power=st.integers(-8, 8), seed=SEEDS)
def test_rms_norm_does_not_see_scale(backend, rows, cols, power, seed):
    """Times a power of two nothing but the epsilon changes; with epsilon 0 not a bit."""
    served("rms_norm", backend)
    x, w = normal(rows, cols, seed=seed), normal(cols, seed=seed + 1)
    assert torch.equal(rms_norm(x * 2.0**power, w, eps=0.0, backend=backend), rms_norm(x, w, eps=0.0, backend=backend))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@quick
@given(tokens=st.integers(1, 9), half=st.integers(1, 40), interleaved=st.booleans(), seed=SEEDS)
def test_rope_keeps_norms_and_is_undone_by_its_conjugate(backend, tokens, half, interleaved, seed):
    served("apply_rope", backend)
    q, k = normal(2, tokens, 3, 2 * half, seed=seed), normal(2, tokens, 1, 2 * half, seed=seed + 1)
    angles = normal(tokens, half, seed=seed + 2) * 10
    cos, sin = angles.cos(), angles.sin()
    turned = apply_rope(q, k, cos, sin, interleaved=interleaved, backend=backend)
    for before, after in zip((q, k), turned, strict=True):
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-5, atol=1e-6)
    back = apply_rope(*turned, cos, -sin, interleaved=interleaved, backend=backend)
    torch.testing.assert_close(back[0], q, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@quick
@given(shift=st.integers(0, 1000), seed=SEEDS)
def test_rope_scores_depend_on_the_distance_alone(backend, shift, seed):
    served("apply_rope", backend)
    q, k = normal(1, 8, 1, 16, seed=seed), normal(1, 8, 1, 16, seed=seed + 1)
    angles = torch.arange(1100, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    cos, sin = angles.cos().float(), angles.sin().float()

    def scores(start):
        turned = apply_rope(q, k, cos, sin, position_ids=torch.arange(start, start + 8), backend=backend)
        return torch.einsum("bthd,bshd->bts", *turned)

    torch.testing.assert_close(scores(shift), scores(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@quick
@given(n=st.integers(1, 100), seed=SEEDS)
def test_swiglu_of_a_closed_gate_and_linearity(backend, n, seed):
    served("swiglu", backend)
    gate, up = normal(n, seed=seed), normal(n, seed=seed + 1)
    assert torch.equal(swiglu(torch.zeros(n), up, backend=backend), torch.zeros(n))
    assert torch.equal(swiglu(gate, 4 * up, backend=backend), 4 * swiglu(gate, up, backend=backend))


@quick
@given(T=st.integers(2, 40), cut=st.integers(1, 39), group=st.sampled_from([1, 2, 4]), seed=SEEDS)
def test_attention_sees_no_future_and_groups_share_heads(T, cut, group, seed):
    q, k, v = (normal(1, T, h, 8, seed=seed + h) for h in (4, 4 // group, 4 // group))
    out = attention(q, k, v, causal=True)
    cut = min(cut, T - 1)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, cut:], changed_v[:, cut:] = 9.0, -9.0
    torch.testing.assert_close(attention(q, changed_k, changed_v, causal=True)[:, :cut], out[:, :cut], rtol=0, atol=0)
    repeated = (t.repeat_interleave(group, dim=2) for t in (k, v))
    torch.testing.assert_close(attention(q, *repeated, causal=True), out, rtol=1e-5, atol=1e-6)


@quick
@given(N=st.integers(1, 12), V=st.integers(1, 200), shift=st.floats(-50, 50), seed=SEEDS)
def test_cross_entropy_ignores_shifts_and_its_gradient_sums_to_zero(N, V, shift, seed):
    logits = normal(N, V, seed=seed).requires_grad_()
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    loss = cross_entropy(logits, target)
    torch.testing.assert_close(cross_entropy(logits.detach() + shift, target), loss.detach(), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.sum(-1).abs().max() < 1e-6


def test_the_interpreter_and_the_simt_machine_obey_too():
    """One scale law on the two backends that are too slow for hypothesis. The epsilon vanishes beside any mean here."""
    x, w = normal(4, 96, seed=1), normal(96, seed=2)
    for backend in ("triton", "cuda"):
        with machine(backend) as device:
            small, large, weight = (t.to(device) for t in (x, x * 4, w))
            assert torch.equal(*(rms_norm(t, weight, eps=1e-30, backend=backend) for t in (small, large)))
