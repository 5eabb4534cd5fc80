"""Questions and answers that every Python installation carries: its docstrings.

    What does `os.path.join` do?        Join two or more pathname components, inserting '/' as needed.

Public functions, classes and methods of the standard library that explain themselves in a first sentence; nothing is
imported or run, their source is only read. Some five thousand pairs: enough to teach a small model what a question is,
with no download. Which of them are kept for the examination is decided by a hash of the name.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from .choices import Question
from .conversations import Message
from .corpus import Document, read_python

HELD_OUT = 1 / 10  # of the questions
CHOICES = 4
UNSPECIFIC = "What does it do?"  # what all of these questions have in common
# Modules that are known by another name than that of their file.
_ALIASES = {"posixpath": "os.path", "_pydecimal": "decimal", "_pydatetime": "datetime", "_pyio": "io"}
_SKIPPED = ("ntpath", "genericpath", "nturl2path", "lib2to3", "idlelib", "turtledemo", "pydoc_data")


@functools.lru_cache(maxsize=2)  # reading ten megabytes of source takes seconds
def docstring_pairs(stdlib: str | os.PathLike[str] | None = None) -> tuple[tuple[str, str], ...]:
    """(dotted name, first sentence of its docstring), sorted by name; no sentence appears twice.

    Args:
        stdlib: folder of another standard library than the running interpreter's.
    """
    root = Path(stdlib) if stdlib is not None else Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    for document in read_python(root):
        for name, text in _docstrings(document):
            sentence = first_sentence(text)
            if sentence is not None:
                found.setdefault(name, sentence)
    # One sentence for several names (overridden methods) would put answers of the examination into the lessons.
    seen: dict[str, str] = {}
    for name, sentence in sorted(found.items(), key=lambda pair: (len(pair[0]), pair[0])):
        seen.setdefault(sentence, name)
    pairs = sorted((name, sentence) for sentence, name in seen.items())
    if len(pairs) < 500:
        raise ValueError(
            f"questions: the standard library in {root} has {len(pairs)} docstrings, at least 500 are needed; this "
            "interpreter seems to ship compiled modules only. Use an ordinary Python build, or data of your own"
        )
    return tuple(pairs)


def _docstrings(document: Document) -> Iterator[tuple[str, str]]:
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = _ALIASES.get(module, module)
    if module.startswith(_SKIPPED) or any(part.startswith("_") for part in module.split(".")):
        return
    try:
        tree = ast.parse(document.data)
    except (SyntaxError, ValueError):
        return  # templates, or another Python's
    yield from _members(tree, module)


def _members(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            text = ast.get_docstring(child)
            if text:
                yield name, text
            if isinstance(child, ast.ClassDef):
                yield from _members(child, name)


def first_sentence(text: str) -> str | None:
    """The first sentence of a docstring on one line, if it is one: words, between 15 and 120 characters."""
    paragraph = " ".join(re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0].split())
    match = re.match(r"(.+?[.!])(?:\s|$)(?<!e\.g\.\s)(?<!i\.e\.\s)", paragraph)
    sentence = match[1] if match else paragraph + "."
    usable = 15 <= len(sentence) <= 120 and sentence[0].isupper() and sentence.isascii() and " " in sentence
    return sentence if usable and not re.search(r"->|>>>|::|\bTODO\b", sentence) else None


def question(name: str) -> str:
    return f"What does `{name}` do?"


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < HELD_OUT * 2**64


def lessons(pairs: Sequence[tuple[str, str]]) -> list[list[Message]]:
    """Conversations to learn from: all but the questions that are held out."""
    return [
        [{"role": "user", "content": question(name)}, {"role": "assistant", "content": sentence}]
        for name, sentence in pairs
        if not is_held_out(name)
    ]


def examination(pairs: Sequence[tuple[str, str]], limit: int | None = None, seed: int = 0) -> list[Question]:
    """The questions that are held out, each with the right sentence among three of other held-out questions.

    None of the four sentences is ever learned from. The wrong ones are as close as possible to the right one's length,
    so that length is no hint.

    Args:
        limit: how many, spread evenly; None: all.
    """
    held = [(name, sentence) for name, sentence in pairs if is_held_out(name)]
    by_length = sorted(range(len(held)), key=lambda i: (len(held[i][1]), held[i][0]))
    rank = {i: at for at, i in enumerate(by_length)}
    chosen = range(len(held)) if limit is None else range(0, len(held), max(1, -(-len(held) // limit)))
    found = []
    for i in chosen:
        name, right = held[i]
        drawn = random.Random(f"{seed} {name}")
        near = by_length[max(0, rank[i] - 20) : rank[i] + 21]
        others = [held[j][1] for j in drawn.sample([j for j in near if j != i], CHOICES - 1)]
        answer = drawn.randrange(CHOICES)
        found.append(Question(question(name), (*others[:answer], right, *others[answer:]), answer))
    return found
