"""LoRA learns small additions, leaves everything else alone, and speaks PEFT's format."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyllm import PRESETS, LlamaForCausalLM
from pyllm.lora import (
    TARGETS,
    LoRAConfig,
    LoRALinear,
    adapted,
    add_lora,
    load_adapter,
    merge_lora,
    merged_state_dict,
    save_adapter,
)

CONFIG = PRESETS["tiny"].replace(initializer_range=0.2)
X = torch.arange(24).view(2, 12) * 5 % 128


def make(backend="auto", **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG.replace(**changes), backend=backend)


def learned(model, config=None):
    """The model with additions as training might leave them."""
    config = add_lora(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapted(model):
            layer.lora_B.normal_(0, 0.1, generator=generator)
    return config


def test_starts_as_itself_and_is_merged_to_what_it_was():
    model = make().eval()
    plain = model(X).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, LoRAConfig(r=3))
    assert torch.equal(model(X).logits, plain)
    with torch.no_grad():
        for _, layer in adapted(model):
            layer.lora_B.normal_(0, 0.1)
    unmerged = model(X).logits
    assert (unmerged - plain).norm() > 0.05 * plain.norm()
    by_state = make().eval()
    by_state.load_state_dict(merged_state_dict(model))
    assert set(model.state_dict()) != set(before)  # the model itself is still an adapted one
    merge_lora(model)
    for merged in (model, by_state):
        assert set(merged.state_dict()) == set(before)
        assert (merged(X).logits - unmerged).norm() < 5e-6 * unmerged.norm()  # some eps of float32, summed differently
    assert all(p.requires_grad for p in model.parameters())
    assert not list(adapted(model))


def test_merging_is_exact():
    """Weights within an ulp of float64's, and in float64 nothing is left of the difference in logits."""
    model = make()
    config = learned(model, LoRAConfig(r=4, lora_alpha=7))
    state = merged_state_dict(model)
    for name, layer in adapted(model):
        exact = layer.base.weight.double() + config.scale * (layer.lora_B.double() @ layer.lora_A.double())
        assert (state[f"{name}.weight"] - exact).abs().max() <= 1e-6 * exact.abs().max()
    model = make("eager").double().eval()
    learned(model)
    unmerged = model(X).logits
    merge_lora(model)
    torch.testing.assert_close(model(X).logits, unmerged, rtol=1e-6, atol=1e-9)


