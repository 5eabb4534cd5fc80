"""What a row says depends on its prompt alone: not on padding, batch mates, chunks, rings, nor on whether there is a
cache.

In float32 on a CPU the logits are the same bit for bit for every side of the padding, any batch mates and any number
of them from four on, as long as the padded length is the same. Elsewhere they differ by rounding, and tokens are the
same:
- With fewer rows than four BLAS takes other kernels, which add in another order (MKL 2024: one row is gemv, two and
  three have kernels of their own; n threads divide the rows among themselves, so that it takes 4 n).
- The prompt's attention sums over the padded length, zeros included, by vectors: another length, another order.
- Attention of many queries at once is another kernel than that of the newest token: `use_cache`, chunks.
With `batch_invariant()` all of it is the same bit for bit.
"""

from __future__ import annotations

import pytest
import torch

from model.reference import pair
from pyllm import KVCache, batch_invariant

NEW = 24
LENGTHS = [30, 17, 25, 1, 28, 8]
FAMILIES = {"llama": {}, "mistral": {"sliding_window": 6}, "qwen3": {}}
ROUNDING = 1e-4  # of logits around 3, after two layers and 24 tokens


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def even_blas() -> None:
    """Skips where BLAS does not treat all rows alike from four on, as the one does that the promise was found with."""
    x = torch.randn(6 * 30, 64)
    for n in (32, 64, 131, 176):
        weight = torch.randn(n, 64)
        whole = torch.nn.functional.linear(x, weight)
        for start, rows in ((0, 4), (0, 6), (0, 7), (3, 5), (60, 100)):
            if not torch.equal(
                torch.nn.functional.linear(x[start : start + rows], weight), whole[start : start + rows]
            ):
                pytest.skip(f"this BLAS adds {rows} rows of 64 in another order than {len(x)}")


