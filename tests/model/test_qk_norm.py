"""Qwen3's QK-norm: fused with the rotation where Triton runs, two ops of C++ where it doesn't, the same model."""

from __future__ import annotations

import pytest
import torch

import pyllm.model
from pyllm.kernels import triton_support, use_backend
from pyllm.rope import fuses_qk_norm

from .test_parity import compare, pair, prompts

needs_triton = pytest.mark.skipif(not triton_support.INSTALLED, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("padding", [None, "left"])
def test_fused_equals_transformers(padding, monkeypatch):
    calls = []
    fused = pyllm.model.qk_norm_rope
    monkeypatch.setattr(pyllm.model, "qk_norm_rope", lambda *a, **k: calls.append(1) or fused(*a, **k))
    theirs, ours = pair(family="qwen3")
    compare(theirs, ours, *prompts(padding))
    assert calls == [] or torch.cuda.is_available()
    ours.backend = "triton,cpu,eager"
    compare(theirs, ours, *prompts(padding))
    assert calls


@needs_triton
def test_who_fuses():
    x = torch.randn(2, 3, 4, 8)
    assert fuses_qk_norm(x, "triton")
    assert fuses_qk_norm(x, "triton,eager")
    assert not fuses_qk_norm(x, "cpu,triton")
    assert not fuses_qk_norm(x, "eager")
    assert not fuses_qk_norm(x, None)
    assert not fuses_qk_norm(x.double(), "triton,eager")  # Triton wouldn't take it
    with use_backend("triton"):
        assert fuses_qk_norm(x, None)
        assert fuses_qk_norm(x, "auto")
        assert not fuses_qk_norm(x, "cpu")
