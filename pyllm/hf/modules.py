"""What the kernels do inside transformers' Llama-family models: the forward of each module, to be mixed into its class.

Every class here is the first base of one in `models.py`, transformers' own the second: constructors, names of weights,
hooks and plans for parallel execution are theirs. Names in shapes: B batch, T tokens, S keys, H query heads, Hkv
key-value heads, D head_dim, C hidden, V vocab.
"""

# No `from __future__ import annotations`: transformers reads the annotations of forward.
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..hf_modules import PatchedAttention, PatchedMLP, PatchedRMSNorm, PatchedRotaryEmbedding, Switches, plain_linear
from ..inputs import IGNORE, kept_positions, shifted, warn_if_all_ignored
from ..kernels import add_rms_norm, cross_entropy, linear_cross_entropy


def adopt(model: PreTrainedModel, *classes: type[nn.Module]) -> None:
    """Give modules that transformers has built the class of ours that derives from theirs.

    Only `forward` differs, and no attribute: the module is the same one, with another way to compute.
    """
    ours = {cls.__bases__[-1]: cls for cls in classes}
    for module in model.modules():
        module.__class__ = ours.get(type(module), type(module))


class Kernels:
    """What the modules below share: every switch is on, and the process chooses the backend."""

    _pyllm = Switches()
    _modeling = modeling_llama  # whose eager attention is that of all four families
    __reduce_ex__ = nn.Module.__reduce_ex__  # these classes are found by name


class Norm(Kernels, PatchedRMSNorm):
    """RMSNorm; with a residual it adds first, and returns the sum too."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None or hidden_states.dtype != self.weight.dtype:
            x = hidden_states if residual is None else residual + hidden_states
            return super().forward(x) if residual is None else (super().forward(x), x)
        return add_rms_norm(hidden_states, residual, self.weight, self.variance_epsilon)


class Rotary(Kernels, PatchedRotaryEmbedding):
    pass


class MLP(Kernels, PatchedMLP):
    """SwiGLU; with another activation than silu, what transformers computes."""

    def forward(self, x: Tensor) -> Any:
        module: Any = self
        if module.config.hidden_act in ("silu", "swish"):
            return super().forward(x)
        return super(PatchedMLP, self).forward(x)


class Attention(Kernels, PatchedAttention):
    pass


class Layer:
    """A block. Its first addition and its second norm are one kernel."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        module: Any = self
        x, _ = module.self_attn(
            hidden_states=module.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        x, residual = module.post_attention_layernorm(x, hidden_states)
        return residual + module.mlp(x)


class Model:
    """Common to all models."""

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # modules and weights are transformers', and so are its conversions of old checkpoints


class CausalLM(Model):
    """A language model whose loss is pyllm's cross-entropy.

    `return_logits = False`, as an attribute or in a call, computes the loss without ever holding the logits.
    """

    base: type[nn.Module]
    return_logits: bool = True

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]  # not theirs, which would build their base
        self.model = self.base(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()  # type: ignore[attr-defined]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """As transformers' own, and return_logits: False, with labels, leaves the logits None and never holds them.

        The loss is the mean over labels that are not -100, or with `num_items_in_batch` the sum divided by it; without
        any label it is 0, with a warning, where transformers has NaN.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        x = outputs.last_hidden_state  # (B, T, C)
        wanted = self.return_logits if return_logits is None else return_logits
        logits = loss = None
        # A head that is more than a matrix (an adapter, quantization, hooks) has to be called.
        fused = not wanted and plain_linear(self.lm_head) and self.loss_function is causal_lm_loss
        if labels is None or not fused:
            logits = self.lm_head(x[:, kept_positions(logits_to_keep, x.shape[1])])
        how: dict[str, Any]
        if labels is not None and logits is None:
            targets = _targets(labels, kwargs.get("shift_labels"))
            how = {"linear_bias": self.lm_head.bias, "ignore_index": IGNORE, "reduction": "sum"}
            total: Any = linear_cross_entropy(x.reshape(-1, x.shape[-1]), self.lm_head.weight, targets, **how)
            loss = _mean(total, targets, IGNORE, kwargs.get("num_items_in_batch"))
        elif labels is not None:
            how = {"logits": logits, "labels": labels, "vocab_size": self.config.vocab_size, **kwargs}  # type: ignore[attr-defined]
            loss = self.loss_function(**how)
            logits = logits if wanted else None
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of the next token: logits (B, T, V) in any dtype, labels (B, T) unshifted, or shifted already.

    Arguments as transformers' ForCausalLMLoss. Returns a float32 scalar, 0 where no label counts.
    """
    targets = _targets(labels, shift_labels, ignore_index)
    how: Any = {"ignore_index": ignore_index, "reduction": "sum"}
    total: Any = cross_entropy(logits.reshape(-1, vocab_size), targets.to(logits.device), **how)
    return _mean(total, targets, ignore_index, num_items_in_batch)


def _targets(labels: Tensor, shift_labels: Tensor | None, ignore_index: int = IGNORE) -> Tensor:
    return (shifted(labels, None, ignore_index) if shift_labels is None else shift_labels).reshape(-1)


def _mean(total: Tensor, targets: Tensor, ignore_index: int, items: int | Tensor | None) -> Tensor:
    warn_if_all_ignored(targets, ignore_index)
    if items is None:
        items = (targets != ignore_index).sum().clamp(min=1)
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)
