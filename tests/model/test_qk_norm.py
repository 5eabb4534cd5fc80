"""Qwen3's QK-norm: fused with the rotation where Triton or C++ runs, two ops where they don't, the same model."""

from __future__ import annotations

import pytest
import torch

import pyllm.model
from pyllm.kernels import extension, triton_support, use_backend
from pyllm.rope import fuses_qk_norm

from .test_parity import compare, pair, prompts

needs_triton = pytest.mark.skipif(not triton_support.INSTALLED, reason="Triton is not installed")


@pytest.mark.parametrize("backend", ["triton,cpu,eager", "cpu,eager", "auto", "eager"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_fused_equals_transformers(padding, backend, monkeypatch):
    if backend.startswith("triton") and not triton_support.INSTALLED:
        pytest.skip("Triton is not installed")
    calls = []
    fused = pyllm.model.qk_norm_rope
    monkeypatch.setattr(pyllm.model, "qk_norm_rope", lambda *a, **k: calls.append(1) or fused(*a, **k))
    theirs, ours = pair(family="qwen3")
    ours.backend = backend
    compare(theirs, ours, *prompts(padding))
    assert bool(calls) == (backend != "eager")


@needs_triton
def test_who_fuses():
    x = torch.randn(2, 3, 4, 8)
    on_cpu = not extension.cpu.why_not(x)
    assert fuses_qk_norm(x, "triton")
    assert fuses_qk_norm(x, "triton,eager")
    assert fuses_qk_norm(x, "cpu") == on_cpu
    assert fuses_qk_norm(x, None) == on_cpu
    assert fuses_qk_norm(x, "cuda,cpu") == on_cpu  # no CUDA tensor: C++ runs
    assert not fuses_qk_norm(x, "eager")
    assert not fuses_qk_norm(x, "eager,triton")
    assert not fuses_qk_norm(x.double(), "triton,eager")  # Triton wouldn't take it
    with use_backend("eager"):
        assert not fuses_qk_norm(x, None)
        assert not fuses_qk_norm(x, "auto")
        assert fuses_qk_norm(x, "triton")
