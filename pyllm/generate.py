"""Generation: prompts in, continuations out, with Hugging Face's options, defaults and results.

One step: logits of the last token -> processors (`processors.py`, in transformers' order) -> argmax or a draw -> the
next input. Beams are in `beam.py`, speculation in `speculative.py`, what stops a row in `stopping.py`.

Names: B rows (prompts times sequences per prompt), T prompt length, t tokens so far, V vocab.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from . import graph
from .beam import search
from .cache import KVCache
from .decode import Decoder, cache_window
from .inputs import check_ids
from .options import GenerationConfig, check_length, configured
from .outputs import ModelOutput
from .processors import Processor, apply, draw_options, processors, warpers
from .quantized import quantize
from .sampling import Draws
from .speculative import DraftModel, Drafts, PromptLookup, speculate
from .stopping import Criterion, Stopping
from .stream import pieces

if TYPE_CHECKING:
    from .model import LlamaForCausalLM

__all__ = ["GenerateBeamDecoderOnlyOutput", "GenerateDecoderOnlyOutput", "GenerationConfig", "generate", "stream"]

RESERVED = 1024  # new tokens that a cache has room for at first; it grows when a text is longer


@dataclass
class GenerateDecoderOnlyOutput(ModelOutput):
    """sequences (B, T + new); per new token scores (B, V) as processed and logits (B, V) as computed."""

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: KVCache | None = None


@dataclass
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """sequences (results, T + new), best first for every prompt; sequences_scores (results,): sums of log
    probabilities over generated length ** length_penalty; per step the scores (prompts * beams, V), log probabilities
    as processed, and logits; beam_indices (results, new): the row of `scores` that each token was taken from, -1 behind
    the end."""

    sequences: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    past_key_values: KVCache | None = None


class GenerationMixin:
    """What a model gets from this module."""

    def generate(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Continue prompts; see `pyllm.generate.generate`."""
        return generate(cast("LlamaForCausalLM", self), input_ids, attention_mask, **options)

    def stream(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Iterator[Any]:
        """Continue a prompt, piece by piece; see `pyllm.generate.stream`."""
        return stream(cast("LlamaForCausalLM", self), input_ids, attention_mask, **options)

    def quantize(self, kind: str) -> LlamaForCausalLM:
        """Keep the matrices in 8 or 4 bits ("int8", "int4") from here on, in place, for inference on a CPU; see
        `pyllm.quantized.quantize`. Returns the model."""
        model = cast("LlamaForCausalLM", self)
        quantize(model, kind)
        return model

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: tuple[Tensor, ...],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The score of every generated token, (B, new), from what `generate` returned; 0 behind the end of a beam.

        Args:
            normalize_logits: turn the scores into log probabilities first; those of beams are already.
        """
        steps = torch.stack(scores)  # (new, rows, V)
        if normalize_logits:
            steps = steps.log_softmax(-1)
        if beam_indices is None:
            beam_indices = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, len(scores))
        n = int((beam_indices >= 0).sum(1).max())
        rows = beam_indices[:, :n].long()
        found = steps[torch.arange(n, device=rows.device), rows.clamp(min=0), sequences[:, -n:]]
        return found.masked_fill(rows < 0, 0.0)


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
    assistant_model: LlamaForCausalLM | None = None,
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    logits_processor: Iterable[Processor] = (),
    stopping_criteria: Iterable[Criterion] = (),
    **options: Any,
) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    """Continue every prompt of a batch.

    Args:
        input_ids: (prompts, T), shorter prompts padded on the left. None: one row with the beginning-of-text token.
        attention_mask: (prompts, T), 0 at padding. When not given, it is inferred from `pad_token_id` if that is not
            an end token.
        seed: makes sampling repeat itself. Row i draws from a stream of its own, made of the seed and i, so what the
            other rows hold does not matter.
        generator: draw from this instead. With neither, torch's global generator is used.
        streamer: an object with put(ids) and end(), given the prompt and then every token.
        tokenizer: knows the text of tokens, for `stop_strings`.
        past_key_values: a cache that holds the first tokens of the prompt already; it is extended in place.
        assistant_model: a smaller model with the same vocabulary, which proposes tokens (speculative decoding).
        logits_processor, stopping_criteria: functions as in transformers, of ids (B, t) and scores (B, V).
        options: the fields of GenerationConfig, with Hugging Face's meaning and defaults. They go before
            `generation_config`, which goes before the model's own.
    Returns:
        (prompts * num_return_sequences, T + new) ids, prompts included; a row that has ended is filled up with
        pad_token_id. With return_dict_in_generate an output object.
    Raises:
        ValueError: an option is unknown, not supported or out of its bounds, or a prompt is malformed.
    """
    call = Call(
        model, input_ids, attention_mask, generation_config, options, seed, generator, tokenizer, past_key_values,
        assistant_model, tuple(logits_processor), tuple(stopping_criteria),
    )  # fmt: skip
    if call.config.beams > 1:
        if streamer is not None:
            raise ValueError("generate: a streamer does not go with beams: nothing is final before the end")
        return call.beams()
    if streamer is not None:
        call.streaming = True
        streamer.put(call.ids.cpu())
    for tokens in call.steps():
        if streamer is not None:
            streamer.put(tokens.cpu())
    if streamer is not None:
        streamer.end()
    return call.result()


def stream(
    model: LlamaForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    tokenizer: Any = None,
    text: bool | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    past_key_values: KVCache | None = None,
    assistant_model: LlamaForCausalLM | None = None,
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    logits_processor: Iterable[Processor] = (),
    stopping_criteria: Iterable[Criterion] = (),
    **options: Any,
) -> Iterator[Any]:
    """`generate` as an iterator over what is new of a single prompt: pieces of text where a tokenizer is given, valid
    UTF-8 each, or else token ids. Whoever stops to iterate stops the work. Arguments are checked at once.

    Args:
        text: False yields ids although there is a tokenizer (for `stop_strings`).
        others: as `generate`; one row only, and no beams.
    """
    call = Call(
        model, input_ids, attention_mask, generation_config, options, seed, generator, tokenizer, past_key_values,
        assistant_model, tuple(logits_processor), tuple(stopping_criteria),
    )  # fmt: skip
    if call.rows != 1 or call.config.beams > 1:
        got = f"{call.rows} rows, {call.config.beams} beams"
        raise ValueError(f"stream: one prompt, one result and no beams, got {got}")
    if text and tokenizer is None:
        raise ValueError("stream: text=True needs tokenizer=")
    call.streaming = True
    return pieces(call.steps(), tokenizer if text is not False else None)


class Call:
    """One call of `generate`: everything is checked when it is made, and computed when it is asked for."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        ids: Tensor | None,
        mask: Tensor | None,
        given: Any,
        options: dict[str, Any],
        seed: int | None,
        generator: torch.Generator | None,
        tokenizer: Any,
        cache: KVCache | None,
        assistant: LlamaForCausalLM | None,
        custom: tuple[Processor, ...],
        criteria: tuple[Criterion, ...],
    ):
        self.config = config = configured(model.config, model.generation_config, given, options)
        if seed is not None and generator is not None:
            raise ValueError("generate: give seed or generator, not both")
        if cache is not None and not isinstance(cache, KVCache):
            raise ValueError(f"generate: past_key_values must be a pyllm.KVCache, got {type(cache)}")
        self.ids, self.mask, self.pad = _prompt(model, config, ids, mask)
        self.model, self.seed, self.generator = model, seed, generator
        self.prompts, self.T = self.ids.shape
        self.device = self.ids.device
        self.rows = self.prompts * (config.sequences if config.beams == 1 else 1)
        self.drafts = self._drafts(assistant)
        spare = self.drafts.most if self.drafts is not None else 0
        room = None if cache is None or cache.growable or cache.window is not None else cache.capacity
        self.limit = check_length(config, model.config, self.T, room, spare=spare)
        self.stopping = Stopping(config, tokenizer, criteria, self.device)
        self.custom = custom
        whole = cache is None and self.drafts is None and not custom and not criteria
        self.on_device = self.device.type == "cuda" and whole and graph.fits(config)
        self.streaming = False  # whether somebody wants every token at once
        self.cache = self._cache(cache, spare)
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def _drafts(self, assistant: LlamaForCausalLM | None) -> Drafts | None:
        config = self.config
        if assistant is None and config.prompt_lookup_num_tokens is None:
            return None
        if assistant is not None and config.prompt_lookup_num_tokens is not None:
            raise ValueError(
                "generate: assistant_model and prompt_lookup_num_tokens are two ways to the same; give one"
            )
        name = "prompt_lookup_num_tokens" if assistant is None else "assistant_model"
        if self.rows != 1 or config.beams > 1:
            raise ValueError(f"generate: {name} needs one prompt, one result and no beams, got {self.rows} rows")
        if config.use_cache is False:
            raise ValueError(f"generate: {name} needs the cache, but use_cache is False")
        if assistant is None:
            assert config.prompt_lookup_num_tokens is not None
            return PromptLookup(config.prompt_lookup_num_tokens, config.max_matching_ngram_size or 2)
        if assistant.config.vocab_size != self.model.config.vocab_size:
            raise ValueError(
                f"generate: assistant_model must have the model's vocabulary of {self.model.config.vocab_size} tokens, "
                f"got {assistant.config.vocab_size}"
            )
        return DraftModel(assistant, config.num_assistant_tokens or 5)

    def _cache(self, cache: KVCache | None, spare: int) -> KVCache | None:
        config = self.config
        if cache is None:
            if config.use_cache is False:
                if config.prefill_chunk_size is not None:
                    raise ValueError("generate: prefill_chunk_size needs the cache, but use_cache is False")
                return None
            if self.on_device:
                return KVCache(self.limit, growable=False)
            # Beams and drafts take tokens back or let rows branch, which a ring can't.
            ring = self.config.beams == 1 and self.drafts is None
            size = min(self.limit, self.T + RESERVED) + spare
            return KVCache(size, window=cache_window(self.model) if ring else None)
        if config.use_cache is False:
            raise ValueError("generate: past_key_values is given, but use_cache is False")
        if config.beams > 1:
            raise ValueError("generate: past_key_values does not go with beams, which lay out a cache of their own")
        if cache.window is not None and self.drafts is not None:
            raise ValueError("generate: speculation takes tokens back, which past_key_values with a window can't")
        if cache.seen >= self.T:
            raise ValueError(
                f"generate: past_key_values holds {cache.seen} tokens, the prompt has {self.T}; pass the whole sequence"
            )
        return cache

    @torch.no_grad()
    def beams(self) -> Tensor | GenerateBeamDecoderOnlyOutput:
        config, n = self.config, self.config.beams
        mask = None if self.mask is None else self.mask.repeat_interleave(n, 0)
        found = search(
            self.model,
            self.ids,
            self.mask,
            self.cache,
            config,
            self.limit,
            self.pad,
            processors(config, mask, self.T, self.limit, self.device, self.custom),
            self.stopping,
            Draws(self.prompts, self.seed, self.generator, self.device) if config.do_sample else None,
        )
        if not config.return_dict_in_generate:
            return found.sequences
        return GenerateBeamDecoderOnlyOutput(
            found.sequences,
            found.sequences_scores if config.output_scores else None,
            tuple(found.scores) if config.output_scores else None,
            tuple(found.logits) if config.output_logits else None,
            found.beam_indices,
        )

    def steps(self) -> Iterator[Tensor]:
        """Computes token after token: (B,) each; from speculation (1, new), one or more."""
        config, T, B = self.config, self.T, self.rows
        rows = torch.arange(self.prompts, device=self.device).repeat_interleave(config.sequences)
        self.out = torch.full((B, self.limit), self.pad or 0, dtype=torch.int64, device=self.device)
        self.out[:, :T] = self.ids[rows]
        self.t = T
        mask = None if self.mask is None else self.mask[rows]
        process = processors(config, mask, T, self.limit, self.device, self.custom)
        draws = Draws(B, self.seed, self.generator, self.device) if config.do_sample else None
        decoder = Decoder(self.model, self.ids, self.mask, self.cache, config.prefill_chunk_size)
        if self.drafts is not None:
            yield from speculate(self, decoder, self.drafts, process, draws)
            return
        with torch.no_grad():
            logits = decoder.prefill()[rows]  # (B, V)
            if self.prompts < B:
                decoder.expand(rows)
            if self.on_device and self.limit > T + 1:
                loop = self.device_loop(decoder, logits, process, draws)
        if self.on_device and self.limit > T + 1:
            yield from graph.decode(self, loop, 1 if self.streaming else graph.ASK)
            return
        running = torch.ones(B, dtype=torch.bool, device=self.device)
        while True:
            with torch.no_grad():
                scores = apply(process, self.out[:, : self.t], logits)
                self.keep(scores, logits)
                token = scores.argmax(-1) if draws is None else draws.tokens(scores.softmax(-1))  # (B,)
                if self.stopping.eos is not None:
                    token = torch.where(running, token, self.out[:, self.t])
                self.out[:, self.t] = token
                self.t += 1
                ended = self.t == self.limit
                if self.stopping:
                    running = running & ~self.stopping(self.out[:, : self.t], scores)
                    ended = ended or not bool(running.any())
            yield token
            if ended:
                return
            with torch.no_grad():
                logits = decoder.step(self.out[:, : self.t])

    def device_loop(
        self, decoder: Decoder, logits: Tensor, process: list[Processor], draws: Draws | None
    ) -> graph.DeviceLoop:
        """What is decoded without the host; logits (B, V) after the prompts."""
        after = decoder.after
        if after is None:
            after = torch.full((self.rows, 1), self.T, dtype=torch.int64, device=self.device)
        assert self.cache is not None
        options = None if draws is None else draw_options(self.config)
        if options is not None:  # what shapes the distribution comes last, and is the drawing kernel's work
            process = process[: len(process) - len(warpers(self.config))]
        return graph.DeviceLoop(
            self.model, self.out, self.T, logits, after, self.cache, process, draws, self.stopping.eos, options
        )

    def keep(self, scores: Tensor, logits: Tensor) -> None:
        """Remember what the caller asked to see, (B, V) each."""
        if self.config.return_dict_in_generate:
            self.scores += [scores] if self.config.output_scores else []
            self.logits += [logits] if self.config.output_logits else []

    def result(self) -> Tensor | GenerateDecoderOnlyOutput:
        config, sequences = self.config, self.out[:, : self.t]
        if not config.return_dict_in_generate:
            return sequences
        scores = tuple(self.scores) if config.output_scores else None
        logits = tuple(self.logits) if config.output_logits else None
        return GenerateDecoderOnlyOutput(sequences, scores, logits, self.cache)


def _prompt(
    model: LlamaForCausalLM, config: GenerationConfig, ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, int | None]:
    """Ids (prompts, T), the mask or None when nothing is padded, the padding token."""
    if ids is None:
        if config.bos_token_id is None:
            raise ValueError("generate: input_ids must be given: the model has no bos_token_id to start from")
        ids = torch.full((1, 1), config.bos_token_id, device=model.device)
    check_ids("input_ids", ids, model.config.vocab_size)
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(
            f"generate: input_ids must have at least one row and one token per row, got {tuple(ids.shape)}"
        )
    ids = ids.to(model.device, torch.int64)
    eos_ids = config.eos_ids
    pad = config.pad_token_id if config.pad_token_id is not None else eos_ids[0] if eos_ids else None
    if mask is None:
        if config.pad_token_id is not None and config.pad_token_id not in eos_ids:
            mask = (ids != config.pad_token_id).long()
        elif len(ids) > 1 and pad is not None and bool(ids[:, 0].eq(pad).any()):
            warnings.warn(
                "generate: attention_mask is not given and can't be inferred, since the padding token is an end "
                "token too; every token is taken for real",
                stacklevel=5,
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
    return ids, mask, pad
