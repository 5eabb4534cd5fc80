"""How likely a model finds given words behind given words: what perplexity and multiple choice are made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import KVCache
from .chat import opening
from .data import nats, surprise
from .decode import cache_window
from .model import LlamaForCausalLM
from .text import TokenBytes
from .tokenizer import Tokenizer

LOGIT_BYTES = 256 << 20  # memory for the logits of a batch
BATCH_TOKENS = 16384  # of prompts, padding included

Request = tuple[Sequence[int], Sequence[int]]  # (context, continuation)


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation behind its context."""

    logprob: float  # sum of ln p over its tokens
    greedy: bool  # whether each of its tokens is the likeliest one
    tokens: int


@torch.no_grad()
def likelihoods(model: LlamaForCausalLM, requests: Sequence[Request], batch: int = 32) -> list[Likelihood]:
    """ln p(continuation | context) of each request, in order.

    Requests with the same context share one pass over it: its keys and values are computed once and copied for each
    continuation. A context that is too long for the model loses its beginning.

    Args:
        requests: (context, continuation), ids each. A context has at least one token.
        batch: contexts, and continuations, in one forward pass at most.
    Raises:
        ValueError: an empty context or continuation, or a continuation longer than the model can read.
    """
    room = model.config.max_position_embeddings
    shared: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            empty = "continuation" if context else "context"
            raise ValueError(f"likelihoods: request {i} has an empty {empty}; a context needs at least one token")
        if len(continuation) > room:
            raise ValueError(
                f"likelihoods: the continuation of request {i} has {len(continuation)} tokens, "
                f"and the model can read {room}"
            )
        kept = min(len(context), room + 1 - len(continuation))  # the last token is predicted, not read
        shared.setdefault(tuple(context[len(context) - kept :]), []).append(i)
    found: list[Likelihood | None] = [None] * len(requests)
    was_training = model.training
    model.eval()
    try:
        for contexts in _batches(sorted(shared, key=len, reverse=True), batch):
            _score(model, contexts, [[requests[i][1] for i in shared[c]] for c in contexts], shared, found, batch)
    finally:
        model.train(was_training)
    assert all(item is not None for item in found)
    return [item for item in found if item is not None]


