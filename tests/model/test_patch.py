"""A patched model of transformers computes what it computed before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyllm
from model.patch_reference import ERROR, MODELS, VERSION, build, compare, gradients, rope, same_gradients, twins
from model.reference import error, prompts, transformers
from pyllm import hf_attention, hf_modules

SWITCHES = ("rms_norm", "rope", "swiglu", "attention", "linear_cross_entropy")


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize("name", MODELS)
def test_equals_unpatched(name, backend, padding):
    theirs, ours = twins(**MODELS[name])
    compare(theirs, pyllm.patch(ours, backend=backend), *prompts(padding))


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_equals_unpatched_on_triton(name):
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 40, "head_dim": 16}
    theirs, ours = twins(**{**MODELS[name], **small, "num_attention_heads": 2, "num_key_value_heads": 1})
    ids, mask, labels = (x[1:, :9] for x in prompts("left"))
    compare(theirs, pyllm.patch(ours, backend="triton"), ids % 40, mask, labels.where(labels < 0, labels % 40))


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("on", [True, False])
def test_each_switch(switch, on, monkeypatch):
    """One alone or all but one: the right kernels run, on the right backend, and the results are the same."""
    called: set[tuple[str, str | None]] = set()
    spied = [(hf_modules, "rms_norm"), (hf_modules, "apply_rope"), (hf_modules, "swiglu"), (hf_attention, "attention")]
    more = ("linear_cross_entropy", "cross_entropy", "qk_norm_rope")
    for module, name in [*spied, *((hf_modules, name) for name in more)]:
        spy(monkeypatch, module, name, called)
    theirs, ours = twins(**MODELS["qwen3"])
    pyllm.patch(ours, **{name: on == (name == switch) for name in SWITCHES}, backend="cpu,eager")
    ids, mask, labels = prompts("left")
    ours.train()
    a, da = gradients(theirs, ids, attention_mask=mask, labels=labels)
    b, db = gradients(ours, ids, attention_mask=mask, labels=labels)
    assert abs(b.loss - a.loss) <= ERROR * a.loss
    same_gradients(db, da)
    kernels = dict(
        zip(SWITCHES, ("rms_norm", "apply_rope", "swiglu", "attention", "linear_cross_entropy"), strict=True)
    )
    wanted = {kernel for name, kernel in kernels.items() if on == (name == switch)}
    if {"rms_norm", "apply_rope"} <= wanted:  # Qwen3's two in one
        wanted = wanted - {"apply_rope"} | {"qk_norm_rope"}
    assert called == {(kernel, "cpu,eager") for kernel in wanted}
    assert (b.logits is None) == (on == (switch == "linear_cross_entropy"))


def spy(monkeypatch, module, name, called):
    kernel = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        called.add((name, kwargs["backend"]))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


ROPES = [
    {},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]


@st.composite
def models(draw: Any) -> dict[str, Any]:
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    kv_heads, head_dim = draw(st.integers(1, 3)), 2 * draw(st.integers(4, 20))
    heads, layers = kv_heads * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    hidden = heads * (head_dim if family == "qwen2" else draw(st.integers(16 // heads + 1, 40)))
    model = {
        "family": family,
        "vocab_size": draw(st.integers(131, 200)),
        "hidden_size": hidden,
        "intermediate_size": draw(st.integers(8, 90)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        **rope(draw(st.sampled_from([1e3, 1e4, 5e5])), **draw(st.sampled_from(ROPES))),
    }
    if family != "qwen2":
        model["head_dim"] = head_dim
    if family in ("llama", "qwen3"):
        model["attention_bias"] = draw(st.booleans())
    if family == "llama":
        model["mlp_bias"] = draw(st.booleans())
    if family == "mistral":
        model["sliding_window"] = draw(st.sampled_from([None, 2, 5, 40]))
    elif family != "llama":
        model["use_sliding_window"] = draw(st.booleans())
        model["sliding_window"] = draw(st.integers(2, 20))
        model["max_window_layers"] = draw(st.integers(0, layers))
    return model


def check_random(model: dict[str, Any], padding: str | None, length: int, backend: str | None) -> None:
    theirs, ours = twins(**model)
    compare(theirs, pyllm.patch(ours, backend=backend), *prompts(padding, length=length))


RANDOM = {
    "model": models(),
    "padding": st.sampled_from([None, "left", "right"]),
    "length": st.integers(11, 40),
    "backend": st.sampled_from(["eager", None]),
}
QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=10, derandomize=True, **QUIET)
@given(**RANDOM)
def test_random_models(**drawn):
    check_random(**drawn)


@pytest.mark.slow
@settings(max_examples=300, **QUIET)
@given(**RANDOM)
def test_many_random_models(**drawn):
    check_random(**drawn)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["eager", None])
def test_bfloat16_is_no_worse_than_unpatched(name, backend):
    """Squared relative errors against float64 of logits and of gradients, over six batches."""
    theirs, ours = (model.bfloat16() for model in twins(**MODELS[name]))
    exact = copy.deepcopy(theirs).double()
    pyllm.patch(ours, backend=backend)
    _, mask, _ = prompts("left")
    generator = torch.Generator().manual_seed(3)
    errors = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(6):
        ids = torch.randint(3, 131, mask.shape, generator=generator)
        labels = ids.masked_fill(mask == 0, -100)
        truth, slopes = gradients(exact, ids, attention_mask=mask, labels=labels)
        for i, model in enumerate((theirs, ours)):
            out, grads = gradients(model, ids, attention_mask=mask, labels=labels)
            real = mask.bool()
            errors[i, 0] += error(out.logits[real].flatten(), truth.logits[real].flatten()) ** 2
            errors[i, 1] += sum(error(grads[name].flatten(), slopes[name].flatten()) ** 2 for name in slopes)
    assert (errors[1] <= errors[0]).all(), errors


GENERATE = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
    "chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_generates_the_same_tokens(name, how, padding):
    theirs, ours = twins(**MODELS[name])
    pyllm.patch(ours)
    ids, mask, _ = prompts(padding)
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **GENERATE[how]}
    found = [model.generate(ids, attention_mask=mask, **options) for model in (theirs, ours)]
    assert torch.equal(*found)
    assert found[0].shape[1] > 17


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_filled_in_pieces(name, kind, padding):
    """8 tokens, then 5, one, and 3 more, into caches of the user's."""
    theirs, ours = twins(**MODELS[name])
    pyllm.patch(ours)
    ids, mask, _ = prompts(padding)
    real = slice(None) if mask is None else mask.bool()
    size = {"max_cache_len": 40} if kind == "StaticCache" else {}
    logits = []
    with torch.no_grad():
        for model in (theirs, ours):
            cache, parts = getattr(transformers, kind)(config=model.config, **size), []
            for start, end in [(0, 8), (8, 13), (13, 14), (14, 17)]:
                how: dict[str, Any] = {"attention_mask": None if mask is None else mask[:, :end]}
                if VERSION < (5, 0):
                    how["cache_position"] = torch.arange(start, end)
                parts.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **how).logits)
            logits.append(torch.cat(parts, 1)[real])
    assert error(logits[1], logits[0]) < ERROR


