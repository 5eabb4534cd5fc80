"""Generation: prompts in, continuations out, with Hugging Face's options, defaults and results.

One step: logits of the last token -> processors (repetition penalty, minimum length, the caller's; when sampling then
temperature, top-k, top-p, min-p, in this order) -> argmax or a draw -> the next input.

Names: B rows (prompts times sequences per prompt), T prompt length, V vocab.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache import KVCache
from .inputs import check_ids
from .outputs import ModelOutput
from .sampling import Draws, RepetitionPenalty, keep_min_p, keep_top_k, keep_top_p

if TYPE_CHECKING:
    from .model import LlamaForCausalLM

Processor = Callable[[Tensor, Tensor], Tensor]  # (ids (B, t), scores (B, V)) -> scores

# Options of transformers that are not here, with the value at which they do nothing. Any other value is refused.
_ABSENT: dict[str, Any] = {
    "stop_strings": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "penalty_alpha": None,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "watermarking_config": None,
    "max_time": None,
    "output_attentions": False,
    "output_hidden_states": False,
}
_SAMPLING_ONLY = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}


@dataclass
class GenerationConfig:
    """What `generation_config.json` holds. None: not set, so that transformers' default applies (in comments)."""

    max_length: int | None = None  # the prompt and 20 more
    max_new_tokens: int | None = None
    min_length: int | None = None  # 0
    min_new_tokens: int | None = None
    do_sample: bool | None = None  # False
    temperature: float | None = None  # 1.0
    top_k: int | None = None  # 50
    top_p: float | None = None  # 1.0
    min_p: float | None = None
    repetition_penalty: float | None = None  # 1.0
    num_beams: int | None = None  # 1
    length_penalty: float | None = None  # 1.0
    early_stopping: bool | str | None = None  # False
    num_return_sequences: int | None = None  # 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool | None = None  # True
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


@dataclass
class GenerateDecoderOnlyOutput(ModelOutput):
    """sequences (B, T + new); per new token scores (B, V) as processed and logits (B, V) as computed."""

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: KVCache | None = None


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    past_key_values: KVCache | None = None,
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    logits_processor: Iterable[Processor] = (),
    stopping_criteria: Iterable[Callable[[Tensor, Any], Any]] = (),
    **options: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continue every prompt of a batch.

    Args:
        input_ids: (prompts, T), shorter prompts padded on the left. None: one row with the beginning-of-text token.
        attention_mask: (prompts, T), 0 at padding. When not given, it is inferred from `pad_token_id` if that is not
            an end token.
        seed: makes sampling repeat itself. Row i draws from a stream of its own, made of the seed and i, so what the
            other rows hold does not matter.
        generator: draw from this instead. With neither, torch's global generator is used.
        streamer: an object with put(ids) and end(), given the prompt and then every token.
        past_key_values: a cache that holds the first tokens of the prompt already; it is extended in place.
        logits_processor, stopping_criteria: functions as in transformers, of ids (B, t) and scores (B, V).
        options: the fields of GenerationConfig: max_new_tokens, min_new_tokens, do_sample, temperature, top_k, top_p,
            min_p, repetition_penalty, num_return_sequences, eos_token_id (one or several), pad_token_id, use_cache,
            return_dict_in_generate, output_scores, output_logits, max_length, min_length. They go before
            `generation_config`, which goes before the model's own.
    Returns:
        (prompts * num_return_sequences, T + new) ids, prompts included; a row that has ended is filled up with
        pad_token_id. Or a GenerateDecoderOnlyOutput.
    Raises:
        ValueError: an option is unknown, not supported or out of its bounds, or a prompt is malformed.
    """
    config = _configured(model, generation_config, options)
    stopping_criteria = tuple(stopping_criteria)
    if seed is not None and generator is not None:
        raise ValueError("generate: give seed or generator, not both")
    ids, mask, eos, pad = _prompt(model, config, input_ids, attention_mask)
    prompts, T = ids.shape
    limit = _limit(model, config, T)
    n = config.num_return_sequences or 1
    device = ids.device

    cache = past_key_values
    if cache is None and config.use_cache is not False:
        cache = KVCache(limit)
    done = 0 if cache is None else cache.seen
    if done >= T:
        raise ValueError(f"generate: past_key_values holds {done} tokens, the prompt has {T}; pass the whole sequence")
    rows = torch.arange(prompts, device=device).repeat_interleave(n)
    logits = _prefill(model, ids, mask, cache, done)[rows]  # (B, V)
    if n > 1 and cache is not None:
        cache.reorder(rows)
    B = prompts * n
    out = torch.full((B, limit), 0 if pad is None else pad, dtype=torch.int64, device=device)
    out[:, :T] = ids[rows]
    mask = None if mask is None else mask[rows]

    processors = _processors(config, out[:, :T], mask, T, eos, logits_processor)
    draw = Draws(B, limit - T, seed, generator, device) if config.do_sample else None
    running = torch.ones(B, dtype=torch.bool, device=device)
    kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
    if streamer is not None:
        streamer.put(ids.cpu())
    t = T
    while True:
        scores = logits
        for process in processors:
            scores = process(out[:, :t], scores)
        if config.return_dict_in_generate:
            kept["scores"] += [scores] if config.output_scores else []
            kept["logits"] += [logits] if config.output_logits else []
        token = scores.argmax(-1) if draw is None else draw(scores.softmax(-1))  # (B,)
        if eos is not None:
            token = torch.where(running, token, out[:, t])
        out[:, t] = token
        t += 1
        if streamer is not None:
            streamer.put(token.cpu())
        if eos is not None:
            running = running & ~torch.isin(token, eos)
        for stop in stopping_criteria:
            running = running & ~torch.as_tensor(stop(out[:, :t], scores), device=device)
        if t == limit or ((eos is not None or stopping_criteria) and not bool(running.any())):
            break
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(B, 1)), dim=1)
        logits = _step(model, out[:, :t], mask, cache)
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return out[:, :t]
    return GenerateDecoderOnlyOutput(
        out[:, :t],
        tuple(kept["scores"]) if config.output_scores else None,
        tuple(kept["logits"]) if config.output_logits else None,
        cache,
    )


# The model's side


def _prefill(model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None, cache: KVCache | None, done: int) -> Tensor:
    """Logits after the last token of every prompt, (prompts, V) float32."""
    T = ids.shape[1]
    if mask is None:
        return _logits(model, ids[:, done:], None, None, cache, 1)[:, -1]
    last = (mask * torch.arange(1, T + 1, device=mask.device)).argmax(1)  # (prompts,) column of the last real token
    positions = _positions(mask)[:, done:]
    if bool((last == T - 1).all()):
        return _logits(model, ids[:, done:], mask, positions, cache, 1)[:, -1]
    warnings.warn(
        "generate: the prompts are padded on the right, so their continuations come after the padding; pad on the "
        "left (padding_side='left' of a tokenizer)",
        stacklevel=4,
    )
    if done and bool((last < done).any()):
        raise ValueError("generate: a prompt has no token that past_key_values does not hold already")
    logits = _logits(model, ids[:, done:], mask, positions, cache, 0)
    return logits[torch.arange(len(last), device=last.device), last - done]


def _step(model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
    """Logits after the newest token, (B, V) float32."""
    new = ids if cache is None else ids[:, -1:]
    positions = None if mask is None else _positions(mask)[:, -new.shape[1] :]
    # A cache knows where the prompts were padded, and what is generated never is.
    return _logits(model, new, mask if cache is None else None, positions, cache, 1)[:, -1]


def _logits(
    model: LlamaForCausalLM,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: KVCache | None,
    keep: int,
) -> Tensor:
    out = model(ids, mask, positions, cache, use_cache=cache is not None, logits_to_keep=keep)
    return out.logits.to(torch.float32)


def _positions(mask: Tensor) -> Tensor:
    """Positions that count real tokens only."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


