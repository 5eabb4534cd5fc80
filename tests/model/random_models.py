"""Random configs of every family, and prompts for them: what hypothesis draws from."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from model.reference import CONFIGS, transformers


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """rope_parameters of every type, at random."""
    kind = draw(st.sampled_from(("default", "linear", "dynamic", "llama3", "yarn")))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from((100.0, 10000.0, 1e6)))}
    if kind != "default":
        rope["factor"] = draw(st.sampled_from((1.0, 1.5, 4.0, 10.0)))
    if kind == "llama3":
        rope["low_freq_factor"] = draw(st.sampled_from((1.0, 2.0)))
        rope["high_freq_factor"] = rope["low_freq_factor"] * draw(st.sampled_from((1.5, 4.0)))
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = draw(st.sampled_from((8, 16, 64)))
    if kind == "yarn":
        optional = {"attention_factor": 1.3, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False}
        rope |= {name: value for name, value in optional.items() if draw(st.booleans())}
        if draw(st.booleans()):
            rope |= {"mscale": 0.8, "mscale_all_dim": 1.2}
    return rope


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """A config of transformers: sizes, head_dim apart from hidden / heads, windows, biases and tying at random."""
    family = draw(st.sampled_from(sorted(CONFIGS)))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    width = 2 * draw(st.integers(2, 20))
    layers = draw(st.integers(1, 3))
    values: dict[str, Any] = {
        "vocab_size": draw(st.integers(20, 150)),
        "hidden_size": kv_heads * group * width,
        "intermediate_size": draw(st.integers(5, 120)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": draw(st.sampled_from((8, 32, 64))),
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-5, 1e-2))),
        "rope_parameters": draw(ropes()),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": draw(st.sampled_from((None, 0))),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "qwen3" or draw(st.booleans()):
        values |= {"head_dim": width, "hidden_size": kv_heads * group * draw(st.integers(4, 24))}
    if family in ("llama", "qwen3"):
        values["attention_bias"] = draw(st.booleans())
    if family == "llama":
        values["mlp_bias"] = draw(st.booleans())
    if family == "mistral":
        values["sliding_window"] = draw(st.one_of(st.none(), st.integers(1, 20)))
    if family.startswith("qwen") and draw(st.booleans()):
        values |= {
            "use_sliding_window": True,
            "sliding_window": draw(st.integers(1, 20)),
            "max_window_layers": draw(st.integers(0, layers)),
        }
    return getattr(transformers, CONFIGS[family])(**values)


@st.composite
def batches(draw: st.DrawFn, vocab_size: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """ids (B, T), a mask or None, labels: rows of unequal lengths where they are padded, some labels left out."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(3, vocab_size, (batch, length), generator=generator)
    labels = ids.masked_fill(torch.rand(batch, length, generator=generator) < 0.2, -100)
    labels[0, -1] = ids[0, -1]  # one at least
    side = draw(st.sampled_from((None, "left", "right")))
    if side is None:
        return ids, None, labels
    short = torch.randint(0, length - 1, (batch, 1), generator=generator)
    short[0] = 0
    column = torch.arange(length)
    mask = (column >= short if side == "left" else column < length - short).long()
    return ids, mask, labels.masked_fill(mask == 0, -100)
