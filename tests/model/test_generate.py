"""Generation equals transformers': tokens when greedy, probabilities when sampling, and its errors."""

from __future__ import annotations

import itertools

import pytest
import torch

from model.reference import error, pair, prompts, transformers
from pyllm import GenerationConfig, KVCache, LlamaForCausalLM
from pyllm.processors import RepetitionPenalty
from pyllm.sampling import draw_tokens, keep_min_p, keep_top_k, keep_top_p

hf_generation = transformers.generation
NEW = 24
EOS = [5, 9, 40, 77, 101, 102, 103, 110, 111, 112]
OPTIONS = {
    "plain": {"eos_token_id": None},
    "one end token": {"eos_token_id": 40, "pad_token_id": 0},
    "many end tokens": {"eos_token_id": EOS, "pad_token_id": 0},
    "not before 7 tokens": {"eos_token_id": EOS, "min_new_tokens": 7, "pad_token_id": 0},
    "not before length 25": {"eos_token_id": EOS, "min_length": 25, "pad_token_id": 0},
    "up to length 30": {"eos_token_id": None, "max_new_tokens": None, "max_length": 30},
    "repetition penalty": {"eos_token_id": None, "repetition_penalty": 1.8},
    "repetition reward": {"eos_token_id": None, "repetition_penalty": 0.7},
}
FAMILIES = {
    "llama": {},
    "mistral": {"family": "mistral", "sliding_window": 6},
    "qwen3": {"family": "qwen3"},
}


def both(theirs, ours, ids, mask, **options):
    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        **options,
    }
    mask = torch.ones_like(ids) if mask is None else mask
    a = theirs.generate(ids, attention_mask=mask, **options)
    return a, [ours.generate(ids, attention_mask=mask, use_cache=cached, **options) for cached in (True, False)]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_equals_transformers(name, padding):
    """Token for token and score for score, with and without the cache."""
    theirs, ours = pair()
    ids, mask, _ = prompts(padding)
    a, found = both(theirs, ours, ids, mask, **OPTIONS[name])
    for b in found:
        assert torch.equal(b.sequences, a.sequences)
        assert len(b.scores) == len(a.scores)
        for ours_score, theirs_score in zip(b.scores, a.scores, strict=True):
            assert torch.equal(ours_score.isinf(), theirs_score.isinf())
            assert error(ours_score.nan_to_num(neginf=0.0), theirs_score.nan_to_num(neginf=0.0)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_families_decode_like_transformers(family):
    theirs, ours = pair(**FAMILIES[family])
    ids, mask, _ = prompts("left")
    a, found = both(theirs, ours, ids, mask, eos_token_id=None)
    for b in found:
        assert torch.equal(b.sequences, a.sequences)


def test_a_batch_equals_its_rows_alone():
    _, ours = pair()
    ids, mask, _ = prompts("left")
    batch = ours.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None)
    for row in range(3):
        alone = ours.generate(ids[row : row + 1, mask[row] == 1], max_new_tokens=NEW, eos_token_id=None)
        assert torch.equal(alone[0, -NEW:], batch[row, -NEW:])


def test_right_padded_prompts_go_on_where_they_end():
    _, ours = pair()
    ids, mask, _ = prompts("right")
    with pytest.warns(UserWarning, match="padded on the right"):
        batch = ours.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None)
    for row in range(3):
        alone = ours.generate(ids[row : row + 1, mask[row] == 1], max_new_tokens=NEW, eos_token_id=None)
        assert torch.equal(alone[0, -NEW:], batch[row, -NEW:])


def test_a_mask_is_inferred_from_the_padding_token():
    theirs, ours = pair(pad_token_id=0)
    ids, mask, _ = prompts("left")
    ids = ids * mask
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    inferred = ours.generate(ids, **options)
    assert torch.equal(inferred, ours.generate(ids, mask, **options))
    assert torch.equal(inferred, theirs.generate(ids, **options))