@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4 has no is_causal")
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_both_ways(name, padding):
    theirs, ours = twins(**MODELS[name])
    pyllm.patch(ours)
    ids, mask, _ = prompts(padding)
    real = slice(None) if mask is None else mask.bool()
    a, b = (model(ids, attention_mask=mask, is_causal=False).logits[real] for model in (theirs, ours))
    assert error(b, a) < ERROR
    assert error(ours(ids, attention_mask=mask).logits[real], a) > 1e-2


@pytest.mark.parametrize("form", ["bool", "float"])
def test_four_dimensional_mask(form):
    theirs, ours = twins()
    pyllm.patch(ours)
    ids, _, labels = prompts()
    mask = (torch.rand(3, 1, 17, 17) < 0.6).tril() | torch.eye(17, dtype=torch.bool)
    if form == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    a, da = gradients(theirs, ids, attention_mask=mask, labels=labels)
    b, db = gradients(ours, ids, attention_mask=mask, labels=labels)
    assert error(b.logits, a.logits) < ERROR
    same_gradients(db, da)
    assert error(ours(ids).logits, a.logits) > 1e-2


def documents() -> tuple[torch.Tensor, list[int], torch.Tensor, torch.Tensor]:
    """Two rows of 17 tokens with documents of 7 and 10, 1 and 16; their positions, ends and lengths."""
    ids, _, _ = prompts()
    lengths = [7, 10, 1, 16]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 17)
    return ids[:2], lengths, positions, torch.tensor([0, 7, 17, 18, 34], dtype=torch.int32)


