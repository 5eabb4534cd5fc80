"""Likelihoods equal what the model says of each text by itself, however they are batched."""

from __future__ import annotations

import math

import pytest
import torch

from pyllm import PRESETS, LlamaForCausalLM, Tokenizer
from pyllm.data import nats
from pyllm.likelihood import likelihoods, loss_by_position, perplexity
from pyllm.tokenizer import CHAT_TOKENS

TEXT = "def größer(self, a, b):\n    return a + b  # 日本語\n" * 40


def make(**changes):
    torch.manual_seed(0)
    config = PRESETS["tiny"].replace(initializer_range=0.3, **changes)
    return LlamaForCausalLM(config).eval()


def alone(model, context, continuation):
    """ln p of a continuation, and whether it is the greedy one, by one plain pass."""
    row = torch.tensor([[*context, *continuation]])[:, -model.config.max_position_embeddings - 1 :]
    with torch.no_grad():
        logits = model(row[:, :-1], use_cache=False).logits[0, -len(continuation) :].double()
    target = torch.tensor(continuation)
    found = logits.log_softmax(-1).gather(1, target[:, None]).sum()
    return float(found), bool((logits.argmax(-1) == target).all())


def requests():
    draw = torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(128, (n,), generator=draw).tolist()

    contexts = [ids(1), ids(9), ids(30), ids(30)]
    asked = [(context, ids(n)) for context in contexts for n in (1, 4, 2, 7, 1)]
    return [asked[i] for i in torch.randperm(len(asked), generator=draw).tolist()]


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("window", [None, 8])
def test_batches_equal_one_by_one(batch, window):
    changes = {} if window is None else {"model_type": "mistral", "sliding_window": window, "layer_types": None}
    model = make(**changes)
    model.train()
    asked = requests()
    found = likelihoods(model, asked, batch)
    assert model.training  # as it was
    model.eval()
    for (context, continuation), one in zip(asked, found, strict=True):
        logprob, greedy = alone(model, context, continuation)
        assert one.logprob == pytest.approx(logprob, rel=2e-5, abs=2e-5)
        assert one.greedy == greedy
        assert one.tokens == len(continuation)


def test_greedy_continuations_are_recognised():
    model = make()
    context = [5, 6, 7]
    row = model.generate(torch.tensor([context]), max_new_tokens=5, eos_token_id=None, pad_token_id=0)[0, 3:].tolist()
    wrong = [*row[:4], (row[4] + 1) % 128]
    found = likelihoods(model, [(context, row), (context, wrong), (context, row[:1])])
    assert [one.greedy for one in found] == [True, False, True]


def test_a_shared_context_is_read_once():
    model = make()
    widths = []
    handle = model.model.register_forward_pre_hook(lambda module, args: widths.append(tuple(args[0].shape)))
    likelihoods(model, [(range(40), [i, i + 1, i + 2]) for i in range(4)])
    handle.remove()
    assert widths == [(1, 40), (4, 2)]


def test_long_contexts_lose_their_beginning():
    model = make(max_position_embeddings=16)
    context, continuation = list(range(40)), [3, 1, 4]
    found = likelihoods(model, [(context, continuation), (context[-14:], continuation)])
    assert found[0].logprob == found[1].logprob  # 14 + 3 - 1 tokens are read
    assert found[0].logprob == pytest.approx(alone(model, context, continuation)[0], rel=2e-5)
    with pytest.raises(ValueError, match="continuation of request 0 has 17 tokens, and the model can read 16"):
        likelihoods(model, [([1], list(range(17)))])
    with pytest.raises(ValueError, match="request 0 has an empty context"):
        likelihoods(model, [([], [1])])
    with pytest.raises(ValueError, match="request 1 has an empty continuation"):
        likelihoods(model, [([1], [1]), ([1], [])])
    assert likelihoods(model, []) == []


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], vocab_size=300)


@torch.no_grad()
def test_perplexity(tokenizer):
    model = make(vocab_size=tokenizer.vocab_size)
    text = TEXT[:600]
    ids = [tokenizer.eos_token_id, *tokenizer.encode(text)]
    found = perplexity(model, tokenizer, text, window=16, stride=5)
    # By hand: each token once, with all the context that the first window to reach it has.
    total, done, begin = 0.0, 1, 0
    while done < len(ids):
        end = min(begin + 17, len(ids))
        begin = max(0, end - 17)
        logits = model(torch.tensor([ids[begin : end - 1]]), use_cache=False).logits[0].double().log_softmax(-1)
        total -= sum(float(logits[i - begin - 1, ids[i]]) for i in range(done, end))
        done, begin = end, begin + 5
    assert found.nats == pytest.approx(total, rel=1e-5)
    assert found.tokens == len(ids) - 1
    assert found.num_bytes == len(text.encode())
    assert found.perplexity == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)
    assert found.nats == pytest.approx(nats(model, torch.tensor(ids), 16, 5), rel=1e-9)
    default = perplexity(model, tokenizer, text)
    assert (default.window, default.stride) == (128, 64)
    for window in (0, 129):
        with pytest.raises(ValueError, match=f"what the model can read, 128, got {window}"):
            perplexity(model, tokenizer, text, window=window)
    with pytest.raises(ValueError, match="stride must be between 1 and length = 16, got 17"):
        perplexity(model, tokenizer, text, window=16, stride=17)


def test_without_an_opening_the_first_token_is_context_only():
    tokenizer = Tokenizer.train([TEXT], vocab_size=300, special_tokens=CHAT_TOKENS)
    model = make(vocab_size=tokenizer.vocab_size)
    ids = tokenizer.encode("def self")
    found = perplexity(model, tokenizer, "def self")
    assert found.tokens == len(ids) - 1
    assert found.num_bytes == len(tokenizer.decode_bytes(ids[1:]))
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        perplexity(model, tokenizer, "d")


def test_loss_by_position(tokenizer):
    model = make(vocab_size=tokenizer.vocab_size)
    rows = loss_by_position(model, tokenizer, TEXT, window=20)
    assert [row[:2] for row in rows] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 20)]
    whole = sum(loss * (end - begin + 1) for begin, end, loss in rows) / 20
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer.encode(TEXT)])
    count = (len(ids) - 1) // 20
    assert whole == pytest.approx(nats(model, ids[: count * 20 + 1], 20) / (count * 20), rel=1e-6)
    with pytest.raises(ValueError, match="a window needs 129"):
        loss_by_position(model, tokenizer, TEXT[:20])
