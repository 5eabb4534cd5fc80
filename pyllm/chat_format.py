"""Giving a model a chat format: a template, tokens for it where wanted, and where generation is to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .conversations import Example
from .model import LlamaForCausalLM
from .options import GenerationConfig
from .template import CHATML, TRANSCRIPT
from .text import TokenBytes
from .tokenizer import CHAT_TOKENS, Tokenizer


def set_template(model: LlamaForCausalLM, tokenizer: Tokenizer, template: str = "auto", frozen: bool = False) -> str:
    """Choose the tokenizer's chat template, in place; says in words which one.

    Args:
        template: "auto" keeps the tokenizer's own, else takes ChatML where the vocabulary has its tokens, else the
            transcript; "chatml" adds its two tokens where they are missing, for which the model grows; "transcript";
            or a file in jinja2.
        frozen: whether embeddings are not trained (LoRA), so that new tokens would stay noise.
    Raises:
        ValueError: new tokens for frozen embeddings; a transcript without a token that ends a text; no such file.
    """
    has_tokens = all(tokenizer.token_id(token) is not None for token in CHAT_TOKENS)
    if template == "auto":
        if tokenizer.config.get("chat_template"):
            return "the model's own"
        template = "chatml" if has_tokens else "transcript"
    if template == "chatml":
        if not has_tokens:
            if frozen:
                raise ValueError(
                    f"--template chatml needs the tokens {' '.join(CHAT_TOKENS)}, which this vocabulary lacks, and "
                    "with LoRA the embeddings of new ones would never be learned: use --template transcript, or train "
                    "all weights"
                )
            tokenizer.add_special_tokens(CHAT_TOKENS)
            grow_vocabulary(model, tokenizer.vocab_size)
        tokenizer.config["chat_template"] = CHATML
        return "ChatML" if has_tokens else f"ChatML, for which {' and '.join(CHAT_TOKENS)} are added to the vocabulary"
    if template == "transcript":
        if tokenizer.eos_token_id is None:
            raise ValueError("--template transcript needs a token that ends a text, and this tokenizer has none")
        tokenizer.config.setdefault("eos_token", tokenizer.backend.id_to_token(tokenizer.eos_token_id))
        tokenizer.config["chat_template"] = TRANSCRIPT
        return "a transcript (User: ... Assistant: ...); an answer ends with the end-of-text token"
    file = Path(template)
    if not file.is_file():
        raise ValueError(f"--template must be auto, chatml, transcript or a file, got {template!r}")
    tokenizer.config["chat_template"] = file.read_text(encoding="utf-8")
    return str(file)


@torch.no_grad()
def grow_vocabulary(model: LlamaForCausalLM, size: int) -> None:
    """Make room for `size` tokens, in place. New rows are the mean of the old ones: a token like any other, at first.

    Does nothing where there is room already (embeddings are often padded to a round number).
    """
    old = model.config.vocab_size
    if size <= old:
        return

    def grown(weight: torch.Tensor) -> nn.Parameter:
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        return nn.Parameter(torch.cat((weight, mean.expand(size - old, -1))), requires_grad=weight.requires_grad)

    embedding, head = model.model.embed_tokens, model.lm_head
    tied = head.weight is embedding.weight
    embedding.weight = grown(embedding.weight)
    head.weight = embedding.weight if tied else grown(head.weight)
    embedding.num_embeddings = head.out_features = size
    model.config = model.model.config = model.config.replace(vocab_size=size)


def stop_at_turn_end(model: LlamaForCausalLM, tokenizer: Tokenizer, example: Example) -> None:
    """Have generation stop at the special token that ends an answer of the example, besides where it stopped before."""
    token = max((i, id) for i, id in enumerate(example.ids) if example.supervised[i])[1]
    if token not in TokenBytes(tokenizer).special:
        return  # the template has none: answers end some other way
    c = model.config
    if model.generation_config is None:
        model.generation_config = GenerationConfig(
            bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id, pad_token_id=c.pad_token_id
        )
    given: Any = model.generation_config.eos_token_id
    ends = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    if token not in ends:
        model.generation_config.eos_token_id = [*ends, token] if ends else token
