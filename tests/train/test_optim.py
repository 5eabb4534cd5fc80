"""Optimisers against their formulas, schedules against their corners."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pyllm.optim import QUINTIC, Muon, Together, cosine, linear, muon_and_adamw, orthogonalize, trapezoid


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (1, 5)])
def test_orthogonalize_acts_on_singular_values_alone(shape):
    """The formula through an SVD: U p(p(...p(S))) V^T with p(s) = a s + b s^3 + c s^5."""
    g = torch.randn(3, *shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = QUINTIC
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ vh
    torch.testing.assert_close(orthogonalize(g), expected, rtol=1e-5, atol=1e-6)  # 1e-7 in the norm's denominator
    if min(shape) == 8:
        assert (s > 0.6).all()
        assert (s < 1.3).all()


def test_orthogonalize_of_zero_is_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 3)), torch.zeros(2, 4, 3))


def test_muon_follows_its_formula():
    torch.manual_seed(1)
    shapes = [(6, 4), (4, 6), (4, 4), (6, 4)]
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    expected = [p.detach().clone() for p in params]
    momenta = [torch.zeros_like(p) for p in expected]
    muon = Muon(params, lr=0.1, momentum=0.9, weight_decay=0.02)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn(shapes[i], dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + i))
            momenta[i] = 0.9 * momenta[i] + 0.1 * p.grad
            update = orthogonalize((0.1 * p.grad + 0.9 * momenta[i])[None])[0]
            expected[i] = expected[i] * (1 - 0.1 * 0.02) - 0.1 * math.sqrt(max(1, p.shape[0] / p.shape[1])) * update
        grads = [p.grad.clone() for p in params]
        muon.step()
        for p, e, g in zip(params, expected, grads, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-12)
            assert torch.equal(p.grad, g)  # gradients are left alone


def test_muon_skips_parameters_without_gradient_and_refuses_vectors():
    p = nn.Parameter(torch.ones(2, 2))
    Muon([p]).step()
    assert torch.equal(p, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"must be matrices.*\(3,\)"):
        Muon([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="momentum=1"):
        Muon([p], momentum=1)


def test_muon_state_survives_saving():
    def make():
        p = nn.Parameter(torch.eye(3))
        return p, Muon([p], lr=0.1)

    def go(p, muon, times):
        for _ in range(times):
            p.grad = p.detach() + torch.arange(9.0).view(3, 3)
            muon.step()

    p, muon = make()
    go(p, muon, 4)
    q, other = make()
    go(q, other, 2)
    r, third = make()
    r.data.copy_(q.data)
    third.load_state_dict(other.state_dict())
    go(r, third, 2)
    assert torch.equal(p, r)


def test_every_parameter_has_one_optimizer():
    from pyllm.config import PRESETS
    from pyllm.model import LlamaForCausalLM

    for tied in (False, True):
        model = LlamaForCausalLM(PRESETS["tiny"].replace(tie_word_embeddings=tied))
        both = muon_and_adamw(model)
        muon, adamw = ([p for g in o.param_groups for p in g["params"]] for o in both.optimizers)
        assert {id(p) for p in muon} | {id(p) for p in adamw} == {id(p) for p in model.parameters()}
        assert len(muon) + len(adamw) == len(list(model.parameters()))
        assert all(p.dim() == 2 for p in muon)
        assert any(p is model.model.embed_tokens.weight for p in adamw)
        assert any(p is model.lm_head.weight for p in adamw)


def test_scale_is_relative_to_the_peak():
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    both = Together(torch.optim.SGD([p], lr=1.0), torch.optim.SGD([q], lr=10.0))
    for scale in (0.5, 0.1):  # not 0.5 and then a tenth of that
        p.grad, q.grad = torch.ones(1), torch.ones(1)
        both.step(scale)
        both.zero_grad()
        assert p.grad is None
    assert p.item() == pytest.approx(-0.6)
    assert q.item() == pytest.approx(-6.0)


def test_schedules():
    for schedule in (cosine, linear, trapezoid):
        assert schedule(0.0) == 0.0
        assert schedule(0.015) == pytest.approx(0.5)
        assert schedule(0.03) == pytest.approx(1.0)
        assert schedule(1.0) == schedule(1.5) == pytest.approx(0.0, abs=1e-12)
        falling = [schedule(i / 100) for i in range(3, 101)]
        assert falling == sorted(falling, reverse=True)
    assert linear(0.515) == pytest.approx(0.5)
    assert cosine(0.515) == pytest.approx(0.5)
    assert cosine(1.0, final=0.1) == pytest.approx(0.1)
    assert trapezoid(0.4) == 1.0
    assert trapezoid(0.75) == pytest.approx(0.5)
    assert cosine(0.0, warmup=0.0) == trapezoid(0.0, warmup=0.0) == 1.0
