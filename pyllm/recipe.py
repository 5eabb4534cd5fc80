"""The demo's model and how it is trained: everything that was tuned, and what it was tuned against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .config import LlamaConfig


@dataclass(frozen=True)
class Recipe:
    """Everything that was tuned."""

    vocab_size: int = 2048
    hidden_size: int = 96
    layers: int = 3
    heads: int = 3
    intermediate_size: int = 256
    batch: int = 16
    length: int = 128
    matrix_lr: float = 0.02
    other_lr: float = 2.4e-2

    def config(self, end: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=4 * self.length,
            bos_token_id=end,
            eos_token_id=end,
            tie_word_embeddings=False,
        )


def choose_recipe(core_minutes: float, gpu: bool) -> Recipe:
    """The size of model that learns most in the time there is.

    Small is right when time is short: a model of twice the size sees half the text. With ten times the computation
    the best model is about three times as large (Hoffmann et al. 2022, arXiv:2203.15556).
    """
    if gpu:
        return Recipe(4096, 256, 5, 4, 704, batch=64, length=256, other_lr=1e-2)
    if core_minutes > 60:
        return Recipe(4096, 192, 5, 6, 512, batch=32, length=256, other_lr=1.2e-2)
    if core_minutes > 12:
        return Recipe(2048, 128, 4, 4, 352, batch=24, length=192, other_lr=1.6e-2)
    return Recipe()


def start_at_zero(model: nn.Module) -> None:
    """Zero the matrices that write into the residual stream: every block then starts as the identity.

    The first steps train embedding and output matrix as if there were no layers, and these then join in by as much as
    they help. An old trick for deep networks that also makes the first minute of a small one count for more.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.zero_()
