"""Tasks whose answers can only come from the prompt, and a model that has learned to look there."""

from __future__ import annotations

import dataclasses
import string
import time

import pytest
import torch

from pyllm import LlamaConfig, LlamaForCausalLM, Tokenizer
from pyllm.conversations import PackedBatches
from pyllm.finetune import PackWorkers
from pyllm.incontext import TASKS, accuracy_by_shots, episodes, lesson, lessons
from pyllm.optim import muon_and_adamw, trapezoid
from pyllm.train import Budget, train


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("shots", [0, 1, 3, 8])
def test_episodes(name, shots):
    drawn = episodes(name, shots, 300)
    assert drawn == episodes(name, shots, 300)
    assert drawn != episodes(name, shots, 300, seed=1)
    answers = [0] * 4
    for episode in drawn:
        assert len(episode.shots) == shots
        assert len(set(episode.choices)) == 4
        answers[episode.answer] += 1
        right = episode.choices[episode.answer]
        known = dict(episode.shots)
        assert len(set(known)) == len(known)  # no key has two values
        if episode.query in known:
            assert known[episode.query] == right
        assert episode.text() == "".join(f"{x} {y}\n" for x, y in episode.shots) + f"{episode.query} {right}\n"
    assert min(answers) > 45  # of 75 each: the place of the right one is no hint


def best_guess(name, episode):
    """What somebody who makes the most of the examples can say: the probability of being right."""
    known = dict(episode.shots)
    if name == "rule":
        return 1.0 if episode.shots else 0.25
    if episode.query in known:
        return 1.0
    left = [choice for choice in episode.choices if choice not in known.values()]
    return 1 / len(left)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_ceilings(name):
    for shots in (0, 1, 2, 3, 4, 8):
        drawn = episodes(name, shots, 1000)
        expected = sum(best_guess(name, episode) for episode in drawn) / len(drawn)
        assert TASKS[name].ceiling(shots) == pytest.approx(expected, abs=0.05)


def test_one_example_tells_the_rule():
    """Every word with different letters tells the four rules apart, so one example is enough."""
    for episode in episodes("rule", 1, 200):
        assert len(set(episode.choices)) == 4


def test_lessons_and_examination_are_different_episodes():
    tokenizer = letters_tokenizer()
    taught = {tokenizer.decode(example.ids) for example in lessons(tokenizer, shots=8, count=3000)}
    asked = [episode.text() for name in TASKS for episode in episodes(name, 8, 200)]
    assert asked[0].count("\n") == next(iter(taught)).count("\n")
    assert not taught & set(asked)
    assert len(lessons(tokenizer, ("rule",), count=10)) == 10


def test_a_lesson_is_about_the_values():
    tokenizer = letters_tokenizer()
    for name in TASKS:
        episode = episodes(name, 3, 1)[0]
        example = lesson(tokenizer, episode)
        assert tokenizer.decode(example.ids) == episode.text()
        values = [y for _, y in episode.shots] + [episode.choices[episode.answer]]
        said = [id for id, learned in zip(example.ids, example.supervised, strict=True) if learned]
        assert tokenizer.decode(said) == "".join(f" {value}" for value in values)


def test_errors():
    with pytest.raises(ValueError, match="known are mapping, recall, rule, got 'magic'"):
        episodes("magic", 1, 1)
    for shots in (-1, 27):
        with pytest.raises(ValueError, match=f"got {shots}"):
            episodes("recall", shots, 1)


def letters_tokenizer() -> Tokenizer:
    """Bytes, and each letter with a space before it as one token: a value stands right behind its key."""
    return Tokenizer.train([" ".join(string.ascii_lowercase) + "\n"] * 50, vocab_size=257 + 26)


def learner(tokenizer, width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def test_an_untrained_model_guesses():
    tokenizer = letters_tokenizer()
    model = learner(tokenizer, 32, 1)
    rows = accuracy_by_shots(model, tokenizer, "recall", shots=(0, 2), count=60)
    assert [row.shots for row in rows] == [0, 2]
    for row in rows:
        assert row.count == 60
        assert row.chance == 0.25
        assert abs(row.accuracy - 0.25) < 0.2
    again = accuracy_by_shots(model, tokenizer, TASKS["recall"], shots=(0, 2), count=60)
    assert [dataclasses.astuple(row) for row in again] == [dataclasses.astuple(row) for row in rows]


STEPS = 600


@pytest.mark.slow
def test_examples_help_after_a_minute_of_training(capsys):
    """k-shot beats zero-shot after about a minute of one core, in a task that was never trained on.

    So long it takes to learn that answers stand in the prompt. With one example the model is right, with two it chooses
    between the values shown; which value belongs to which key is learned later than this test can wait for.
    """
    tokenizer = letters_tokenizer()
    model = learner(tokenizer, 64, 2)
    torch.set_num_threads(1)
    batches = PackedBatches(lessons(tokenizer, ("mapping",), shots=20), length=256, batch=8)
    workers, optimizer = PackWorkers(1), muon_and_adamw(model, 0.02, 6e-3)
    start = time.process_time()
    done = list(train(model, batches, optimizer, Budget(steps=STEPS), schedule=trapezoid, workers=workers))
    spent = time.process_time() - start
    rows = accuracy_by_shots(model, tokenizer, "recall", shots=(0, 1, 2), count=300)
    with capsys.disabled():
        print(f"\n{len(done)} steps, {spent:.0f} s of one core; recall:", end="")
        print(", ".join(f" {row.shots} shots {row.accuracy:.1%}" for row in rows))
    zero, one, two = (row.accuracy for row in rows)
    assert zero < 0.35
    assert one > zero + 0.4
    assert two > zero + 0.1
