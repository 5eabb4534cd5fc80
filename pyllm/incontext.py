"""Learning in context: tasks that can only be solved with what stands in the prompt.

Every episode of a task draws a new secret, so that no training can teach the answers; only how to find them. The model
sees k examples and is asked one more; with none it can but guess. Accuracy by number of examples is the learning curve
of a model whose weights don't change (Brown et al. 2020, arXiv:2005.14165; Olsson et al. 2022, arXiv:2209.11895, on the
attention heads that do it).

    mapping    a secret function of four letters, each line a letter and its value     k b / r x / k ?
    recall     pairs, one of which is asked again                                      k b / r x / w c / r ?
    rule       copy, reverse, shift or swap, each line a word and what becomes of it    dog god / cat tac / pin ?
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .chat import opening
from .choices import Accuracy, Item, score_items, text_item
from .conversations import Example
from .model import LlamaForCausalLM
from .tokenizer import Tokenizer

KEYS = 4
CHOICES = 4


@dataclass(frozen=True)
class Episode:
    """Examples, a question and its possible answers."""

    shots: tuple[tuple[str, str], ...]
    query: str
    choices: tuple[str, ...]
    answer: int

    def prompt(self) -> str:
        return "".join(f"{x} {y}\n" for x, y in self.shots) + self.query

    def text(self) -> str:
        """All of it, answered."""
        return f"{self.prompt()} {self.choices[self.answer]}\n"


@dataclass(frozen=True)
class Task:
    """A family of episodes.

    Attributes:
        episode: (random numbers, shots) to an episode.
        ceiling: shots to the accuracy of somebody who makes the most of what is shown.
    """

    name: str
    episode: Callable[[random.Random, int], Episode]
    ceiling: Callable[[int], float]


def _mapping(draw: random.Random, shots: int) -> Episode:
    keys = draw.sample(string.ascii_lowercase, KEYS)
    values = draw.sample(string.ascii_lowercase, KEYS)
    secret = dict(zip(keys, values, strict=True))
    shown = [keys[i % KEYS] for i in range(shots)]  # all keys once before any appears twice
    query = draw.choice(keys)
    draw.shuffle(shown)
    choices = draw.sample(values, CHOICES)
    pairs = tuple((key, secret[key]) for key in shown)
    return Episode(pairs, query, tuple(choices), choices.index(secret[query]))


def _recall(draw: random.Random, shots: int) -> Episode:
    size = max(shots, CHOICES)
    keys, values = draw.sample(string.ascii_lowercase, size), draw.sample(string.ascii_lowercase, size)
    at = draw.randrange(max(1, shots))
    others = [value for value in values if value != values[at]]
    # Wrong choices are values that were shown as well, as far as there are enough.
    choices = [values[at], *draw.sample(others[: max(shots, CHOICES) - 1], CHOICES - 1)]
    draw.shuffle(choices)
    pairs = tuple(zip(keys[:shots], values[:shots], strict=True))
    return Episode(pairs, keys[at], tuple(choices), choices.index(values[at]))


def _shift(word: str) -> str:
    return "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word)


_RULES: tuple[Callable[[str], str], ...] = (
    lambda word: word,
    lambda word: word[::-1],
    _shift,
    lambda word: word[1] + word[0] + word[2:],
)


def _rule(draw: random.Random, shots: int) -> Episode:
    rule = draw.choice(_RULES)
    words = ["".join(draw.sample(string.ascii_lowercase, 3)) for _ in range(shots + 1)]
    query = words[-1]
    choices = [each(query) for each in _RULES]  # four different ones, as the word's letters differ
    if len(set(choices)) < len(choices):
        return _rule(draw, shots)  # "abc" shifted is no other rule's, but be sure
    draw.shuffle(choices)
    return Episode(tuple((w, rule(w)) for w in words[:-1]), query, tuple(choices), choices.index(rule(query)))


TASKS = {
    task.name: task
    for task in (
        # An unseen key's value is one of those not shown: with k of 4 keys seen, (k + 1) / 4 in all.
        Task("mapping", _mapping, lambda k: min(1.0, (k + 1) / KEYS)),
        Task("recall", _recall, lambda k: 1.0 if k else 1 / CHOICES),
        Task("rule", _rule, lambda k: 1.0 if k else 1 / CHOICES),
    )
}


def episodes(task: Task | str, shots: int, count: int, seed: int = 0) -> list[Episode]:
    """Episodes of a task, the same ones for the same seed."""
    task = _task(task)
    if shots < 0 or (task.name == "recall" and shots > 26):
        raise ValueError(f"in-context tasks: shots must be at least 0 and, for recall, at most 26, got {shots}")
    draw = random.Random(f"{task.name} {shots} {seed}")
    return [task.episode(draw, shots) for _ in range(count)]


def lesson(tokenizer: Tokenizer, episode: Episode) -> Example:
    """An answered episode as tokens, of which the values and the answer are learned from: all else is chance."""
    text, spans = "", []
    for x, y in (*episode.shots, (episode.query, episode.choices[episode.answer])):
        spans.append((len(text) + len(x), len(text) + len(x) + 1 + len(y)))
        text += f"{x} {y}\n"
    ids, places = tokenizer.encode_offsets(text)
    start = opening(tokenizer)
    learned = [any(begin <= at < end for begin, end in spans) for at, _ in places]
    return Example((*start, *ids), (*(False for _ in start), *learned))


def lessons(
    tokenizer: Tokenizer, names: Sequence[str] = tuple(TASKS), shots: int = 12, count: int = 20_000, seed: int = 0
) -> list[Example]:
    """Answered episodes of several tasks: what a model learns to learn in context from (`PackedBatches` packs them).

    The seeds of `accuracy_by_shots` draw other secrets.
    """
    each = -(-count // len(names))
    return [lesson(tokenizer, e) for name in names for e in episodes(name, shots, each, seed + 1_000_003)]


def accuracy_by_shots(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    task: Task | str,
    shots: Sequence[int] = (0, 1, 2, 4, 8),
    count: int = 200,
    seed: int = 0,
) -> list[Accuracy]:
    """How often the model finds the answer among four, after how many examples."""
    found = []
    for k in shots:
        items: list[Item] = []
        for episode in episodes(task, k, count, seed):
            choices = [f" {choice}" for choice in episode.choices]
            items.append(text_item(tokenizer, episode.prompt(), choices, episode.answer))
        found.append(score_items(model, items, k))
    return found


def _task(task: Task | str) -> Task:
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(f"in-context tasks: known are {', '.join(TASKS)}, got {task!r}")
    return TASKS[task]
