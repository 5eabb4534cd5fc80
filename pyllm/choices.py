"""Multiple choice: a model answers with the choice that it finds likeliest, so that it need not know how to answer.

    {"question": "What does `len` do?", "choices": ["Count.", "Sleep."], "answer": 0}       a line of JSONL

`answer` is the index of the right choice from 0 on, its letter ("A" is the first), or the choice itself. The model
reads "Question: ...\nAnswer:" and each choice is scored by the probability of its words behind it: by their sum, which
favours short choices; by the mean per byte of text, which doesn't; and by how much the question raises the probability
over that behind an unspecific question, which discounts choices that are likely anyway. With k shots, k other questions
with their answers stand before the question. For models that were taught to chat, all of it is a conversation in their
template.

Sources: Brown et al. 2020, arXiv:2005.14165, section 2.4 (all three); Holtzman et al. 2021, arXiv:2104.08315 (why
probability alone misleads).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat import opening
from .conversations import Message, encode
from .likelihood import likelihoods
from .model import LlamaForCausalLM
from .tokenizer import Tokenizer

UNSPECIFIC = "What is the answer?"


@dataclass(frozen=True)
class Question:
    """A question, possible answers and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Item:
    """What a model is asked: tokens of the prompt, and of each choice behind it."""

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]  # bytes of the choices
    answer: int
    prior: tuple[int, ...] | None = None  # an unspecific prompt, behind which the choices are scored as well


@dataclass(frozen=True)
class Accuracy:
    """Of some questions."""

    accuracy: float  # by the sum of ln p
    normalized: float  # by ln p per byte
    contrast: float | None  # by ln p behind the question less ln p behind an unspecific one
    error: float  # one standard error of `accuracy`
    chance: float  # what guessing would get
    count: int
    shots: int
    cut: int  # prompts that were too long for the model and lost their beginning


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a JSONL file.

    Raises:
        ValueError: naming file, line and what is wrong with it.
    """
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at more than line ends
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error
            found.append(_question(row, f"{path}, line {number}"))
    if not found:
        raise ValueError(f"{path} holds no question: it is empty")
    return found


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, dict) or not {"question", "choices", "answer"} <= set(row):
        raise ValueError(f'{where}: needs {{"question": ..., "choices": [...], "answer": ...}}, got {str(row)[:60]}')
    question, choices, answer = row["question"], row["choices"], row["answer"]
    if not isinstance(question, str):
        raise ValueError(f"{where}: question must be a text, got {str(question)[:60]}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"{where}: choices must be two texts or more, none of them empty, got {str(choices)[:60]}")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        index = answer
    elif isinstance(answer, str) and answer in choices:
        index = choices.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and 0 <= ord(answer.upper()) - ord("A") < len(choices):
        index = ord(answer.upper()) - ord("A")
    else:
        raise ValueError(
            f"{where}: answer must be an index from 0 to {len(choices) - 1}, a letter from A to "
            f"{chr(ord('A') + len(choices) - 1)} or one of the choices, got {answer!r}"
        )
    return Question(question, tuple(choices), index)


def text_item(
    tokenizer: Tokenizer, prompt: str, choices: Sequence[str], answer: int, sizes: Sequence[int] | None = None
) -> Item:
    """A prompt and the texts that may follow it, each tokenised together with it, as one text would be."""
    start = opening(tokenizer)
    context = start + tokenizer.encode(prompt)
    if not context:
        raise ValueError("multiple choice: the prompt is empty, and this tokenizer has no token that opens a text")
    words = []
    for choice in choices:
        whole = start + tokenizer.encode(prompt + choice)
        # Where the last token of the prompt would join the choice's first, the prompt is kept as it would be alone.
        joined = whole[: len(context)] != context
        words.append(tuple(tokenizer.encode(choice) if joined else whole[len(context) :]))
    sizes = [len(choice.encode()) for choice in choices] if sizes is None else sizes
    return Item(tuple(context), tuple(words), tuple(sizes), answer)


def plain_item(tokenizer: Tokenizer, question: Question, shots: Sequence[Question] = ()) -> Item:
    """Question and answer as text."""
    before = "".join(f"Question: {s.question}\nAnswer: {s.choices[s.answer]}\n\n" for s in shots)
    prompt = f"{before}Question: {question.question}\nAnswer:"
    sizes = [len(choice.encode()) for choice in question.choices]
    item = text_item(tokenizer, prompt, [f" {choice}" for choice in question.choices], question.answer, sizes)
    return dataclasses.replace(item, prior=tuple(opening(tokenizer) + tokenizer.encode("Answer:")))


def chat_item(
    tokenizer: Tokenizer,
    question: Question,
    shots: Sequence[Question] = (),
    system: str | None = None,
    unspecific: str = UNSPECIFIC,
) -> Item:
    """Question and answer as a conversation in the model's template. A choice is scored with the end of its turn."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for shot in shots:
        messages += [
            {"role": "user", "content": shot.question},
            {"role": "assistant", "content": shot.choices[shot.answer]},
        ]
    asked = [*messages, {"role": "user", "content": question.question}]
    answered = [_last_answer(tokenizer, asked, choice) for choice in question.choices]
    prior, _ = _last_answer(tokenizer, [*messages, {"role": "user", "content": unspecific}], question.choices[0])
    sizes = tuple(len(choice.encode()) for choice in question.choices)
    return Item(answered[0][0], tuple(words for _, words in answered), sizes, question.answer, prior)


