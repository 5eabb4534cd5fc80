"""The Llama family of language models, on pyllm's kernels; weights bear Hugging Face's names.

    token ids -> embedding -> L x [ + attention(norm(x)),  + SwiGLU(norm(x)) ] -> norm -> logits

Sources: Touvron et al. 2023, arXiv:2302.13971 (Llama); Ainslie et al. 2023, arXiv:2305.13245 (grouped queries);
Jiang et al. 2023, arXiv:2310.06825 (sliding window); Yang et al. 2025, arXiv:2505.09388 (QK-norm).

Names in shapes: B batch, T query length, S key length, H query heads, Hkv key-value heads, D head_dim, C hidden,
F intermediate, V vocab, L layers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cache import KVCache
from .config import LlamaConfig
from .generate import GenerationMixin
from .initialize import initialize
from .inputs import (
    IGNORE,
    Pass,
    check_inputs,
    check_labels,
    documents_of,
    kept_positions,
    leading_padding,
    positions,
    real_tokens,
    shifted,
    take,
    warn_if_all_ignored,
)
from .kernels import (
    add_rms_norm,
    apply_rope,
    attention,
    attention_decode,
    cross_entropy,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    swiglu,
)
from .kernels.dispatch import parse
from .masked import masked_attention, row_mask, tree_attention
from .outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from .projection import project
from .resize import ResizeMixin
from .rope import RotaryEmbedding, fuses_qk_norm


class RMSNorm(nn.Module):
    """The weight of a norm. With a residual it adds first, and returns the sum too."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None, backend: str | None = None) -> Any:
        if residual is None:
            return rms_norm(x, self.weight, self.eps, backend=backend)
        return add_rms_norm(x, residual, self.weight, self.eps, backend=backend)


class LlamaAttention(nn.Module):
    """Causal attention in which H / Hkv query heads share a key-value head."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        C, H, Hkv, D = config.hidden_size, config.num_attention_heads, config.kv_heads, config.width
        self.layer, self.window = layer, config.windows[layer]
        self.q_shape, self.kv_shape = (H, D), (Hkv, D)
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, Hkv * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, Hkv * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        B, T, _ = x.shape
        q = project(self.q_proj, x, step.backend).view(B, T, *self.q_shape)  # (B, T, H, D)
        k = project(self.k_proj, x, step.backend).view(B, T, *self.kv_shape)  # (B, T, Hkv, D)
        v = project(self.v_proj, x, step.backend).view(B, T, *self.kv_shape)
        q, k = self._rotate(q, k, step)
        out = self._attend(q, k, v, step)  # (B, T, H, D), or without B when packed
        if step.blind is not None:
            out = out.masked_fill(step.blind, 0.0)
        return project(self.o_proj, out.reshape(B, T, self.o_proj.in_features), step.backend)

    def _rotate(self, q: Tensor, k: Tensor, step: Pass) -> tuple[Tensor, Tensor]:
        how: dict[str, Any] = {"rotary_dim": self.q_shape[1], "backend": step.backend}
        if self.q_norm is not None and self.k_norm is not None:
            if fuses_qk_norm(q, step.backend):
                weights = self.q_norm.weight, self.k_norm.weight
                return qk_norm_rope(q, k, *weights, step.cos, step.sin, self.q_norm.eps, **how)
            q, k = self.q_norm(q, backend=step.backend), self.k_norm(k, backend=step.backend)
        return apply_rope(q, k, step.cos, step.sin, **how)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Any:
        options: dict[str, Any] = {"window": self.window, "backend": step.backend}
        if step.cu_seqlens is not None:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * T, heads, D)
            cu = step.cu_seqlens
            return attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, **options)
        cache = step.cache
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, S, Hkv, D)
        if step.mask is not None:
            return masked_attention(q, k, v, step.mask)
        if cache is None or cache.seen == 0:  # only tokens of this pass; padding was moved behind them, out of sight
            return attention(q, k, v, causal=True, **options)
        if cache.tree is not None:
            return tree_attention(q, k, v, cache.tree.mask(self.window, k.shape[1]))
        if not torch.is_grad_enabled():
            return attention_decode(q, k, v, cache.ends, **options)
        if step.starts is None:
            return attention(q, k, v, causal=True, **options)
        if self.window not in step.masks:
            step.masks[self.window] = row_mask(step.starts, q.shape[1], k.shape[1], self.window)
        return masked_attention(q, k, v, step.masks[self.window])


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, C, bias=config.mlp_bias)

    def forward(self, x: Tensor, step: Pass) -> Tensor:
        gate, up = (project(layer, x, step.backend) for layer in (self.gate_proj, self.up_proj))  # (B, T, F) each
        return project(self.down_proj, swiglu(gate, up, backend=step.backend), step.backend)


class LlamaDecoderLayer(nn.Module):
    """One layer. The addition that ends a block is left to the norm that follows it, which fuses the two."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, residual: Tensor | None, step: Pass) -> tuple[Tensor, Tensor]:
        """x (B, T, C), what the block before computed; residual (B, T, C), the stream that it is still to join."""
        if residual is None:
            residual, x = x, self.input_layernorm(x, backend=step.backend)
        else:
            x, residual = self.input_layernorm(x, residual, backend=step.backend)
        x = self.self_attn(x, step)
        x, residual = self.post_attention_layernorm(x, residual, backend=step.backend)
        return self.mlp(x, step), residual