def test_defaults_come_from_the_generation_config():
    _, ours = pair()
    ids, _, _ = prompts()
    ours.generation_config = GenerationConfig.from_dict({"max_new_tokens": 3, "eos_token_id": None, "top_p": 0.3})
    assert ours.generate(ids).shape[1] == 20
    assert ours.generate(ids, max_new_tokens=5).shape[1] == 22
    assert ours.generate(ids, generation_config=GenerationConfig(max_new_tokens=4)).shape[1] == 21
    ours.generation_config = None
    with pytest.warns(UserWarning, match="20 new tokens"):
        assert ours.generate(ids, eos_token_id=None).shape[1] == 37


def test_without_a_prompt():
    theirs, ours = pair()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(**options), theirs.generate(**options))
    ours.config = ours.config.replace(bos_token_id=None)
    with pytest.raises(ValueError, match="input_ids must be given"):
        ours.generate(**options)


def test_a_chat_keeps_its_cache():
    """The second turn feeds only what is new, and says what it would say without a cache."""
    _, ours = pair()
    ids, mask, _ = prompts("left")
    cache = KVCache()
    first = ours.generate(ids, mask, max_new_tokens=5, eos_token_id=None, past_key_values=cache)
    more = torch.cat((first, ids[:, :4]), 1)
    longer = torch.cat((mask, torch.ones(3, 9, dtype=mask.dtype)), 1)
    assert len(cache) == first.shape[1] - 1
    again = ours.generate(more, longer, max_new_tokens=5, eos_token_id=None, past_key_values=cache)
    assert torch.equal(again, ours.generate(more, longer, max_new_tokens=5, eos_token_id=None))


# Sampling


def scores_and_ids() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(6, 200, generator=generator) * 4
    scores[1] = 0.5  # all alike
    scores[2, :5] = 9.0  # ties at the top
    scores[3, 7:] = -torch.inf  # hardly anything left
    scores[4] *= 100
    return scores, torch.randint(0, 200, (6, 11), generator=generator)


HF = {
    **{f"top_k {k}": (lambda s, k=k: keep_top_k(s, k), hf_generation.TopKLogitsWarper(k)) for k in (1, 3, 50, 500)},
    **{
        f"top_p {p}": (lambda s, p=p: keep_top_p(s, p), hf_generation.TopPLogitsWarper(p))
        for p in (0.0, 1e-3, 0.3, 0.9, 0.999)
    },
    **{
        f"min_p {p}": (lambda s, p=p: keep_min_p(s, p), hf_generation.MinPLogitsWarper(p))
        for p in (0.0, 0.05, 0.5, 1.0)
    },
}


@pytest.mark.parametrize("name", HF)
def test_filters_equal_transformers(name):
    ours, theirs = HF[name]
    scores, ids = scores_and_ids()
    assert torch.equal(ours(scores), theirs(ids, scores.clone()))


@pytest.mark.parametrize("penalty", [0.6, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    scores, ids = scores_and_ids()
    theirs = hf_generation.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores.clone())
    assert torch.equal(RepetitionPenalty(penalty, None, 11)(ids, scores), theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.8},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "temperature": 2.5},
    ],
    ids=str,
)
def test_sampling_probabilities_equal_transformers(options):
    """All processors in their order, on the first token of a padded batch; then transformers goes on from our draws."""
    theirs, ours = pair()
    ids, mask, _ = prompts("left")
    common = {"do_sample": True, "max_new_tokens": 1, "eos_token_id": None, **options}
    common |= {"return_dict_in_generate": True, "output_scores": True}
    for _ in range(3):
        a = theirs.generate(ids, attention_mask=mask, **common).scores[0].softmax(-1)
        out = ours.generate(ids, mask, seed=4, **common)
        assert float((out.scores[0].softmax(-1) - a).abs().max()) < 1e-6
        assert bool((a.gather(1, out.sequences[:, -1:]) > 0).all())
        ids, mask = out.sequences, torch.cat((mask, torch.ones(3, 1, dtype=mask.dtype)), 1)