def _last_answer(
    tokenizer: Tokenizer, messages: Sequence[Message], reply: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A conversation's tokens up to a reply of the assistant's, and the reply's."""
    example = encode(tokenizer, [*messages, {"role": "assistant", "content": reply}])
    end = len(example.ids)
    while end and not example.supervised[end - 1]:
        end -= 1
    begin = end
    while begin and example.supervised[begin - 1]:
        begin -= 1
    return example.ids[:begin], example.ids[begin:end]


def draw_shots(pool: Sequence[Question], question: Question, count: int, seed: int) -> list[Question]:
    """`count` questions of the pool, none of which is the question itself; the same ones for the same seed."""
    others = [other for other in pool if other.question != question.question]
    if len(others) < count:
        raise ValueError(f"multiple choice: {count} shots need as many other questions, there are {len(others)}")
    return random.Random(f"{seed} {question.question}").sample(others, count)


def answer_questions(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    shots: int = 0,
    pool: Sequence[Question] | None = None,
    chat: bool = False,
    system: str | None = None,
    unspecific: str = UNSPECIFIC,
    seed: int = 0,
    batch: int = 32,
) -> Accuracy:
    """How many questions the model gets right.

    Args:
        shots: examples before each question, drawn from `pool` (by default the questions themselves, but never the
            one that is asked).
        chat: ask in the model's chat template.
        system: a system prompt, with chat.
        unspecific: a question that all of these could be, with chat: choices are compared with what it makes likely.
    """
    pool = questions if pool is None else pool
    items = []
    for question in questions:
        before = draw_shots(pool, question, shots, seed)
        if chat:
            items.append(chat_item(tokenizer, question, before, system, unspecific))
        else:
            items.append(plain_item(tokenizer, question, before))
    return score_items(model, items, shots, batch)


def score_items(model: LlamaForCausalLM, items: Sequence[Item], shots: int = 0, batch: int = 32) -> Accuracy:
    """How many items the model gets right. Of equally likely choices the first counts as chosen."""
    if not items:
        raise ValueError("multiple choice: there is no question")
    requests = [(item.context, words) for item in items for words in item.choices]
    scored = iter(likelihoods(model, requests, batch))
    scores = [[next(scored).logprob for _ in item.choices] for item in items]
    # Priors: the same words behind the unspecific prompt. Many items share them, and each is computed once.
    priors = {(item.prior, words): 0.0 for item in items if item.prior is not None for words in item.choices}
    if priors:
        for pair, found in zip(priors, likelihoods(model, list(priors), batch), strict=True):
            priors[pair] = found.logprob
    right = normalized = contrasted = 0
    for item, row in zip(items, scores, strict=True):
        right += _best(row) == item.answer
        normalized += _best([score / size for score, size in zip(row, item.sizes, strict=True)]) == item.answer
        if item.prior is not None:
            raised = [score - priors[item.prior, words] for score, words in zip(row, item.choices, strict=True)]
            contrasted += _best(raised) == item.answer
    n, room = len(items), model.config.max_position_embeddings
    share = right / n
    return Accuracy(
        accuracy=share,
        normalized=normalized / n,
        contrast=contrasted / n if all(item.prior is not None for item in items) else None,
        error=math.sqrt(share * (1 - share) / n),
        chance=sum(1 / len(item.choices) for item in items) / n,
        count=n,
        shots=shots,
        cut=sum(len(item.context) + max(map(len, item.choices)) - 1 > room for item in items),
    )


def _best(scores: Sequence[float]) -> int:
    return scores.index(max(scores))
