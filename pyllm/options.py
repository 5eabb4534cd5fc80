"""The options of generation: their names and defaults are Hugging Face's; what a call gives is merged and checked here.

Everything that can be refused is refused before any work is done.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LlamaConfig

# Options of transformers that are not here, with the value at which they do nothing. Any other value is refused.
_ABSENT: dict[str, Any] = {
    "top_h": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "penalty_alpha": None,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "watermarking_config": None,
    "token_healing": False,
    "dola_layers": None,
    "low_memory": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
# Options of transformers that change how fast it is and never what comes out. They are read and left alone.
_HINTS = frozenset({
    "cache_implementation", "cache_config", "compile_config", "disable_compile", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "synced_gpus",
})  # fmt: skip
_SAMPLING_ONLY = {
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}  # fmt: skip
_BEAMS_ONLY = {"length_penalty": 1.0, "early_stopping": False}
# None in a call says "switch this off"; for the others it says "not given".
_RESETTABLE = (
    "eos_token_id", "pad_token_id", "top_k", "top_p", "min_p", "max_length", "stop_strings", "bad_words_ids",
    "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
)  # fmt: skip


@dataclass
class GenerationConfig:
    """What `generation_config.json` holds. None: not set, so that transformers' default applies (in comments)."""

    # How long
    max_length: int | None = None  # the prompt and 20 more
    max_new_tokens: int | None = None
    min_length: int | None = None  # 0
    min_new_tokens: int | None = None
    max_time: float | None = None  # seconds
    stop_strings: str | list[str] | None = None
    # Which strategy
    do_sample: bool | None = None  # False
    num_beams: int | None = None  # 1
    num_return_sequences: int | None = None  # 1
    length_penalty: float | None = None  # 1.0
    early_stopping: bool | str | None = None  # False
    # The scores of all strategies
    sequence_bias: Any = None  # {(tokens): bias} or [[[tokens], bias]]
    repetition_penalty: float | None = None  # 1.0
    no_repeat_ngram_size: int | None = None  # 0
    bad_words_ids: list[list[int]] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    remove_invalid_values: bool | None = None  # False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    renormalize_logits: bool | None = None  # False
    # Sampling's scores
    temperature: float | None = None  # 1.0
    top_k: int | None = None  # 50
    top_p: float | None = None  # 1.0
    min_p: float | None = None
    typical_p: float | None = None  # 1.0
    epsilon_cutoff: float | None = None  # 0.0
    eta_cutoff: float | None = None  # 0.0
    # Speed
    use_cache: bool | None = None  # True
    prefill_chunk_size: int | None = None  # the whole prompt in one pass
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None  # 2
    num_assistant_tokens: int | None = None  # 5 here
    # Tokens, results
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    return_dict_in_generate: bool | None = None  # False
    output_scores: bool | None = None  # False
    output_logits: bool | None = None  # False
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # other keys of the file, kept for saving

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """From the contents of a generation_config.json."""
        known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        extra = {name: value for name, value in values.items() if name not in known}
        return cls(**{name: value for name, value in values.items() if name in known}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """What generation_config.json holds: the values that are set."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        extra = values.pop("extra")
        return {**extra, **{name: value for name, value in values.items() if value is not None}}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    # Short forms of what is asked for often

    @property
    def beams(self) -> int:
        return self.num_beams or 1

    @property
    def sequences(self) -> int:
        """Results per prompt."""
        return self.num_return_sequences or 1

    @property
    def eos_ids(self) -> list[int]:
        return _ints(self.eos_token_id)


def _ints(given: Any) -> list[int]:
    if given is None:
        return []
    return [int(e) for e in (given if isinstance(given, (list, tuple)) else [given])]


def configured(
    model_config: LlamaConfig, saved: GenerationConfig | None, given: Any, options: dict[str, Any]
) -> GenerationConfig:
    """The call's options over its `generation_config` over the model's, checked.

    Raises:
        ValueError: an option is unknown, not supported, out of its bounds, or conflicts with another.
    """
    known = {field.name for field in dataclasses.fields(GenerationConfig)} - {"extra"}
    unknown = sorted(set(options) - known - set(_ABSENT) - _HINTS)
    if unknown:
        raise ValueError(f"generate: the following `model_kwargs` are not used by the model: {unknown} (typos?)")
    if given is not None and not isinstance(given, GenerationConfig):
        given = GenerationConfig.from_dict(given if isinstance(given, Mapping) else given.to_dict())
    values = {name: getattr(model_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for layer in (saved, given):
        values.update({} if layer is None else layer.to_dict())
    values.update({name: value for name, value in options.items() if value is not None or name in _RESETTABLE})
    for name, neutral in _ABSENT.items():
        if values.get(name) is not None and values[name] != neutral:
            raise ValueError(f"generate: {name} = {values[name]!r} is not supported")
    config = GenerationConfig.from_dict(values)
    _check_bounds(config)
    _check_tokens(config, model_config.vocab_size)
    _check_together(config)
    for names, active, needs in (
        (_SAMPLING_ONLY, config.do_sample, "do_sample=True"),
        (_BEAMS_ONLY, config.beams > 1, "num_beams > 1"),
    ):
        for name, default in names.items():
            if not active and options.get(name) not in (None, default):
                warnings.warn(f"generate: {name} = {options[name]} has no effect without {needs}", stacklevel=5)
    if config.max_new_tokens is not None and options.get("max_length") is not None:
        warnings.warn("generate: max_new_tokens and max_length are both given; max_new_tokens counts", stacklevel=5)
    return config


def _check_bounds(config: GenerationConfig) -> None:
    def bounded(name: str, rule: str, good: Callable[[Any], bool]) -> None:
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not good(value)):
            raise ValueError(f"generate: {name} must be {rule}, got {value!r}")

    for name in (
        "max_new_tokens", "num_return_sequences", "num_beams", "prefill_chunk_size", "prompt_lookup_num_tokens",
        "max_matching_ngram_size", "num_assistant_tokens",
    ):  # fmt: skip
        bounded(name, "an integer greater than 0", lambda v: isinstance(v, int) and v > 0)
    for name in ("min_new_tokens", "min_length", "no_repeat_ngram_size"):
        bounded(name, "a non-negative integer", lambda v: isinstance(v, int) and v >= 0)
    bounded("repetition_penalty", "greater than 0 and finite", lambda v: 0 < v < math.inf)
    bounded("length_penalty", "finite", math.isfinite)
    bounded("max_time", "greater than 0", lambda v: v > 0)
    if config.do_sample:
        hint = "; for greedy decoding, set do_sample=False" if config.temperature == 0 else ""
        bounded("temperature", f"greater than 0 and finite{hint}", lambda v: 0 < v < math.inf)
        bounded("top_k", "a non-negative integer (0: all tokens)", lambda v: isinstance(v, int) and v >= 0)
        bounded("top_p", "within [0, 1]", lambda v: 0 <= v <= 1)
        bounded("min_p", "within [0, 1]", lambda v: 0 <= v <= 1)
        bounded("typical_p", "within (0, 1]", lambda v: 0 < v <= 1)
        bounded("epsilon_cutoff", "within [0, 1)", lambda v: 0 <= v < 1)
        bounded("eta_cutoff", "within [0, 1)", lambda v: 0 <= v < 1)
    for name in ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "output_scores"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"generate: {name} must be True or False, got {value!r}")
    early = config.early_stopping
    if early is not None and not isinstance(early, bool) and early != "never":
        raise ValueError(f"generate: early_stopping must be a boolean or 'never', got {early!r}")
    decay = config.exponential_decay_length_penalty
    if decay is not None and (not isinstance(decay, (list, tuple)) or len(decay) != 2 or decay[1] <= 0):
        raise ValueError(
            "generate: exponential_decay_length_penalty must be (start, factor) with a factor greater than 0, "
            f"got {decay!r}"
        )


def _check_tokens(config: GenerationConfig, vocab_size: int) -> None:
    def tokens(name: str, ids: Any) -> None:
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
            raise ValueError(f"generate: {name} must be token ids within [0, {vocab_size}), got {ids!r}")

    for name in ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        value = getattr(config, name)
        if value is not None:
            tokens(name, [value] if isinstance(value, int) else value)
    if config.forced_bos_token_id is not None:
        tokens("forced_bos_token_id", [config.forced_bos_token_id])
    if config.bad_words_ids is not None:
        words = config.bad_words_ids
        if not isinstance(words, (list, tuple)) or not words or not all(isinstance(w, (list, tuple)) for w in words):
            raise ValueError(f"generate: bad_words_ids must be a non-empty list of lists of token ids, got {words!r}")
        for word in words:
            tokens("each list in bad_words_ids", word)
            if not word:
                raise ValueError("generate: bad_words_ids must not hold an empty list")
    if config.sequence_bias is not None:
        config.sequence_bias = _sequence_bias(config.sequence_bias)
        for word in config.sequence_bias:
            tokens("each key of sequence_bias", word)


def _sequence_bias(given: Any) -> dict[tuple[int, ...], float]:
    """{tokens: bias} of either spelling: a dict with tuples as keys, or a list of [tokens, bias]."""
    try:
        pairs = given.items() if isinstance(given, Mapping) else given
        found = {tuple(tokens): float(bias) for tokens, bias in pairs}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"generate: sequence_bias must be {{(tokens): bias}} or [[[tokens], bias]], got {given!r}"
        ) from error
    if not found or () in found:
        raise ValueError(f"generate: sequence_bias must name at least one token per entry, got {given!r}")
    return found


def _check_together(config: GenerationConfig) -> None:
    """Options that exclude each other."""
    n, beams = config.sequences, config.beams
    if n > 1 and beams == 1 and not config.do_sample:
        raise ValueError(
            f"generate: num_return_sequences = {n} needs do_sample=True or num_beams; greedy decoding has one result"
        )
    if 1 < beams < n:
        raise ValueError(f"generate: num_return_sequences = {n} must not be larger than num_beams = {beams}")
    strings = config.stop_strings
    if strings is not None:
        strings = [strings] if isinstance(strings, str) else list(strings)
        if not strings or not all(isinstance(s, str) and s for s in strings):
            raise ValueError(f"generate: stop_strings must be a text or several, none of them empty, got {strings!r}")
    suppressed = set(config.suppress_tokens or ())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = set(_ints(getattr(config, name)))
        if forced and forced <= suppressed:
            raise ValueError(f"generate: {name} = {sorted(forced)} is in suppress_tokens too: nothing would be left")


def check_length(
    config: GenerationConfig, model_config: LlamaConfig, T: int, room: int | None, *, spare: int = 0
) -> int:
    """Length at which generation ends, prompt included.

    Args:
        T: the prompt's length.
        room: tokens that a cache can hold at most; None: as many as wanted.
        spare: tokens beyond the end that are tried and dropped (speculative decoding).
    """
    trained = model_config.max_position_embeddings
    if config.max_new_tokens is not None:
        limit = T + config.max_new_tokens
    elif config.max_length is None:
        limit = min(T + 20, max(trained, T + 1))
        warnings.warn(f"generate: no max_new_tokens given, so {limit - T} new tokens at most", stacklevel=5)
    elif config.max_length <= T:
        raise ValueError(
            f"generate: input_ids has {T} tokens, but max_length is {config.max_length}; "
            "raise it, or better set max_new_tokens"
        )
    else:
        limit = config.max_length
    if room is not None and limit - 1 + spare > room:
        raise ValueError(
            f"generate: past_key_values has room for {room} tokens and is not growable, but {T} of the prompt and "
            f"{limit - T} new ones need {limit - 1 + spare}; reserve more, or lower max_new_tokens"
        )
    if limit > trained and model_config.rope["rope_type"] != "dynamic":
        warnings.warn(
            f"generate: up to {limit} tokens, but the model knows {trained} positions "
            "(max_position_embeddings); what comes after them is of little worth",
            stacklevel=5,
        )
    for name, shortest in (("min_length", config.min_length), ("min_new_tokens", config.min_new_tokens)):
        if shortest and shortest + (T if name == "min_new_tokens" else 0) > limit:
            warnings.warn(
                f"generate: {name} = {shortest} can't be reached: generation ends at {limit} tokens", stacklevel=5
            )
    return limit
