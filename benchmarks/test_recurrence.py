"""Why pretraining moved to attention: an LSTM, a GRU and a Transformer of equal size, trained on the same batches.

`pytest benchmarks/test_recurrence.py --benchmark-only` measures tokens per second of a training step (forward,
backward, fused AdamW) over sequence lengths, and what share of the machine's matrix rate it uses. The number of tokens
in a batch is the same at every length: longer means fewer rows, hence for a recurrent net thinner products and more of
them, one after the other. `python -m benchmarks report` draws the figure.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import budget
from pyllm import LlamaConfig, LlamaForCausalLM

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOKENS = int(os.environ.get("PYLLM_BENCH_TOKENS", 65536 if GPU else 4096))  # in a batch
LENGTHS = (64, 256, 1024, 4096)
ROUNDS = int(os.environ.get("PYLLM_BENCH_ROUNDS", 5))
CONFIG = LlamaConfig(
    vocab_size=8192 if GPU else 512,
    hidden_size=1024 if GPU else 192,
    intermediate_size=2816 if GPU else 512,
    num_hidden_layers=8 if GPU else 4,
    num_attention_heads=16 if GPU else 6,
    num_key_value_heads=16 if GPU else 6,
    max_position_embeddings=max(LENGTHS),
)


class Recurrent(nn.Module):
    """Embedding, as many recurrent layers as the Transformer has, logits; called as pyllm's models are.

    Args:
        kind: nn.LSTM or nn.GRU, cuDNN's kernels on a GPU.
        width: hidden size.
    """

    def __init__(self, kind: type[nn.RNNBase], width: int):
        super().__init__()
        self.embed = nn.Embedding(CONFIG.vocab_size, width)
        self.layers = kind(width, width, CONFIG.num_hidden_layers, batch_first=True)
        self.head = nn.Linear(width, CONFIG.vocab_size, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.layers(self.embed(ids))[0])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Transformer(nn.Module):
    """pyllm's model, with its kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(CONFIG)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        loss = self.model(ids, shift_labels=targets, use_cache=False, return_logits=False).loss
        assert isinstance(loss, Tensor)
        return loss


def size(model: nn.Module) -> int:
    """Weights that take part in matrix products: all but the embedding's, which are looked up."""
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    return sum(p.numel() for p in model.parameters()) - looked_up


def width_of(kind: type[nn.RNNBase], wanted: int) -> int:
    """The hidden size, a multiple of 8, with which a recurrent net comes closest to `wanted` weights."""
    gates = {nn.LSTM: 4, nn.GRU: 3}[kind]

    def weights(width: int) -> int:
        layer = gates * (2 * width * width + 2 * width)
        return CONFIG.num_hidden_layers * layer + width * CONFIG.vocab_size

    return min(range(8, 8 * CONFIG.hidden_size, 8), key=lambda width: abs(weights(width) - wanted))


def models() -> dict[str, Callable[[], nn.Module]]:
    """Who is compared, each made when it is wanted."""
    wanted = size(Transformer())
    return {
        "transformer": Transformer,
        "LSTM": lambda: Recurrent(nn.LSTM, width_of(nn.LSTM, wanted)),
        "GRU": lambda: Recurrent(nn.GRU, width_of(nn.GRU, wanted)),
    }


def flops(model: nn.Module, batch: int, length: int) -> float:
    """Useful operations of one step: 6 a weight and token; attention's scores and sums, half of them masked."""
    total = 6.0 * size(model) * batch * length
    if isinstance(model, Transformer):
        attended = length * (length + 1) / 2
        total += 3 * 4 * attended * batch * CONFIG.num_hidden_layers * CONFIG.num_attention_heads * CONFIG.width
    return total


def stepper(model: nn.Module, batch: int, length: int) -> Callable[[], None]:
    """One training step on random tokens."""
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(CONFIG.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
            loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if GPU:
            torch.cuda.synchronize()

    return step


@pytest.mark.parametrize("who", ["transformer", "LSTM", "GRU"])
@pytest.mark.parametrize("length", LENGTHS, ids=lambda length: f"T{length}")
def test_training_step(benchmark, journal, deadline, length, who):
    budget.rounds(deadline, 0.0, ROUNDS)
    torch.manual_seed(0)
    model = models()[who]()
    if not benchmark.enabled:
        benchmark(stepper(model, 2, length // 16))
        return
    batch = max(1, TOKENS // length)
    step = stepper(model, batch, length)
    start = time.perf_counter()
    step()
    took = time.perf_counter() - start
    rounds = budget.rounds(deadline, took, ROUNDS, before=took)
    benchmark.group = f"training step, {batch} x {length} tokens"
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=1)
    seconds = benchmark.stats.stats.data
    row: dict[str, Any] = dict(
        op="recurrence", case=f"T {length}", passed="training step", dtype="bfloat16" if GPU else "float32", who=who,
        seconds=statistics.median(seconds), spread=max(seconds) - min(seconds), tokens=batch * length, length=length,
        batch=batch, weights=size(model), flops=flops(model, batch, length), bytes=0,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    journal.row(row)
    benchmark.extra_info.update(row)
