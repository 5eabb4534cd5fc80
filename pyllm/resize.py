"""Another vocabulary for a model that has weights already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import LlamaConfig


class ResizeMixin:
    """`resize_token_embeddings`, as Hugging Face's models have it."""

    config: LlamaConfig
    model: Any
    lm_head: nn.Linear
    tie_weights: Any

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Grow or cut the vocabulary of embedding and output matrix, after tokens were added to the tokenizer.

        A new token gets the mean of the old ones in both matrices, so that it is neither likely nor unlikely at first:
        Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models". The parameters are new ones: an
        optimizer has to be made afterwards.

        Args:
            new_num_tokens: tokens from now on; None: as many as there are.
            pad_to_multiple_of: round them up, for tensor cores (8 or 64).
        Raises:
            ValueError: fewer than one token, or so few that config.pad_token_id is cut off.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if size < 1 or (pad_to_multiple_of is not None and pad_to_multiple_of < 1):
            raise ValueError(
                f"resize_token_embeddings: new_num_tokens = {new_num_tokens} and pad_to_multiple_of = "
                f"{pad_to_multiple_of} must be at least 1"
            )
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size == self.config.vocab_size:
            return self.model.embed_tokens
        self.config = self.model.config = self.config.replace(vocab_size=size)  # checks pad_token_id
        for module in (self.model.embed_tokens, self.lm_head):
            old = module.weight
            module.weight = nn.Parameter(_resized(old, size), requires_grad=old.requires_grad)
        self.model.embed_tokens.num_embeddings = self.lm_head.out_features = size
        self.tie_weights()
        return self.model.embed_tokens


def _resized(weight: Tensor, size: int) -> Tensor:
    """The first `size` rows; those beyond are the mean of all."""
    if size <= len(weight):
        return weight[:size].clone()
    mean = weight.to(torch.promote_types(weight.dtype, torch.float32)).mean(0).to(weight.dtype)
    return torch.cat((weight, mean.expand(size - len(weight), -1)))
