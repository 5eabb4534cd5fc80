"""docs/generation.md: its figure is drawn from a model. (Its snippets run in tests/docs.)"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

from pyllm import PRESETS, LlamaForCausalLM, Tokenizer

DOCS = Path(__file__).parents[2] / "docs"


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
