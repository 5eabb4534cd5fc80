"""The whole model through torch.compile's default compiler, in one graph, forward and backward."""

from __future__ import annotations

import shutil

import pytest
import torch

from pyllm import PRESETS, LlamaForCausalLM


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on CPU")
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_compiled_model_equals_itself(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = LlamaForCausalLM(PRESETS["tiny"], backend=backend)
    ids = torch.randint(PRESETS["tiny"].vocab_size, (2, 32))

    def gradients(run):
        model.zero_grad()
        loss = run(ids, labels=ids, use_cache=False, return_logits=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    expected, wanted = gradients(model)
    loss, got = gradients(torch.compile(model, fullgraph=True))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