@pytest.mark.parametrize("said", ["position_ids", "position_ids, no cache", "cu_seq_lens"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_packed_documents_equal_documents_alone(name, said, monkeypatch):
    """And no mask of all pairs of tokens is made for it."""
    kernels: set[Any] = set()
    masks: list[Any] = []
    make_mask = hf_attention.attention_mask
    spy(monkeypatch, hf_attention, "attention", kernels)
    monkeypatch.setattr(hf_attention, "attention_mask", lambda **call: masks.append(make_mask(**call)) or masks[-1])
    theirs, ours = twins(**MODELS[name])
    pyllm.patch(ours)  # which registers the function above
    ids, lengths, positions, ends = documents()
    how: dict[str, Any] = {"position_ids": positions}
    if said == "cu_seq_lens":
        how |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 16, "max_length_k": 16}
    if said == "position_ids, no cache":
        how["use_cache"] = False
    alone = torch.cat([theirs(d[None]).logits[0] for d in ids.flatten().split(lengths)])
    assert error(ours(ids, **how).logits.flatten(0, 1), alone) < ERROR
    assert kernels == {("attention", None)}
    assert masks and not [mask for mask in masks if mask is not None]
    assert error(ours(ids).logits.flatten(0, 1), alone) > 1e-2


def test_packed_documents_under_dropout(monkeypatch):
    """Where dropout takes attention to torch's own, documents still don't see each other."""
    ours = pyllm.patch(build(attention_dropout=0.5)).train()
    ids, _, positions, ends = documents()
    other = ids.clone()
    other[:, 0] += 1  # of the first document of each row
    logits = []
    for said in ({}, {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}):
        for tokens in (ids, other):
            torch.manual_seed(0)
            logits.append(ours(tokens, position_ids=positions, **said).logits.detach())
        assert torch.equal(logits[-1][0, 7:], logits[-2][0, 7:])
        assert not torch.equal(logits[-1][0, :7], logits[-2][0, :7])
    assert not torch.equal(ours(ids, position_ids=positions).logits, logits[0])  # another seed, other tokens dropped
    ours.eval()
    assert torch.equal(ours(ids, position_ids=positions).logits, ours(ids, position_ids=positions).logits)


def test_gaps_in_positions_are_not_documents():
    theirs, ours = twins()
    pyllm.patch(ours)
    ids, _, _ = prompts()
    for positions in (torch.arange(0, 34, 2), torch.cat((torch.arange(5), torch.arange(8), torch.arange(20, 24)))):
        for use_cache in (False, True):
            how = {"position_ids": positions.expand(3, 17), "use_cache": use_cache}
            assert error(ours(ids, **how).logits, theirs(ids, **how).logits) < ERROR


def test_what_comes_out_besides():
    theirs, ours = twins(**MODELS["qwen3"])
    ids, mask, _ = prompts("left")
    pyllm.patch(ours)
    states = [model(ids, attention_mask=mask, output_hidden_states=True).hidden_states for model in (theirs, ours)]
    assert len(states[0]) == len(states[1]) == 3
    for a, b in zip(*states, strict=True):
        assert error(b[mask.bool()], a[mask.bool()]) < ERROR
    embedded = ours.get_input_embeddings()(ids)
    a = ours(inputs_embeds=embedded, attention_mask=mask).logits
    assert torch.equal(a, ours(ids, attention_mask=mask).logits)
    for kept in (1, torch.tensor([3, 16])):
        a, b = (model(ids, attention_mask=mask, logits_to_keep=kept).logits[0] for model in (theirs, ours))
        assert error(b, a) < ERROR


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForTokenClassification"])
def test_other_heads(name, head):
    labels = {} if head == "Model" else {"num_labels": 3, "pad_token_id": 0}
    theirs, ours = twins(**MODELS[name], head=head, **labels)
    pyllm.patch(ours)
    ids, mask, _ = prompts("right")
    ids = ids * mask  # the last token that isn't pad_token_id's is classified
    a, b = (model(ids, attention_mask=mask) for model in (theirs, ours))
    if head == "ForSequenceClassification":
        assert error(b.logits, a.logits) < ERROR
    elif head == "ForTokenClassification":
        assert error(b.logits[mask.bool()], a.logits[mask.bool()]) < ERROR
    else:
        assert error(b.last_hidden_state[mask.bool()], a.last_hidden_state[mask.bool()]) < ERROR


BROKEN = {
    "rope pairs neighbours": ("apply_rope", lambda f: lambda *a, **k: f(*a, **{**k, "interleaved": True})),
    "rope turns backwards": ("apply_rope", lambda f: lambda q, k, c, s, **o: f(q, k, c, -s, **o)),
    "gate and up swapped": ("swiglu", lambda f: lambda g, u, **o: f(u, g, **o)),
    "norm weights from 1": ("rms_norm", lambda f: lambda *a, **k: f(*a, **{**k, "offset": 1.0})),
    "eps forgotten": ("rms_norm", lambda f: lambda x, w, eps, **k: f(x, w, 0.0, **k)),
    "bias forgotten": ("linear_cross_entropy", lambda f: lambda x, w, t, **k: f(x, 1.001 * w, t, **k)),
    "sum for mean": ("linear_cross_entropy", lambda f: lambda *a, **k: f(*a, **{**k, "reduction": "sum"})),
    "labels not ignored": ("cross_entropy", lambda f: lambda x, t, **k: f(x, t.clamp(min=0), **k)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_patch_is_rejected(name, monkeypatch):
    """The comparison is worth something: it rejects patches with one thing wrong."""
    function, breaker = BROKEN[name]
    theirs, ours = twins(rms_norm_eps=1e-2)
    monkeypatch.setattr(hf_modules, function, breaker(getattr(hf_modules, function)))
    with pytest.raises(AssertionError):
        compare(theirs, pyllm.patch(ours), *prompts())


@pytest.mark.parametrize("change", [-1, 1])
def test_a_window_off_by_one_is_rejected(change, monkeypatch):
    theirs, ours = twins(**MODELS["mistral"])
    attention = hf_attention.attention
    monkeypatch.setattr(hf_attention, "attention", lambda *a, **k: attention(*a, **{**k, "window": 6 + change}))
    with pytest.raises(AssertionError):
        compare(theirs, pyllm.patch(ours), *prompts())


def test_a_window_of_one_token():
    """Its queries have no gradient but for rounding, so that only logits are compared."""
    theirs, ours = twins(family="mistral", sliding_window=1)
    ids, mask, _ = prompts("left")
    a, b = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (theirs, pyllm.patch(ours)))
    assert error(b, a) < ERROR


def test_angles_are_not_rounded():
    """In bfloat16 a cosine near 1 has a step of half a degree or more."""
    theirs, ours = (model.bfloat16() for model in twins())
    positions = torch.arange(1000)[None]
    wide = [theirs.model.rotary_emb(torch.ones(1), positions)]
    rounded = [theirs.model.rotary_emb(torch.ones(1, dtype=torch.bfloat16), positions)]
    pyllm.patch(ours)
    found = ours.model.rotary_emb(torch.ones(1, dtype=torch.bfloat16), positions)
    for a, b, c in zip(found, *wide, *rounded, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c.float())


def test_norm_weights_in_float32_widen_as_before():
    theirs, ours = (model.bfloat16() for model in twins())
    for model in (theirs, ours):
        model.model.norm.float()
        model.lm_head.float()
    pyllm.patch(ours)
    ids, _, _ = prompts()
    a, b = theirs(ids).logits, ours(ids).logits
    assert a.dtype == b.dtype == torch.float32
    assert error(b, a) < 0.05