def test_only_the_additions_are_learned():
    model = make().train()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, LoRAConfig(r=2, lora_dropout=0.1))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * CONFIG.num_hidden_layers
    assert model.num_parameters(only_trainable=True) == sum(
        2 * (layer.in_features + layer.out_features) for _, layer in adapted(model)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(X, labels=X, return_logits=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    for name, p in model.named_parameters():
        if ".lora_" in name:
            assert p.grad is not None
        else:
            assert torch.equal(p, base[name.replace(".base.", ".")]), name
            assert p.grad is None


def test_the_gradient_is_that_of_the_formula():
    model = make("eager").double().train()
    config = learned(model, LoRAConfig(r=2, lora_alpha=3))
    name, layer = next(adapted(model))
    model(X, labels=X).loss.backward()
    merged = make("eager").double().train()
    merged.load_state_dict(merged_state_dict(model))
    weight = merged.get_submodule(name).weight
    merged(X, labels=X).loss.backward()
    dW = weight.grad
    torch.testing.assert_close(layer.lora_A.grad, config.scale * layer.lora_B.detach().T @ dW)
    torch.testing.assert_close(layer.lora_B.grad, config.scale * dW @ layer.lora_A.detach().T)


def test_half_precision_base_learns_in_float32():
    model = make().to(torch.bfloat16)
    config = learned(model)
    name, layer = next(adapted(model))
    assert layer.lora_A.dtype == torch.float32
    out = layer(torch.randn(3, layer.in_features, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    model(X, labels=X, return_logits=False).loss.backward()
    assert layer.lora_B.grad.dtype == torch.float32
    exact = layer.base.weight.double() + config.scale * (layer.lora_B.double() @ layer.lora_A.double())
    assert torch.equal(merged_state_dict(model)[f"{name}.weight"], exact.bfloat16())  # rounded once


def test_compile():
    """One graph, the same loss and gradients, with the fused ops in it."""
    model = make(num_hidden_layers=1).train()
    learned(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(called):
        loss = called(X, labels=X, use_cache=False, return_logits=False).loss
        return loss.detach(), torch.autograd.grad(loss, parameters)

    loss, gradients = run(model)
    compiled_loss, compiled = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled_loss, loss)
    for one, other in zip(compiled, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing():
    model = make().train()
    learned(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(X, labels=X).loss
    gradients = torch.autograd.grad(loss, parameters)
    model.gradient_checkpointing_enable()
    again = torch.autograd.grad(model(X, labels=X).loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_adapters_are_saved_and_loaded(tmp_path):
    model = make().eval()
    config = learned(model, LoRAConfig(r=3, lora_alpha=5, target_modules=("q_proj", "down_proj"), use_rslora=True))
    save_adapter(model, config, tmp_path, base="some/model")
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in names
    assert len(names) == 2 * 2 * CONFIG.num_hidden_layers
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["base_model_name_or_path"] == "some/model"
    other = make().eval()
    assert load_adapter(other, tmp_path) == LoRAConfig(3, 5, 0.0, ("down_proj", "q_proj"), True)
    assert torch.equal(other(X).logits, model(X).logits)
    pattern = r".*\.(q_proj|down_proj)"  # PEFT takes a regular expression as well
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": pattern}))
    again = make().eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again(X).logits, model(X).logits)


def test_errors(tmp_path):
    model = make()
    for wrong, message in (
        ({"r": 0}, "rank must be at least 1, got 0"),
        ({"lora_alpha": 0}, "alpha must be positive"),
        ({"lora_dropout": 1.0}, "below 1, got 1.0"),
        ({"target_modules": ()}, "target_modules is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRAConfig(**wrong)
    with pytest.raises(ValueError, match=r"target 'c_attn' is no linear layer.*known: down_proj, gate_proj"):
        add_lora(model, LoRAConfig(target_modules=("q_proj", "c_attn")))
    with pytest.raises(ValueError, match="'lm_head' is not supported"):
        add_lora(model, LoRAConfig(target_modules=("lm_head",)))
    assert all(p.requires_grad for p in model.parameters())  # a refusal changes nothing
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(model)
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(model, LoRAConfig(), tmp_path)
    config = learned(model)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model)
    with pytest.raises(ValueError, match=r"lora_A is an adapter's: call pyllm\.lora\.merge_lora"):
        model.save_pretrained(tmp_path / "model")
    assert not isinstance(getattr(next(adapted(model))[1], "weight", None), torch.Tensor)
    save_adapter(model, config, tmp_path / "good")

    def broken(change, tensors=None):
        folder = tmp_path / "broken"
        folder.mkdir(exist_ok=True)
        settings = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        state = load_file(tmp_path / "good" / "adapter_model.safetensors")
        save_file({**state, **(tensors or {})}, folder / "adapter_model.safetensors")
        return folder

    fresh = make()
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for change, message in (
        (({"peft_type": "IA3"},), "peft_type must be LORA, got 'IA3'"),
        (({"use_dora": True},), "use_dora = True is not supported"),
        (({"modules_to_save": ["lm_head"]},), "modules_to_save = .* is not supported"),
        (({"rank_pattern": {"q": 3}},), "rank_pattern = .* is not supported"),
        (({"target_modules": ["q_proj"]},), "has no place in the model"),
        (({}, {first: torch.zeros(8, 3)}), r"q_proj\.lora_A.* has shape \(8, 3\), the model \(8, 64\)"),
        (({}, {"base_model.model.x": torch.zeros(1)}), "'x' has no place in the model"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter(fresh, broken(*change))
    assert not list(adapted(fresh))
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load_adapter(fresh, tmp_path / "none")
    file = tmp_path / "good" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or not safetensors"):
        load_adapter(fresh, tmp_path / "good")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's use of transformers
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_ours_and_we_read_peft(tmp_path, rslora):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    config = learned(model, LoRAConfig(r=4, lora_alpha=6, use_rslora=rslora))
    save_adapter(model, config, tmp_path / "ours")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(X).logits, model(X).logits, rtol=1e-4, atol=1e-5)

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = {"r": 5, "lora_alpha": 7, "use_rslora": rslora, "target_modules": list(TARGETS)}
    made = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    made.save_pretrained(tmp_path / "theirs")
    fresh = make().eval()
    load_adapter(fresh, tmp_path / "theirs")
    torch.testing.assert_close(fresh(X).logits, made(X).logits, rtol=1e-4, atol=1e-5)
    merge_lora(fresh)
    merged = made.merge_and_unload()
    torch.testing.assert_close(fresh.state_dict(), dict(merged.state_dict()), rtol=1e-6, atol=1e-7)


def test_scale():
    assert LoRAConfig(r=4, lora_alpha=6).scale == 1.5
    assert LoRAConfig(r=4, lora_alpha=6, use_rslora=True).scale == 3.0


def test_lora_linear_names_its_sizes():
    layer = LoRALinear(torch.nn.Linear(6, 4), LoRAConfig(r=2))
    assert (layer.in_features, layer.out_features) == (6, 4)
    assert torch.equal(layer.merged(), layer.base.weight)
