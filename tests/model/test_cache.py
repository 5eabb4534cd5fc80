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


# Taking tokens back


@pytest.mark.parametrize("mask", [None, MASK], ids=["even", "padded"])
def test_crop_goes_on_from_earlier(model, mask):
    cache, plain = KVCache(), KVCache()
    feed(model, cache, 0, 18, mask)
    assert cache.crop(12) == 12
    assert cache.crop(30) == 12
    feed(model, plain, 0, 12, mask)
    assert (None if cache.lengths is None else cache.lengths.tolist()) == (None if mask is None else [12, 5])
    assert torch.allclose(feed(model, cache, 12, 20, mask), feed(model, plain, 12, 20, mask), atol=1e-5, rtol=1e-5)
    assert cache.crop(0) == len(cache) == 0
    assert torch.equal(feed(model, cache, 0, 20), feed(model, KVCache(), 0, 20))
    with pytest.raises(ValueError, match="can't be cropped to -1"):
        cache.crop(-1)


@pytest.fixture
def windowed() -> LlamaForCausalLM:
    config = {**PRESETS["tiny"].replace(initializer_range=0.2).to_dict(), "model_type": "mistral", "sliding_window": 5}
    return LlamaForCausalLM(config).eval()


CHUNKS = [[20], [1] * 20, [4, 1, 1, 1, 1, 5, 7], [3, 6, 1, 1, 9], [5, 1, 14], [12, 8]]


@pytest.mark.parametrize("mask", [None, MASK], ids=["even", "padded"])
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_a_ring_sees_what_a_window_sees(windowed, chunks, mask):
    """However many tokens come at once, before, while and after the ring turns."""
    ring, straight = KVCache(window=5), KVCache()
    start = 0
    for chunk in chunks:
        a, b = (feed(windowed, cache, start, start + chunk, mask) for cache in (ring, straight))
        real = torch.ones_like(a[..., 0], dtype=torch.bool) if mask is None else mask[:, start : start + chunk].bool()
        assert torch.allclose(a[real], b[real], atol=1e-5, rtol=1e-5)
        start += chunk
    assert ring.keys[0].shape[1] <= 6 < straight.keys[0].shape[1]


def test_a_ring_takes_back_only_what_it_still_has(windowed):
    ring = KVCache(window=5)
    feed(windowed, ring, 0, 4)
    assert ring.crop(2) == 2
    feed(windowed, ring, 2, 12)
    assert ring.crop(11) == 11
    whole = KVCache()
    feed(windowed, whole, 0, 11)
    assert torch.allclose(feed(windowed, ring, 11, 12), feed(windowed, whole, 11, 12), atol=1e-5)
    assert ring.crop(9) == 0  # what the tenth token would look back at is gone
    assert torch.allclose(feed(windowed, ring, 0, 9), feed(windowed, KVCache(), 0, 9), atol=1e-5)


def test_a_ring_of_fixed_size(windowed):
    """Six places are enough for any number of tokens."""
    ring, straight = KVCache(6, growable=False, window=5), KVCache()
    for start in range(0, 20, 4):
        a, b = (feed(windowed, cache, start, start + 4) for cache in (ring, straight))
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="room for 4 tokens"):
        feed(windowed, KVCache(4, growable=False, window=5), 0, 9)


def test_gradients_through_a_ring(windowed):
    ring, straight = KVCache(window=5), KVCache()
    grads = []
    for cache in (ring, straight):
        feed(windowed, cache, 0, 9)
        windowed.zero_grad()
        for start, end in ((9, 12), (12, 13)):
            windowed(IDS[:, start:end], past_key_values=cache).logits.square().sum().backward()
        grads.append([p.grad.clone() for p in windowed.parameters()])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("mask", [None, MASK], ids=["even", "padded"])
def test_a_pinned_cache_keeps_addresses_and_counts_on_the_device(model, mask):
    pinned, plain = KVCache(20, growable=False), KVCache()
    feed(model, pinned, 0, 15, mask)
    feed(model, plain, 0, 15, mask)
    pinned.pin()
    lengths = pinned.lengths
    addresses = [t.data_ptr() for t in (*pinned.keys, *pinned.values, lengths)]
    positions = (torch.ones_like(IDS) if mask is None else mask).cumsum(1) - 1
    for t in range(15, 20):
        with torch.no_grad():
            a, b = (
                model(IDS[:, t : t + 1], position_ids=positions[:, t : t + 1], past_key_values=cache).logits
                for cache in (pinned, plain)
            )
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)
    assert [t.data_ptr() for t in (*pinned.keys, *pinned.values, pinned.lengths)] == addresses
    assert lengths.tolist() == [20, 20 if mask is None else 13]
    with pytest.raises(ValueError, match="room for 20 tokens, but 20 seen"):
        model(IDS[:, :1], past_key_values=pinned)


def test_what_can_be_pinned():
    with pytest.raises(ValueError, match="not growable and has no window"):
        KVCache(8).pin()
    with pytest.raises(ValueError, match="window must be at least 1 or None, got 0"):
        KVCache(window=0)
