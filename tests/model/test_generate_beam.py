"""Beam search equals transformers': the sequences token for token, their scores, and where each token came from."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.reference import error, pair, prompts
from pyllm import KVCache

NEW = 14
EOS = [5, 9, 40, 77, 101, 102, 103, 110]


def both(theirs, ours, padding=None, **options):
    ids, mask, _ = prompts(padding)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    a = theirs.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)
    return a, ours.generate(ids, mask, **options)


def assert_same(a, b):
    assert torch.equal(b.sequences, a.sequences)
    assert torch.allclose(b.sequences_scores, a.sequences_scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(b.beam_indices, a.beam_indices)
    assert len(b.scores) == len(a.scores)
    for ours_score, theirs_score in zip(b.scores, a.scores, strict=True):
        assert torch.equal(ours_score.isinf(), theirs_score.isinf())
        assert error(ours_score.nan_to_num(neginf=0.0), theirs_score.nan_to_num(neginf=0.0)) < 1e-4


SETTINGS = list(
    itertools.product(
        [True, False, "never"],  # early_stopping
        [-1.5, 0.0, 0.6, 1.0, 2.0],  # length_penalty
        [None, "left"],
        [None, 40, EOS],
        [0, 5],  # min_new_tokens
        [True, False],  # use_cache
    )
)
SOME = [(random.Random(i).randint(2, 8), *setting) for i, setting in enumerate(random.Random(0).sample(SETTINGS, 14))]


def compare(case, family="llama", **changes):
    beams, early, penalty, padding, eos, least, cached = case
    theirs, ours = pair(family, **changes)
    options = {"num_beams": beams, "early_stopping": early, "length_penalty": penalty, "eos_token_id": eos}
    options |= {"min_new_tokens": least, "num_return_sequences": 1 + beams // 2, "use_cache": cached}
    assert_same(*both(theirs, ours, padding, **options))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_beams_equal_transformers(case):
    compare(case)


@pytest.mark.slow
@pytest.mark.parametrize("beams", [2, 3, 4, 5, 6, 7, 8])
def test_many_settings_equal_transformers(beams):
    for setting in random.Random(beams).sample(SETTINGS, 90):
        compare((beams, *setting))


@pytest.mark.parametrize(
    "family, changes",
    [("mistral", {"sliding_window": 6}), ("qwen3", {}), ("qwen2", {}), ("llama", {"num_key_value_heads": 4})],
    ids=["mistral", "qwen3", "qwen2", "mha"],
)
def test_families(family, changes):
    for padding, cached in itertools.product([None, "left"], [True, False]):
        compare((4, False, 1.0, padding, EOS, 0, cached), family, **changes)


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.4},
        {"bad_words_ids": [[7], [11, 12], [60, 61]]},
        {"renormalize_logits": True, "suppress_tokens": list(range(20))},
        {"forced_eos_token_id": 40},
    ],
    ids=lambda o: next(iter(o)),
)
def test_processors_work_on_beams(options):
    theirs, ours = pair()
    assert_same(*both(theirs, ours, "left", num_beams=4, num_return_sequences=4, eos_token_id=EOS, **options))


def test_one_beam_is_greedy():
    _, ours = pair()
    ids, mask, _ = prompts("left")
    greedy = ours.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None)
    assert torch.equal(ours.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None, num_beams=1), greedy)


def test_many_tokens_with_branches_cleared_away():
    """Long enough that dead branches are cleared from the cache several times, in rows of unequal length."""
    theirs, ours = pair(max_position_embeddings=512)
    a, b = both(theirs, ours, "left", num_beams=5, max_new_tokens=150, eos_token_id=None, num_return_sequences=5)
    assert_same(a, b)


def test_windows_survive_the_clearing():
    """Positions move with their tokens: what a window hides depends on them."""
    theirs, ours = pair("mistral", sliding_window=20, max_position_embeddings=512)
    options = {"num_beams": 3, "max_new_tokens": 70, "eos_token_id": None, "num_return_sequences": 3}
    assert_same(*both(theirs, ours, "left", **options))


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("beams, eos", [(2, 30), (3, 60), (5, 60), (4, 110)], ids=str)
def test_nearly_every_token_ends(beams, eos, early):
    """All of the best candidates may end, so that beams go on from far behind; and each early_stopping differs."""
    theirs, ours = pair()
    options = {"num_beams": beams, "num_return_sequences": beams, "eos_token_id": list(range(3, eos))}
    options |= {"early_stopping": early, "length_penalty": 2.0, "max_new_tokens": 30}
    assert_same(*both(theirs, ours, "left", **options))


def test_prompts_fed_in_chunks():
    _, ours = pair()
    ids, mask, _ = prompts("left")
    options = {"max_new_tokens": NEW, "num_beams": 3, "eos_token_id": EOS, "pad_token_id": 0}
    whole = ours.generate(ids, mask, **options)
    assert torch.equal(ours.generate(ids, mask, prefill_chunk_size=4, **options), whole)


def test_a_batch_equals_its_prompts_alone():
    _, ours = pair()
    ids, mask, _ = prompts("left")
    options = {"max_new_tokens": NEW, "num_beams": 4, "num_return_sequences": 2, "eos_token_id": None}
    batch = ours.generate(ids, mask, **options)
    for row in range(3):
        alone = ours.generate(ids[row : row + 1, mask[row] == 1], **options)
        assert torch.equal(alone[:, -NEW:], batch[2 * row : 2 * row + 2, -NEW:])


def test_transition_scores_equal_transformers():
    theirs, ours = pair()
    ids, _, _ = prompts()
    options = {"max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    b = ours.generate(ids, num_beams=3, num_return_sequences=3, **options)
    mine = ours.compute_transition_scores(b.sequences, b.scores, b.beam_indices)
    assert torch.allclose(mine, theirs.compute_transition_scores(b.sequences, b.scores, b.beam_indices))
    lengths = (b.beam_indices >= 0).sum(1)
    assert torch.allclose(mine.sum(1) / lengths, b.sequences_scores, atol=1e-5)
    g = ours.generate(ids, **{**options, "eos_token_id": None})
    for normalised in (False, True):
        mine = ours.compute_transition_scores(g.sequences, g.scores, normalize_logits=normalised)
        assert torch.allclose(
            mine, theirs.compute_transition_scores(g.sequences, g.scores, normalize_logits=normalised), atol=1e-6
        )


# The cache is not copied


class Copies(TorchDispatchMode):
    """Bytes that operations write into new or other memory, of tensors as wide as keys and values are."""

    MOVES = ("index_select", "gather", "clone", "cat", "copy_", "_to_copy", "index_put_", "index", "repeat", "take")

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim, self.moved = head_dim, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in self.MOVES and isinstance(out, torch.Tensor):
            source = args[-1] if name == "index_put_" else args[1] if name == "copy_" else out
            source = source if isinstance(source, torch.Tensor) else out
            if source.dim() == 4 and source.shape[-1] == self.head_dim:
                self.moved += source.nbytes
        return out


@pytest.mark.parametrize("padding", [None, "left"])
def test_a_step_does_not_copy_the_cache(padding):
    """Per step and layer: the beams' new keys and values, and what the queries and outputs take. Nothing that grows
    with the prompt. Clearing dead branches away costs as much again over time."""
    _, ours = pair(max_position_embeddings=2048)
    moved = {}
    for length in (32, 512):
        ids, mask, _ = prompts(padding, length=length)
        options = {"num_beams": 4, "eos_token_id": None}
        counts = []
        for new in (2, 66):
            with Copies(16) as copies:
                ours.generate(ids, mask, max_new_tokens=new, **options)
            counts.append(copies.moved)
        moved[length] = (counts[1] - counts[0]) / 64
    token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32
    beams = 3 * 4
    assert abs(moved[512] - moved[32]) < 0.5 * beams * token
    assert moved[512] < 12 * beams * token
    whole = 512 * beams * token
    assert moved[512] < whole / 40


def test_rows_of_the_cache_are_prompts():
    """Four beams read the prompt's keys from one place."""
    _, ours = pair()
    ids, _, _ = prompts()
    made = []
    init = KVCache.__init__

    def remember(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "__init__", remember)
        ours.generate(ids, max_new_tokens=4, num_beams=4, eos_token_id=None)
    assert [cache.batch_size for cache in made] == [3]


