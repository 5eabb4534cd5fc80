"""transformers' Llama, Mistral, Qwen2 and Qwen3 with the kernels inside. Tested with transformers 5.23; 4.57 works too.

    import pyllm.hf
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="pyllm")

These are `PreTrainedModel`s: caches, `generate`, pipelines, Trainer, gradient checkpointing, hooks and plans for
parallel execution are transformers' own, weights bit for bit the same. RMSNorm, RoPE, SwiGLU and cross-entropy are
always the kernels (`pyllm.use_backend` chooses which). Attention is what `attn_implementation` names, as everywhere in
transformers: "pyllm" for the kernels, "sdpa" unless anything is said.

Importing the package registers two things: attention "pyllm", which every model of transformers may then use (for one
without a class here it is all that changes), and these classes with the Auto classes, for their configs. From then on
`AutoModelForCausalLM` builds them; `transformers.LlamaForCausalLM` stays what it was, and `unregister()` gives the Auto
classes back.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from .. import hf_attention
from .models import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
    Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
)

AUTO: dict[Any, tuple[Any, ...]] = {
    transformers.AutoModel: (LlamaModel, MistralModel, Qwen2Model, Qwen3Model),
    transformers.AutoModelForCausalLM: (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM),
    transformers.AutoModelForSequenceClassification: (
        LlamaForSequenceClassification,
        MistralForSequenceClassification,
        Qwen2ForSequenceClassification,
        Qwen3ForSequenceClassification,
    ),
    transformers.AutoModelForTokenClassification: (
        LlamaForTokenClassification,
        MistralForTokenClassification,
        Qwen2ForTokenClassification,
        Qwen3ForTokenClassification,
    ),
    transformers.AutoModelForQuestionAnswering: (
        LlamaForQuestionAnswering,
        MistralForQuestionAnswering,
        Qwen2ForQuestionAnswering,
        Qwen3ForQuestionAnswering,
    ),
}


def register() -> None:
    """Attention "pyllm" for every model, and the classes here for the Auto classes. To do it twice changes nothing."""
    hf_attention.register()
    for auto, classes in AUTO.items():
        for cls in classes:
            auto.register(cls.config_class, cls, exist_ok=True)


def unregister() -> None:
    """Let the Auto classes build transformers' own models again. Models that exist stay as they are."""
    for auto, classes in AUTO.items():
        for cls in classes:
            auto._model_mapping._extra_content.pop(cls.config_class, None)


register()


__all__ = [
    "LlamaConfig",
    "LlamaForCausalLM",
    "LlamaForQuestionAnswering",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaModel",
    "MistralConfig",
    "MistralForCausalLM",
    "MistralForQuestionAnswering",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MistralModel",
    "Qwen2Config",
    "Qwen2ForCausalLM",
    "Qwen2ForQuestionAnswering",
    "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification",
    "Qwen2Model",
    "Qwen3Config",
    "Qwen3ForCausalLM",
    "Qwen3ForQuestionAnswering",
    "Qwen3ForSequenceClassification",
    "Qwen3ForTokenClassification",
    "Qwen3Model",
    "register",
    "unregister",
]
