"""What `pyllm.patch` makes of transformers' modules: the same parameters and attributes, forwards that run kernels.

A module is patched by giving it another class, a subclass of its own that `patched_class` makes. So no weight moves,
nothing else in the process changes, and a patched model can still be copied, pickled, compiled and hooked.

Names in shapes: B batch, T queries, S keys, H query heads, Hkv key-value heads, D head_dim, C hidden, V vocab.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import hf_attention
from .inputs import IGNORE
from .kernels import apply_rope, cross_entropy, linear_cross_entropy, qk_norm_rope, rms_norm, swiglu
from .rope import fuses_qk_norm


@dataclass(frozen=True)
class Switches:
    """What `pyllm.patch` was asked for. Every patched module holds it as `_pyllm`."""

    rms_norm: bool = True
    rope: bool = True
    swiglu: bool = True
    attention: bool = True
    linear_cross_entropy: bool = True
    backend: str | None = None


class Patched:
    """What the classes below share. Each goes before a class of transformers, which is the other base."""

    forward: Callable[..., Any]
    _pyllm: Switches
    _modeling: Any  # the module of transformers that the other base is from

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds classes by name, and these have none that it could find.
        return _blank, type(self).__bases__, self.__dict__


class PatchedRMSNorm(Patched):
    """x / sqrt(mean(x^2) + eps) * weight, rounded once; transformers rounds before the weight as well."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Any:
        # A weight that is kept in float32 widens the result, here as there.
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
        return rms_norm(x, self.weight, self.variance_epsilon, backend=self._pyllm.backend)


class PatchedMLP(Patched):
    """down(silu(gate(x)) * up(x))."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), backend=self._pyllm.backend))


class PatchedRotaryEmbedding(Patched):
    """cos and sin (B, T, D) in float32, as the kernels use them; transformers rounds them to x's dtype."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        wide = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))  # asked for its dtype and device only
        return super().forward(wide, position_ids)


class PatchedAttention(Patched):
    """Projections, QK-norm where there is one, rotation, cache, and attention as the config names it."""

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    training: bool
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self._pyllm.attention and self._pyllm.backend is not None:
            kwargs["backend"] = self._pyllm.backend  # for hf_attention, through what transformers puts between
        if not self._pyllm.rope:
            return super().forward(hidden_states, *args, **kwargs)
        return self._forward(hidden_states, *args, **kwargs)

    def _forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, T, C), and what transformers' decoder layers pass along."""
        B, T, _ = hidden_states.shape
        q = self.q_proj(hidden_states).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(hidden_states).view(B, T, -1, self.head_dim)  # (B, T, Hkv, D)
        v = self.v_proj(hidden_states).view(B, T, -1, self.head_dim)
        q, k = self._rotate(q, k, *position_embeddings)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is None:
            past_key_values = kwargs.pop("past_key_value", None)  # its name before transformers 4.56
        if past_key_values is not None:
            # transformers 4 tells a static cache where to write.
            where = () if cache_position is None else ({"cache_position": cache_position},)
            k, v = past_key_values.update(k, v, self.layer_idx, *where)  # (B, Hkv, S, D)
        options = {
            "dropout": self.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            "sliding_window": self._window(),
        }
        out, weights = self._attend()(self, q, k, v, attention_mask, **options, **kwargs)  # (B, T, H, D)
        return self.o_proj(out.reshape(B, T, -1)), weights

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        how: dict[str, Any] = {"rotary_dim": self.head_dim, "backend": self._pyllm.backend}
        q_norm, k_norm = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
        if q_norm is None or k_norm is None:
            return apply_rope(q, k, cos, sin, **how)
        alike = q.dtype == q_norm.weight.dtype and q_norm.variance_epsilon == k_norm.variance_epsilon
        if self._pyllm.rms_norm and alike and not hooked(q_norm, k_norm) and fuses_qk_norm(q, self._pyllm.backend):
            return qk_norm_rope(q, k, q_norm.weight, k_norm.weight, cos, sin, q_norm.variance_epsilon, **how)
        return apply_rope(q_norm(q), k_norm(k), cos, sin, **how)

    def _window(self) -> int | None:
        if hasattr(self, "sliding_window"):  # Qwen: of this layer
            return self.sliding_window
        return getattr(self.config, "sliding_window", None) if "Mistral" in type(self).__name__ else None

    def _attend(self) -> Callable[..., Any]:
        name, eager = self.config._attn_implementation, self._modeling.eager_attention_forward
        return eager if name == "eager" else self._modeling.ALL_ATTENTION_FUNCTIONS[name]


