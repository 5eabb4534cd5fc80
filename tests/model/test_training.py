"""What training adds: recomputation, mixed precision, compilation, initial weights, moving between devices."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils import _pytree

from pyllm import PRESETS, LlamaForCausalLM

CONFIG = PRESETS["tiny"].replace(initializer_range=0.1)
IDS = torch.randint(0, CONFIG.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def model(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG, **options)


def step(m, **kwargs):
    m.zero_grad()
    loss = m(IDS, labels=IDS, **kwargs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in m.parameters()]


@pytest.mark.parametrize("mask", [None, MASK], ids=["even", "padded"])
def test_recomputation_changes_no_bit(mask):
    m = model()
    loss, gradients = step(m, attention_mask=mask)
    calls = []
    m.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    m.gradient_checkpointing_enable()
    again, recomputed = step(m, attention_mask=mask)
    assert len(calls) == 2
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))
    with pytest.warns(UserWarning, match="no cache is kept"):
        assert m(IDS, use_cache=True).past_key_values is None
    m.gradient_checkpointing_disable()
    calls.clear()
    step(m)
    assert len(calls) == 1


def test_no_cache_in_training_unless_asked():
    m = model()
    assert m(IDS).past_key_values is None
    assert len(m(IDS, use_cache=True).past_key_values) == 12
    assert len(m.eval()(IDS).past_key_values) == 12


@pytest.mark.parametrize("return_logits", [True, False])
def test_autocast(return_logits):
    """bfloat16 multiplications, float32 weights, gradients and loss."""
    m = model()
    loss, gradients = step(m, return_logits=return_logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, approximate = step(m, return_logits=return_logits)
        assert m(IDS).logits.dtype == torch.bfloat16
    assert half.dtype == torch.float32
    assert not torch.equal(half, loss)
    assert abs(half - loss) < 2**-7 * loss
    for a, b in zip(gradients, approximate, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).norm() < 2**-4 * a.norm()


@pytest.mark.parametrize(("mask", "return_logits"), [(None, False), (MASK, True)], ids=["even", "padded"])
def test_compiles_as_one_graph(mask, return_logits):
    m = model()
    loss, gradients = step(m, attention_mask=mask, return_logits=return_logits)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    again, found = step(compiled, attention_mask=mask, return_logits=return_logits)
    torch.testing.assert_close(again, loss)
    for a, b in zip(found, gradients, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_initial_weights():
    m = LlamaForCausalLM(PRESETS["small"].replace(pad_token_id=3, tie_word_embeddings=False))
    for name, parameter in m.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        else:
            n = parameter.numel()
            assert abs(parameter.mean()) < 5 * 0.02 / math.sqrt(n), name
            assert abs(parameter.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * n), name
    assert (m.model.embed_tokens.weight[3] == 0).all()
    m(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert (m.model.embed_tokens.weight.grad[3] == 0).all()
    assert (m.model.embed_tokens.weight.grad[4] != 0).any()


@pytest.mark.parametrize("tied", [True, False])
def test_from_the_meta_device(tied):
    """What FSDP does: built without memory, given it later."""
    config = CONFIG.replace(tie_word_embeddings=tied)
    with torch.device("meta"):
        m = LlamaForCausalLM(config)
    assert m.device.type == "meta"
    m.to_empty(device="cpu")
    torch.manual_seed(0)
    m.init_weights()
    expected = LlamaForCausalLM(config)
    expected.load_state_dict(m.state_dict())
    assert torch.equal(m(IDS).logits, expected(IDS).logits)
    assert (m.lm_head.weight is m.model.embed_tokens.weight) == tied
    assert m.num_parameters() == config.num_parameters()


def test_precision_of_rope_survives_a_cast():
    m = model().to(torch.bfloat16)
    assert torch.equal(m.model.rotary_emb.inv_freq, model().model.rotary_emb.inv_freq)
    assert m.dtype == torch.bfloat16


def test_outputs_are_transparent_to_pytree():
    out = model()(IDS, labels=IDS)
    leaves, spec = _pytree.tree_flatten(out)
    assert any(leaf is out.loss for leaf in leaves)
    assert _pytree.tree_unflatten(leaves, spec).logits is out.logits


def test_the_backend_is_the_models_choice(monkeypatch):
    import pyllm.model

    seen = []
    original = pyllm.model.swiglu
    monkeypatch.setattr(
        pyllm.model, "swiglu", lambda *a, backend: (seen.append(backend), original(*a, backend=backend))[1]
    )
    m = model(backend="eager")
    m(IDS)
    m.backend = "auto"
    m(IDS)
    assert seen == ["eager", "eager", "auto", "auto"]
    with pytest.raises(ValueError, match="nonsense"):
        m.backend = "nonsense"


def test_sizes_and_accessors():
    m = LlamaForCausalLM(CONFIG.replace(tie_word_embeddings=False))
    assert m.get_memory_footprint() == 4 * m.num_parameters() + m.model.rotary_emb.inv_freq.nbytes
    embeddings = m.num_parameters() - m.num_parameters(exclude_embeddings=True)
    assert embeddings == CONFIG.vocab_size * CONFIG.hidden_size
    m.lm_head.weight.requires_grad_(False)
    assert m.num_parameters() - m.num_parameters(only_trainable=True) == embeddings
    assert m.flops_per_token(64) == CONFIG.flops_per_token(64)
    assert m.get_output_embeddings() is m.lm_head
    tied = LlamaForCausalLM(CONFIG)
    other = torch.nn.Embedding(CONFIG.vocab_size, CONFIG.hidden_size)
    tied.set_input_embeddings(other)
    assert tied.get_input_embeddings() is other
    assert tied.lm_head.weight is other.weight


@pytest.mark.parametrize("tied", [True, False])
def test_another_vocabulary(tied, tmp_path):
    m = LlamaForCausalLM(CONFIG.replace(tie_word_embeddings=tied)).eval()
    V = CONFIG.vocab_size
    before, old = m(IDS).logits, m.model.embed_tokens.weight.clone()
    assert m.resize_token_embeddings() is m.get_input_embeddings()
    grown = m.resize_token_embeddings(V + 3, pad_to_multiple_of=8)
    assert m.config.vocab_size == m.model.config.vocab_size == grown.num_embeddings == V + 8
    assert torch.equal(grown.weight[:V], old)
    torch.testing.assert_close(grown.weight[V:], old.mean(0).expand(8, -1))
    assert (m.lm_head.weight is grown.weight) == tied
    after = m(IDS + 5, labels=IDS + 8).logits
    assert after.shape[-1] == V + 8
    torch.testing.assert_close(m(IDS).logits[..., :V], before)
    torch.testing.assert_close(after[..., V], after[..., :V].mean(-1))
    m.save_pretrained(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.vocab_size == V + 8
    m.resize_token_embeddings(V)
    assert torch.equal(m(IDS).logits, before)
    with pytest.raises(ValueError, match="new_num_tokens = 0"):
        m.resize_token_embeddings(0)
    padded = LlamaForCausalLM(CONFIG.replace(pad_token_id=V - 1))
    with pytest.raises(ValueError, match="pad_token_id"):
        padded.resize_token_embeddings(V - 1)
    assert padded.get_input_embeddings().num_embeddings == padded.config.vocab_size == V
