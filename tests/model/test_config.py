"""LlamaConfig reads and writes what transformers does, and refuses what it does not know."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from model.reference import CONFIGS, config, transformers
from pyllm import PRESETS, LlamaConfig

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip_through_transformers(family, tmp_path):
    """Every field that transformers has comes back from what pyllm wrote."""
    theirs = config(family, rope_parameters={**YARN, "rope_theta": 777.0}, eos_token_id=[2, 5], dtype="bfloat16")
    ours = LlamaConfig.from_hf(theirs)
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    back = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(back) is type(theirs)
    written, expected = back.to_dict(), theirs.to_dict()
    follows_from_layer_types = {"max_window_layers"}
    for name in set(expected) - {"_name_or_path", "transformers_version", "architectures"} - follows_from_layer_types:
        assert written[name] == expected[name], name
    assert LlamaConfig.from_hf(back) == ours
    assert LlamaConfig.from_dict(ours.to_dict()) == ours


@pytest.mark.parametrize("family", CONFIGS)
def test_missing_keys_take_the_family_defaults(family):
    theirs = getattr(transformers, CONFIGS[family])()
    ours = LlamaConfig.from_dict({"model_type": family})
    for name, value in ours.to_dict().items():
        if name in ("architectures", "dtype", "max_window_layers"):
            continue
        assert value == getattr(theirs, name, 128 if name == "head_dim" else None), name


@pytest.mark.parametrize("family", CONFIGS)
def test_files_that_transformers_saves(family, tmp_path):
    """save_pretrained leaves out what equals the class's defaults."""
    theirs = config(family)
    theirs.save_pretrained(tmp_path)
    ours = LlamaConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert ours == LlamaConfig.from_hf(theirs)


def test_old_spelling():
    """rope_scaling beside rope_theta, the key `type`, torch_dtype."""
    common = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 2048}
    old = LlamaConfig.from_dict(
        {**common, "rope_theta": 500000.0, "rope_scaling": {**LLAMA3}, "torch_dtype": "bfloat16"}
    )
    new = LlamaConfig.from_dict(
        {**common, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "dtype": torch.bfloat16}
    )
    assert old == new
    assert old.dtype == "bfloat16"
    assert old.rope["original_max_position_embeddings"] == 2048
    by_type = LlamaConfig.from_dict({**common, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert by_type.rope == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    plain = LlamaConfig.from_dict({**common, "rope_theta": 1e6, "rope_scaling": None})
    assert plain.rope == {"rope_type": "default", "rope_theta": 1e6}
    for mine in (old, by_type, plain):
        theirs = transformers.LlamaConfig.from_dict({**mine.to_dict()})
        assert theirs.rope_parameters == mine.rope_parameters


def test_the_forms_that_a_model_takes():
    theirs = config()
    assert LlamaConfig.of(theirs) == LlamaConfig.of(theirs.to_dict()) == LlamaConfig.of(LlamaConfig.from_hf(theirs))
    with pytest.raises(ValueError, match="expected a LlamaConfig"):
        LlamaConfig.of(3)


BAD = {
    "model_type 'gpt2'": {"model_type": "gpt2"},
    "hidden_size = 65 must be a multiple of num_attention_heads = 4": {"hidden_size": 65},
    "num_attention_heads = 4 must be a multiple of num_key_value_heads = 3": {"num_key_value_heads": 3},
    "head_dim = 15 must be even": {"head_dim": 15},
    "vocab_size must be a positive integer, got 0": {"vocab_size": 0},
    "num_hidden_layers must be a positive integer, got 2.0": {"num_hidden_layers": 2.0},
    "rms_norm_eps must be a float between 0 and 1, got 0.0": {"rms_norm_eps": 0.0},
    "hidden_act = 'gelu' is not supported": {"hidden_act": "gelu"},
    "pretraining_tp = 2 is not supported": {"pretraining_tp": 2},
    "attention_dropout = 0.1 is not supported": {"attention_dropout": 0.1},
    r"quantization_config \(quant_method 'awq'\) is not supported": {"quantization_config": {"quant_method": "awq"}},
    "rope_type 'longrope' is not supported": {"rope_scaling": {"type": "longrope", "factor": 2.0}},
    "needs 'factor'": {"rope_scaling": {"type": "linear"}},
    r"rope_parameters\['factor'\] must be a positive number, got -1": {
        "rope_scaling": {"type": "linear", "factor": -1}
    },
    r"\['high_freq_factor'\] = 1.0 must be greater than": {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "per layer type is not supported": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "sliding_window = 8 is not supported for model_type 'llama'": {"sliding_window": 8},
    "layer_types has 1 entries for num_hidden_layers = 2": {"layer_types": ["full_attention"]},
    "layer type 'chunked_attention' is not supported": {"layer_types": ["chunked_attention"] * 2},
    "pad_token_id = 99 must be less than vocab_size = 50": {"pad_token_id": 99},
    "dtype 'int8' is not supported": {"torch_dtype": "int8"},
    "mlp_bias is not supported for model_type 'qwen2'": {"model_type": "qwen2", "mlp_bias": True},
    "attention_bias is not supported for model_type 'mistral'": {"model_type": "mistral", "attention_bias": True},
    "layer_types .* is not supported for model_type 'mistral'": {
        "model_type": "mistral",
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}


@pytest.mark.parametrize("message", BAD)
def test_refusals_name_the_feature(message):
    good = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    LlamaConfig.from_dict(good)
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({**good, **BAD[message]})


def test_presets_have_the_published_sizes():
    millions = {name: round(preset.num_parameters() / 1e6) for name, preset in PRESETS.items()}
    assert millions["llama-3.2-1b"] == 1236
    assert millions["llama-3-8b"] == 8030
    assert millions["llama-3-70b"] == 70554
    assert millions["qwen3-8b"] == 8191


def test_flops():
    """Counted by hand: one layer of one head, tokens that see 2.5 keys on the mean, or at most 2 through a window."""
    tiny = LlamaConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        model_type="mistral",
    )
    matrices = 4 * 4 * 4 + 3 * 4 * 6 + 10 * 4
    assert tiny.flops_per_token(4, training=False) == 2 * matrices + 4 * 4 * 2.5
    assert tiny.flops_per_token(4) == 3 * tiny.flops_per_token(4, training=False)
    windowed = tiny.replace(sliding_window=2, layer_types=None)
    assert windowed.flops_per_token(4, training=False) == 2 * matrices + 4 * 4 * 1.75


def test_config_needs_no_torch():
    code = (
        "import sys, pyllm; pyllm.PRESETS['llama-3-8b'].to_dict(); assert 'LlamaForCausalLM' in dir(pyllm);"
        "assert 'torch' not in sys.modules; import pyllm.config"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_attribute_errors():
    import pyllm

    with pytest.raises(AttributeError, match="no attribute 'LamaConfig'"):
        pyllm.LamaConfig  # noqa: B018
