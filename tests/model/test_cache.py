"""The key-value cache: it grows, forgets, and its rows can be put in another order."""

from __future__ import annotations

import pytest
import torch

from pyllm import PRESETS, KVCache, LlamaForCausalLM

IDS = torch.arange(40).view(2, 20)
MASK = torch.ones_like(IDS)
MASK[1, :7] = 0


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(PRESETS["tiny"].replace(initializer_range=0.2)).eval()


@torch.no_grad()
def feed(model, cache, start, end, mask=None):
    part = None if mask is None else mask[:, :end]
    return model(IDS[:, start:end], attention_mask=part, past_key_values=cache).logits


@pytest.mark.parametrize("mask", [None, MASK], ids=["even", "padded"])
def test_growth_changes_nothing(model, mask):
    """From room for 3 tokens to 20, against a cache that had the room from the start."""
    small, roomy = KVCache(3), KVCache(64)
    for start, end in [(0, 8), (8, 9), (9, 15), (15, 20)]:
        assert torch.equal(feed(model, small, start, end, mask), feed(model, roomy, start, end, mask))
    assert 20 <= small.keys[0].shape[1] < 64
    assert roomy.keys[0].shape == (2, 64, 2, 16)
    assert roomy.nbytes() == 2 * 2 * 2 * 64 * 2 * 16 * 4


@pytest.mark.parametrize("mask", [None, MASK], ids=["even", "padded"])
def test_rows_in_another_order(model, mask):
    """Beams continue from copies of rows; so do several samples of a prompt."""
    cache = KVCache()
    first = feed(model, cache, 0, 19, mask)
    assert first.isfinite().all()
    rows = torch.tensor([1, 1, 0])
    cache.reorder(rows)
    with torch.no_grad():
        part = None if mask is None else mask[rows]
        again = model(IDS[rows, 19:], attention_mask=part, past_key_values=cache).logits
        whole = model(IDS, attention_mask=mask).logits[rows, 19:]
    assert torch.allclose(again, whole, atol=1e-5, rtol=1e-5)
    assert cache.batch_size == 3


def test_reset_keeps_the_memory_and_nothing_else(model):
    cache = KVCache(32)
    feed(model, cache, 0, 20, MASK)
    address = cache.keys[0].data_ptr()
    assert cache.padded
    cache.reset()
    assert (len(cache), cache.padded, cache.get_seq_length()) == (0, False, 0)
    assert torch.equal(feed(model, cache, 0, 20), feed(model, KVCache(32), 0, 20))
    assert cache.keys[0].data_ptr() == address


def test_lengths_and_mask(model):
    cache = KVCache()
    feed(model, cache, 0, 10, MASK)
    assert cache.lengths.tolist() == [10, 3]
    feed(model, cache, 10, 11)  # no mask: all new tokens are real
    assert cache.lengths.tolist() == [11, 4]
    assert torch.equal(cache.mask, MASK[:, :11].bool())
    assert cache.get_seq_length() == 11


def test_a_cache_that_was_returned_is_not_changed_by_its_own_graph(model):
    """Gradients of an earlier pass survive that later passes write into the same memory."""
    cache = KVCache(32)
    feed(model, cache, 0, 8)
    loss = model(IDS[:, 8:12], past_key_values=cache).logits.sum()
    feed(model, cache, 12, 20)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mask", [torch.ones_like(IDS), MASK], ids=["even", "padded"])
def test_masks_that_are_not_looked_at(model, mask, monkeypatch):
    """On a GPU nobody asks whether a mask pads anything, since that would stall the stream; results are the same."""
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask).logits[mask.bool()]
        monkeypatch.setattr("pyllm.inputs._readable", lambda tensor: False)
        cache, parts = KVCache(), []
        for start, end in [(0, 8), (8, 13), (13, 14), (14, 20)]:
            parts.append(feed(model, cache, start, end, mask))
        again = torch.cat(parts, 1)[mask.bool()]
        assert torch.allclose(again, whole, atol=1e-5, rtol=1e-5)
        assert torch.allclose(model(IDS, attention_mask=mask).logits[mask.bool()], whole, atol=1e-5, rtol=1e-5)
    assert cache.padded
    assert cache.lengths.tolist() == mask.sum(1).tolist()


def test_bad_capacity():
    with pytest.raises(ValueError, match="capacity must not be negative, got -1"):
        KVCache(-1)
