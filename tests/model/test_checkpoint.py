"""Folders of weights go to transformers and back, bit for bit; damaged ones are refused by tensor and file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyllm.checkpoint
from model.reference import pair, prompts, transformers
from pyllm import PRESETS, LlamaForCausalLM

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


def test_where_to_and_from(tmp_path, monkeypatch):
    """The ways in which scripts for transformers name a device and a dtype."""
    _, ours = pair()
    ours.save_pretrained(tmp_path)
    for options in (
        {"device_map": {"": "cpu"}},
        {"device_map": "cpu"},
        {"device_map": torch.device("cpu")},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}, "low_cpu_mem_usage": True},
        {"device": "cpu", "trust_remote_code": True, "use_safetensors": True},
    ):
        assert same(LlamaForCausalLM.from_pretrained(tmp_path, **options), ours)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LlamaForCausalLM.from_pretrained(tmp_path, device_map="auto").device.type == "cpu"
    assert LlamaForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert LlamaForCausalLM.from_pretrained(tmp_path, device_map={"": "meta"}).device.type == "meta"
    for options, message in (
        ({"device_map": {"a": "cpu", "b": "cuda:0"}}, "device_map must name one device"),
        ({"device_map": "sequential"}, "device_map must name a device, got 'sequential'"),
        ({"device_map": "cpu", "device": "cpu"}, "are the same; give one"),
        ({"load_in_8bit": True}, "load_in_8bit = True is not supported"),
        ({"attn_implementation": "sdpa"}, "attn_implementation = 'sdpa' is not supported; pyllm's attention is always"),
    ):
        with pytest.raises(ValueError, match=message):
            LlamaForCausalLM.from_pretrained(tmp_path, **options)
    with pytest.raises(ValueError, match="safe_serialization = False is not supported"):
        ours.save_pretrained(tmp_path, safe_serialization=False)


MEMORY = """
import sys, pathlib, torch
from pyllm import LlamaForCausalLM

def kilobytes(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0])

LlamaForCausalLM.from_pretrained(sys.argv[2])  # imports, caches
for dtype in sys.argv[3:]:
    anonymous, resident = kilobytes("RssAnon"), kilobytes("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=dtype)
    print(kilobytes("RssAnon") - anonymous, kilobytes("VmHWM") - resident)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's accounts of memory")
def test_loading_copies_nothing(tmp_path):
    """The weights are the file, mapped; in another dtype there is one copy, and never a second."""
    config = PRESETS["tiny"].replace(vocab_size=30_000, hidden_size=192, intermediate_size=512, head_dim=16)
    config = config.replace(tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "large")
    LlamaForCausalLM(PRESETS["tiny"]).save_pretrained(tmp_path / "small")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size // 1024  # about 50 MB
    copies = {"float32": 0, "float64": 2, "bfloat16": 0.5}
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large"), str(tmp_path / "small"), *copies]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    for (dtype, n), line in zip(copies.items(), done.stdout.splitlines(), strict=True):
        anonymous, peak = map(int, line.split())
        assert anonymous < (n + 0.1) * size, (dtype, anonymous / size)
        assert peak < (n + 1.1) * size, (dtype, peak / size)  # with what of the file was read


@pytest.mark.parametrize("fail_at", ["model-00002", "model-00001", "generation_config.json"])
def test_a_save_that_fails_leaves_what_was_there(fail_at, tmp_path, monkeypatch):
    _, ours = pair()
    ours.save_pretrained(tmp_path, max_shard_size="60KB")
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    write, write_text = pyllm.checkpoint.save_file, Path.write_text

    def full(file):
        if fail_at in str(file):
            raise OSError("no space left on device")

    monkeypatch.setattr(pyllm.checkpoint, "save_file", lambda t, file, **k: (write(t, file, **k), full(file)))
    monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: (write_text(self, *a, **k), full(self)))
    with torch.no_grad():
        ours.model.norm.weight.add_(1)
    with pytest.raises(OSError, match="no space"):
        ours.save_pretrained(tmp_path, max_shard_size="60KB")
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_saving_over_the_files_that_are_mapped(tmp_path):
    _, ours = pair()
    ours.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.model.norm.weight.add_(1)
    loaded.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert same(again, loaded)
    assert not same(again, ours)


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
    rf"tensor '{NORM}' must be floating point, got torch.int8; quantized weights": lambda d: spoil_file(
        d, lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int8)})
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


def test_an_index_that_lies_is_named(tmp_path):
    pair()[1].save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    first, second = sorted(set(contents["weight_map"].values()))[:2]
    tensors = load_file(tmp_path / second)
    name = min(load_file(tmp_path / first))
    save_file({**tensors, name: load_file(tmp_path / first)[name]}, tmp_path / second)
    with pytest.raises(ValueError, match=rf"{second}: tensor '{name}' is in another file of .* as well"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {name: "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="must map tensors to files beside it as 'weight_map'"):
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
