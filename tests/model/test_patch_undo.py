"""Patching changes one object, can be undone without a trace, and says clearly what it can't do."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from typing import Any

import pytest
import torch

import pyllm
from model.patch_reference import ERROR, MODELS, VERSION, build, gradients, same_gradients, state, twins
from model.reference import config, error, prompts, randomise, transformers
from pyllm import hf_modules


@pytest.mark.parametrize("head", ["ForCausalLM", "Model", "ForSequenceClassification"])
@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_everything(name, head):
    model = build(**MODELS[name], head=head, **({"num_labels": 2} if "Seq" in head else {}))
    ids, _, _ = prompts()
    before, output = state(model), model(ids[:1])[0]
    for switches in ({}, {"attention": False}, {"rope": False, "backend": "eager"}):
        assert pyllm.patch(model, **switches) is model
        assert state(model) != before
        if not switches and head == "ForCausalLM":
            gradients(model, ids, labels=ids)
            model.generate(ids, max_new_tokens=2, pad_token_id=0)
            model.zero_grad()
        assert pyllm.unpatch(model) is model
        assert state(model) == before
        assert not [key for module in model.modules() for key in vars(module) if "pyllm" in key]
    assert torch.equal(model(ids[:1])[0], output)


def test_patched_undoes_after_an_error_too():
    model = build()
    before = state(model)
    with pyllm.patched(model, rms_norm=False) as inside:
        assert inside is model
        assert type(model.model.norm) is before_type(before, "model.norm")
        assert type(model.model.layers[0].mlp) is not before_type(before, "model.layers.0.mlp")
    assert state(model) == before
    with pytest.raises(ZeroDivisionError), pyllm.patched(model):
        raise ZeroDivisionError
    assert state(model) == before


def before_type(before: list[Any], name: str) -> type:
    return next(entry[1] for entry in before if entry[0] == name)


def test_nothing_else_changes():
    """Two models of one config: the other, the config and transformers' modules stay as they are."""
    shared = config("mistral", sliding_window=6)
    ours, other = (transformers.MistralForCausalLM(shared).eval() for _ in range(2))
    randomise(other)
    ids, mask, _ = prompts("left")
    before, contents, output = state(other), shared.to_dict(), other(ids, attention_mask=mask).logits
    modeling = sys.modules[type(other).__module__]
    functions = {name: value for name, value in vars(modeling).items() if callable(value)}
    forwards = {name: vars(cls).get("forward") for name, cls in functions.items() if isinstance(cls, type)}
    interface = dict(transformers.AttentionInterface())
    pyllm.patch(ours)
    assert ours.config is not shared
    assert ours.config._attn_implementation == "pyllm"
    assert state(other) == before
    assert shared.to_dict() == contents
    assert shared._attn_implementation == "sdpa"
    assert {name: value for name, value in vars(modeling).items() if callable(value)} == functions
    assert {n: vars(cls).get("forward") for n, cls in functions.items() if isinstance(cls, type)} == forwards
    assert {name: transformers.AttentionInterface()[name] for name in interface} == interface
    assert torch.equal(other(ids, attention_mask=mask).logits, output)
    pyllm.unpatch(ours)
    assert ours.config is shared


def test_changes_of_the_config_outlive_the_patch():
    model = pyllm.patch(build())
    model.resize_token_embeddings(140, mean_resizing=False)
    model.config.use_cache = False
    model.config.remark = [1]
    shown = model.config
    pyllm.unpatch(model)
    assert model.config is not shown
    assert (model.config.vocab_size, model.config.use_cache, model.config.remark) == (140, False, [1])
    assert model.config._attn_implementation == "sdpa"


def test_a_method_kept_from_the_patched_model_still_works():
    """accelerate keeps model.forward, bound, for as long as the model lives."""
    model = build()
    ids, _, _ = prompts()
    expected = model(ids, labels=ids)
    pyllm.patch(model)
    kept, norm = model.forward, model.model.norm.forward
    pyllm.unpatch(model)
    assert torch.equal(kept(ids, labels=ids).logits, expected.logits)
    assert norm(torch.ones(2, 64)).shape == (2, 64)


def test_copies_and_pickles():
    ids, _, _ = prompts()
    model = pyllm.patch(build(**MODELS["qwen3"]), backend="eager")
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    assert twin.config is not model.config
    assert all(module.config is twin.config for module in twin.modules() if hasattr(module, "config"))
    for other in (twin, pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, expected)
        pyllm.unpatch(other)
        assert type(other) is transformers.Qwen3ForCausalLM
        assert other.config._attn_implementation == "sdpa"
        assert error(other(ids).logits, expected) < ERROR
    assert torch.equal(model(ids).logits, expected)


