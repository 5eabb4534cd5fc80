"""pyllm.hf: transformers' models with the kernels inside compute, load, train and generate what transformers' do."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from model.reference import LOGITS, compare, config, error, original, pair, prompts, randomise, transformers
from pyllm import LlamaForCausalLM, hf_attention, hf_modules

hf = pytest.importorskip("pyllm.hf", reason="pyllm.hf needs transformers 5")
hf.unregister()  # other tests take transformers' own models from the Auto classes
modules = pytest.importorskip("pyllm.hf.modules")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
WINDOWED: dict[str, Any] = {"family": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"family": "mistral", "sliding_window": 6},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": WINDOWED,
}


@pytest.fixture
def auto():
    """The Auto classes build ours."""
    hf.register()
    yield
    hf.unregister()


def ours_of(theirs: Any, attention: str = "pyllm") -> Any:
    """pyllm.hf's model with the weights of one of transformers."""
    cls = getattr(hf, type(theirs).__name__)
    ours = cls._from_config(copy.deepcopy(theirs.config), attn_implementation=attention, dtype=theirs.dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours


def both(name: str, attention: str = "pyllm") -> tuple[Any, Any]:
    theirs, _ = pair(**MODELS[name])
    return theirs, ours_of(theirs, attention)


# The same numbers


def grid(*quick: tuple[Any, ...], **axes: Any) -> Any:
    """Every combination; those that are not among the quick ones are slow."""
    names, values = zip(*axes.items(), strict=True)
    every = itertools.product(*values)
    rows = [
        pytest.param(*row, marks=() if row in quick else pytest.mark.slow, id="-".join(map(str, row))) for row in every
    ]
    return pytest.mark.parametrize(names, rows)


@grid(
    *itertools.product(MODELS, (None, "left", "right"), ("pyllm",)),
    ("mistral", "right", "sdpa"),
    ("qwen3", "left", "eager"),
    name=MODELS,
    padding=(None, "left", "right"),
    attention=("pyllm", "sdpa", "eager"),
)
def test_logits_losses_and_gradients(name, padding, attention):
    theirs, ours = both(name, attention)
    if attention == "eager":  # it differs from "sdpa" at padding, which reaches the loss
        theirs.set_attn_implementation("eager")
    compare(theirs, ours, *prompts(padding))


@grid(*zip(FAMILIES, (*HEADS, HEADS[0]), strict=True), family=FAMILIES, head=HEADS)
def test_other_heads(family, head, auto):
    name = type(config(family)).__name__.replace("Config", f"For{head}")
    settings = config(family, pad_token_id=0, num_labels=3)
    theirs = getattr(transformers, name)._from_config(copy.deepcopy(settings), dtype=torch.float32).eval()
    randomise(theirs)
    builder = getattr(transformers, f"AutoModelFor{head}")
    ours = builder.from_config(settings, attn_implementation="pyllm", dtype=torch.float32).eval()
    assert type(ours) is getattr(hf, name)
    assert any(type(m) is getattr(hf, name.replace(f"For{head}", "Model")) for m in ours.modules())
    ours.load_state_dict(theirs.state_dict())
    ids, mask, _ = prompts("right")
    real = mask.bool()
    ids = ids.masked_fill(~real, 0)
    a, b = theirs(ids, attention_mask=mask), ours(ids, attention_mask=mask)
    for x, y in zip(a.to_tuple(), b.to_tuple(), strict=True):
        if isinstance(x, torch.Tensor):
            x, y = (x[real], y[real]) if x.shape[:2] == mask.shape else (x, y)
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)


def test_the_loss_in_every_form():
    theirs, ours = both("llama")
    ids, _, labels = prompts()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for options in ({}, {"num_items_in_batch": 29}, {"num_items_in_batch": torch.tensor(7)}, {"shift_labels": shifted}):
        a = theirs(ids, labels=labels, **options).loss
        for return_logits in (True, False):
            out = ours(ids, labels=labels, return_logits=return_logits, **options)
            assert abs(out.loss - a) <= LOGITS * a
            assert (out.logits is None) == (not return_logits)
    ours.return_logits = False
    assert ours(ids, labels=labels).logits is None
    assert ours(ids).logits is not None
    assert error(ours(ids, logits_to_keep=2).logits, theirs(ids, logits_to_keep=2).logits) < LOGITS
    ours.lm_head.register_forward_hook(lambda module, args, out: out * 0)  # what a head does beyond a matrix is done
    assert abs(ours(ids, labels=labels).loss - torch.tensor(131.0).log()) < 1e-5


