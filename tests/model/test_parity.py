"""pyllm's model is transformers' model: logits, losses and gradients on the same random weights."""

from __future__ import annotations

import pytest
import torch

import pyllm.model
from model.reference import GRADIENTS, LOGITS, compare, error, pair, prompts

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
}
MODELS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide-heads": {"head_dim": 32},
    "eps": {"rms_norm_eps": 1e-2},
    "padding-row": {"pad_token_id": 7},
    **{f"rope-{name}": {"rope_parameters": rope} for name, rope in ROPE.items()},
    "mistral": {"family": "mistral", "sliding_window": 6},
    "mistral-no-window": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2"},
    "qwen2-some-windows": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"family": "qwen3"},
    "qwen3-tied": {"family": "qwen3", "tie_word_embeddings": True},
}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(name, padding):
    compare(*pair(**MODELS[name]), *prompts(padding))


@pytest.mark.parametrize("name", ROPE)
def test_rope_beyond_the_trained_length(name):
    """80 tokens where max_position_embeddings is 64."""
    theirs, ours = pair(rope_parameters=ROPE[name])
    ids, _, _ = prompts(length=80)
    with torch.no_grad():
        assert error(ours(ids).logits, theirs(ids).logits) < LOGITS


@pytest.mark.parametrize("name", ["gqa", "tied", "biases", "mistral", "qwen2", "qwen3"])
def test_state_dict_is_theirs(name):
    theirs, ours = pair(**MODELS[name])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [t.shape for t in ours.state_dict().values()] == [t.shape for t in theirs.state_dict().values()]
    assert ours.num_parameters() == theirs.num_parameters() == ours.config.num_parameters()
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == ours.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        *((name, padding) for name in ("gqa", "mistral", "qwen3", "rope-dynamic") for padding in (None, "left")),
        *((name, "inside") for name in ("gqa", "qwen3")),  # not mistral: its window counts tokens, theirs columns
    ],
)
def test_cache_in_pieces_equals_transformers_in_one(name, padding):
    """A prompt of 8, then 5 tokens, then one by one, through the cache; lengths differ by row when padded."""
    theirs, ours = pair(**MODELS[name])
    ids, mask, _ = prompts("left" if padding == "left" else None)
    if padding == "inside":
        mask = torch.ones_like(ids)
        mask[1, 4:8], mask[2, 6:8] = 0, 0
    with torch.no_grad():
        whole = theirs(ids, attention_mask=mask).logits
        cache, logits = None, []
        for start, end in [(0, 8), (8, 13), (13, 14), (14, 15), (15, 16), (16, 17)]:
            part = None if mask is None else mask[:, :end]
            out = ours(ids[:, start:end], attention_mask=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    real = slice(None) if mask is None else mask.bool()
    assert error(torch.cat(logits, 1)[real], whole[real]) < LOGITS
    assert len(cache) == 17


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["gqa", "mistral"])
def test_gradients_through_a_cache(name, padding):
    """Cached tokens are constants; what is fed on top of them has the gradients that transformers gives it."""
    theirs, ours = pair(**MODELS[name])
    ids, mask, labels = prompts(padding)
    found = []
    for model in (theirs, ours):
        with torch.no_grad():
            cache = model(
                ids[:, :10], attention_mask=None if mask is None else mask[:, :10], use_cache=True
            ).past_key_values
        model.zero_grad()
        model(ids[:, 10:], attention_mask=mask, past_key_values=cache, labels=labels[:, 10:]).loss.backward()
        found.append(dict(model.named_parameters()))
    for name, parameter in found[0].items():
        assert error(found[1][name].grad.flatten(), parameter.grad.flatten()) < GRADIENTS, name


@pytest.mark.parametrize("form", ["bool", "float"])
def test_four_dimensional_mask(form):
    """Two documents in a row, told apart by the mask, positions restarting."""
    theirs, ours = pair()
    ids, _, _ = prompts()
    document = torch.arange(17) >= 9
    mask = (document[:, None] == document) & torch.ones(17, 17, dtype=torch.bool).tril()
    mask = mask.expand(3, 1, 17, 17)
    if form == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.cat((torch.arange(9), torch.arange(8))).expand(3, 17)
    a = theirs(ids, attention_mask=mask, position_ids=positions).logits
    b = ours(ids, attention_mask=mask, position_ids=positions).logits
    assert error(b, a) < LOGITS
    assert error(ours(ids).logits, a) > 1e-2


def test_packed_documents_equal_documents_alone():
    _, ours = pair()
    ids, _, _ = prompts()
    lengths = [7, 1, 20, 6]
    flat = ids.flatten()[: sum(lengths)]
    ends = torch.tensor([0, 7, 8, 28, 34])
    packed = ours(flat.view(2, 17), cu_seqlens=ends, labels=flat.view(2, 17))
    alone = [ours(d[None], labels=d[None] if len(d) > 1 else None) for d in flat.split(lengths)]
    expected = torch.cat([out.logits[0] for out in alone])
    assert error(packed.logits.flatten(0, 1), expected) < LOGITS
    counts = torch.tensor([n - 1 for n in lengths])
    total = sum(out.loss * count for out, count in zip(alone, counts, strict=True) if count)
    assert abs(packed.loss - total / counts.sum()) < LOGITS * packed.loss
    assert error(ours(flat[None]).logits[0], expected) > 1e-2


