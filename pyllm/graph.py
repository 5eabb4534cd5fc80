"""Decoding that never waits for the host: a step as one CUDA graph, replayed token after token.

Everything that changes from step to step lives on the device at a fixed address: the newest tokens, their positions and
column, the cache's lengths, which rows go on, the random numbers of all steps. So a step is the same launches every
time, and is captured once. The host asks only now and then whether all rows have ended, and cuts off what was written
too much. `step` is an ordinary function: without a graph, on a CPU too, it computes the same.

What needs the host at every step (processors that read the text, stop strings, the caller's own functions) is not for
this loop; `fits` tells.

Names: B rows, T prompt length, L length at which generation ends, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache import KVCache
from .kernels import sample
from .kernels.dispatch import parse
from .processors import Processor, apply
from .sampling import Draws, draw_tokens

if TYPE_CHECKING:
    from .generate import Call
    from .model import LlamaForCausalLM
    from .options import GenerationConfig

WARM = 3  # steps that run as they are before one is captured: allocators and lazily built kernels settle
ASK = 16  # steps between two questions whether all rows have ended


def fits(config: GenerationConfig) -> bool:
    """Whether no option needs to see the text, or the scores, at every step."""
    reads_text = (
        config.sequence_bias, config.bad_words_ids, config.exponential_decay_length_penalty, config.stop_strings,
        config.suppress_tokens, config.begin_suppress_tokens, config.forced_bos_token_id, config.forced_eos_token_id,
        config.max_time, config.no_repeat_ngram_size or None, config.min_length or None, config.min_new_tokens or None,
        None if config.repetition_penalty in (None, 1.0) else config.repetition_penalty,
    )  # fmt: skip
    kept = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    cached = config.use_cache is not False
    return cached and config.beams == 1 and not kept and all(value is None for value in reads_text)


class DeviceLoop:
    """The rows of a batch after their prompts.

    Args:
        out: (B, L) ids, the prompts in the first T columns and padding tokens behind.
        logits: (B, V) after the prompts.
        positions: (B, 1) of the next token.
        cache: filled with the prompts, not growable, room for L tokens.
        process: processors that don't read the ids.
        options: of `pyllm.kernels.sample`, which then draws from what they leave; None: they have done it all.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        out: Tensor,
        T: int,
        logits: Tensor,
        positions: Tensor,
        cache: KVCache,
        process: list[Processor],
        draws: Draws | None,
        eos: Tensor | None,
        options: Mapping[str, Any] | None = None,
    ):
        B, L = out.shape
        self.model, self.out, self.cache, self.process, self.eos = model, out, cache, process, eos
        self.numbers = None if draws is None else draws.ahead(L - T)
        self.options = options
        # A model that was told a backend which doesn't draw has eager draw.
        self.backend = ",".join((*parse(model.backend), "eager")) if parse(model.backend) else None
        self.column = torch.full((1,), T, dtype=torch.int64, device=out.device)
        self.step_index = torch.zeros_like(self.column)
        self.running = torch.ones(B, dtype=torch.bool, device=out.device)
        self.length = torch.full((B,), T, dtype=torch.int64, device=out.device)  # of each row, its end token included
        self.token = torch.zeros(B, 1, dtype=torch.int64, device=out.device)
        self.position = positions.clone()
        self.choose(logits)
        cache.pin()

    def choose(self, logits: Tensor) -> None:
        """Write the token that follows; logits (B, V) float32."""
        scores = apply(self.process, self.out, logits)
        if self.numbers is None:
            token = scores.argmax(-1)
        else:
            numbers = self.numbers.index_select(0, self.step_index)[0]
            if self.options is not None:
                token = sample(scores, numbers, **self.options, backend=self.backend)
            else:
                token = draw_tokens(scores.softmax(-1), numbers)
        rows = self.column.expand(len(token), 1)
        token = torch.where(self.running, token, self.out.gather(1, rows)[:, 0])
        self.out.scatter_(1, rows, token[:, None])
        self.token.copy_(token[:, None])
        self.length += self.running
        if self.eos is not None:
            self.running &= (token[:, None] != self.eos).all(1)  # isin would sort and wait for many end tokens
        self.column += 1
        self.step_index += 1

    def step(self) -> None:
        """The newest token through the model, and the next one chosen. Reads and writes device memory only."""
        out = self.model(self.token, None, self.position, self.cache, use_cache=True, logits_to_keep=1)
        self.position += 1
        self.choose(out.logits[:, -1].to(torch.float32))


def decode(call: Call, loop: DeviceLoop, ask: int = ASK) -> Iterator[Tensor]:
    """The tokens of a call, (B,) each. On a CUDA device the steps after the first few are replays of a graph."""
    graph = None
    side = torch.cuda.Stream() if call.device.type == "cuda" else None
    call.t += 1
    yield loop.token[:, 0].clone()
    for i in range(call.limit - call.T - 1):
        if loop.eos is not None and i % ask == 0 and not bool(loop.running.any()):
            break
        with torch.no_grad():
            if side is None:
                loop.step()
            elif i < WARM:  # a captured stream may not be the default one, nor may what it warms up on
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    loop.step()
                torch.cuda.current_stream().wait_stream(side)
            else:
                if graph is None:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        loop.step()
                    loop.cache.seen -= 1  # capturing computes nothing
                graph.replay()
                loop.cache.seen += 1
        call.t += 1
        yield loop.token[:, 0].clone()
    call.t = int(loop.length.max())
    loop.cache.pinned = False
    loop.cache.crop(call.t - 1)