# The options


def _configured(model: LlamaForCausalLM, given: Any, options: dict[str, Any]) -> GenerationConfig:
    """The call's options over `generation_config` over the model's, checked."""
    known = {field.name for field in dataclasses.fields(GenerationConfig)} - {"extra"}
    unknown = sorted(set(options) - known - set(_ABSENT))
    if unknown:
        raise ValueError(f"generate: the following `model_kwargs` are not used by the model: {unknown} (typos?)")
    if given is not None and not isinstance(given, GenerationConfig):
        given = GenerationConfig.from_dict(given if isinstance(given, Mapping) else given.to_dict())
    layers = [model.generation_config, given]
    c = model.config
    values = {"bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id, "pad_token_id": c.pad_token_id}
    for layer in layers:
        values.update({} if layer is None else layer.to_dict())
    values.update({name: value for name, value in options.items() if value is not None or name in _RESETTABLE})
    for name, neutral in _ABSENT.items():
        if values.get(name) is not None and values[name] != neutral:
            raise ValueError(f"generate: {name} = {values[name]!r} is not supported")
    config = GenerationConfig.from_dict(values)
    _check(config)
    if not config.do_sample:
        for name, default in _SAMPLING_ONLY.items():
            if options.get(name) not in (None, default):
                warnings.warn(f"generate: {name} = {options[name]} has no effect without do_sample=True", stacklevel=4)
    return config


_RESETTABLE = ("eos_token_id", "pad_token_id", "top_k", "top_p", "min_p", "max_length")  # None says: switch this off


def _check(config: GenerationConfig) -> None:
    def bounded(name: str, rule: str, good: Callable[[Any], bool]) -> None:
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not good(value)):
            raise ValueError(f"generate: {name} must be {rule}, got {value!r}")

    bounded("max_new_tokens", "an integer greater than 0", lambda v: isinstance(v, int) and v > 0)
    bounded("min_new_tokens", "a non-negative integer", lambda v: isinstance(v, int) and v >= 0)
    bounded("min_length", "a non-negative integer", lambda v: isinstance(v, int) and v >= 0)
    bounded("num_return_sequences", "an integer greater than 0", lambda v: isinstance(v, int) and v > 0)
    bounded("num_beams", "an integer greater than 0", lambda v: isinstance(v, int) and v > 0)
    bounded("repetition_penalty", "greater than 0", lambda v: v > 0)
    if config.do_sample:
        hint = "; for greedy decoding, set do_sample=False" if config.temperature == 0 else ""
        bounded("temperature", f"greater than 0 and finite{hint}", lambda v: 0 < v < math.inf)
        bounded("top_k", "a non-negative integer (0: all tokens)", lambda v: isinstance(v, int) and v >= 0)
        bounded("top_p", "within [0, 1]", lambda v: 0 <= v <= 1)
        bounded("min_p", "within [0, 1]", lambda v: 0 <= v <= 1)
    if config.early_stopping not in (None, True, False, "never"):
        raise ValueError(f"generate: early_stopping must be a boolean or 'never', got {config.early_stopping!r}")
    if (config.num_beams or 1) > 1:
        raise ValueError(f"generate: num_beams = {config.num_beams} is not supported: there is no beam search yet")
    if (config.num_return_sequences or 1) > 1 and not config.do_sample:
        raise ValueError(
            f"generate: num_return_sequences = {config.num_return_sequences} needs do_sample=True; "
            "greedy decoding has one result"
        )