def batch(side: str = "left", extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Six prompts of very unequal lengths, with `extra` columns of padding that nobody needs."""
    T = max(LENGTHS) + extra
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 131, (len(LENGTHS), T), generator=generator)  # padding holds any ids
    mask = torch.zeros_like(ids)
    for b, n in enumerate(LENGTHS):
        words = torch.randint(3, 131, (n,), generator=torch.Generator().manual_seed(100 + b))
        place = slice(T - n, T) if side == "left" else slice(0, n)
        ids[b, place], mask[b, place] = words, 1
    return ids, mask


def run(ours, ids, mask, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens and their logits, (B, new) and (B, new, V)."""
    options = {"max_new_tokens": NEW, "eos_token_id": None, "output_logits": True, **options}
    out = ours.generate(ids, mask, return_dict_in_generate=True, **options)
    return out.sequences[:, -options["max_new_tokens"] :], torch.stack(out.logits, 1)


def model(family: str):
    return pair(family, max_position_embeddings=256, **FAMILIES[family])[1]


def bitwise(a, b) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def close(a, b) -> bool:
    return torch.equal(a[0], b[0]) and float((a[1] - b[1]).abs().max()) < ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:generate. the prompts are padded on the right")
def test_padding_is_invisible_bitwise(family, even_blas):
    ours = model(family)
    left = run(ours, *batch())
    assert bitwise(run(ours, *batch("right")), left)
    assert close(run(ours, *batch(extra=11)), left)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_mates_are_invisible_bitwise(family, even_blas):
    ours = model(family)
    ids, mask = batch()
    all_six = run(ours, ids, mask)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    mixed = run(ours, ids[order], mask[order])
    assert bitwise(tuple(x[order.argsort()] for x in mixed), all_six)
    other, other_mask = ids.clone(), mask.clone()
    other[1:], other_mask[1:] = 7, 1
    assert bitwise(tuple(x[:1] for x in run(ours, other, other_mask)), tuple(x[:1] for x in all_six))
    assert bitwise(run(ours, ids[:4], mask[:4]), tuple(x[:4] for x in all_six))


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mistral", "qwen3"))])
def test_the_rest_is_the_same_but_for_rounding(family):
    ours = model(family)
    ids, mask = batch()
    all_six = run(ours, ids, mask)
    for b, n in enumerate(LENGTHS):
        alone = run(ours, ids[b : b + 1, -n:], None)
        assert close(alone, tuple(x[b : b + 1] for x in all_six))
        assert torch.equal(alone[0], ours.generate(ids[b : b + 1, -n:], max_new_tokens=NEW, eos_token_id=None)[:, n:])
    uncached = run(ours, ids, mask, use_cache=False)
    assert close(uncached, all_six)
    assert torch.equal(uncached[1][:, 0], all_six[1][:, 0])  # the prompt's pass is the same
    for chunk in (1, 7, 29):
        assert close(run(ours, ids, mask, prefill_chunk_size=chunk), all_six)


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_invisible_bitwise_when_asked_for(family, threads):
    """Alone, in a batch, padded, in chunks, with the cache or without: the same logits to the last bit."""
    torch.set_num_threads(threads)
    ours = model(family)
    ids, mask = batch()
    ids, mask = ids[[0, 1, 3]], mask[[0, 1, 3]]
    options = {"max_new_tokens": 12}
    plain = run(ours, ids, mask, **options)
    with batch_invariant():
        three = run(ours, ids, mask, **options)
        for b, n in enumerate((30, 17, 1)):
            alone = run(ours, ids[b : b + 1, -n:], None, **options)
            assert bitwise(alone, tuple(x[b : b + 1] for x in three))
        wide = torch.nn.functional.pad(ids, (11, 0), value=7), torch.nn.functional.pad(mask, (11, 0))
        assert bitwise(run(ours, *wide, **options), three)
        assert bitwise(run(ours, ids, mask, use_cache=False, **options), three)
        for chunk in (1, 7):
            assert bitwise(run(ours, ids, mask, prefill_chunk_size=chunk, **options), three)
    assert float((three[1] - plain[1]).abs().max()) < ROUNDING
    assert torch.equal(three[0], plain[0])


def test_long_rows_are_invariant_too():
    """Over several blocks of keys."""
    ours = pair(max_position_embeddings=512)[1]
    ids = torch.randint(3, 131, (2, 300), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    with batch_invariant(), torch.no_grad():
        both = run(ours, ids, mask, max_new_tokens=3)
        assert bitwise(run(ours, ids[1:, 40:], None, max_new_tokens=3), tuple(x[1:] for x in both))
        assert bitwise(run(ours, ids, mask, max_new_tokens=3, prefill_chunk_size=90), both)
    plain = run(ours, ids, mask, max_new_tokens=3)
    assert float((plain[1] - both[1]).abs().max()) < ROUNDING


def test_what_batch_invariance_is_for():
    ours = pair()[1].to(torch.bfloat16)
    with batch_invariant(), pytest.raises(ValueError, match=r"float32 on a CPU only, got torch\.bfloat16"):
        ours(torch.tensor([[3, 4]]))


def test_a_ring_holds_the_window_and_says_the_same():
    ours = model("mistral")
    ids, mask = batch()
    ring, straight = KVCache(window=6), KVCache()
    assert close(run(ours, ids, mask, past_key_values=ring), run(ours, ids, mask, past_key_values=straight))
    assert ring.keys[0].shape[1] == 7
    assert straight.keys[0].shape[1] >= 53
    assert len(ring) == len(straight) == 53
    out = ours.generate(ids, mask, max_new_tokens=9, eos_token_id=None, return_dict_in_generate=True)
    assert out.past_key_values.window == 6  # generate's own choice where all layers have a window


@pytest.mark.filterwarnings("ignore:generate. the prompts are padded on the right")
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_right_padding_in_chunks(chunk):
    ours = model("llama")
    assert close(run(ours, *batch("right"), prefill_chunk_size=chunk), run(ours, *batch()))


def test_samples_do_not_depend_on_batch_mates():
    ours = model("llama")
    ids, mask = batch()
    options = {"max_new_tokens": NEW, "do_sample": True, "seed": 9, "eos_token_id": None}
    together = ours.generate(ids, mask, **options)
    for side in (ids[:1, -LENGTHS[0] :],):
        assert torch.equal(ours.generate(side, **options)[:, -NEW:], together[:1, -NEW:])
    assert torch.equal(ours.generate(ids[:4], mask[:4], **options), together[:4])


def test_cost_is_linear():
    """256 new tokens after 17: every token goes through the model once; with four beams, once per beam."""
    ours = pair(max_position_embeddings=512)[1]
    ids, mask = batch()
    fed: list[int] = []
    hook = ours.model.register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    ours.generate(ids, mask, max_new_tokens=256, eos_token_id=None)
    assert fed == [30] + [1] * 255
    fed.clear()
    ours.generate(ids, mask, max_new_tokens=256, eos_token_id=None, prefill_chunk_size=8)
    assert fed == [8, 8, 8, 6] + [1] * 255
    fed.clear()
    ours.generate(ids, mask, max_new_tokens=64, eos_token_id=None, num_beams=4)
    assert fed == [30] + [4] * 63
    hook.remove()
