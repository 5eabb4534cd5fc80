"""What a Llama-family model is made of, in Hugging Face's names; reads and writes `config.json`. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What a family's class in transformers assumes where config.json is silent, and the class that config.json names.
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": (
        "MistralForCausalLM",
        {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", _QWEN),
    "qwen3": ("Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}),
}
# RoPE type -> the keys it needs besides rope_theta, and the ones it may have.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers that define a model; checked once, here, so that nothing downstream has to.

    Fields bear Hugging Face's names and Llama's defaults. Filled in when None: `num_key_value_heads` (as many as query
    heads), `head_dim` (hidden_size / heads), `rope_parameters` (default RoPE, theta 10000), `layer_types`.
    `model_type` is the family: llama, mistral (`sliding_window`), qwen2 (bias on q, k and v), qwen3 (QK-norm).

    Raises:
        ValueError: a value out of its bounds, or a feature that pyllm does not have; the message names it.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    model_type: str = "llama"
    dtype: str | None = None

    # Reading and writing

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """From the contents of a `config.json`, in the spelling of transformers 5 or of earlier versions.

        Keys that no supported architecture reads are ignored, as transformers does; a feature that would change what
        the model computes and that pyllm lacks is a ValueError.
        """
        values = {**values}
        model_type = values.get("model_type") or "llama"
        if model_type not in FAMILIES:
            raise ValueError(f"config: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
        if values.get("quantization_config") is not None:
            method = values["quantization_config"].get("quant_method", "unknown")
            raise ValueError(f"config: quantization_config (quant_method {method!r}) is not supported")
        if (values.get("pretraining_tp") or 1) > 1:
            raise ValueError(
                f"config: pretraining_tp = {values['pretraining_tp']} is not supported; 1 computes the same "
                "up to rounding, so it may be set to 1"
            )
        fields = {field.name for field in dataclasses.fields(cls)}
        found = {**FAMILIES[model_type][1], **{k: v for k, v in values.items() if k in fields}}
        found["model_type"] = model_type
        found["dtype"] = _dtype_name(values.get("dtype") or values.get("torch_dtype"))
        found["rope_parameters"] = _read_rope(values)
        if model_type.startswith("qwen"):  # Qwen files carry a window even when it is switched off
            layers = found.get("num_hidden_layers", cls.num_hidden_layers)
            if not values.get("use_sliding_window", False):
                found["sliding_window"] = None
            else:
                found.setdefault("sliding_window", 4096)
            if found.get("layer_types") is None and found["sliding_window"] is not None:
                first = values.get("max_window_layers", 28)
                found["layer_types"] = [_SLIDING if i >= first else _FULL for i in range(layers)]
        found = {k: v for k, v in found.items() if v is not None or k not in _NOT_NONE}
        return cls(**found)

    @classmethod
    def from_hf(cls, config: Any) -> LlamaConfig:
        """From a transformers config, or anything with `to_dict()`."""
        if not hasattr(config, "to_dict"):
            raise ValueError(f"config: expected a LlamaConfig, a dict or a transformers config, got {type(config)}")
        return cls.from_dict({"model_type": getattr(config, "model_type", "llama"), **config.to_dict()})

    @classmethod
    def of(cls, config: LlamaConfig | Mapping[str, Any] | Any) -> LlamaConfig:
        """From any of the three forms that the model accepts."""
        if isinstance(config, LlamaConfig):
            return config
        return cls.from_dict(config) if isinstance(config, Mapping) else cls.from_hf(config)

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds, in transformers 5's spelling."""
        values = dataclasses.asdict(self)
        values["architectures"] = [FAMILIES[self.model_type][0]]
        layer_types = values.pop("layer_types")
        if self.model_type.startswith("qwen"):
            values["use_sliding_window"] = self.sliding_window is not None
            values["layer_types"] = list(layer_types)
            values["max_window_layers"] = layer_types.index(_SLIDING) if _SLIDING in layer_types else len(layer_types)
        if self.model_type != "llama":
            del values["mlp_bias"]
        else:
            del values["sliding_window"]
        if self.model_type in ("mistral", "qwen2"):
            del values["attention_bias"]
        return values

    def replace(self, **changes: Any) -> LlamaConfig:
        """A copy with other values. Dimensions that were filled in are kept unless they are given."""
        if "num_hidden_layers" in changes:
            changes.setdefault("layer_types", None)
        return dataclasses.replace(self, **changes)

    # Checks

    def __post_init__(self) -> None:
        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)  # frozen for users; these are the documented defaults

        if self.model_type not in FAMILIES:
            raise ValueError(f"config: model_type {self.model_type!r} is not supported; known: {', '.join(FAMILIES)}")
        if self.num_key_value_heads is None:
            fill("num_key_value_heads", self.num_attention_heads)
        for name in _POSITIVE:
            value = getattr(self, name)
            if name == "head_dim" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"config: hidden_size = {self.hidden_size} must be a multiple of num_attention_heads = "
                    f"{self.num_attention_heads}; if the heads have a width of their own, give head_dim"
                )
            fill("head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"config: num_attention_heads = {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}: each key-value head serves equally many query heads"
            )
        if self.width % 2:
            raise ValueError(f"config: head_dim = {self.head_dim} must be even: RoPE rotates pairs of dimensions")
        if not (isinstance(self.rms_norm_eps, float) and 0 < self.rms_norm_eps < 1):
            raise ValueError(f"config: rms_norm_eps must be a float between 0 and 1, got {self.rms_norm_eps!r}")
        if not 0 <= self.initializer_range <= 1:
            raise ValueError(f"config: initializer_range must be between 0 and 1, got {self.initializer_range!r}")
        if self.hidden_act not in ("silu", "swish"):
            raise ValueError(f"config: hidden_act = {self.hidden_act!r} is not supported; Llama's MLP is SwiGLU (silu)")
        if self.attention_dropout:
            raise ValueError(f"config: attention_dropout = {self.attention_dropout} is not supported, only 0.0")
        if self.mlp_bias and self.model_type != "llama":
            raise ValueError(f"config: mlp_bias is not supported for model_type {self.model_type!r}, which has none")
        if self.attention_bias and self.model_type == "mistral":
            raise ValueError("config: attention_bias is not supported for model_type 'mistral', which has none")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"config: pad_token_id = {self.pad_token_id} must be less than vocab_size = {self.vocab_size}; "
                "was a token added without resizing the embeddings?"
            )
        fill("dtype", _dtype_name(self.dtype))
        fill("rope_parameters", self._checked_rope())
        fill("layer_types", self._checked_layer_types())

    def _checked_rope(self) -> dict[str, Any]:
        rope = {**(self.rope_parameters or {})}
        rope_type = rope.pop("type", None)  # the spelling before rope_type
        rope_type = rope.get("rope_type") or rope_type or "default"
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"config: rope_type {rope_type!r} is not supported; known: {', '.join(ROPE_TYPES)}")
        required, optional = ROPE_TYPES[rope_type]
        rope["rope_type"] = rope_type
        rope["rope_theta"] = 10000.0 if rope.get("rope_theta") is None else rope["rope_theta"]
        if rope.pop("partial_rotary_factor", None) not in (None, 1.0):
            raise ValueError("config: rope_parameters with partial_rotary_factor other than 1 is not supported")
        if "original_max_position_embeddings" in required:
            rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        for key in ("rope_theta", *required):
            if key not in rope:
                raise ValueError(f"config: rope_parameters of rope_type {rope_type!r} needs {key!r}; it has {rope}")
            value = rope[key]
            if value is None and rope_type == "yarn" and key == "factor":
                continue  # means max_position_embeddings / original_max_position_embeddings
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"config: rope_parameters[{key!r}] must be a positive number, got {value!r}")
        if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
            raise ValueError(
                f"config: rope_parameters['high_freq_factor'] = {rope['high_freq_factor']} must be greater than "
                f"['low_freq_factor'] = {rope['low_freq_factor']}"
            )
        # Anything else (a leftover factor under "default") has no effect in transformers either.
        return {k: v for k, v in rope.items() if k in ("rope_type", "rope_theta", *required, *optional)}

    def _checked_layer_types(self) -> tuple[str, ...]:
        given = self.layer_types
        if self.sliding_window is None:
            default = (_FULL,) * self.num_hidden_layers
        else:
            default = (_SLIDING,) * self.num_hidden_layers
            if self.model_type == "llama":
                raise ValueError(
                    f"config: sliding_window = {self.sliding_window} is not supported for model_type 'llama'; "
                    "the family with a window is 'mistral'"
                )
            if not isinstance(self.sliding_window, int) or self.sliding_window < 1:
                raise ValueError(f"config: sliding_window must be a positive integer, got {self.sliding_window!r}")
        if given is None:
            return default
        for layer_type in given:
            if layer_type not in (_FULL, _SLIDING):
                raise ValueError(f"config: layer type {layer_type!r} is not supported; known: {_FULL}, {_SLIDING}")
        if len(given) != self.num_hidden_layers:
            raise ValueError(
                f"config: layer_types has {len(given)} entries for num_hidden_layers = {self.num_hidden_layers}"
            )
        if _SLIDING in given and self.sliding_window is None:
            raise ValueError(f"config: layer_types has {_SLIDING!r} but sliding_window is None")
        if tuple(given) != default and not self.model_type.startswith("qwen"):
            raise ValueError(f"config: layer_types {list(given)} is not supported for model_type {self.model_type!r}")
        return tuple(given)

    # What follows from the numbers

    @property
    def kv_heads(self) -> int:
        """num_key_value_heads, never None."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def width(self) -> int:
        """head_dim, never None."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def qk_norm(self) -> bool:
        """Whether q and k are normalised per head before RoPE (Qwen3)."""
        return self.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to q, k and v have a bias (always in Qwen2)."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def rope(self) -> dict[str, Any]:
        """rope_parameters, never None."""
        assert self.rope_parameters is not None
        return self.rope_parameters

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, how many tokens back a query sees (itself included), or None for all."""
        assert self.layer_types is not None
        return tuple(self.sliding_window if kind == _SLIDING else None for kind in self.layer_types)

    @property
    def _layer_matrices(self) -> int:
        heads = self.num_attention_heads + self.kv_heads
        return self.hidden_size * (2 * heads * self.width + 3 * self.intermediate_size)

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters of the model; without `embeddings`, neither the embedding nor the output matrix is counted."""
        C, F, D = self.hidden_size, self.intermediate_size, self.width
        biases = (self.num_attention_heads + 2 * self.kv_heads) * D * self.qkv_bias + C * self.attention_bias
        biases += (2 * F + C) * self.mlp_bias
        norms = 2 * C + 2 * D * self.qk_norm
        ends = (1 if self.tie_word_embeddings else 2) * embeddings * self.vocab_size * C
        return self.num_hidden_layers * (self._layer_matrices + biases + norms) + C + ends

    def flops_per_token(self, sequence_length: int, *, training: bool = True) -> float:
        """Useful floating-point operations per token of a sequence, a multiply-add counting two.

        Every matrix of the layers and the output matrix, plus attention over the keys that causality and the window
        leave (their mean over the sequence). Training is three times the forward pass; recomputation earns nothing.
        """
        matmul = self.num_hidden_layers * self._layer_matrices + self.vocab_size * self.hidden_size
        keys = 0.0
        for window in self.windows:
            seen = min(window or sequence_length, sequence_length)
            keys += (seen * (seen + 1) / 2 + (sequence_length - seen) * seen) / sequence_length
        forward = 2 * matmul + 4 * self.num_attention_heads * self.width * keys
        return forward * 3 if training else forward


