"""Every Python example of README.md and docs/ runs as it stands there, page by page, in an empty folder and offline.

What a block of text right behind it shows is what it prints.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A comment right before a block says why it can't run: <!-- not run: reason -->
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?```python\n(?P<code>.*?)```(?:\n```text\n(?P<output>.*?)```)?", re.DOTALL
)


def examples(page: Path) -> list[tuple[int, str, str | None]]:
    """The blocks that run, with the lines that they begin at and what they print, where the page says so."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start("code")) + 1, found["code"], found["output"])
        for found in BLOCK.finditer(text)
        if found["reason"] is None
    ]


@pytest.fixture
def as_found(tmp_path, monkeypatch):
    """An empty folder to run in; afterwards transformers' Auto classes are its own again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    yield
    if "pyllm.hf" in sys.modules:
        sys.modules["pyllm.hf"].unregister()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, as_found, capsys):
    """In order, one namespace a page: a later block may use what an earlier one made."""
    names: dict = {"__name__": "__main__"}
    for line, code, output in examples(page):
        padded = "\n" * (line - 1) + code  # so that a traceback names the page's own line
        capsys.readouterr()
        exec(compile(padded, str(page), "exec"), names)
        printed = capsys.readouterr().out
        assert output is None or printed == output, f"{page.name}, line {line}"


def test_the_readme_shows_every_way_of_use():
    """Ten lines each, give or take, and complete: each block of the section runs without the ones before it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Ways of use") : text.index("## What runs where")]
    blocks = [found["code"] for found in BLOCK.finditer(section)]
    for way in (
        "LlamaForCausalLM.from_pretrained",
        "TextStreamer",
        "optimizer.step",
        'attn_implementation="pyllm"',
        "pyllm.patch(",
        "from pyllm.kernels import",
    ):
        assert sum(way in block for block in blocks) >= 1, way
    for block in blocks:
        assert len(block.splitlines()) <= 16, block
        assert re.search(r"^(import|from) ", block, re.MULTILINE), block


@pytest.mark.slow
@pytest.mark.parametrize("index", range(6))
def test_a_way_of_use_is_complete(index, as_found):
    line, code, _ = examples(PAGES[0])[index]
    exec(compile("\n" * (line - 1) + code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for file in re.findall(r"`((?:pyllm|tests|docs|kernels|csrc)/[\w/]+\.\w+)`", text):
        assert any((base / file).exists() for base in (ROOT, ROOT / "pyllm")), file
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