def _prompt(
    model: LlamaForCausalLM, config: GenerationConfig, ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, int | None]:
    """Ids (prompts, T), the mask or None when nothing is padded, the end tokens, the padding token."""
    if ids is None:
        if config.bos_token_id is None:
            raise ValueError("generate: input_ids must be given: the model has no bos_token_id to start from")
        ids = torch.full((1, 1), config.bos_token_id, device=model.device)
    check_ids("input_ids", ids, model.config.vocab_size)
    if ids.shape[1] == 0:
        raise ValueError("generate: input_ids must have at least one token per row, got length 0")
    ids = ids.to(torch.int64)
    given = config.eos_token_id
    eos_ids = [] if given is None else [int(e) for e in (given if isinstance(given, (list, tuple)) else [given])]
    pad = config.pad_token_id if config.pad_token_id is not None else eos_ids[0] if eos_ids else None
    if mask is None:
        if config.pad_token_id is not None and config.pad_token_id not in eos_ids:
            mask = (ids != config.pad_token_id).long()
        elif len(ids) > 1 and pad is not None and bool(ids[:, 0].eq(pad).any()):
            warnings.warn(
                "generate: attention_mask is not given and can't be inferred, since the padding token is an end "
                "token too; every token is taken for real",
                stacklevel=4,
            )
    elif tuple(mask.shape) != tuple(ids.shape):
        raise ValueError(
            f"generate: attention_mask must have input_ids' shape {tuple(ids.shape)}, got {tuple(mask.shape)}"
        )
    else:
        mask = (mask.to(ids.device) != 0).long()
    if mask is not None:
        empty = (mask.sum(1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"generate: attention_mask must keep a token of every row, got none in row {empty[0]}")
        mask = None if bool(mask.all()) else mask
    return ids, mask, torch.tensor(eos_ids, device=ids.device) if eos_ids else None, pad


def _limit(model: LlamaForCausalLM, config: GenerationConfig, T: int) -> int:
    """Length at which generation ends, prompt included."""
    if config.max_new_tokens is not None:
        return T + config.max_new_tokens
    if config.max_length is None:
        limit = min(T + 20, max(model.config.max_position_embeddings, T + 1))
        warnings.warn(f"generate: no max_new_tokens given, so {limit - T} new tokens at most", stacklevel=4)
        return limit
    if config.max_length <= T:
        raise ValueError(
            f"generate: input_ids has {T} tokens, but max_length is {config.max_length}; "
            "raise it, or better set max_new_tokens"
        )
    return config.max_length


# Processors


def _processors(
    config: GenerationConfig,
    prompt: Tensor,
    mask: Tensor | None,
    T: int,
    eos: Tensor | None,
    custom: Iterable[Processor],
) -> list[Processor]:
    """In transformers' order."""
    found: list[Processor] = []
    if config.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenalty(float(config.repetition_penalty), mask, T))
    shortest = config.min_length or 0
    if config.min_new_tokens:
        shortest = T + config.min_new_tokens
    if eos is not None and shortest > T:
        found.append(lambda ids, scores: scores if ids.shape[1] >= shortest else scores.index_fill(1, eos, -math.inf))
    found.extend(custom)
    if config.do_sample:
        temperature, top_k = config.temperature, 50 if config.top_k is None else config.top_k
        top_p, min_p = config.top_p, config.min_p
        if temperature not in (None, 1.0):
            found.append(lambda ids, scores: scores / temperature)
        if top_k:
            found.append(lambda ids, scores: keep_top_k(scores, top_k))
        if top_p is not None and top_p < 1.0:
            found.append(lambda ids, scores: keep_top_p(scores, top_p))
        if min_p is not None:
            found.append(lambda ids, scores: keep_min_p(scores, min_p))
    return found