def test_a_pickle_opens_where_nothing_was_patched_yet(monkeypatch):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    ids, _, _ = prompts()
    model = pyllm.patch(build(), backend="eager")
    pickled = pickle.dumps(model)
    monkeypatch.delitem(transformers.AttentionInterface._global_mapping, "pyllm")
    monkeypatch.delitem(type(MASKS)._global_mapping, "pyllm")
    hf_modules.patched_class.cache_clear()
    assert torch.equal(pickle.loads(pickled)(ids).logits, model(ids).logits)


def test_saves_the_same_files(tmp_path):
    theirs, ours = twins(**MODELS["mistral"])
    pyllm.patch(ours)
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert list(loaded.state_dict()) == list(theirs.state_dict()) == list(ours.state_dict())


def test_looks_like_the_class_it_was():
    theirs, ours = twins()
    pyllm.patch(ours)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, transformers.LlamaForCausalLM)
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    assert inspect.signature(type(ours).forward) == inspect.signature(type(theirs).forward)
    assert ours.can_generate()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert ours.loss_function is theirs.loss_function


def refused(model: Any, *words: str, **switches: Any) -> None:
    before = state(model)
    with pytest.raises(ValueError, match="patch") as refusal:
        pyllm.patch(model, **switches)
    assert not [word for word in words if word not in str(refusal.value)], refusal.value
    assert state(model) == before


def test_refuses_to_patch_twice():
    model = pyllm.patch(build())
    refused(model, "already", "unpatch")
    with pytest.raises(ValueError, match="already"):
        pyllm.patch(model.model)
    with pytest.raises(ValueError, match="part of a model"):
        pyllm.unpatch(model.model)
    pyllm.unpatch(model)
    pyllm.patch(model.model)
    refused(model, "already", "in model,")


def test_refuses_to_unpatch_what_is_not_patched():
    for model in (build(), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="not patched"):
            pyllm.unpatch(model)


def test_refuses_other_architectures():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    other = transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    )
    refused(other, "GemmaForCausalLM", "LlamaForCausalLM", "Qwen3Model", "MistralForSequenceClassification")
    for what in (torch.nn.Linear(2, 2), pyllm.LlamaForCausalLM(config()), "a path"):
        with pytest.raises(ValueError, match="known are LlamaModel, LlamaForCausalLM"):
            pyllm.patch(what)


@pytest.mark.skipif(VERSION < (5, 0), reason="pyllm.hf is for transformers 5")
def test_refuses_pyllm_hf():
    hf = pytest.importorskip("pyllm.hf", reason="pyllm.hf cannot be imported")
    refused(hf.LlamaForCausalLM(config()), "LlamaForCausalLM has the kernels already")


class OwnForward(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class NoForward(transformers.LlamaForCausalLM):
    pass


def test_forwards_of_other_people_are_not_lost():
    ids, _, _ = prompts()
    model = OwnForward(config()).eval()
    refused(model, "the model has a forward of its own", "linear_cross_entropy")
    expected = model(ids).logits
    with pyllm.patched(model, linear_cross_entropy=False):
        assert error(model(ids).logits, expected) < ERROR
    with pyllm.patched(NoForward(config())) as model:
        assert isinstance(model, NoForward)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp has a forward of its own.*swiglu"):
        pyllm.patch(model)
    pyllm.patch(model, swiglu=False)


def test_hooks_of_accelerate_stay_around_the_kernels():
    """They hide a module's forward behind their own; loading with device_map or in 4 bits sets them."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    theirs, ours = twins()
    ids, _, labels = prompts()
    for module in ours.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    before = {name: dict(vars(module)) for name, module in ours.named_modules()}
    expected, da = gradients(theirs, ids, labels=labels)
    pyllm.patch(ours.train())
    ours.model.norm.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    seen: list[torch.dtype] = []
    out, db = gradients(ours, ids, labels=labels)
    assert seen == [torch.float32]
    assert abs(out.loss - expected.loss) <= ERROR * expected.loss
    same_gradients(db, da)
    norm = ours.model.norm
    assert norm._old_forward.__func__ is type(norm).forward is not type(theirs.model.norm).forward
    pyllm.unpatch(ours.eval())
    for name, module in ours.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is before[name][key] for key in ("forward", "_old_forward", "_hf_hook"))
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_says_that_transformers_is_too_old(monkeypatch):
    model = build()
    monkeypatch.setattr("transformers.__version__", "4.52.4")
    with pytest.raises(ImportError, match=r"4\.53 or newer, this is 4\.52\.4"):
        pyllm.patch(model)


def test_refuses_what_it_cannot_mean():
    refused(build(hidden_act="gelu"), "gelu", "swiglu=False")
    ids, _, _ = prompts()
    theirs, ours = twins(hidden_act="gelu")
    assert error(pyllm.patch(ours, swiglu=False)(ids).logits, theirs(ids).logits) < ERROR
    with pytest.raises(ValueError, match="unknown backend 'tritn'"):
        pyllm.patch(build(), backend="tritn")
    with pytest.raises(pyllm.BackendError), pyllm.patched(build(), backend="cuda") as model:
        model(ids)