class LlamaModel(nn.Module):
    """Embedding, layers and final norm: everything but the logits."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.checkpoint_options: dict[str, Any] = {"use_reentrant": False}  # may have a context_fn, too

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments as `LlamaForCausalLM.forward`; backend is what the kernels are called with."""
        cache = past_key_values
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, cache, cu_seqlens)
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        B, T, device = given.shape[0], given.shape[1], given.device
        if cu_seqlens is None:
            cu_seqlens = documents_of(position_ids, attention_mask, cache, B, T)
        use_cache = self._use_cache(use_cache, cu_seqlens)
        cache = cache if cache is not None else KVCache() if use_cache else None
        seen = 0 if cache is None else cache.seen
        position_ids = positions(position_ids, seen, B, T, device, cu_seqlens)  # (T,), or (B, T) where rows differ
        real = real_tokens(attention_mask, cache, T)  # (B, T) bool, or None where every token is one
        order = None
        if real is not None:
            # Each row's tokens are moved in front of its padding, where plain causality is all the mask they need.
            order = torch.argsort(~real, dim=1, stable=True)  # (B, T)
            given = take(given, order)
            position_ids = position_ids.expand(B, T).gather(1, order)
        cos, sin = self.rotary_emb(position_ids)
        step = Pass(cos, sin, backend, cache, None if cu_seqlens is None else cu_seqlens.to(torch.int32))
        if attention_mask is not None and attention_mask.dim() == 4:
            if cache is not None and cache.padded:
                raise ValueError("a 4-D attention_mask does not go with a cache filled from a padded batch")
            step.mask = attention_mask
        if cache is not None:
            cache.begin(B, T, real, device)
            step.starts = cache.starts
        if real is not None and order is not None:
            step.blind = take(leading_padding(real, step.starts), order)[:, :, None, None]

        x = self.embed_tokens(given) if input_ids is not None else given  # (B, T, C)
        residual = None
        states = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(x if residual is None else x + residual)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x, residual = checkpoint(layer, x, residual, step, **self.checkpoint_options)
            else:
                x, residual = layer(x, residual, step)
        x, _ = self.norm(x, residual, backend=backend)
        states += [x] if output_hidden_states else []
        if cache is not None:
            cache.advance(real)
        if order is not None:
            back = torch.argsort(order, dim=1)
            x, states = take(x, back), [take(state, back) for state in states]
        return BaseModelOutputWithPast(x, cache if use_cache else None, tuple(states) if output_hidden_states else None)

    def _use_cache(self, use_cache: bool | None, cu_seqlens: Tensor | None) -> bool:
        if use_cache is None:
            return self.config.use_cache and not self.training and cu_seqlens is None
        if use_cache and cu_seqlens is not None:
            raise ValueError("use_cache=True is not supported with cu_seqlens: a cache has one sequence a row")
        if use_cache and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            warnings.warn("use_cache=True does not go with gradient checkpointing; no cache is kept", stacklevel=3)
            return False
        return use_cache


