"""The comparison measures what it says."""

from __future__ import annotations

import pytest
import torch

from pyllm.compare import _saved_bytes, compare
from pyllm.config import PRESETS
from pyllm.kernels.extension import cpu
from pyllm.model import LlamaForCausalLM


def test_saved_bytes_by_hand():
    x = torch.randn(1000, requires_grad=True)
    w = torch.nn.Parameter(torch.randn(1000))
    # exp saves its result (4000 bytes), the product saves that again and the parameter w, which doesn't count.
    assert _saved_bytes(lambda: (x.exp() * w).sum(), [w]) == 4000
    # A view has the same memory: x is counted once, and the sine's cosine needs x itself.
    assert _saved_bytes(lambda: (x.view(10, 100).sin() + x.view(100, 10).sin().view(10, 100)).sum(), [w]) == 4000


@pytest.mark.skipif(cpu.module is None, reason="the C++ kernels were not built")
def test_compare_fused_and_eager():
    model = LlamaForCausalLM(PRESETS["tiny"], backend="cpu,eager")
    batch = torch.randint(PRESETS["tiny"].vocab_size, (2, 33))
    marker = torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = marker
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    found = compare(model, batch, rounds=2)
    assert 0 <= found.loss_difference < 1e-5
    assert 0 < found.gradient_difference < 1e-4  # not exactly equal, or the same kernels ran twice
    assert found.fused_speed > 0
    assert found.speedup == found.fused_speed / found.eager_speed
    assert 0 < found.fused_memory < found.eager_memory
    assert model.backend == "cpu,eager"
    assert model.model.norm.weight.grad is marker
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    table = found.table()
    assert f"{found.speedup:.2f} x" in table
    assert "kept for the backward pass" in table


def test_compare_shows_a_wrong_gradient(monkeypatch):
    """A planted bug: one op's gradient is off by 1%, in whatever the automatic choice takes here."""
    from pyllm import compare as module

    real = module.use_backend
    model = LlamaForCausalLM(PRESETS["tiny"])

    def spoiled(name):
        hook.remove() if name == "eager" else None
        return real("eager")

    hook = model.model.norm.weight.register_hook(lambda grad: grad * 1.01)
    monkeypatch.setattr(module, "use_backend", spoiled)
    found = compare(model, torch.randint(128, (2, 17)), rounds=1)
    assert found.gradient_difference == pytest.approx(0.01, rel=1e-2)
    assert found.loss_difference == 0.0