class PatchedForCausalLM(Patched):
    """The loss without all logits in memory, in training; otherwise transformers' own forward."""

    model: nn.Module
    lm_head: nn.Module
    training: bool
    loss_function: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *args: Any,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The forward of transformers, in whose signature the first seven arguments are the same since 4.50.

        Args:
            return_logits: compute the logits although there are labels, or don't; None: not in training.
        Raises:
            ValueError: return_logits is False, but the loss can't be had without logits.
        """
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        reasons = self._needs_logits(labels, args, kwargs)
        if reasons:
            if return_logits is False:
                raise ValueError(f"return_logits=False is not possible: {'; '.join(reasons)}")
            return super().forward(*given, labels, use_cache, *args, **kwargs)
        config: Any = self.config  # type: ignore[attr-defined]
        return_dict = kwargs.pop("return_dict", None)
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
        inputs = dict(zip(names, given, strict=True))
        kwargs.pop("logits_to_keep", None)
        assert labels is not None
        out = self.model(**inputs, use_cache=use_cache, return_dict=True, **kwargs)
        logits = None
        if self.training if return_logits is None else not return_logits:
            loss = self._loss(out.last_hidden_state, None, labels, **kwargs)
        else:
            logits = self.lm_head(out.last_hidden_state)  # (B, T, V)
            loss = self._loss(out.last_hidden_state, logits, labels, **kwargs)
        result = self._modeling.CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return result if (config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def _needs_logits(self, labels: Tensor | None, args: Any, kwargs: dict[str, Any]) -> list[str]:
        """Why the loss isn't one of hidden states and the head's weight; empty when it is."""
        keep = kwargs.get("logits_to_keep", 0)
        custom = self.loss_function is not self._modeling_loss()
        reasons = {
            "there are no labels": labels is None,
            "logits_to_keep is given": not isinstance(keep, int) or keep != 0,
            "arguments beyond use_cache are given by position": bool(args),
            "the model has a loss_function of its own": custom,
            "lm_head is not a plain nn.Linear (an adapter, quantization, hooks)": not plain_linear(self.lm_head),
        }
        return [reason for reason, holds in reasons.items() if holds]

    @staticmethod
    def _modeling_loss() -> Callable[..., Any]:
        from transformers.loss.loss_utils import ForCausalLMLoss

        return ForCausalLMLoss

    def _loss(
        self,
        x: Tensor,
        logits: Tensor | None,
        labels: Tensor,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORE,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """x (B, T, C), logits (B, T, V) or None, labels (B, T); arguments as those of transformers' loss."""
        targets = F.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
        targets = targets.reshape(-1).to(x.device)
        how: dict[str, Any] = {"ignore_index": ignore_index, "backend": self._pyllm.backend}
        how["reduction"] = "mean" if num_items_in_batch is None else "sum"
        loss: Any
        if logits is None:
            head: Any = self.lm_head
            loss = linear_cross_entropy(x.reshape(-1, x.shape[-1]), head.weight, targets, linear_bias=head.bias, **how)
        else:
            loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, **how)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def hooked(*modules: nn.Module) -> bool:
    """Whether a call of one of them does more than its forward."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in modules
    )


def plain_linear(module: nn.Module) -> bool:
    """Whether a module is x @ weight.T + bias and no more."""
    return type(module) is nn.Linear and not hooked(module)


@functools.cache
def patched_class(patch: Any, base: Any) -> type[nn.Module]:
    """The class of a patched module: `patch` before transformers' `base`, whose name and signature it keeps."""
    theirs: Any = base.forward
    ours: Any = patch.forward

    @functools.wraps(theirs)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # accelerate's wrappers may keep this method, bound to a module that has been unpatched since.
        return (ours if isinstance(self, Patched) else theirs)(self, *args, **kwargs)

    names = {"__doc__": base.__doc__, "_modeling": sys.modules[base.__module__], "forward": forward}
    return type(base.__name__, (patch, base), names)


def _blank(patch: Any, base: Any) -> Any:
    """A patched module without contents: what unpickling and deepcopy start from."""
    hf_attention.register()
    cls = patched_class(patch, base)
    return cls.__new__(cls)
