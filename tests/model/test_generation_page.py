"""docs/generation.md: its snippets run, one after the other, and its figure is drawn from a model."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import torch

from pyllm import PRESETS, LlamaForCausalLM, Tokenizer

DOCS = Path(__file__).parents[2] / "docs"


def test_the_snippets_run(capsys):
    page = (DOCS / "generation.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 6
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/generation.md", "exec"), names)
    assert "tensor([" in capsys.readouterr().out
    assert (DOCS / "generation.png").exists()
    for file in re.findall(r"`((?:pyllm|tests|docs)/[\w/]+\.py)`", page):
        assert (DOCS.parent / file).exists(), file


def test_the_figure_is_drawn(tmp_path, monkeypatch):
    text = "class A:\n    def __init__(self, name, size):\n        self.name = name\n" * 40
    tokenizer = Tokenizer.train([text], vocab_size=300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(PRESETS["tiny"].replace(vocab_size=tokenizer.vocab_size, initializer_range=0.3))
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_generation.py", str(tmp_path), "--out", str(tmp_path / "figure.png")])
    runpy.run_path(str(DOCS / "make_generation.py"), run_name="__main__")
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    assert torch.is_grad_enabled()