@pytest.mark.parametrize("return_logits", [True, False])
def test_a_batch_without_labels_has_loss_zero(return_logits):
    _, ours = both("llama")
    ids, _, labels = prompts()
    with pytest.warns(UserWarning, match="every label is -100"):
        loss = ours(ids, labels=torch.full_like(labels, -100), return_logits=return_logits).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


def test_another_activation_is_theirs():
    theirs = original(config(hidden_act="gelu"))
    randomise(theirs)
    ids, _, _ = prompts()
    assert error(ours_of(theirs)(ids).logits, theirs(ids).logits) < LOGITS


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_recomputation():
    theirs, ours = both("qwen3")
    ours.gradient_checkpointing_enable()
    compare(theirs, ours.train(), *prompts("left"))


@pytest.mark.slow
def test_compiles_as_one_graph():
    theirs = original(config(num_hidden_layers=1))
    randomise(theirs)
    ours = ours_of(theirs)
    ours.compile(fullgraph=True, backend="aot_eager")
    ids, _, labels = prompts()
    for model in (theirs, ours):
        model(ids, labels=labels, use_cache=False).loss.backward()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert error(b.grad.flatten(), a.grad.flatten()) < LOGITS


@pytest.mark.parametrize("name", MODELS)
def test_what_the_attention_computes(name):
    """Hidden states and attention weights, as transformers' eager attention gives them."""
    theirs, ours = both(name)
    theirs.set_attn_implementation("eager")
    ids, mask, _ = prompts("left")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    a, b = theirs(ids, attention_mask=mask, **wanted), ours(ids, attention_mask=mask, **wanted)
    real = mask.bool()
    assert len(a.attentions) == len(b.attentions) == 2
    for x, y in zip(a.attentions, b.attentions, strict=True):
        torch.testing.assert_close(y.transpose(1, 2)[real], x.transpose(1, 2)[real], rtol=1e-4, atol=1e-6)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert error(y[real], x[real]) < LOGITS


# The kernels

KERNELS = ("rms_norm", "add_rms_norm", "apply_rope", "swiglu", "attention", "attention_decode")
KERNELS += ("cross_entropy", "linear_cross_entropy")


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel runs, and torch's attention."""
    counts: dict[str, int] = {}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    for module in (hf_modules, modules, hf_attention):
        for name in KERNELS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    sdpa = "scaled_dot_product_attention"
    monkeypatch.setattr(torch.nn.functional, sdpa, counted("sdpa", getattr(torch.nn.functional, sdpa)))
    return counts


def test_the_kernels_do_the_work(calls):
    _, ours = both("llama")
    ids, _, labels = prompts()
    ours(ids, labels=labels)
    assert calls == {
        "rms_norm": 3,
        "add_rms_norm": 2,
        "apply_rope": 2,
        "swiglu": 2,
        "attention": 2,
        "cross_entropy": 1,
    }
    calls.clear()
    ours(ids, labels=labels, return_logits=False)
    assert calls["linear_cross_entropy"] == 1
    assert "cross_entropy" not in calls
    calls.clear()
    ours.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert calls["attention"] == 2
    assert calls["attention_decode"] == 6
    assert "sdpa" not in calls


HOLES = torch.ones(3, 17, dtype=torch.long)
HOLES[1, 4:8] = 0
DOCUMENTS = torch.cat((torch.arange(9), torch.arange(8))).expand(3, 17)
WHO = {
    "plain": ("mistral", {}, {"attention"}),
    "left": ("mistral", {"attention_mask": prompts("left")[1]}, {"attention"}),
    "right": ("mistral", {"attention_mask": prompts("right")[1]}, {"attention"}),
    "holes": ("llama", {"attention_mask": HOLES}, {"attention"}),
    "holes under a window": ("mistral", {"attention_mask": HOLES}, {"sdpa"}),
    "holes under some windows": ("qwen3", {"attention_mask": HOLES}, {"attention", "sdpa"}),
    "documents by positions": ("qwen3", {"position_ids": DOCUMENTS, "use_cache": False}, {"sdpa"}),
    "bool": ("llama", {"attention_mask": torch.ones(3, 1, 17, 17, dtype=torch.bool).tril()}, {"sdpa"}),
}


