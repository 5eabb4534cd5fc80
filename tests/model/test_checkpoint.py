"""Folders of weights go to transformers and back, bit for bit; damaged ones are refused by tensor and file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.reference import pair, prompts, transformers
from pyllm import LlamaForCausalLM

MODELS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "tie_word_embeddings": True},
}


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("shard", ["50GB", "60KB"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, shard, tmp_path):
    theirs, ours = pair(**MODELS[name])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "theirs")
    assert same(loaded, theirs)
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == loaded.config.tie_word_embeddings
    loaded.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    files = sorted(f.name for f in (tmp_path / "ours").iterdir())
    assert ("model.safetensors.index.json" in files) == (shard == "60KB")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same(back, theirs)
    ids, _, _ = prompts()
    assert torch.equal(loaded(ids).logits, ours(ids).logits)
    assert torch.equal(back(ids).logits, theirs(ids).logits)


def test_index_matches_theirs(tmp_path):
    theirs, ours = pair()
    theirs.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    ours.save_pretrained(tmp_path / "b", max_shard_size="60KB")
    a, b = (json.loads((tmp_path / d / "model.safetensors.index.json").read_text()) for d in "ab")
    assert a["metadata"] == b["metadata"]
    assert set(a["weight_map"]) == set(b["weight_map"])
    for name in set(b["weight_map"].values()):
        assert (tmp_path / "b" / name).stat().st_size < 60_000 or len(load_file(tmp_path / "b" / name)) == 1


def test_dtypes(tmp_path):
    _, ours = pair(dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert same(loaded, ours)
    assert loaded.config.dtype == "bfloat16"
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    wide = LlamaForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert same(wide, ours.float())
    with pytest.raises(ValueError, match="dtype must be a floating-point"):
        LlamaForCausalLM.from_pretrained(tmp_path, dtype="int8")


def test_generation_config_travels(tmp_path):
    theirs, _ = pair()
    theirs.generation_config = transformers.GenerationConfig(
        max_new_tokens=7, eos_token_id=[3, 4], do_sample=True, top_p=0.8, forced_bos_token_id=None
    )
    theirs.save_pretrained(tmp_path / "a")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    back = transformers.GenerationConfig.from_pretrained(tmp_path / "b")
    for name in ("max_new_tokens", "eos_token_id", "do_sample", "top_p"):
        assert getattr(back, name) == getattr(theirs.generation_config, name), name
    ids, _, _ = prompts()
    assert ours.generate(ids, seed=1).shape[1] <= 17 + 7


def test_a_second_save_replaces_the_first(tmp_path):
    _, ours = pair()
    ours.save_pretrained(tmp_path, max_shard_size="60KB")
    with torch.no_grad():
        ours.lm_head.weight.add_(1)
    ours.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    ours.save_pretrained(tmp_path, max_shard_size=60_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert same(LlamaForCausalLM.from_pretrained(tmp_path), ours)


def spoil_file(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


NORM = "model.layers.1.input_layernorm.weight"
DAMAGE = {
    rf"'{NORM}' is in none of \['model.safetensors'\]": lambda d: spoil_file(d, lambda t: t.pop(NORM)),
    r"model.safetensors: tensor 'extra.weight' has no place in a llama model with 2 layers": lambda d: spoil_file(
        d, lambda t: t.update({"extra.weight": torch.zeros(1)})
    ),
    rf"model.safetensors: tensor '{NORM}' has shape \(3,\), but config.json makes it \(64,\)": lambda d: spoil_file(
        d, lambda t: t.update({NORM: torch.zeros(3)})
    ),
    "model.safetensors is damaged or not safetensors": truncate,
    "tensor 'lm_head.weight' has shape .131, 64., but config.json makes it .140, 64.": lambda d: spoil_config(
        d, vocab_size=140
    ),
    "ties lm_head.weight to model.embed_tokens.weight, but the files hold two": lambda d: spoil_config(
        d, tie_word_embeddings=True
    ),
    "config.json is not valid JSON": lambda d: (d / "config.json").write_text("{"),
    "model_type 'gpt2' is not supported": lambda d: spoil_config(d, model_type="gpt2"),
}
ABSENT = {
    "config.json is missing": lambda d: (d / "config.json").unlink(),
    "has neither model.safetensors nor model.safetensors.index.json": lambda d: (d / "model.safetensors").unlink(),
    "pytorch_model.bin is a pickle": lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
}


@pytest.mark.parametrize("message", [*DAMAGE, *ABSENT])
def test_damage_is_named(message, tmp_path):
    pair()[1].save_pretrained(tmp_path)
    LlamaForCausalLM.from_pretrained(tmp_path)
    (DAMAGE | ABSENT)[message](tmp_path)
    with pytest.raises(ValueError if message in DAMAGE else FileNotFoundError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    pair()[1].save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-00002-*"))[0]
    tensors = load_file(shard)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} is missing; .* holds '{min(tensors)}'"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.ones(64)}, shard)
    with pytest.raises(ValueError, match=rf"{shard.name} lacks '.*', which .* says it holds"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder, nor owner/name"):
        LlamaForCausalLM.from_pretrained(tmp_path / "nowhere" / "at" / "all")


def test_an_unreachable_repository_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded .*no network.*check the name, the network"):
        LlamaForCausalLM.from_pretrained("nobody/nothing")
