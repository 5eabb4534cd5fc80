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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..inputs import IGNORE, kept_positions, shifted, warn_if_all_ignored
from ..kernels import add_rms_norm, apply_rope, cross_entropy, linear_cross_entropy, qk_norm_rope, rms_norm, swiglu
from ..rope import fuses_qk_norm


def adopt(model: PreTrainedModel, *classes: type[nn.Module]) -> None:
    """Give modules that transformers has built the class of ours that derives from theirs.

    Only `forward` differs, and no attribute: the module is the same one, with another way to compute.
    """
    ours = {cls.__bases__[-1]: cls for cls in classes}
    for module in model.modules():
        module.__class__ = ours.get(type(module), type(module))


class Norm:
    """RMSNorm; with a residual it adds first, and returns the sum too."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return add_rms_norm(hidden_states, residual, self.weight, self.variance_epsilon)


class Rotary:
    """cos and sin in float32 whatever the model's dtype: angles rounded to bfloat16 are off by a whole degree."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.new_empty(0, dtype=torch.float32), position_ids)  # type: ignore[misc]


class MLP:
    """SwiGLU: down(silu(gate(x)) * up(x)). With another activation than silu, as transformers computes it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.config.hidden_act not in ("silu", "swish"):  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc]
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[attr-defined]


class Attention:
    """RoPE, QK-norm where the model has it, and whichever attention the config names."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        module: Any = self
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        q = module.q_proj(hidden_states).view(shape)  # (B, T, H, D)
        k = module.k_proj(hidden_states).view(shape)  # (B, T, Hkv, D)
        v = module.v_proj(hidden_states).view(shape)
        q, k = self._rotate(q, k, *position_embeddings)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)  # (B, Hkv, S, D)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            module,
            q,
            k,
            v,
            attention_mask,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling,
            sliding_window=self._window(),
            **kwargs,
        )  # (B, T, H, D)
        return module.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        module: Any = self
        if hasattr(module, "q_norm"):
            if fuses_qk_norm(q, None):
                weights = module.q_norm.weight, module.k_norm.weight
                return qk_norm_rope(q, k, *weights, cos, sin, module.q_norm.variance_epsilon)
            q, k = module.q_norm(q), module.k_norm(k)
        return apply_rope(q, k, cos, sin)

    def _window(self) -> int | None:
        return getattr(self, "sliding_window", None)


class WindowAttention(Attention):
    """Mistral's: the window is the config's, not the layer's."""

    def _window(self) -> int | None:
        return getattr(self.config, "sliding_window", None)  # type: ignore[attr-defined]


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
        # A head that is more than a matrix (quantised, with an adapter) has to be called.
        fused = not wanted and type(self.lm_head) is nn.Linear and self.loss_function is causal_lm_loss
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
