"""Multi-head, grouped-query, multi-query: what sharing keys and values saves, and whom it serves.

`pytest benchmarks/test_kv_heads.py --benchmark-only`: one model with 8 query heads (32 on a GPU) and fewer and fewer
key-value heads; bytes of the cache, seconds to read the prompt, tokens per second after it. The weights of keys and
values shrink with the heads too, which is a part of what is gained.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import pytest
import torch

from benchmarks import budget
from pyllm import LlamaConfig, LlamaForCausalLM
from pyllm.cache import KVCache

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
H = 32 if GPU else 8
BATCH, PROMPT, NEW = (16, 8192, 64) if GPU else (2, int(os.environ.get("PYLLM_BENCH_PROMPT", 2048)), 16)
ROUNDS = int(os.environ.get("PYLLM_BENCH_ROUNDS", 5))


def model(kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=H * (128 if GPU else 64), intermediate_size=H * (352 if GPU else 176),
        num_hidden_layers=8 if GPU else 4, num_attention_heads=H, num_key_value_heads=kv_heads,
        max_position_embeddings=PROMPT + NEW + 1,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE, torch.bfloat16 if GPU else torch.float32).eval()


@pytest.mark.parametrize("kv_heads", [h for h in (32, 16, 8, 4, 2, 1) if h <= H], ids=lambda h: f"Hkv{h}")
@torch.no_grad()
def test_kv_heads(benchmark, journal, deadline, kv_heads):
    budget.rounds(deadline, 0.0, ROUNDS)
    lm = model(kv_heads)
    length = PROMPT if benchmark.enabled else 128
    prompt = torch.randint(1024, (BATCH, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cache = KVCache(capacity=PROMPT + NEW + 1)

    def read() -> None:
        cache.reset()
        lm(prompt, past_key_values=cache, logits_to_keep=1)
        if GPU:
            torch.cuda.synchronize()

    def write() -> None:
        cache.crop(length)
        token = prompt[:, -1:]
        for _ in range(NEW):
            token = lm(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"decode, {BATCH} texts of {PROMPT} tokens"
    prefill: list[float] = []
    for _ in range(2 if benchmark.enabled else 1):
        start = time.perf_counter()
        read()
        prefill.append(time.perf_counter() - start)
    start = time.perf_counter()
    write()
    took = time.perf_counter() - start
    benchmark.pedantic(write, rounds=budget.rounds(deadline, took, ROUNDS, before=took), warmup_rounds=1)
    if not benchmark.enabled:
        return
    seconds = [s / NEW for s in benchmark.stats.stats.data]
    row: dict[str, Any] = dict(
        op="kv heads", case=f"{BATCH} x {PROMPT} tokens, {H} query heads", passed="decode step",
        dtype=str(lm.dtype)[6:], who=f"{kv_heads} kv heads", seconds=statistics.median(seconds),
        spread=max(seconds) - min(seconds),
        kv_heads=kv_heads, tokens=BATCH, cache=cache.nbytes(), prefill=min(prefill), bytes=0, flops=0.0,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    journal.row(row)
    benchmark.extra_info.update(row)
