"""Processors equal transformers': each by its scores, and all together in their order inside `generate`."""

from __future__ import annotations

import random

import pytest
import torch

from model.reference import SIZES, pair, prompts, transformers
from pyllm import Tokenizer
from pyllm.options import GenerationConfig
from pyllm.processors import NoRepeatNGram, SequenceBias, finite, no_bad_words, normalised, processors
from pyllm.sampling import keep_epsilon, keep_eta, keep_min_p, keep_top_k, keep_top_p, keep_typical
from pyllm.stopping import StopStrings

hf = transformers.generation
CPU = torch.device("cpu")
NEW = 20


def scores_and_ids() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(8, 60, generator=generator) * 4
    scores[1] = 0.5  # all alike
    scores[2, :5] = 9.0  # ties at the top
    scores[3, 7:] = -torch.inf  # hardly anything left
    scores[4] *= 100
    scores[5, 3:] = -torch.inf
    return scores, torch.randint(0, 4, (8, 30), generator=generator)


FILTERS = {
    "top_k 3, two at least": (lambda s: keep_top_k(s, 1, 2), hf.TopKLogitsWarper(1, min_tokens_to_keep=2)),
    "top_p 0, three at least": (lambda s: keep_top_p(s, 0.0, 3), hf.TopPLogitsWarper(0.0, min_tokens_to_keep=3)),
    "min_p 1, two at least": (lambda s: keep_min_p(s, 1.0, 2), hf.MinPLogitsWarper(1.0, min_tokens_to_keep=2)),
    **{
        f"typical {p}, {n} at least": (
            lambda s, p=p, n=n: keep_typical(s, p, n),
            hf.TypicalLogitsWarper(p, min_tokens_to_keep=n),
        )
        for p in (0.05, 0.4, 0.95)
        for n in (1, 3)
    },
    **{
        f"epsilon {p}, {n} at least": (
            lambda s, p=p, n=n: keep_epsilon(s, p, n),
            hf.EpsilonLogitsWarper(p, min_tokens_to_keep=n),
        )
        for p in (3e-4, 0.05, 0.9)
        for n in (1, 3)
    },
    **{
        f"eta {p}, {n} at least": (
            lambda s, p=p, n=n: keep_eta(s, p, n),
            hf.EtaLogitsWarper(p, min_tokens_to_keep=n),
        )
        for p in (3e-4, 0.05, 0.9)
        for n in (1, 3)
    },
    "normalised": (lambda s: normalised(None, s), hf.LogitNormalization()),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_equal_transformers(name):
    ours, theirs = FILTERS[name]
    scores, ids = scores_and_ids()
    before = scores.clone()
    assert torch.equal(ours(scores), theirs(ids, scores.clone()))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31])
def test_no_repeat_ngram_equals_transformers(n):
    scores, ids = scores_and_ids()
    assert torch.equal(NoRepeatNGram(n)(ids, scores), hf.NoRepeatNGramLogitsProcessor(n)(ids, scores.clone()))


def test_sequence_bias_equals_transformers():
    scores, ids = scores_and_ids()
    biases = {(3,): 2.0, (5,): -1.5, (1, 2): 4.0, (0, 1, 7): -torch.inf, (*ids[0, -3:].tolist(), 9): 8.0}
    theirs = hf.SequenceBiasLogitsProcessor(dict(biases))(ids, scores.clone())
    assert torch.equal(SequenceBias(biases, CPU)(ids, scores), theirs)


def test_bad_words_equal_transformers():
    scores, ids = scores_and_ids()
    words = [[3], [9], [1, 2], [int(ids[2, -1]), 30]]
    theirs = hf.NoBadWordsLogitsProcessor(words, eos_token_id=9)(ids, scores.clone())
    assert torch.equal(no_bad_words(words, [9], CPU)(ids, scores), theirs)
    assert no_bad_words([[9]], [9], CPU) is None


def test_invalid_values_are_replaced_as_in_transformers():
    scores, ids = scores_and_ids()
    scores[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert torch.equal(finite(ids, scores), hf.logits_process.InfNanRemoveLogitsProcessor()(ids, scores.clone()))


OPTIONS = {
    "no repeated bigrams": {"no_repeat_ngram_size": 2},
    "no repeated tokens": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[7], [11, 12], [40], [101, 5]]},
    "sequence bias": {"sequence_bias": {(33,): 3.0, (33, 50): 20.0}},
    "suppressed": {"suppress_tokens": list(range(0, 130, 2))},
    "suppressed at first": {"begin_suppress_tokens": list(range(120))},
    "forced end": {"forced_eos_token_id": [9, 3]},
    "sooner the end": {"exponential_decay_length_penalty": (3, 1.5)},
    "all finite": {"remove_invalid_values": True, "bad_words_ids": [[7]]},
    "all at once": {
        "sequence_bias": {(33,): 3.0}, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[4, 8]],
        "min_new_tokens": 6, "suppress_tokens": [1, 2, 3], "begin_suppress_tokens": [77], "forced_eos_token_id": 5,
        "renormalize_logits": True, "exponential_decay_length_penalty": (8, 1.2),
    },
}  # fmt: skip


@pytest.mark.parametrize("padding", ["left", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_equals_transformers(name, padding):
    theirs, ours = pair()
    ids, mask, _ = prompts(padding)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": [40, 9, 77], "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True, **OPTIONS[name]}
    a = theirs.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)
    b = ours.generate(ids, mask, **options)
    assert torch.equal(b.sequences, a.sequences)
    for x, y in zip(b.scores, a.scores, strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-4)


