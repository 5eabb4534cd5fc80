"""Packed rows: every token once, documents apart, any row from its number."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.config import PRESETS
from pyllm.documents import Item
from pyllm.inputs import IGNORE
from pyllm.model import LlamaForCausalLM
from pyllm.packing import PackedRows, mix, permute
from pyllm.shards import TokenShards, tokenise

END = 0


class Ids:
    """A tokenizer for documents that are ids already. With a beginning of its own if `start` is given."""

    def __init__(self, start=None):
        self.vocab_size, self.bos_token_id, self.eos_token_id = 128, start, END

    class backend:  # noqa: N801
        @staticmethod
        def to_str():
            return "ids"

    @staticmethod
    def encode_batch(texts):
        return [[] for _ in texts]

    @staticmethod
    def decode_bytes(ids, skip_special):
        return bytes(len(ids))


def corpus(folder, lengths, start=None, shard_tokens=64):
    generator = np.random.default_rng(0)
    items = [Item(ids=generator.integers(2, 128, n)) for n in lengths]
    tokenise(items, Ids(start), folder, 0.0, shard_tokens=shard_tokens)
    return items, TokenShards.open(folder / "train")


@given(st.integers(1, 2000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_one_to_one(count, key):
    assert sorted(permute(np.arange(count), count, key).tolist()) == list(range(count))


def test_permute_is_random_and_the_same_everywhere():
    order = permute(np.arange(10_000), 10_000, 1)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert (order != permute(np.arange(10_000), 10_000, 2)).mean() > 0.99
    assert permute(np.arange(7), 7, 3).tolist() == permute(np.arange(7), 7, 3).tolist()
    assert int(permute(10**12, 10**13, 5)[0]) < 10**13  # no table of that size anywhere
    assert int(mix(0)) == 0xE220A8397B1DCDAF  # the published first output of splitmix64 with seed 0


@pytest.mark.parametrize("length", [1, 5, 16, 23, 400])
def test_an_epoch_reads_every_target_once_and_fewer_than_a_row_twice(tmp_path, length):
    _, shards = corpus(tmp_path / "data", [9, 1, 30, 0, 57, 3, 88])
    rows = PackedRows(shards, length, seed=4)
    for epoch in range(3):
        seen = np.zeros(shards.tokens, dtype=int)
        for row in range(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch):
            np.add.at(seen, (rows.start(row) + np.arange(length)) % shards.tokens, 1)
        assert seen.min() >= 1
        assert (seen - 1).sum() < length
    assert rows.start(0) != rows.start(rows.per_epoch) or length >= 400


def test_batches_hold_what_the_corpus_says(tmp_path):
    _, shards = corpus(tmp_path / "data", [9, 1, 30, 0, 57, 3, 88])
    rows = PackedRows(shards, 16, seed=1)
    batch = rows.batch(3, 4)
    whole, _ = shards.read(0, shards.tokens)
    for i in range(4):
        where = (rows.start(3 + i) + np.arange(17)) % shards.tokens
        assert batch.inputs[i].tolist() == whole[where[:-1]].tolist()
        assert batch.targets[i].tolist() == whole[where[1:]].tolist()
    flat = batch.inputs.flatten()
    expected = sorted({*range(0, 65, 16), *(i for i in range(64) if flat[i] == END)})
    assert batch.cu_seqlens.tolist() == expected
    assert batch.count == 64
    assert batch.pairs == sum(n * (n + 1) // 2 for n in np.diff(expected))
    again = PackedRows(shards, 16, seed=1)
    assert torch.equal(again.batch(5, 1).inputs[0], batch.inputs[2])  # no state but the number
    assert not torch.equal(PackedRows(shards, 16, seed=2).batch(3, 4).inputs, batch.inputs)


def test_rows_of_single_documents_need_no_cu_seqlens(tmp_path):
    _, shards = corpus(tmp_path / "data", [199])
    rows = PackedRows(shards, 10, shuffle=False)
    assert rows.batch(0, 3).cu_seqlens is None
    assert rows.batch(0, 3).pairs == 3 * 55
    assert [rows.start(r) for r in range(rows.per_epoch + 1)] == [*range(0, 200, 10), 0]
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        PackedRows(shards, 0)


def test_no_end_predicts_a_beginning_of_its_own(tmp_path):
    """<s> doc </s>: behind </s> there is nothing to learn, and the loss says so."""
    _, shards = corpus(tmp_path / "data", [4, 6, 2], start=1)
    batch = PackedRows(shards, shards.tokens, shuffle=False).batch(0, 1)
    inputs, targets = batch.inputs[0].tolist(), batch.targets[0].tolist()
    assert [targets[i] for i in range(len(inputs)) if inputs[i] == END] == [IGNORE] * 3
    assert batch.count == shards.tokens - 3
    assert sum(target == IGNORE for target in targets) == 3


@pytest.mark.parametrize("start", [None, 1])
def test_packed_training_equals_separate_documents(tmp_path, start):
    """The loss and every gradient of a packed batch against the documents one by one, each in a pass of its own."""
    lengths = [5, 17, 1, 33, 8]
    items, shards = corpus(tmp_path / "data", lengths, start)
    model = LlamaForCausalLM(PRESETS["tiny"], backend="auto").train()
    rows = PackedRows(shards, shards.tokens, shuffle=False)
    batch = rows.batch(0, 1)
    assert batch.cu_seqlens is not None
    given = dict(cu_seqlens=batch.cu_seqlens, num_items_in_batch=batch.count, use_cache=False, return_logits=False)
    packed = model(batch.inputs, shift_labels=batch.targets, **given).loss
    packed.backward()
    got = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    alone = torch.zeros(())
    before, behind = ([END], []) if start is None else ([start], [END])
    for item in items:
        row = torch.tensor([[*before, *item.ids.tolist(), *behind]])
        targets = torch.cat([row[:, 1:], torch.tensor([[END if start is None else IGNORE]])], 1)
        loss = model(row, shift_labels=targets, num_items_in_batch=batch.count, use_cache=False).loss
        loss.backward()
        alone = alone + loss.detach()
    assert float((packed.detach() - alone).abs()) < 1e-5
    for g, p in zip(got, model.parameters(), strict=True):
        assert float((g - p.grad).norm()) <= 1e-5 * float(p.grad.norm())


def test_leaking_across_documents_would_show(tmp_path):
    """The same batch without cu_seqlens is far off: the test above can fail."""
    _, shards = corpus(tmp_path / "data", [5, 17, 1, 33, 8])
    model = LlamaForCausalLM(PRESETS["tiny"], backend="eager").train()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    batch = PackedRows(shards, shards.tokens, shuffle=False).batch(0, 1)
    apart = model(batch.inputs, shift_labels=batch.targets, cu_seqlens=batch.cu_seqlens).loss
    leaking = model(batch.inputs, shift_labels=batch.targets).loss
    assert float((apart - leaking).abs().detach()) > 1e-3


def test_state_is_a_number(tmp_path):
    """Reading on from row n is reading from n: batches of any size give the same rows."""
    _, shards = corpus(tmp_path / "data", [40, 40, 40])
    rows = PackedRows(shards, 7, seed=9)
    one_by_one = torch.cat([rows.batch(r, 1).inputs for r in range(60)])
    for size in (2, 5, 60):
        parts = [rows.batch(first, size).inputs for first in range(0, 60, size)]
        assert torch.equal(torch.cat(parts)[:60], one_by_one)
    assert len(set(itertools.chain(*[(rows.start(r),) for r in range(rows.per_epoch)]))) == rows.per_epoch
