"""The demo's model and how it is trained: everything that was tuned, and what it was tuned against.

Bits per byte of the validation text after about 40 seconds of one core (32 to 49; a smaller number is better, zlib -9
needs 2.02). A row adds to the one above it, an indented row is a trial of one change that was not kept or not yet:

    AdamW, cosine to zero, 1024 tokens of vocabulary, batches of 8 x 128              2.11   after 40 s, 0.6 M tokens
    Muon for the matrices, batches of 16 x 128, output = embedding, AdamW at 6e-3     2.01
      AdamW at 1.2e-2                                                                 1.99
      windows of 256 instead of 128                                                   2.13   slower, and fewer of them
    an output matrix of its own, 1.2e-2, GPT-2's pattern for the tokenizer            1.95
    AdamW at 2.4e-2 (5e-2: the same)                                                  1.91
    linear decay instead of cosine                                                    1.89
    vocabulary of 2048 (0.5 M tokens of 3.2 bytes instead of 2.7)                     1.78   another seed: 1.77
      2 layers instead of 3                                                           1.75   but 1.62 : 1.59 after 115 s
      batches of 8 x 128                                                              1.77
      AdamW at 1.2e-2                                                                 1.79
    the same after 115 s on one core, 1.4 M tokens                                    1.59
      vocabulary of 1024, 1.6 M tokens                                                1.67
      vocabulary of 4096, 1.1 M tokens                                                1.56   in 1.3 times the time
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .config import LlamaConfig


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of a batch, and peak learning rates: matrices by Muon, all else by AdamW."""

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