def test_forced_beginning():
    theirs, ours = pair()
    ids = torch.tensor([[1], [4]])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "forced_bos_token_id": 33}
    a = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(ours.generate(ids, **options), a)
    assert a[:, 1].tolist() == [33, 33]


def test_order_and_presence_equal_transformers():
    """The list of processors for random options, against transformers' own list: the same scores from the whole."""
    theirs, _ = pair()
    choices = {
        "repetition_penalty": [1.2, 0.8], "no_repeat_ngram_size": [2, 3], "bad_words_ids": [[[5], [1, 2]]],
        "min_new_tokens": [3], "suppress_tokens": [[3, 4]], "begin_suppress_tokens": [[8]], "temperature": [0.6, 1.7],
        "top_k": [0, 5, 30], "top_p": [0.7, 0.95], "min_p": [0.05], "typical_p": [0.8], "epsilon_cutoff": [1e-3],
        "eta_cutoff": [1e-3], "renormalize_logits": [True], "num_beams": [1, 3], "eos_token_id": [7, [7, 9]],
        "do_sample": [True, False], "remove_invalid_values": [True],
    }  # fmt: skip
    scores, ids = scores_and_ids()
    scores = torch.nn.functional.pad(scores, (0, SIZES["vocab_size"] - 60), value=-3.0)
    rng = random.Random(5)
    for _ in range(60):
        options = {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.4}
        length = rng.choice([28, 30])
        options.setdefault("top_k", 50)  # the default that transformers' generate fills in
        config = transformers.GenerationConfig(**options)
        theirs._prepare_special_tokens(config, True, device=CPU)
        config.max_length = 50
        made = theirs._get_logits_processor(config, length, model_kwargs={"attention_mask": torch.ones(8, length)})
        expected = made(ids, scores.clone()).softmax(-1)
        found = scores
        for process in processors(GenerationConfig(**options), None, length, 50, CPU):
            found = process(ids, found)
        assert float((found.softmax(-1) - expected).abs().max()) < 1e-6, options


@pytest.mark.parametrize(
    "options",
    [
        {"typical_p": 0.7, "top_k": 0},
        {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "temperature": 1.3},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_sampling_probabilities_equal_transformers(options):
    theirs, ours = pair()
    ids, mask, _ = prompts("left")
    common = {"do_sample": True, "max_new_tokens": 1, "eos_token_id": None, **options}
    common |= {"return_dict_in_generate": True, "output_scores": True}
    a = theirs.generate(ids, attention_mask=mask, **common).scores[0].softmax(-1)
    b = ours.generate(ids, mask, seed=4, **common).scores[0].softmax(-1)
    assert float((a - b).abs().max()) < 1e-6


# Stop strings


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "the stop sign stops the topper at the top: größer, naïve, 日本語 stop. stopping stopped " * 40
    return Tokenizer.train([text], vocab_size=330)


def hf_tokenizer(tokenizer: Tokenizer):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)


@pytest.mark.parametrize("strings", ["stop", ["top:", "größ"], ["本", "p the"], ["e", "naïve"]], ids=str)
def test_stop_strings_equal_transformers(tokenizer, strings):
    theirs = hf.StopStringCriteria(hf_tokenizer(tokenizer), strings)
    ours = StopStrings(strings, tokenizer)
    texts = ["the stop", "stop the", "the topper", "a größer", "日本", "日", "stopping", "st op", "s", "top: größ", "e"]
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        for end in range(1, ids.shape[1] + 1):
            found.append(bool(ours(ids[:, :end], None)[0]))
            assert found[-1] == bool(theirs(ids[:, :end], None)[0]), (text, end)
    assert any(found)
    assert not all(found)


def test_generation_stops_at_strings_as_transformers_does(tokenizer):
    theirs, ours = pair(vocab_size=tokenizer.vocab_size)
    ids, mask, _ = prompts("left")
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    free = ours.generate(ids, mask, **options)
    text = tokenizer.decode_bytes(free[1, 17:].tolist())
    for strings in (["e", "st"], [text[5:6].decode("latin-1")], "t"):
        ours_out = ours.generate(ids, mask, stop_strings=strings, tokenizer=tokenizer, **options)
        theirs_out = theirs.generate(
            ids, attention_mask=mask, stop_strings=strings, tokenizer=hf_tokenizer(tokenizer), **options
        )
        assert torch.equal(ours_out, theirs_out)
        again = ours.generate(ids, mask, stop_strings=strings, tokenizer=hf_tokenizer(tokenizer), **options)
        assert torch.equal(ours_out, again)


def test_stop_strings_end_beams(tokenizer):
    theirs, ours = pair(vocab_size=tokenizer.vocab_size)
    ids, mask, _ = prompts("left")
    options = {"max_new_tokens": 20, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": 2, "pad_token_id": 2}
    options |= {"stop_strings": ["e", "st"]}
    a = theirs.generate(ids, attention_mask=mask, tokenizer=hf_tokenizer(tokenizer), **options)
    assert torch.equal(ours.generate(ids, mask, tokenizer=tokenizer, **options), a)


def test_max_time_ends_all_rows():
    _, ours = pair()
    ids, _, _ = prompts()
    assert ours.generate(ids, max_new_tokens=40, max_time=1e-9, eos_token_id=None).shape[1] == 18