def test_draws_follow_the_probabilities():
    """Over an even grid of numbers every token is drawn in proportion, and one of probability 0 never."""
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.125, 0.125, 0.0])
    n = 8000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = draw_tokens(probabilities.expand(n, -1), grid)
    assert torch.equal(torch.bincount(drawn, minlength=7), (probabilities * n).long())
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_tokens(probabilities.expand(2, -1), ends).tolist() == [1, 5]


def test_a_seed_repeats_and_rows_draw_alone():
    _, ours = pair()
    ids, mask, _ = prompts("left")
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "eos_token_id": None}
    a = ours.generate(ids, mask, seed=7, **options)
    assert torch.equal(a, ours.generate(ids, mask, seed=7, **options))
    assert torch.equal(a, ours.generate(ids, mask, seed=7, use_cache=False, **options))
    assert not torch.equal(a, ours.generate(ids, mask, seed=8, **options))
    assert torch.equal(a[:1], ours.generate(ids[:1], seed=7, **options))
    twins = ours.generate(ids[:1].expand(2, -1), seed=7, **options)
    assert not torch.equal(twins[0], twins[1])
    assert torch.equal(twins, ours.generate(ids[:1], seed=7, num_return_sequences=2, **options))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(*(ours.generate(ids, mask, generator=g, **options) for g in generators))
    torch.manual_seed(3)
    free = ours.generate(ids, mask, **options)
    torch.manual_seed(3)
    assert torch.equal(free, ours.generate(ids, mask, **options))


def test_num_return_sequences_of_a_padded_batch():
    _, ours = pair()
    ids, mask, _ = prompts("left")
    options = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None, "seed": 1}
    several = ours.generate(ids, mask, num_return_sequences=2, **options)
    twice = ours.generate(ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), **options)
    assert torch.equal(several, twice)


# What goes around it


class Recorder:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, ids):
        self.pieces.append(ids.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer_gets_the_prompt_and_every_token():
    theirs, ours = pair()
    ids, _, _ = prompts()
    mine, other = Recorder(), Recorder()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    out = ours.generate(ids[:1], streamer=mine, **options)
    theirs.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), streamer=other, **options)
    assert mine.pieces == other.pieces
    assert mine.ended
    assert list(itertools.chain(*mine.pieces)) == out[0].tolist()


def test_custom_processors_and_stopping():
    theirs, ours = pair()
    ids, _, _ = prompts()

    def ban(tokens, scores):
        return scores.index_fill(1, torch.arange(0, 60), -torch.inf)

    def enough(tokens, scores, **_):
        return torch.full((tokens.shape[0],), tokens.shape[1] >= 22)

    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    options |= {"logits_processor": [ban], "stopping_criteria": [enough]}
    a = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{**options, "stopping_criteria": transformers.StoppingCriteriaList([enough])},
    )
    b = ours.generate(ids, **options)
    assert torch.equal(a, b)
    assert b.shape[1] == 22


def test_the_cache_makes_decoding_linear():
    """N new tokens are N forward passes of one token each, after the prompt."""
    _, ours = pair()
    ids, _, _ = prompts()
    fed: list[int] = []
    hook = ours.model.register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    ours.generate(ids, max_new_tokens=9, eos_token_id=None)
    hook.remove()
    assert fed == [17] + [1] * 8


def test_training_mode_and_gradients_stay_out_of_it():
    _, ours = pair()
    ids, _, _ = prompts()
    expected = ours.generate(ids, max_new_tokens=4, eos_token_id=None)
    ours.train()
    ours.gradient_checkpointing_enable()
    assert isinstance(ours, LlamaForCausalLM)
    assert torch.equal(ours.generate(ids, max_new_tokens=4, eos_token_id=None), expected)
    assert ours.training
