"""From documents to batches, and the honest measure of what a model has learned from them.

documents -> ids, one long row:   <|endoftext|> doc 1 <|endoftext|> doc 2 <|endoftext|> ...
row -> windows of T + 1 ids:      inputs are the first T, targets the last T (each position predicts the next id)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .corpus import Document
from .tokenizer import Tokenizer

Apply = Callable[[Callable[[Any], float], Iterable[Any]], Iterable[float]]  # the built-in map, or one of its kind


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> Tensor:
    """All documents as one row of ids (N,) int64, with the end-of-text token before, between and after them."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("tokenize: the tokenizer has no end-of-text token to put between documents")
    row = [end]
    texts = [document.data.decode("utf-8", "replace") for document in documents]
    for ids in tokenizer.encode_batch(texts):
        row.extend(ids)
        row.append(end)
    return torch.tensor(row, dtype=torch.int64)


class Batches:
    """Endless batches of windows from one row of ids, the same ones for the same seed.

    An epoch cuts the row into windows that touch but do not overlap and deals them out in random order, so every id is
    a target once an epoch. Where the cuts fall changes from epoch to epoch: no target is always first in its window.

    Args:
        row: (N,) ids.
        batch: windows in a batch.
        length: T, targets in a window.
        seed: of order and cuts.
    Yields:
        (batch, T + 1) int64; `inputs, targets = x[:, :-1], x[:, 1:]`.
    """

    def __init__(self, row: Tensor, batch: int, length: int, seed: int = 0):
        if batch < 1 or length < 1:
            raise ValueError(f"Batches: batch and length must be at least 1, got {batch} and {length}")
        if len(row) < length + 1:
            raise ValueError(f"Batches: {len(row)} ids do not fill a window of {length} + 1; give more text")
        self.row, self.batch, self.length = row, batch, length
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = 0

    def starts(self) -> Tensor:
        """Where the windows of the next epoch begin, in the order in which they are dealt."""
        shift = 0
        if self.epoch > 0:
            spare = min(self.length, len(self.row) - self.length)  # keeps room for at least one window
            shift = int(torch.randint(spare, (1,), generator=self.generator))
        self.epoch += 1
        count = (len(self.row) - 1 - shift) // self.length
        return torch.randperm(count, generator=self.generator) * self.length + shift

    def __iter__(self) -> Iterator[Tensor]:
        offsets = torch.arange(self.length + 1)
        waiting = torch.empty(0, dtype=torch.int64)
        while True:
            while len(waiting) < self.batch:  # an epoch's rest opens the next one's first batch: nothing is dropped
                waiting = torch.cat([waiting, self.starts()])
            now, waiting = waiting[: self.batch], waiting[self.batch :]
            yield self.row[now[:, None] + offsets]


@torch.no_grad()
def surprise(model: nn.Module, windows: Tensor) -> Tensor:
    """-ln p of every target of (N, T + 1) windows, as (N, T) float64 on the CPU."""
    x = windows.to(next(model.parameters()).device)
    logits = model(x[:, :-1], use_cache=False).logits.float()  # (N, T, V)
    losses = logits.logsumexp(-1) - logits.gather(-1, x[:, 1:, None])[..., 0]
    return losses.double().cpu()


def nats(
    model: nn.Module, row: Tensor, length: int, stride: int | None = None, batch: int = 32, apply: Apply = map
) -> float:
    """The model's total surprise at a row of ids: the sum over every id but the first of -ln p(id | ids before it).

    Windows of `length` targets advance by `stride`; each id is counted once, in the first window that reaches it, and
    so has at least `length - stride` ids of context (except at the very beginning, where there are no more).

    Args:
        model: called as `model(input_ids).logits`, as it is: call `model.eval()` before.
        row: (N,) ids.
        apply: how to map over parts of the work: `Workers.map` uses several cores.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"nats: stride must be between 1 and length = {length}, got {stride}")
    if len(row) < 2:
        return 0.0
    length = min(length, len(row) - 1)
    stride = min(stride, length)
    # The window that begins at b has the targets row[b + 1 .. b + length]; those up to `done` are counted already.
    last = len(row) - 1 - length
    begins = [*range(0, last, stride), last]
    done = [0, *(begin + length for begin in begins[:-1])]
    offsets = torch.arange(length + 1)

    def part(first: int) -> float:
        begin = torch.tensor(begins[first : first + batch])[:, None]
        fresh = begin + offsets[1:] > torch.tensor(done[first : first + batch])[:, None]  # (windows, length) bool
        return float(surprise(model, row[begin + offsets])[fresh].sum())

    return sum(apply(part, range(0, len(begins), batch)))


def bits_per_byte(
    model: nn.Module,
    row: Tensor,
    num_bytes: int,
    length: int,
    stride: int | None = None,
    batch: int = 32,
    apply: Apply = map,
) -> float:
    """How many bits the model needs per byte of the original text: comparable across tokenizers, and with zip.

    An entropy coder driven by the model would compress the text to this size. Every token is paid for, also the
    end-of-text tokens between documents, while only the text's own bytes are divided by: no token comes for free.

    Args:
        row: `tokenize(documents, ...)`.
        num_bytes: of those documents.
    """
    if num_bytes < 1:
        raise ValueError(f"bits_per_byte: num_bytes must be at least 1, got {num_bytes}")
    return nats(model, row, length, stride, batch, apply) / math.log(2) / num_bytes


class QuickValidation:
    """Bits per byte on a few windows spread evenly over the validation text: the same ones every time it is asked.

    Cheap enough for every few seconds. A little above `bits_per_byte`, since here windows start without context.
    """

    def __init__(self, row: Tensor, tokenizer: Tokenizer, length: int, windows: int = 96):
        windows = max(1, min(windows, (len(row) - 1) // length))
        begins = torch.linspace(0, len(row) - 1 - length, windows).long()
        self.windows = row[begins[:, None] + torch.arange(length + 1)]
        targets = self.windows[:, 1:].flatten().tolist()
        self.num_bytes = len(tokenizer.decode_bytes(targets, skip_special=True))

    def __call__(self, model: nn.Module, apply: Apply = map) -> float:
        parts = apply(lambda part: float(surprise(model, part).sum()), self.windows.split(16))
        return sum(parts) / math.log(2) / self.num_bytes