# Sampled beams


def test_sampled_beams_repeat_and_stand_alone():
    _, ours = pair()
    ids, mask, _ = prompts("left")
    options = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": True, "eos_token_id": EOS, "pad_token_id": 0}
    a = ours.generate(ids, mask, seed=3, **options)
    assert torch.equal(a, ours.generate(ids, mask, seed=3, **options))
    assert torch.equal(a, ours.generate(ids, mask, seed=3, use_cache=False, **options))
    alone = ours.generate(ids[:1], seed=3, **options)
    assert torch.equal(a[:1, : alone.shape[1]], alone)
    assert not torch.equal(a, ours.generate(ids, mask, seed=4, **options))


def test_sampled_beams_without_a_choice_equal_transformers():
    """With as many tokens as top_k leaves, the draw has one outcome, and all that surrounds it is compared."""
    theirs, ours = pair()
    options = {"num_beams": 2, "do_sample": True, "top_k": 1, "eos_token_id": None, "num_return_sequences": 2}
    ids, _, _ = prompts()
    options |= {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    a = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    b = ours.generate(ids, seed=0, **options)
    assert torch.equal(b.scores[0].isinf(), a.scores[0].isinf())
    assert torch.allclose(b.scores[0].softmax(-1), a.scores[0].softmax(-1), atol=1e-6)


def test_sampled_beams_follow_the_probabilities():
    """First tokens of two beams, drawn one after the other without putting back: the first in proportion to p."""
    _, ours = pair()
    ids, _, _ = prompts()
    options = {"num_beams": 2, "do_sample": True, "top_k": 4, "eos_token_id": None, "max_new_tokens": 1}
    options |= {"num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    trials = 600
    many = ids[:1].expand(trials, -1)
    out = ours.generate(many, seed=1, **options)
    p = out.scores[0][0].softmax(-1)
    first, second = out.sequences[:, -1].view(trials, 2).unbind(1)
    assert not bool((first == second).any())
    # Results are sorted by score, so that pairs are unordered: {a, b} has p_a p_b / (1 - p_a) + p_b p_a / (1 - p_b).
    kept = p.nonzero().flatten().tolist()
    expected, seen = [], []
    for a, b in itertools.combinations(kept, 2):
        pa, pb = float(p[a]), float(p[b])
        expected.append(trials * (pa * pb / (1 - pa) + pb * pa / (1 - pb)))
        seen.append(int((((first == a) & (second == b)) | ((first == b) & (second == a))).sum()))
    assert sum(seen) == trials
    chi2 = sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True))
    assert chi2 < 20.5  # 5 degrees of freedom, 0.1%
