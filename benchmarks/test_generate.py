"""Generation against transformers, in one run: `pytest benchmarks/test_generate.py --benchmark-only`.

Tokens per second of greedy search at batch 1 and 8 and of beam search with 4 beams, and at batch 1 in half precision
and with weights of 8 and 4 bits, on a model of 100 million parameters. The rivals take turns with ours round by round:
transformers' `generate` as it is, twice, which shows the noise; and its forward compiled over a static cache, in the
PYLLM_BENCH_COMPILE=0 leaves that rival out.

PYLLM_BENCH_THREADS (1) and PYLLM_BENCH_ROUNDS (7) as they say. With one thread processor time is taken, which other
programs disturb less than wall time; with more, and on a GPU, wall time. A step reads every weight once, so that on a
CPU each case is also put beside what a plain sum over memory reads per second in the same run: the most there is.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import budget
from pyllm import LlamaForCausalLM, engine

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = dict(
    vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
    num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=None, tie_word_embeddings=True,
)  # fmt: skip
PROMPT = 16
ROUNDS = int(os.environ.get("PYLLM_BENCH_ROUNDS", 7))
THREADS = int(os.environ.get("PYLLM_BENCH_THREADS", 1))
COMPILE = os.environ.get("PYLLM_BENCH_COMPILE", "1") != "0"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    batch: int
    beams: int = 1
    new: int = 32
    dtype: torch.dtype = torch.float32
    quantize: str | None = None  # ours only: the rival keeps its float32
    off: float = 1e-4  # how far the logits may be apart: what is wrong is not timed


CASES = {
    "batch 1": Case(1),
    "batch 8": Case(8),
    "beam 4": Case(1, 4),
    "batch 1, 256 tokens": Case(1, new=256),
    "batch 1, bfloat16": Case(1, dtype=torch.bfloat16, off=0.1),
    "batch 1, int8": Case(1, quantize="int8", off=0.1),
    "batch 1, int4": Case(1, quantize="int4", off=0.6),
}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval().to(DEVICE)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def seconds(call: Callable[[], Any]) -> float:
    clock = time.process_time if DEVICE == "cpu" and THREADS == 1 else time.perf_counter
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
@torch.no_grad()
def test_generate(name, theirs, benchmark, journal, deadline):
    case = CASES[name]
    work = 2 * sum(p.numel() for p in theirs.parameters()) * case.batch * case.new
    budget.rounds(deadline, 2 * budget.expected(work, case.dtype), ROUNDS)
    if not benchmark.enabled:  # a few tokens show that it runs and is right
        case = case._replace(new=4)
    if case.quantize and DEVICE == "cuda":
        pytest.skip("weights of 8 and 4 bits are for CPUs")
    rival = copy.deepcopy(theirs).to(case.dtype)
    ours = LlamaForCausalLM(theirs.config).eval().to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    ours.to(case.dtype)
    if case.quantize:
        ours.quantize(case.quantize)
    if DEVICE == "cpu":
        assert engine.why_not(ours) == []
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, SIZES["vocab_size"], (case.batch, PROMPT), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": case.new, "num_beams": case.beams, "do_sample": False}
    rivals: dict[str, Callable[[], Any]] = {
        "transformers": lambda: rival.generate(ids, attention_mask=mask, pad_token_id=0, **options),
        "transformers again": lambda: rival.generate(ids, attention_mask=mask, pad_token_id=0, **options),
    }
    if COMPILE and deadline == float("inf") and case.beams == 1 and case.new == 32 and not case.quantize:
        compiled = Compiled(rival, case.new)
        rivals["transformers, static cache, compiled"] = lambda: compiled(ids)
    mine = lambda: ours.generate(ids, mask, **options)  # noqa: E731

    if benchmark.enabled:  # a few tokens tell how long all of them would take
        took = seconds(
            lambda: rival.generate(ids, attention_mask=mask, pad_token_id=0, **{**options, "max_new_tokens": 4})
        )
        budget.rounds(deadline, 2 * took * case.new / 4, ROUNDS, before=2 * took * case.new / 4)
    a, b = (model(ids).logits.double() for model in (ours, rival))
    assert float((a - b).norm() / b.norm()) < case.off
    if case.off < 1e-3:
        assert torch.equal(mine(), rivals["transformers"]())
    if not benchmark.enabled:
        benchmark(mine)
        return
    start = time.perf_counter()
    for call in (mine, rivals["transformers"]):
        call()
    took = time.perf_counter() - start
    rounds = budget.rounds(deadline, 2 * took, ROUNDS)
    if len(rivals) > 2:
        rivals["transformers, static cache, compiled"]()
    taken: dict[str, list[float]] = {other: [] for other in (*rivals, "a sum over memory")}
    memory = torch.ones(100_000_000) if DEVICE == "cpu" else None

    def before_each_round():
        for other, call in rivals.items():
            taken[other].append(seconds(call))
        if memory is not None:
            taken["a sum over memory"].append(seconds(memory.sum))

    own: list[float] = []
    benchmark.pedantic(lambda: own.append(seconds(mine)), setup=before_each_round, rounds=rounds)
    rate = case.batch * case.new / statistics.median(own)
    found = {other: case.batch * case.new / statistics.median(taken[other]) for other in rivals}
    benchmark.extra_info.update(pyllm=rate, threads=THREADS, **found)
    for who, values in {"pyllm": own, **taken}.items():
        if who != "a sum over memory":
            journal.row(dict(
                op="generation", case=name, passed="whole text", dtype=str(case.dtype)[6:], threads=THREADS, bytes=0,
                who=who, seconds=statistics.median(values), spread=max(values) - min(values), flops=0.0,
                tokens=case.batch * case.new,
            ))  # fmt: skip
    print(f"\n{name}, {THREADS} threads: pyllm {rate:.1f} tokens/s", end="")
    for other, theirs_rate in found.items():
        print(f"; {other} {theirs_rate:.1f} ({rate / theirs_rate:.2f}x)", end="")
    if memory is not None:
        read = memory.nbytes / statistics.median(taken["a sum over memory"])
        weights = engine._plan(ours).sizes["total_bytes"]
        steps = rate / case.batch
        print(f"; reads {weights * steps / 1e9:.1f} GB/s of weights, a sum over memory {read / 1e9:.1f}", end="")
    print()
