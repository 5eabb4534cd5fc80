"""Multiple choice: read without guessing, asked as one text, and judged by three rules."""

from __future__ import annotations

import json

import pytest
import torch

from pyllm import PRESETS, LlamaForCausalLM, Tokenizer, choices
from pyllm.choices import (
    Item,
    Question,
    answer_questions,
    chat_item,
    draw_shots,
    plain_item,
    read_questions,
    score_items,
    text_item,
)
from pyllm.likelihood import Likelihood
from pyllm.template import CHATML
from pyllm.tokenizer import CHAT_TOKENS, END_OF_TEXT

TEXT = "Question: What is the sum of größer numbers?\nAnswer: the sum of numbers\n" * 20
Q = Question("What is größer?", ("the sum", "numbers of 日本", "What"), 1)
OTHER = Question("What is the sum?", ("numbers", "größer"), 0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], vocab_size=300)


def test_a_question_is_asked_as_one_text(tokenizer):
    item = plain_item(tokenizer, Q, [OTHER])
    before = "Question: What is the sum?\nAnswer: numbers\n\nQuestion: What is größer?\nAnswer:"
    for choice, words in zip(Q.choices, item.choices, strict=True):
        assert list(item.context + words) == [tokenizer.eos_token_id, *tokenizer.encode(f"{before} {choice}")]
        assert tokenizer.decode(words) == f" {choice}"
    assert item.sizes == (7, 17, 4)
    assert item.prior == (tokenizer.eos_token_id, *tokenizer.encode("Answer:"))
    joined = text_item(tokenizer, "the s", ["um"], 0)  # " sum" is one token, but the prompt stays what it is
    assert tokenizer.decode(joined.context) == "the s"
    assert tokenizer.decode(joined.choices[0]) == "um"


def test_a_question_is_asked_as_a_conversation():
    tokenizer = Tokenizer.train([TEXT], vocab_size=310, special_tokens=(END_OF_TEXT, *CHAT_TOKENS))
    tokenizer.config["chat_template"] = CHATML
    item = chat_item(tokenizer, Q, [OTHER], system="Be brief.")
    shown = tokenizer.decode(item.context, skip_special=False)
    assert shown == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is the sum?<|im_end|>\n"
        "<|im_start|>assistant\nnumbers<|im_end|>\n<|im_start|>user\nWhat is größer?<|im_end|>\n<|im_start|>assistant\n"
    )
    said = [tokenizer.decode(words, skip_special=False) for words in item.choices]
    assert said == [f"{choice}<|im_end|>" for choice in Q.choices]
    assert tokenizer.decode(item.prior, skip_special=False) == shown.replace("What is größer?", choices.UNSPECIFIC)


def test_three_rules(monkeypatch):
    """Sums, per byte, and against the prior: each of the rules picks another choice here."""
    table = {(1, 5): -4.0, (1, 6): -6.0, (1, 7): -5.0, (2, 5): -4.5, (2, 6): -6.1, (2, 7): -9.0}

    def fake(model, requests, batch=32):
        return [Likelihood(table[context[0], words[0]], False, 1) for context, words in requests]

    monkeypatch.setattr(choices, "likelihoods", fake)
    model = LlamaForCausalLM(PRESETS["tiny"])
    for answer, expected in ((0, (1, 0, 0)), (1, (0, 1, 0)), (2, (0, 0, 1))):
        found = score_items(model, [Item((1,), ((5,), (6,), (7,)), (2, 10, 3), answer, (2,))], 5)
        assert (found.accuracy, found.normalized, found.contrast) == expected
        assert found.chance == pytest.approx(1 / 3)
        assert (found.count, found.shots, found.cut) == (1, 5, 0)
    assert score_items(model, [Item((1,), ((5,), (6,)), (1, 1), 0)]).contrast is None
    with pytest.raises(ValueError, match="there is no question"):
        score_items(model, [])


def test_a_model_that_knows_answers(tokenizer):
    """Zero- and few-shot run end to end, and the likeliest choice is the one that counts."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        PRESETS["tiny"].replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=40)
    ).eval()
    asked = [Question(f"What is {word}?", (word, "sum", "numbers"), 0) for word in ("the", "of", "a", "x", "größer")]
    from pyllm.likelihood import likelihoods

    items = [plain_item(tokenizer, question) for question in asked]
    best = []
    for item in items:
        scores = [one.logprob for one in likelihoods(model, [(item.context, words) for words in item.choices])]
        best.append(scores.index(max(scores)))
    known = [Question(q.question, q.choices, b) for q, b in zip(asked, best, strict=True)]
    assert answer_questions(model, tokenizer, known).accuracy == 1.0
    wrong = [Question(q.question, q.choices, (b + 1) % 3) for q, b in zip(asked, best, strict=True)]
    assert answer_questions(model, tokenizer, wrong).accuracy == 0.0
    shots = answer_questions(model, tokenizer, known, shots=2, seed=1)
    assert shots == answer_questions(model, tokenizer, known, shots=2, seed=1)
    assert shots.cut == 0
    small = answer_questions(model, tokenizer, known, shots=4)
    assert small.cut == 5  # four examples don't fit


def test_shots():
    pool = [Question(f"q{i}", ("a", "b"), 0) for i in range(6)]
    for question in pool:
        drawn = draw_shots(pool, question, 5, seed=0)
        assert question not in drawn
        assert len({shot.question for shot in drawn}) == 5
        assert drawn == draw_shots(pool, question, 5, seed=0)
    assert draw_shots(pool, pool[0], 5, 0) != draw_shots(pool, pool[0], 5, 1)
    with pytest.raises(ValueError, match="6 shots need as many other questions, there are 5"):
        draw_shots(pool, pool[0], 6, 0)


def test_reading(tmp_path):
    file = tmp_path / "exam.jsonl"
    rows = [
        {"question": "q", "choices": ["x", "y"], "answer": 1},
        {"question": "q", "choices": ["x", "y"], "answer": "b"},
        {"question": "q", "choices": ["x", "y"], "answer": "y"},
        {"question": "q", "choices": ["B", "A"], "answer": "A"},  # a choice before it is a letter
    ]
    file.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [question.answer for question in read_questions(file)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "not valid JSON"),
        ("[]", 'needs {"question"'),
        ('{"question": "q", "choices": ["x", "y"]}', 'needs {"question"'),
        ('{"question": 1, "choices": ["x", "y"], "answer": 0}', "question must be a text"),
        ('{"question": "q", "choices": ["x"], "answer": 0}', "two texts or more"),
        ('{"question": "q", "choices": ["x", ""], "answer": 0}', "none of them empty"),
        ('{"question": "q", "choices": ["x", "y"], "answer": 2}', "index from 0 to 1, a letter from A to B"),
        ('{"question": "q", "choices": ["x", "y"], "answer": true}', "got True"),
        ('{"question": "q", "choices": ["x", "y"], "answer": "C"}', "got 'C'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    file = tmp_path / "exam.jsonl"
    file.write_text('{"question": "q", "choices": ["x", "y"], "answer": 0}\n' + row)
    with pytest.raises(ValueError, match=r"exam\.jsonl, line 2: ") as caught:
        read_questions(file)
    assert message in str(caught.value)
    file.write_text("\n")
    with pytest.raises(ValueError, match="it is empty"):
        read_questions(file)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_questions(tmp_path / "none")
