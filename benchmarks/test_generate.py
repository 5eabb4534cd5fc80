"""Generation against transformers, in one run: `pytest benchmarks/test_generate.py --benchmark-only`.

Tokens per second of processor time (one thread) for greedy search at batch 1 and 8 and for beam search with 4 beams.
The rivals: transformers' `generate` as it is, and with PYLLM_BENCH_COMPILE=1, as it takes minutes to compile, its
forward compiled over a static cache, in the loop that gives it its best (gpt-fast's recipe; `generate` itself compiles
on GPUs only). All take turns, round by round, and transformers is timed twice, which shows the noise. On a GPU wall
time is taken, and ours decodes with one graph per step.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyllm import LlamaForCausalLM

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = dict(
    vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
PROMPT = 16
ROUNDS = int(os.environ.get("PYLLM_BENCH_ROUNDS", 7))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {"batch 1": (1, 1, 64), "batch 8": (8, 1, 64), "beam 4": (1, 4, 64), "batch 1, 256 tokens": (1, 1, 256)}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval().to(DEVICE)
    ours = LlamaForCausalLM(theirs.config).eval().to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def seconds(call: Callable[[], Any]) -> float:
    """Processor time on a CPU, where other programs disturb wall time; wall time on a GPU."""
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    start = clock()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock() - start


class Compiled:
    """transformers' forward, compiled, over a static cache: greedy, one token after the other."""

    def __init__(self, model: Any, new: int):
        self.model, self.new = model, new
        self.step = torch.compile(model.forward, dynamic=False)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        B, T = ids.shape
        cache = transformers.StaticCache(config=self.model.config, max_cache_len=T + self.new)
        out = self.model(ids, past_key_values=cache)
        row = [out.logits[:, -1].argmax(-1, keepdim=True)]
        for t in range(T, T + self.new - 1):
            position = torch.full((B, 1), t, device=ids.device)
            out = self.step(input_ids=row[-1], past_key_values=cache, position_ids=position)
            row.append(out.logits[:, -1].argmax(-1, keepdim=True))
        return torch.cat((ids, *row), 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_generate(name, models, benchmark):
    theirs, ours = models
    batch, beams, new = CASES[name]
    ids = torch.randint(3, SIZES["vocab_size"], (batch, PROMPT), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": new, "num_beams": beams, "do_sample": False}
    rivals: dict[str, Callable[[], Any]] = {
        "transformers": lambda: theirs.generate(ids, attention_mask=mask, pad_token_id=0, **options),
        "transformers again": lambda: theirs.generate(ids, attention_mask=mask, pad_token_id=0, **options),
    }
    if beams == 1 and os.environ.get("PYLLM_BENCH_COMPILE"):
        compiled = Compiled(theirs, new)
        rivals["transformers, static cache, compiled"] = lambda: compiled(ids)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = ours.generate(ids, mask, **options)
        assert torch.equal(expected, rivals["transformers"]())  # what is wrong is not timed
        for rival in rivals.values():
            rival()
        taken: dict[str, list[float]] = {rival: [] for rival in rivals}

        def before_each_round():
            for rival, call in rivals.items():
                taken[rival].append(seconds(call))

        mine: list[float] = []
        benchmark.pedantic(
            lambda: mine.append(seconds(lambda: ours.generate(ids, mask, **options))),
            setup=before_each_round, rounds=ROUNDS,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    rate = batch * new / statistics.median(mine)
    found = {rival: batch * new / statistics.median(values) for rival, values in taken.items()}
    benchmark.extra_info.update(pyllm=rate, **found)
    print(f"\n{name}: pyllm {rate:.1f} tokens/s", end="")
    for rival, other in found.items():
        print(f"; {rival} {other:.1f} ({rate / other:.2f}x)", end="")
    print()