@pytest.mark.parametrize("case", WHO)
def test_masks_equal_theirs_and_who_computes_them(case, calls):
    name, inputs, expected = WHO[case]
    theirs, ours = both(name)
    ids, _, _ = prompts()
    a = theirs(ids, **inputs).logits
    calls.clear()
    b = ours(ids, **inputs).logits
    real = slice(None)
    if inputs.get("attention_mask") is not None and inputs["attention_mask"].dim() == 2:
        real = inputs["attention_mask"].bool()
    assert error(b[real], a[real]) < LOGITS
    assert {"attention", "attention_decode", "sdpa"} & set(calls) == expected


def test_packed_documents_equal_documents_alone(calls):
    _, ours = both("mistral")
    ids, _, _ = prompts()
    lengths = [7, 1, 20, 6]
    flat = ids.flatten()[: sum(lengths)]
    ends = torch.tensor([0, 7, 8, 28, 34], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    how = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 20, "max_length_k": 20}
    alone = torch.cat([ours(document[None]).logits[0] for document in flat.split(lengths)])
    calls.clear()
    packed = ours(flat[None], position_ids=positions, use_cache=False, **how).logits[0]
    assert "sdpa" not in calls
    assert error(packed, alone) < LOGITS


# Generation


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "assisted": {"prompt_lookup_num_tokens": 3, "batch": 1},
    "uncached": {"use_cache": False},
    "sampled": {"do_sample": True, "top_p": 0.9},
}


@grid(
    *(("mistral", "left", way) for way in WAYS),
    *(("qwen3", padding, way) for padding in (None, "left") for way in ("greedy", "static")),
    ("llama", None, "beams"),
    name=MODELS,
    padding=(None, "left"),
    way=WAYS,
)
def test_generate(name, padding, way):
    theirs, ours = both(name)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, **WAYS[way]}
    batch = options.pop("batch", 3)
    ids, mask, _ = prompts(padding)
    mask = torch.ones_like(ids) if mask is None else mask
    found = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        found.append(model.generate(ids[-batch:], attention_mask=mask[-batch:], **options))
    assert torch.equal(*found)


def test_a_pipeline():
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(131)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", padding_side="left")
    texts = []
    for model in both("llama"):
        run = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        out = run(["w3 w4 w5 w6", "w7"], max_new_tokens=5, do_sample=False, batch_size=2)
        texts.append([row[0]["generated_text"] for row in out])
    assert texts[0] == texts[1]
    assert all(len(text) > len("w3 w4 w5 w6") for text in texts[0]), texts


