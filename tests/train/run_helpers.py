"""A corpus and a model small enough that a whole run takes a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pyllm.config import LlamaConfig
from pyllm.train_config import TrainConfig

WORDS = [
    "def",
    "return",
    "self",
    "if",
    "for",
    "in",
    "not",
    "and",
    "import",
    "class",
    "value",
    "name",
    "list",
    "None",
    "True",
]
MODEL = LlamaConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


def write_corpus(folder: Path) -> None:
    """corpus.jsonl and model.json."""
    draw = random.Random(0)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for _ in range(150):
            text = " ".join(draw.choices(WORDS, k=draw.randint(1, 80)))
            file.write(json.dumps({"text": text}) + "\n")
    (folder / "model.json").write_text(json.dumps(MODEL.to_dict()), encoding="utf-8")


def config(folder: Path, **changes: Any) -> TrainConfig:
    """A run on that corpus: 12 steps of 8 rows of 32 tokens, one thread, no samples."""
    values: dict[str, Any] = dict(
        data=(str(folder / "corpus.jsonl"),),
        model=str(folder / "model.json"),
        out=str(folder / "run"),
        vocab_size=320,
        length=32,
        batch=8,
        micro_batch=4,
        steps=12,
        validation=0.2,
        validation_rows=8,
        validate_every=5,
        sample_every=0,
        save_every=4,
        threads=1,
        plain=True,
    )
    return TrainConfig(**{**values, **changes})