class LlamaForCausalLM(GenerationMixin, ResizeMixin, nn.Module):
    """A Llama-family language model.

    Args:
        config: a LlamaConfig, the contents of a config.json, or a transformers config.
        backend: what runs the kernels: "auto", "triton", "cuda", "cpu", "eager", or several with commas. Also an
            attribute, to change it later.
    """

    linear_loss = staticmethod(linear_cross_entropy)  # tensor parallelism puts its own here

    def __init__(self, config: LlamaConfig | Mapping[str, Any] | Any, backend: str = "auto"):
        super().__init__()
        self.config = LlamaConfig.of(config)
        self.backend = backend
        self.generation_config: Any = None  # what generation_config.json said, else the config's token ids
        self.model = LlamaModel(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool = True,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token at every position, and the loss where labels are given.

        Args:
            input_ids: (B, T) token ids; or inputs_embeds (B, T, C).
            attention_mask: (B, S), 0 where there is padding, on whichever side; S counts cached tokens too. What is
                computed at padding is finite and means nothing. Or (B, 1 or H, T, S), which replaces causality: bool,
                or added to the scores; this runs in eager PyTorch.
            position_ids: (B, T) or (T,); counted from the cache's length when not given. Where they don't go on within
                a row, without mask or cache, another document begins, as in Hugging Face; it is not seen from there.
            past_key_values: a KVCache, extended in place.
            labels: (B, T), unshifted; -100 is ignored. The loss is the mean over the others; 0 when there are none.
            use_cache: return a cache; by default as the config says, and not in training.
            logits_to_keep: compute logits of the last n positions (0: all), or at these indices. The loss covers all.
            shift_labels: (B, T) targets that are shifted already, instead of labels.
            num_items_in_batch: what the summed loss is divided by, instead of the number of labels: for gradient
                accumulation over batches of unequal sizes.
            return_logits: False computes the loss without ever holding the logits.
            cu_seqlens: (documents + 1,) where the documents packed into the B * T tokens begin and end. They don't see
                each other, positions restart, and no document predicts the next one's first token.
        Raises:
            ValueError: naming the argument, the rule and the value.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True is not supported: the kernels never hold attention weights")
        if kwargs.get("cu_seq_lens_q") is not None:  # Hugging Face's name
            cu_seqlens = kwargs["cu_seq_lens_q"]
        if not return_logits and labels is None and shift_labels is None:
            raise ValueError("return_logits=False needs labels: there would be nothing to compute")
        if labels is not None and shift_labels is not None:
            raise ValueError("labels and shift_labels are two forms of the same; give one")
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            bool(output_hidden_states),
            cu_seqlens,
            self.backend,
        )
        x = out.last_hidden_state  # (B, T, C)
        logits = loss = None
        if return_logits:
            kept = x[:, kept_positions(logits_to_keep, x.shape[1])]
            logits = project(self.lm_head, kept, self.backend)  # (B, kept, V)
        if labels is not None or shift_labels is not None:
            name, targets = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
            targets = check_labels(name, targets, x.shape[0], x.shape[1], self.config.vocab_size)
            targets = targets.to(x.device, torch.int64)
            if shift_labels is None:
                targets = shifted(targets, cu_seqlens)
            whole = logits is not None and isinstance(logits_to_keep, int) and logits.shape[1] == x.shape[1]
            loss = self._loss(x, logits if whole else None, targets, num_items_in_batch)
        result = CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states)
        return result.to_tuple() if return_dict is False else result

    def _loss(self, x: Tensor, logits: Tensor | None, targets: Tensor, items: int | Tensor | None) -> Tensor:
        warn_if_all_ignored(targets)
        targets = targets.reshape(-1)
        # The sum, divided by at least one, rather than the mean: a batch without labels has loss 0, not NaN.
        how: dict[str, Any] = {"ignore_index": IGNORE, "reduction": "sum", "backend": self.backend}
        total: Any
        if logits is None:
            total = self.linear_loss(x.reshape(-1, x.shape[-1]), self.lm_head.weight, targets, **how)
        else:
            total = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, **how)
        items = (targets != IGNORE).sum().clamp(min=1) if items is None else items
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> LlamaForCausalLM:
        """Load a folder in Hugging Face's layout; see `pyllm.checkpoint.from_pretrained`."""
        from .checkpoint import from_pretrained

        return from_pretrained(cls, path, **options)

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder in Hugging Face's layout; see `pyllm.checkpoint.save_pretrained`."""
        from .checkpoint import save_pretrained

        save_pretrained(self, path, **options)

    # Weights

    def init_weights(self) -> None:
        """Start over: matrices and embeddings normal with `initializer_range`, biases 0, norms 1, padding's row 0."""
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                initialize(module, name, parameter, self.config.initializer_range)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output matrix the embedding's very parameter, if the config ties them."""
        if self.config.tie_word_embeddings and isinstance(self.lm_head, nn.Linear):  # a quantised one is a copy
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Any, recurse: bool = True) -> LlamaForCausalLM:
        super()._apply(fn, recurse)
        self.tie_weights()  # moving off the meta device makes a new parameter of each
        return self

    @property
    def backend(self) -> str:
        return self._backend

    @backend.setter
    def backend(self, backend: str) -> None:
        parse(backend)
        self._backend = backend

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again; or what `context_fn` says."""
        self.model.gradient_checkpointing = True
        self.model.checkpoint_options = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing = False

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Parameters, a tied one counted once."""
        skipped = self.model.embed_tokens.weight if exclude_embeddings else None
        counted = (p for p in self.parameters() if p is not skipped and (p.requires_grad or not only_trainable))
        return sum(p.numel() for p in counted)

    def get_memory_footprint(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def flops_per_token(self, sequence_length: int, *, training: bool = True) -> float:
        """Useful operations per token; see `LlamaConfig.flops_per_token`."""
        return self.config.flops_per_token(sequence_length, training=training)