def test_trainer(tmp_path):
    """Gradient accumulation over unequal numbers of labels: the same losses, with and without logits in memory."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(24):
        ids = torch.randint(131, (12,), generator=generator)
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(12) < index % 7, -100, ids)})
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 5, "logging_steps": 1}
    options |= {"learning_rate": 1e-3, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    theirs, ours = both("mistral")
    losses = []
    for model, return_logits in ((theirs, True), (copy.deepcopy(ours), True), (ours, False)):
        model.return_logits = return_logits
        arguments = transformers.TrainingArguments(str(tmp_path), **options)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


# Files and classes


SHARDS = ("50GB", "60KB")


@grid(*zip(MODELS, SHARDS * 2, strict=True), name=MODELS, shard=SHARDS)
def test_files(name, shard, tmp_path, auto):
    """What one library saves, the three load, bit for bit."""
    theirs, _ = both(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="pyllm")
    assert type(ours) is getattr(hf, type(theirs).__name__)
    assert ours.config._attn_implementation == "pyllm"
    ours.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    back, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    for other in (ours, back, plain):
        state = other.state_dict()
        assert list(state) == list(theirs.state_dict())
        assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
    a, b = ((tmp_path / d / "config.json").read_text() for d in ("theirs", "ours"))
    assert a == b  # no trace: neither a class nor an attention that another machine would lack


def test_the_auto_classes(auto):
    for family in FAMILIES:
        settings = config(family)
        name = type(settings).__name__.replace("Config", "")
        model = transformers.AutoModelForCausalLM.from_config(settings)
        assert type(model) is getattr(hf, f"{name}ForCausalLM")
        assert type(model.model) is getattr(hf, f"{name}Model")
        assert model.config._attn_implementation == "sdpa"
        assert type(transformers.AutoModel.from_config(settings)) is getattr(hf, f"{name}Model")
        assert isinstance(model, getattr(transformers, f"{name}ForCausalLM"))
        assert type(getattr(transformers, f"{name}ForCausalLM")(settings).model.norm).__module__.startswith("transf")
    hf.unregister()
    assert type(transformers.AutoModelForCausalLM.from_config(config())) is transformers.LlamaForCausalLM


def test_copies_stay_what_they_are(tmp_path):
    _, ours = both("llama")
    ids, _, _ = prompts()
    torch.save(ours, tmp_path / "model.pt")
    for other in (copy.deepcopy(ours), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
        assert torch.equal(other(ids).logits, ours(ids).logits)


# "pyllm" as the attention of other models


OTHERS: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 20.0, "sliding_window": 5},
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16, "sliding_window": 4},
    "Olmo2": {},
    "Phi3": {"pad_token_id": 0, "sliding_window": 7},
    "Bert": {},
}


@grid(*zip(OTHERS, ("left", "right", None, "left", "right"), strict=True), name=OTHERS, padding=(None, "left", "right"))
def test_other_models(name, padding):
    sizes = {k: v for k, v in config().to_dict().items() if k in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    if name != "Bert":
        sizes["num_key_value_heads"] = 2
    settings = getattr(transformers, f"{name}Config")(**sizes, **OTHERS[name])
    models = []
    hf_attention.register()
    for attention in ("eager", "pyllm"):
        torch.manual_seed(0)
        cls = getattr(transformers, f"{name}Model")
        models.append(cls._from_config(copy.deepcopy(settings), attn_implementation=attention).eval())
        randomise(models[-1])
    ids, mask, _ = prompts(padding)
    real = slice(None) if mask is None else mask.bool()
    a, b = (model(ids, attention_mask=mask).last_hidden_state[real] for model in models)
    assert error(b, a) < LOGITS


def test_what_no_attention_has_is_refused():
    _, ours = both("llama")
    q = torch.randn(1, 4, 3, 16)
    layer = ours.model.layers[0].self_attn
    with pytest.raises(ValueError, match="softcap is not supported together with dropout"):
        hf_attention.attention_forward(layer, q, q, q, None, softcap=20.0, dropout=0.1)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"s_aux \(sinks\) is not supported together with this attention_mask"):
        hf_attention.attention_forward(layer, q, q, q, mask, s_aux=torch.zeros(4))


BROKEN = {
    "window off by one": (hf_attention, "attention", lambda f: lambda *a, **k: f(*a, **{**k, "window": 7})),
    "not causal": (hf_attention, "attention", lambda f: lambda *a, **k: f(*a, **{**k, "causal": False})),
    "scale forgotten": (hf_attention, "attention", lambda f: lambda *a, **k: f(*a, **{**k, "softmax_scale": 1.0})),
    "rope backwards": (hf_modules, "apply_rope", lambda f: lambda q, k, c, s, **o: f(q, k, c, -s, **o)),
    "residual lost": (modules, "add_rms_norm", lambda f: lambda x, r, *a, **k: (f(x, r, *a, **k)[0], x)),
    "gate and up": (hf_modules, "swiglu", lambda f: lambda g, u, **o: f(u, g, **o)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_rejected(name, monkeypatch):
    theirs, ours = both("mistral")
    where, function, breaker = BROKEN[name]
    monkeypatch.setattr(where, function, breaker(getattr(where, function)))
    with pytest.raises(AssertionError):
        compare(theirs, ours, *prompts())
