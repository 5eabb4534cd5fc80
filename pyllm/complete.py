"""What a model in training writes: one prompt, continued."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import LlamaForCausalLM
from .tokenizer import Tokenizer


def complete(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    seed: int,
    temperature: float = 0.6,
    before: str = "",
) -> str:
    """A prompt and the model's continuation, as one text.

    Spaces at the end of the prompt are left to the model: in a byte-level vocabulary a space belongs to the word behind
    it, so "def" and " name" are what the model knows, while "def " with a lone space is something it never saw.

    Args:
        before: text in front of the prompt that is not returned; before that stands an end-of-text token.
    """
    prompt = prompt.rstrip(" ") or prompt
    ids = [tokenizer.eos_token_id, *tokenizer.encode(before + prompt)]
    was_training = model.training
    model.eval()
    inputs: Tensor = torch.tensor([ids], device=model.device)
    row = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 50} if temperature > 0 else {}),
        seed=seed,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.train(was_training)
    return prompt + tokenizer.decode(row[0, len(ids) :].tolist())