@pytest.mark.parametrize("name", ["gqa", "mistral", "qwen2-some-windows"])
def test_positions_that_restart_are_documents(name):
    """What transformers' collators pack so never leaks, cached or not; the loss is transformers'."""
    theirs, ours = pair(**MODELS[name])
    ids, _, labels = prompts()
    positions = torch.cat((torch.arange(9), torch.arange(8))).expand(3, 17)
    a = theirs(ids, position_ids=positions, labels=labels, use_cache=False)
    b = ours(ids, position_ids=positions, labels=labels)
    assert error(b.logits, a.logits) < LOGITS
    assert abs(b.loss - a.loss) <= LOGITS * a.loss
    assert b.past_key_values is None
    assert error(ours(ids, position_ids=positions[:1]).logits, a.logits) < LOGITS
    assert error(ours(ids, position_ids=positions[0]).logits, a.logits) < LOGITS
    with pytest.raises(ValueError, match="use_cache=True is not supported with cu_seqlens"):
        ours(ids, position_ids=positions, use_cache=True)


@pytest.mark.parametrize("kwargs", [{"num_items_in_batch": 29}, {"num_items_in_batch": torch.tensor(7)}, {}])
def test_ways_to_reduce_the_loss(kwargs):
    theirs, ours = pair()
    ids, _, labels = prompts()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    a = theirs(ids, labels=labels, **kwargs).loss
    for form in ({"labels": labels}, {"shift_labels": shifted}, {"labels": labels, "return_logits": False}):
        assert abs(ours(ids, **form, **kwargs).loss - a) <= LOGITS * a


def test_forward_options():
    theirs, ours = pair()
    ids, _, labels = prompts()
    a, b = theirs(ids, output_hidden_states=True), ours(ids, output_hidden_states=True)
    assert len(b.hidden_states) == len(a.hidden_states) == 3
    for ours_state, theirs_state in zip(b.hidden_states, a.hidden_states, strict=True):
        assert error(ours_state, theirs_state) < LOGITS
    for kept in (1, 5, torch.tensor([3, 0, 16])):
        assert error(ours(ids, logits_to_keep=kept).logits, theirs(ids, logits_to_keep=kept).logits) < LOGITS
        loss = ours(ids, labels=labels, logits_to_keep=kept).loss
        assert abs(loss - theirs(ids, labels=labels).loss) <= LOGITS * loss
    embedded = ours.get_input_embeddings()(ids)
    assert torch.equal(ours(inputs_embeds=embedded).logits, b.logits)
    positions = torch.arange(3, 20).expand(3, 17)
    assert error(ours(ids, position_ids=positions).logits, theirs(ids, position_ids=positions).logits) < LOGITS
    as_tuple = ours(ids, labels=labels, return_dict=False)
    named = ours(ids, labels=labels)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], named.loss)
    assert torch.equal(named["logits"], named[1])
    assert list(named) == list(theirs(ids, labels=labels)) == ["loss", "logits", "past_key_values"]
    assert torch.equal(named.to_tuple()[1], as_tuple[1])
    assert ours(ids, use_cache=False).past_key_values is None
    assert torch.equal(ours(ids, foo=1).logits, b.logits)  # unknown names are swallowed, as by transformers


def test_bfloat16_is_no_worse_than_transformers():
    exact, _ = pair()
    theirs, ours = pair(dtype=torch.bfloat16)
    exact = exact.double()
    exact.load_state_dict({k: v.double() for k, v in theirs.state_dict().items()})
    ids, _, labels = prompts()
    with torch.no_grad():
        truth = exact(ids, labels=labels)
        a, b = theirs(ids, labels=labels), ours(ids, labels=labels)
    difference_theirs = (a.logits.double() - truth.logits).norm() / truth.logits.norm()
    difference_ours = (b.logits.double() - truth.logits).norm() / truth.logits.norm()
    assert difference_ours <= difference_theirs
    assert ours.model.rotary_emb.inv_freq.dtype == torch.float32


BROKEN = {
    "rope pairs neighbours": ("apply_rope", lambda f: lambda *a, **k: f(*a, **{**k, "interleaved": True})),
    "rope turns backwards": ("apply_rope", lambda f: lambda q, k, c, s, **o: f(q, k, c, -s, **o)),
    "not causal": ("attention", lambda f: lambda *a, **k: f(*a, **{**k, "causal": False})),
    "scores scaled twice": ("attention", lambda f: lambda q, k, v, **o: f(q / q.shape[-1] ** 0.5, k, v, **o)),
    "heads share in turn": ("attention", lambda f: lambda q, k, v, **o: f(q, k.flip(2), v.flip(2), **o)),
    "gate and up swapped": ("swiglu", lambda f: lambda g, u, **o: f(u, g, **o)),
    "norm weights from 1": ("rms_norm", lambda f: lambda *a, **k: f(*a, **{**k, "offset": 1.0})),
    "norm before adding": ("add_rms_norm", lambda f: lambda x, r, *a, **k: (f(x, r * 0, *a, **k)[0], x + r)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_rejected(name, monkeypatch):
    """The comparison above is worth something: it rejects models with one thing wrong."""
    function, breaker = BROKEN[name]
    theirs, ours = pair()
    monkeypatch.setattr(pyllm.model, function, breaker(getattr(pyllm.model, function)))
    with pytest.raises(AssertionError):
        compare(theirs, ours, *prompts())


@pytest.mark.parametrize("change", [-1, 1])
def test_a_window_off_by_one_is_rejected(change, monkeypatch):
    theirs, ours = pair("mistral", sliding_window=6)
    for layer in ours.model.layers:
        layer.self_attn.window += change
    with pytest.raises(AssertionError):
        compare(theirs, ours, *prompts())
