"""Speculation changes how many passes a text takes, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from model.reference import SIZES, pair, prompts
from pyllm import KVCache, LlamaForCausalLM
from pyllm.speculative import PromptLookup

NEW = 24
EOS = [40, 77, 101]


def drafts() -> dict[str, dict]:
    """Ways to guess: from the text, by another model (nearly always wrong), by the model itself (always right), and by
    one that is a little off."""
    _, ours = pair()
    _, close = pair()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in close.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    return {
        "lookup": {"prompt_lookup_num_tokens": 4},
        "lookup, long": {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 3},
        "other model": {"assistant_model": LlamaForCausalLM(ours.config).eval()},
        "itself": {"assistant_model": ours, "num_assistant_tokens": 3},
        "close": {"assistant_model": close},
    }


NAMES = list(drafts())


def row(seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    part = torch.randint(3, SIZES["vocab_size"], (1, 6), generator=generator)
    return part.repeat(1, 3)  # repetitions, for lookup to find


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": None},
        {"eos_token_id": EOS, "min_new_tokens": 5},
        {"eos_token_id": None, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"eos_token_id": None, "max_new_tokens": 1},
        {"eos_token_id": None, "max_new_tokens": 2},
    ],
    ids=str,
)
def test_greedy_is_the_same(name, options):
    """Tokens, scores, and the cache that is left."""
    _, ours = pair()
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True, **options}
    plain = ours.generate(row(), **options)
    fast = ours.generate(row(), **options, **drafts()[name])
    assert torch.equal(fast.sequences, plain.sequences)
    assert len(fast.scores) == len(plain.scores)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(fast.scores, plain.scores, strict=True))
    assert len(fast.past_key_values) == len(plain.past_key_values) == plain.sequences.shape[1] - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_same_for_many_prompts(name):
    _, ours = pair()
    guesses = drafts()[name]
    for seed in range(30):
        options = {"max_new_tokens": NEW, "eos_token_id": EOS if seed % 2 else None}
        assert torch.equal(ours.generate(row(seed), **options, **guesses), ours.generate(row(seed), **options))


@pytest.mark.parametrize("family, changes", [("mistral", {"sliding_window": 6}), ("qwen3", {})], ids=str)
def test_families(family, changes):
    _, ours = pair(family, **changes)
    plain = ours.generate(row(), max_new_tokens=NEW, eos_token_id=None)
    for guesses in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": ours}):
        assert torch.equal(ours.generate(row(), max_new_tokens=NEW, eos_token_id=None, **guesses), plain)


def test_right_guesses_save_passes():
    _, ours = pair()
    passes: list[int] = []
    hook = ours.model.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    ours.generate(row(), max_new_tokens=NEW, eos_token_id=None, assistant_model=drafts()["itself"]["assistant_model"])
    hook.remove()
    assert len(passes) == 1 + -(-(NEW - 1) // 6)  # five guesses and the model's own token per pass
    assert sum(passes) < row().shape[1] + 2 * NEW


def test_lookup_finds_what_followed():
    guess = lambda ids, k, n=2: PromptLookup(k, n).guess(torch.tensor([ids]), k, [], None)[0].tolist()  # noqa: E731
    assert guess([5, 6, 7, 8, 9, 5, 6], 3) == [7, 8, 9]
    assert guess([5, 6, 7, 1, 6, 8, 2, 6], 2) == [7, 1]  # the pair (2, 6) is new, 6 is not
    assert guess([1, 2, 3], 4) == []
    assert guess([4, 4, 4], 3) == [4]
    assert guess([7], 3) == []


def test_padding_and_a_cache_that_was_there():
    _, ours = pair()
    ids, mask, _ = prompts("left")
    options = {"max_new_tokens": NEW, "eos_token_id": None}
    plain = ours.generate(ids[2:], mask[2:], **options)
    for name in ("lookup", "close"):
        if name == "lookup":
            assert torch.equal(ours.generate(ids[2:], mask[2:], **options, **drafts()[name]), plain)
        cache = KVCache()
        ours.generate(row(), max_new_tokens=2, eos_token_id=None, past_key_values=cache)
        cache.crop(12)
        again = ours.generate(row(), past_key_values=cache, **options, **drafts()[name])
        assert torch.equal(again, ours.generate(row(), **options))


def test_lookup_with_a_seed_draws_the_same_tokens():
    """A certain guess is accepted when the model draws it, with the very number that it would have used anyway."""
    _, ours = pair()
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.4, "eos_token_id": None}
    for seed in range(3):
        plain = ours.generate(row(), seed=seed, **options)
        assert torch.equal(ours.generate(row(), seed=seed, prompt_lookup_num_tokens=4, **options), plain)


@pytest.mark.parametrize(
    "name", ["close", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lookup", "other model"))]
)
def test_sampling_follows_the_same_distribution(name):
    """Pairs of first tokens, many times, against their exact probabilities: chi-squared at 0.1%."""
    _, ours = pair()
    options = {"do_sample": True, "top_k": 3, "eos_token_id": None}
    shown = {"return_dict_in_generate": True, "output_scores": True}
    first = ours.generate(row(), max_new_tokens=1, seed=0, **options, **shown).scores[0][0].softmax(-1)
    expected = {}
    for a in first.nonzero().flatten().tolist():
        ids = torch.cat((row(), torch.tensor([[a]])), 1)
        second = ours.generate(ids, max_new_tokens=1, seed=0, **options, **shown).scores[0][0].softmax(-1)
        for b in second.nonzero().flatten().tolist():
            expected[a, b] = float(first[a] * second[b])
    trials = 300
    guesses = drafts()[name]
    seen = Counter(
        tuple(ours.generate(row(), max_new_tokens=3, seed=seed, **options, **guesses)[0, 18:20].tolist())
        for seed in range(trials)
    )
    assert set(seen) <= set(expected)
    likely = [(seen[key], trials * p) for key, p in expected.items() if trials * p >= 5]
    rest = trials - sum(e for _, e in likely)
    likely += [(trials - sum(s for s, _ in likely), rest)] if rest > 1 else []
    chi2 = sum((s - e) ** 2 / e for s, e in likely)
    assert chi2 < {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3, 8: 26.1, 9: 27.9}[len(likely) - 1]


BAD = {
    "two ways to the same": {"prompt_lookup_num_tokens": 3, "assistant_model": "itself"},
    "prompt_lookup_num_tokens must be an integer greater than 0, got 0": {"prompt_lookup_num_tokens": 0},
    "prompt_lookup_num_tokens needs one prompt": {"prompt_lookup_num_tokens": 3, "num_beams": 2},
    "needs one prompt, one result and no beams, got 2 rows": {
        "prompt_lookup_num_tokens": 3, "do_sample": True, "num_return_sequences": 2,
    },
    "needs the cache, but use_cache is False": {"prompt_lookup_num_tokens": 3, "use_cache": False},
    "past_key_values with a window": {"prompt_lookup_num_tokens": 3, "past_key_values": KVCache(window=4)},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_errors(message):
    _, ours = pair()
    options = dict(BAD[message])
    if options.get("assistant_model") == "itself":
        options["assistant_model"] = ours
    with pytest.raises(ValueError, match=message):
        ours.generate(row(), max_new_tokens=3, **options)


def test_vocabularies_must_agree():
    _, ours = pair()
    _, other = pair(vocab_size=99)
    with pytest.raises(ValueError, match="model's vocabulary of 131 tokens, got 99"):
        ours.generate(row(), max_new_tokens=3, assistant_model=other)
