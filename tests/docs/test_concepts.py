"""docs/concepts.md: every idea is there, every link leads somewhere, every figure can be drawn. `test_examples.py` runs
the snippets."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "concepts.md").read_text(encoding="utf-8")
# What the page is about; each of these has a section.
IDEAS = (
    "language modelling",
    "self-supervised pretraining",
    "why transformers train efficiently",
    "encoder-only and decoder-only",
    "cross-entropy",
    "zero-shot, few-shot, in-context learning",
    "fine-tuning",
    "instruction tuning and the system prompt",
    "tokenization",
    "embedding",
    "position and rope",
    "multi-head, grouped-query, multi-query",
    "swiglu",
    "layer, batch and rms normalisation",
    "auto-regressive generation",
)


def figures() -> Any:
    spec = importlib.util.spec_from_file_location("make_concepts", DOCS / "make_concepts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_idea_has_a_section_with_a_snippet():
    sections = {part.split("\n", 1)[0].lower(): part for part in PAGE.split("\n## ")[1:]}
    assert set(IDEAS) <= sections.keys()
    for idea in IDEAS:
        assert "```python" in sections[idea], idea
        assert "```\n```text" in sections[idea], idea
        assert "Where:" in sections[idea] or "Source" in sections[idea] or "The price" in sections[idea], idea


def anchors_of(page: str) -> set[str]:
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", page, re.MULTILINE)}


def test_links_and_anchors():
    anchors = anchors_of(PAGE)
    links = re.findall(r"(`?)\[?([^\[\]]*)\]\(([^)]+)\)", PAGE)
    assert len(links) > 40
    for _, text, target in links:
        if target.startswith("#"):
            assert target[1:] in anchors, target
            continue
        path, _, anchor = target.partition("#")
        file = DOCS / path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors_of(file.read_text(encoding="utf-8")), target
        if file.suffix == ".py":  # a link to code says what to look for there
            name = text.strip("`")
            assert re.search(rf"\b(def|class) {re.escape(name)}\b", file.read_text(encoding="utf-8")), (name, target)


def test_every_figure_on_the_page_is_drawn(tmp_path):
    made = figures()
    shown = set(re.findall(r"\(concepts/(\w+)\.png\)", PAGE))
    for draw in made.FIGURES:
        if draw is made.in_context:
            draw(tmp_path, steps=3)
        elif draw is not made.tokens:  # reads the whole standard library; its own test below
            draw(tmp_path)
    assert shown - {"tokens"} <= {file.stem for file in tmp_path.glob("*.png")}
    assert all((DOCS / "concepts" / f"{name}.png").exists() for name in shown)


@pytest.mark.slow
def test_the_figure_of_tokens(tmp_path):
    figures().tokens(tmp_path)
    assert (tmp_path / "tokens.png").stat().st_size > 5000