def _batches(contexts: list[tuple[int, ...]], batch: int) -> Iterator[list[tuple[int, ...]]]:
    """Contexts of falling length, as many at a time as `batch` and memory allow."""
    at = 0
    while at < len(contexts):
        count = max(1, min(batch, BATCH_TOKENS // len(contexts[at])))
        yield contexts[at : at + count]
        at += count


def _score(
    model: LlamaForCausalLM,
    contexts: list[tuple[int, ...]],
    continuations: list[list[Sequence[int]]],
    shared: dict[tuple[int, ...], list[int]],
    found: list[Likelihood | None],
    batch: int,
) -> None:
    """The likelihoods of some contexts' continuations, written to their places in `found`."""
    longest = len(contexts[0])
    ids = torch.zeros(len(contexts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):  # padded in front, so that all continuations begin in one column
        ids[row, longest - len(context) :] = torch.tensor(context)
        mask[row, longest - len(context) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    device = model.device
    deepest = max(len(c) for cs in continuations for c in cs) - 1  # tokens to be read behind the context
    cache = KVCache(longest + deepest, window=cache_window(model)) if deepest else None
    out = model(
        ids.to(device), mask.to(device), positions.to(device), cache, use_cache=cache is not None, logits_to_keep=1
    )
    first = out.logits[:, -1].float().log_softmax(-1)  # (contexts, V)
    rows = [(row, i) for row, context in enumerate(contexts) for i in shared[context]]
    words = [continuation for row in continuations for continuation in row]
    # Those of one token are done. The others' rows of the cache are copied, a few at a time, so that memory is bounded.
    order = sorted(range(len(rows)), key=lambda j: -len(words[j]))
    limit = max(1, min(4 * batch, LOGIT_BYTES // (4 * model.config.vocab_size * max(1, deepest))))
    for at in range(0, len(order), limit):
        part = order[at : at + limit]
        heads = first[torch.tensor([rows[j][0] for j in part], device=device)]  # (part, V)
        tail = len(words[part[0]]) - 1
        later = None
        if tail:
            assert cache is not None
            later = _continue(model, cache, [rows[j][0] for j in part], [words[j] for j in part], mask, tail)
        for k, j in enumerate(part):
            target = torch.tensor(words[j], device=device)
            scores = heads[k][None]
            if later is not None:
                scores = torch.cat((scores, later[k, : len(words[j]) - 1]))  # (tokens, V)
            logprob = float(scores.gather(1, target[:, None]).double().sum())
            found[rows[j][1]] = Likelihood(logprob, bool((scores.argmax(-1) == target).all()), len(words[j]))


def _continue(
    model: LlamaForCausalLM, cache: KVCache, rows: list[int], words: list[Sequence[int]], mask: Tensor, tail: int
) -> Tensor:
    """ln p of the tokens behind the first, (continuations, tail, V); padded behind."""
    device = model.device
    index = torch.tensor(rows)
    copied = copy.copy(cache)  # shares the tensors until `reorder` makes new ones
    copied.reorder(index.to(device))
    ids = torch.zeros(len(rows), tail, dtype=torch.int64)
    real = torch.zeros_like(ids)
    for k, word in enumerate(words):
        ids[k, : len(word) - 1] = torch.tensor(word[:-1])
        real[k, : len(word) - 1] = 1
    before = mask[index]
    positions = before.sum(1, keepdim=True) + torch.arange(tail)
    whole = torch.cat((before, real), dim=1)
    out = model(ids.to(device), whole.to(device), positions.to(device), copied, use_cache=True)
    return out.logits.float().log_softmax(-1)


@dataclass(frozen=True)
class Perplexity:
    """Of a text."""

    perplexity: float  # exp of the mean surprise per token
    bits_per_byte: float
    nats: float  # sum of -ln p over the scored tokens
    tokens: int  # that were scored
    num_bytes: int  # that they stand for
    window: int
    stride: int  # tokens had at least window - stride tokens of context, those at the very beginning excepted


def perplexity(
    model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """Perplexity and bits per byte of a text, over sliding windows; every token is scored once.

    The text begins behind the token that opens texts in this vocabulary. Where there is none, the first token has no
    context at all and is not scored.

    Args:
        window: tokens that are read at a time; by default as many as the model can, at most 1024.
        stride: how far windows advance, by default half of one. Each token is scored in the first window that reaches
            it, and so has at least window - stride tokens of context.
    """
    window = min(1024, model.config.max_position_embeddings) if window is None else window
    if not 1 <= window <= model.config.max_position_embeddings:
        raise ValueError(
            f"perplexity: window must be between 1 and what the model can read, "
            f"{model.config.max_position_embeddings}, got {window}"
        )
    stride = max(1, window // 2) if stride is None else stride
    row = torch.tensor(opening(tokenizer) + tokenizer.encode(text))
    if len(row) < 2:
        raise ValueError(f"perplexity: the text has {len(row)} tokens, at least 2 are needed")
    table = TokenBytes(tokenizer)
    scored = row[1:].tolist()
    num_bytes = sum(len(table[id]) for id in scored if id not in table.special)
    was_training = model.training
    model.eval()
    total = nats(model, row, window, stride, batch=window_batch(model, window))
    model.train(was_training)
    return Perplexity(
        math.exp(min(700.0, total / len(scored))),
        total / math.log(2) / max(1, num_bytes),
        total,
        len(scored),
        num_bytes,
        window,
        stride,
    )


def window_batch(model: LlamaForCausalLM, window: int) -> int:
    """Windows at a time whose logits fit into memory."""
    return max(1, min(32, LOGIT_BYTES // (8 * model.config.vocab_size * window)))


def loss_by_position(
    model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, window: int | None = None
) -> list[tuple[int, int, float]]:
    """Mean surprise by how much context there is: (from position, to position, nats per token), ends included.

    Windows that touch but don't overlap; position 1 is a window's second token, with one before it. Positions are
    grouped by powers of two: 1, 2-3, 4-7, ...
    """
    window = min(1024, model.config.max_position_embeddings) if window is None else window
    row = torch.tensor(opening(tokenizer) + tokenizer.encode(text))
    count = (len(row) - 1) // window
    if count < 1:
        raise ValueError(f"loss by position: the text has {len(row)} tokens, a window needs {window + 1}")
    windows = row[torch.arange(count)[:, None] * window + torch.arange(window + 1)]
    was_training = model.training
    model.eval()
    losses = torch.cat([surprise(model, part) for part in windows.split(window_batch(model, window))]).mean(0)
    model.train(was_training)
    found = []
    begin = 1
    while begin <= window:
        end = min(2 * begin - 1, window)
        found.append((begin, end, float(losses[begin - 1 : end].mean())))
        begin = end + 1
    return found
