"""Batches cover the text, and bits per byte are counted as by hand."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pyllm.corpus import Document
from pyllm.data import Batches, QuickValidation, bits_per_byte, nats, tokenize
from pyllm.tokenizer import Tokenizer


class Table(nn.Module):
    """A bigram model: logits of the next id depend on the current one alone. Counts what it is asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.asked = []

    def forward(self, ids, use_cache=False):
        self.asked.append(tuple(ids.shape))
        return SimpleNamespace(logits=self.logits[ids])


def test_tokenize_puts_the_end_between_documents():
    tokenizer = Tokenizer.train(["abc def"], vocab_size=257)
    row = tokenize([Document("a", b"ab"), Document("b", "é".encode())], tokenizer)
    assert row[0] == row[3] == row[-1] == tokenizer.eos_token_id
    assert tokenizer.decode_bytes(row.tolist(), skip_special=True) == "abé".encode()
    assert len(row) == 7


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_an_epoch_covers_every_target_once(batch):
    row = torch.arange(8 * 25 + 1)
    batches = Batches(row, batch, 8)
    seen = torch.cat([x[:, 1:].flatten() for x in itertools.islice(batches, -(-25 // batch))])[: 8 * 25]
    assert sorted(seen.tolist()) == list(range(1, 201))


def test_later_epochs_are_cut_elsewhere_and_still_cover():
    row = torch.arange(1000)
    batches = Batches(row, 5, 10)
    first, second = batches.starts(), batches.starts()
    for starts in (first, second):
        assert len(set(starts.tolist())) == len(starts)
        assert torch.equal(starts.sort().values.diff(), torch.full((len(starts) - 1,), 10))  # touching, not overlapping
        assert starts.max() + 11 <= 1000
        assert len(starts) >= 98
    assert first.min() == 0
    assert second.min() > 0
    assert not torch.equal(first.sort().values, first)


def test_windows_are_text_and_shifted():
    x = next(iter(Batches(torch.arange(500), 3, 16)))
    assert x.shape == (3, 17)
    assert torch.equal(x[:, 1:], x[:, :-1] + 1)


def test_same_seed_same_batches():
    row = torch.arange(3000)
    one, two, other = (list(itertools.islice(Batches(row, 4, 8, seed), 200)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_row_of_exactly_one_window():
    batches = iter(Batches(torch.arange(9), 2, 8))
    assert torch.equal(next(batches), torch.arange(9).expand(2, 9))
    next(batches)


def test_too_short_a_row():
    with pytest.raises(ValueError, match="5 ids do not fill a window"):
        Batches(torch.arange(5), 1, 8)
    with pytest.raises(ValueError, match="batch and length"):
        Batches(torch.arange(50), 0, 8)


def test_uniform_model_by_hand():
    """A model that knows nothing pays log2 V bits for each of the N - 1 predicted tokens."""
    V, N, num_bytes = 50, 333, 700
    row = torch.randint(V, (N,))
    found = bits_per_byte(Table(torch.zeros(V, V)), row, num_bytes, length=16, stride=8)
    assert found == pytest.approx(math.log2(V) * (N - 1) / num_bytes, rel=1e-6)


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 8), (16, 5), (16, 1), (400, 400), (400, 7), (99, 99)])
def test_each_token_is_counted_once(length, stride):
    """For a bigram model context doesn't matter, so any cut of the row must give the same sum, term by term."""
    torch.manual_seed(5)
    V, N = 11, 100
    logits, row = torch.randn(V, V), torch.randint(V, (N,))
    by_hand = -sum(float(logits[row[i]].double().log_softmax(-1)[row[i + 1]]) for i in range(N - 1))
    assert nats(Table(logits), row, length, stride, batch=3) == pytest.approx(by_hand, rel=1e-6)


def test_stride_gives_context():
    """With stride s, every target after the first window has at least length - s ids before it in its window."""
    model = Table(torch.zeros(4, 4))
    nats(model, torch.zeros(100, dtype=torch.int64), 16, 4, batch=1)
    assert len(model.asked) == 1 + -(-(99 - 16) // 4)
    assert all(shape == (1, 16) for shape in model.asked)


def test_nothing_to_predict():
    assert nats(Table(torch.zeros(4, 4)), torch.tensor([1]), 16) == 0.0
    with pytest.raises(ValueError, match="stride must be between 1 and length = 16, got 17"):
        nats(Table(torch.zeros(4, 4)), torch.zeros(40, dtype=torch.int64), 16, 17)
    with pytest.raises(ValueError, match="num_bytes"):
        bits_per_byte(Table(torch.zeros(4, 4)), torch.zeros(40, dtype=torch.int64), 0, 16)


def test_quick_validation_counts_its_own_bytes():
    tokenizer = Tokenizer.train(["to be or not to be " * 50], vocab_size=270)
    row = tokenize([Document("a", b"to be or not to be, that is the question " * 40)], tokenizer)
    quick = QuickValidation(row, tokenizer, length=8, windows=5)
    text = b"".join(tokenizer.decode_bytes(w[1:].tolist(), skip_special=True) for w in quick.windows)
    expected = math.log2(270) * 5 * 8 / len(text)
    assert quick(Table(torch.zeros(270, 270))) == pytest.approx(expected)
    assert torch.equal(quick.windows, QuickValidation(row, tokenizer, length=8, windows=5).windows)