_POSITIVE: tuple[str, ...] = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_POSITIVE += ("num_key_value_heads", "head_dim", "max_position_embeddings")
# A null in the file means the default, except where None is a value of its own.
_NOT_NONE = {f.name for f in dataclasses.fields(LlamaConfig) if f.default is not None} - {
    "bos_token_id",
    "eos_token_id",
}


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"config: dtype {name!r} is not supported; known: {', '.join(DTYPES)}")
    return name


def _read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's parameters from either spelling, with the precedence of transformers 5."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"config: rope_parameters per layer type is not supported, got {sorted(rope)}")
    rope = {**rope}
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = values.get("rope_theta")
    if rope.get("partial_rotary_factor") is None:
        rope["partial_rotary_factor"] = values.get("partial_rotary_factor")
    if values.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    return rope


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3 = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    bos_token_id=128000,
    eos_token_id=128001,
    dtype="bfloat16",
)


def _small(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, length: int
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )


# Models by name. The real ones have the published dimensions, which benchmarks take their shapes from.
PRESETS: dict[str, LlamaConfig] = {
    "llama-3.2-1b": _LLAMA3.replace(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope_parameters=_LLAMA3_ROPE,
    ),
    "llama-3-8b": _LLAMA3,
    "llama-3-70b": _LLAMA3.replace(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
    "qwen3-8b": LlamaConfig(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=151643,
        eos_token_id=151645,
        dtype="bfloat16",
    ),
    # Small enough to train on a laptop: 0.1, 5 and 28 million parameters. The demo's own model is in recipe.py.
    "tiny": _small(128, 64, 176, 2, 4, 2, 128),
    "small": _small(4096, 256, 688, 6, 4, 2, 1024),
    "medium": _small(8192, 512, 1408, 8, 8, 4, 2048),
}
