"""Bad input to the model is a ValueError that names the tensor, the rule and the value."""

from __future__ import annotations

import pytest
import torch

from pyllm import PRESETS, KVCache, LlamaForCausalLM

V, C = PRESETS["tiny"].vocab_size, PRESETS["tiny"].hidden_size
IDS = torch.arange(12).view(2, 6)


def filled(batch: int = 2, tokens: int = 4, **options) -> KVCache:
    cache = KVCache(tokens, **options)
    model()(IDS[:1, :tokens].expand(batch, -1), past_key_values=cache)
    return cache


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(PRESETS["tiny"]).eval()


def changed(**arguments):
    return lambda: {"input_ids": IDS, **arguments}


BAD = {
    "exactly one of input_ids and inputs_embeds must be given, got neither": changed(input_ids=None),
    "exactly one of input_ids and inputs_embeds must be given, got both": changed(inputs_embeds=torch.zeros(2, 6, C)),
    "input_ids must be int64 or int32, got torch.float32": changed(input_ids=IDS.float()),
    "input_ids must be a tensor, got <class 'list'>": changed(input_ids=[[1, 2]]),
    r"input_ids must have shape \(batch, length\), got \(12,\); unsqueeze": changed(input_ids=IDS.flatten()),
    rf"input_ids must be within \[0, vocab_size = {V}\), got {V}; do the tokenizer": changed(input_ids=IDS + V - 11),
    rf"input_ids must be within \[0, vocab_size = {V}\), got -1": changed(input_ids=IDS - 1),
    "inputs_embeds must be floating point, got torch.int64": changed(
        input_ids=None, inputs_embeds=torch.zeros(2, 6, C, dtype=torch.int64)
    ),
    rf"inputs_embeds must have shape \(batch, length, hidden_size = {C}\), got \(2, 6, 3\)": changed(
        input_ids=None, inputs_embeds=torch.zeros(2, 6, 3)
    ),
    r"attention_mask must have shape \(2, 6\), got \(2, 5\)": changed(attention_mask=torch.ones(2, 5)),
    r"attention_mask must be 2-D or 4-D, got shape \(2, 6, 6\)": changed(attention_mask=torch.ones(2, 6, 6)),
    r"a 4-D attention_mask must have shape \(2, 1, 6, 6\), got \(2, 1, 6, 5\)": changed(
        attention_mask=torch.ones(2, 1, 6, 5)
    ),
    r"a 4-D attention_mask must be bool .*, got torch.int64": changed(
        attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.int64)
    ),
    "position_ids must be int64 or int32, got torch.float32": changed(position_ids=torch.zeros(2, 6)),
    r"position_ids must have shape \(2, 6\) or \(6,\).* got \(2, 5\)": changed(position_ids=IDS[:, :5]),
    "position_ids must not be negative, got -1": changed(position_ids=IDS - 1),
    "past_key_values must be a pyllm.KVCache, got <class 'tuple'>": changed(past_key_values=()),
    r"attention_mask must have shape \(2, 10\) \(4 in the cache \+ 6 new\), got \(2, 6\)": lambda: {
        "input_ids": IDS,
        "past_key_values": filled(),
        "attention_mask": torch.ones(2, 6),
    },
    "past_key_values holds 3 rows, but the input has 2": lambda: {
        "input_ids": IDS,
        "past_key_values": filled(batch=3),
    },
    r"past_key_values has room for 4 tokens, but 4 seen \+ 6 new are 10": lambda: {
        "input_ids": IDS,
        "past_key_values": filled(growable=False),
    },
    "attention_mask differs from the one that past_key_values was filled with": lambda: {
        "input_ids": IDS,
        "past_key_values": filled(),
        "attention_mask": (torch.arange(10) > 1).long().expand(2, -1),
    },
    r"labels must have the input's shape \(2, 6\), got \(2, 5\); labels are shifted inside": changed(labels=IDS[:, 1:]),
    rf"labels must be within \[0, vocab_size = {V}\) or -100, got {V}": changed(labels=IDS + V - 11),
    rf"labels must be within \[0, vocab_size = {V}\) or -100, got -1": changed(labels=IDS - 1),
    "labels must be int64 or int32, got torch.float32": changed(labels=IDS.float()),
    "labels and shift_labels are two forms of the same": changed(labels=IDS, shift_labels=IDS),
    "return_logits=False needs labels": changed(return_logits=False),
    "logits_to_keep must not be negative, got -1": changed(logits_to_keep=-1),
    r"logits_to_keep must be an int or 1-D indices, got shape \(2, 6\)": changed(logits_to_keep=IDS),
    "cu_seqlens must rise from 0 to batch . length = 12": changed(cu_seqlens=torch.tensor([0, 5, 11])),
    "cu_seqlens must be 1-D": changed(cu_seqlens=torch.tensor([[0, 12]])),
    "cu_seqlens delimits packed documents; it does not go with attention_mask": changed(
        cu_seqlens=torch.tensor([0, 12]), attention_mask=torch.ones(2, 6)
    ),
    "use_cache=True is not supported with cu_seqlens": changed(cu_seqlens=torch.tensor([0, 12]), use_cache=True),
    "output_attentions=True is not supported": changed(output_attentions=True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    arguments = BAD[message]()
    with pytest.raises(ValueError, match=message):
        model()(**arguments)


def test_unknown_backend():
    with pytest.raises(ValueError, match="gpu"):
        LlamaForCausalLM(PRESETS["tiny"], backend="gpu")


def test_a_cache_filled_from_padding_takes_no_4d_mask():
    cache, m = KVCache(), model()
    m(IDS, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6]), past_key_values=cache)
    with pytest.raises(ValueError, match="a 4-D attention_mask does not go with a cache filled from a padded batch"):
        m(IDS[:, :1], attention_mask=torch.ones(2, 1, 1, 7, dtype=torch.bool), past_key_values=cache)


@pytest.mark.parametrize("return_logits", [True, False])
def test_a_batch_without_labels_has_loss_zero(return_logits):
    """transformers' loss is NaN here, and the step after it ruins the model."""
    m = model().train()
    with pytest.warns(UserWarning, match="every label is -100"):
        loss = m(IDS, labels=torch.full_like(IDS, -100), return_logits=return_logits).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in m.parameters())


def test_sizes_of_zero():
    m = model()
    assert m(IDS[:0]).logits.shape == (0, 6, V)
    assert m(IDS[:, :0]).logits.shape == (2, 0, V)


def test_a_row_of_nothing_but_padding_is_finite():
    m = model().train()
    mask = torch.tensor([[0] * 6, [0, 0, 1, 1, 1, 1]])
    out = m(IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100))
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in m.parameters())
