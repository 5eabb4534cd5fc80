"""Options: every bad one is an error before any work, and says what is wrong; what has no effect is a warning."""

from __future__ import annotations

import pytest
import torch

from model.reference import SIZES, pair, prompts, transformers
from pyllm import GenerationConfig, KVCache
from pyllm.options import configured

ONES = torch.ones(3, 16)
BAD = {
    "max_new_tokens must be an integer greater than 0, got 0": {"max_new_tokens": 0},
    "max_new_tokens must be an integer greater than 0, got 2.5": {"max_new_tokens": 2.5},
    "min_new_tokens must be a non-negative integer, got -1": {"min_new_tokens": -1},
    "min_length must be a non-negative integer, got -1": {"min_length": -1},
    "no_repeat_ngram_size must be a non-negative integer, got -2": {"no_repeat_ngram_size": -2},
    "prefill_chunk_size must be an integer greater than 0, got 0": {"prefill_chunk_size": 0},
    "temperature must be greater than 0 .* do_sample=False, got 0.0": {"do_sample": True, "temperature": 0.0},
    "temperature must be greater than 0 .* got inf": {"do_sample": True, "temperature": float("inf")},
    "temperature must be greater than 0 .* got nan": {"do_sample": True, "temperature": float("nan")},
    "top_k must be a non-negative integer .*, got -1": {"do_sample": True, "top_k": -1},
    r"top_p must be within \[0, 1\], got 1.5": {"do_sample": True, "top_p": 1.5},
    r"min_p must be within \[0, 1\], got 2": {"do_sample": True, "min_p": 2},
    r"typical_p must be within \(0, 1\], got 0": {"do_sample": True, "typical_p": 0},
    r"epsilon_cutoff must be within \[0, 1\), got 1": {"do_sample": True, "epsilon_cutoff": 1},
    r"eta_cutoff must be within \[0, 1\), got -0.1": {"do_sample": True, "eta_cutoff": -0.1},
    "repetition_penalty must be greater than 0 and finite, got 0": {"repetition_penalty": 0},
    "length_penalty must be finite, got inf": {"num_beams": 2, "length_penalty": float("inf")},
    "max_time must be greater than 0, got 0": {"max_time": 0},
    "do_sample must be True or False, got 'yes'": {"do_sample": "yes"},
    "use_cache must be True or False, got 1": {"use_cache": 1},
    "early_stopping must be a boolean or 'never', got 3": {"early_stopping": 3},
    "early_stopping must be a boolean or 'never', got 'always'": {"num_beams": 2, "early_stopping": "always"},
    "num_beams must be an integer greater than 0, got 0": {"num_beams": 0},
    "num_return_sequences = 2 needs do_sample=True or num_beams": {"num_return_sequences": 2},
    "num_return_sequences = 4 must not be larger than num_beams = 3": {"num_beams": 3, "num_return_sequences": 4},
    r"eos_token_id must be token ids within \[0, 131\), got \[131\]": {"eos_token_id": 131},
    r"suppress_tokens must be token ids within \[0, 131\), got \[-1\]": {"suppress_tokens": [-1]},
    "bad_words_ids must be a non-empty list of lists of token ids": {"bad_words_ids": [3, 4]},
    "bad_words_ids must not hold an empty list": {"bad_words_ids": [[3], []]},
    "each list in bad_words_ids must be token ids": {"bad_words_ids": [[3, 400]]},
    "sequence_bias must be": {"sequence_bias": [3, 4]},
    "sequence_bias must name at least one token per entry": {"sequence_bias": {(): 1.0}},
    "each key of sequence_bias must be token ids": {"sequence_bias": {(500,): 1.0}},
    "stop_strings must be a text or several": {"stop_strings": [""], "tokenizer": object()},
    "stop_strings needs tokenizer=": {"stop_strings": "x"},
    "tokenizer must be a pyllm.Tokenizer": {"stop_strings": "x", "tokenizer": object()},
    "exponential_decay_length_penalty must be": {"exponential_decay_length_penalty": 3},
    r"forced_eos_token_id = \[5\] is in suppress_tokens too": {"forced_eos_token_id": 5, "suppress_tokens": [5, 6]},
    "num_beam_groups = 2 is not supported": {"num_beam_groups": 2},
    "guidance_scale = 3.0 is not supported": {"guidance_scale": 3.0},
    r"`model_kwargs` are not used by the model: \['max_new_token'\]": {"max_new_token": 3},
    "give seed or generator, not both": {"seed": 1, "generator": torch.Generator()},
    "input_ids has 17 tokens, but max_length is 17": {"max_new_tokens": None, "max_length": 17},
    r"attention_mask must have input_ids' shape \(3, 17\), got \(3, 16\)": {"attention_mask": ONES},
    "attention_mask must keep a token of every row, got none in row 0": {"attention_mask": torch.zeros(3, 17)},
    r"one token per row, got \(3, 0\)": {"input_ids": torch.zeros(3, 0, dtype=torch.int64)},
    r"within \[0, vocab_size = 131\), got 131": {"input_ids": torch.full((1, 2), SIZES["vocab_size"])},
    r"room for 18 tokens and is not growable, but 17 of the prompt and 3 new ones need 19": {
        "past_key_values": KVCache(18, growable=False)
    },
    "past_key_values must be a pyllm.KVCache": {"past_key_values": transformers.DynamicCache()},
    "past_key_values is given, but use_cache is False": {"past_key_values": KVCache(), "use_cache": False},
    "past_key_values does not go with beams": {"past_key_values": KVCache(), "num_beams": 2},
    "prefill_chunk_size needs the cache": {"prefill_chunk_size": 4, "use_cache": False},
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_option_before_any_work(message):
    _, ours = pair()
    ids, _, _ = prompts()
    passes: list[int] = []
    hook = ours.model.register_forward_pre_hook(lambda module, args: passes.append(1))
    with pytest.raises(ValueError, match=message):
        ours.generate(**{"input_ids": ids, "max_new_tokens": 3, **BAD[message]})
    hook.remove()
    assert not passes


WARNED = {
    "temperature = 0.5 has no effect without do_sample=True": {"temperature": 0.5},
    "top_k = 3 has no effect without do_sample=True": {"top_k": 3},
    "length_penalty = 2.0 has no effect without num_beams > 1": {"length_penalty": 2.0},
    "early_stopping = True has no effect without num_beams > 1": {"early_stopping": True},
    "max_new_tokens and max_length are both given; max_new_tokens counts": {"max_length": 40},
    r"min_new_tokens = 9 can't be reached: generation ends at 19 tokens": {"min_new_tokens": 9},
    "up to 67 tokens, but the model knows 64 positions": {"max_new_tokens": 50},
}


@pytest.mark.parametrize("message", WARNED)
def test_what_has_no_effect_warns(message):
    _, ours = pair()
    ids, _, _ = prompts()
    options = {"max_new_tokens": 2, "eos_token_id": None, **WARNED[message]}
    with pytest.warns(UserWarning, match=message) as caught:
        assert ours.generate(ids, **options).shape[1] == 17 + options["max_new_tokens"]
    assert caught[0].filename == __file__


def test_bad_values_in_the_files_are_found_too():
    _, ours = pair()
    ids, _, _ = prompts()
    ours.generation_config = GenerationConfig.from_dict({"do_sample": True, "top_p": 7.0})
    with pytest.raises(ValueError, match="top_p must be"):
        ours.generate(ids, max_new_tokens=2)


def test_none_switches_off_what_the_file_says():
    _, ours = pair()
    saved = GenerationConfig.from_dict({"eos_token_id": 4, "top_k": 7, "bad_words_ids": [[3]], "do_sample": True})
    made = configured(ours.config, saved, None, {"eos_token_id": None, "bad_words_ids": None, "top_p": 0.5})
    assert (made.eos_token_id, made.bad_words_ids, made.top_k, made.top_p) == (None, None, 7, 0.5)


def test_a_config_of_transformers_is_read():
    theirs, ours = pair()
    ids, _, _ = prompts()
    config = transformers.GenerationConfig(max_new_tokens=6, num_beams=3, num_return_sequences=2, eos_token_id=40)
    a = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert torch.equal(ours.generate(ids, generation_config=config), a)


def test_every_saved_option_survives():
    """A transformers generation_config.json in full is read, and written back."""
    _, ours = pair()
    values = transformers.GenerationConfig(top_k=5, do_sample=True, max_new_tokens=3, repetition_penalty=1.1).to_dict()
    ours.generation_config = GenerationConfig.from_dict(values)
    ids, _, _ = prompts()
    assert ours.generate(ids, seed=1).shape == (3, 20)
    saved = ours.generation_config.to_dict()
    assert {k: v for k, v in values.items() if v is not None} == {k: v for k, v in saved.items() if v is not None}


def test_hints_of_speed_change_nothing():
    _, ours = pair()
    ids, _, _ = prompts()
    ours.generation_config = GenerationConfig.from_dict({"cache_implementation": "hybrid", "eos_token_id": None})
    plain = ours.generate(ids, max_new_tokens=4)
    assert torch.equal(ours.generate(ids, max_new_tokens=4, cache_implementation="static"), plain)


def test_a_cache_grows_beyond_what_was_reserved(monkeypatch):
    _, ours = pair()
    ids, mask, _ = prompts("left")
    plain = ours.generate(ids, mask, max_new_tokens=30, eos_token_id=None)
    monkeypatch.setattr("pyllm.generate.RESERVED", 3)
    assert torch.equal(ours.generate(ids, mask, max_new_tokens=30, eos_token_id=None), plain)


def test_sampled_tokens_pass_a_chi_squared_test():
    """Many rows of one prompt, drawn at once with a seed, a generator and the global one: 0.1% level."""
    _, ours = pair()
    ids, _, _ = prompts()
    many = ids[:1].expand(3000, -1)
    options = {"do_sample": True, "top_k": 8, "temperature": 1.5, "eos_token_id": None, "max_new_tokens": 1}
    shown = {"return_dict_in_generate": True, "output_scores": True}
    for source in ({"seed": 11}, {"generator": torch.Generator().manual_seed(5)}, {}):
        out = ours.generate(many, **options, **shown, **source)
        p = out.scores[0][0].softmax(-1).double()
        seen = torch.bincount(out.sequences[:, -1], minlength=len(p))
        assert int(seen[p == 0].sum()) == 0
        kept = p > 0
        chi2 = float(((seen[kept] - 3000 * p[kept]) ** 2 / (3000 * p[kept])).sum())
        assert chi2 < 24.3, source  # 7 degrees of freedom
