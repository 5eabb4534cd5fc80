"""The decoding engine: on a CPU, generation computes a step of the whole model in one call to C++.

A small model's step is mostly Python, one op after the other; a large one's is reading every weight once. The engine
(`csrc/decode/decode_cpu.cpp`) does without the first and does the second at the speed of memory: float32 and half
precision weights in place, weights of 8 and 4 bits as `model.quantize` packed them. It works on the very cache that the
ordinary forward uses, rings and trees of beams included, so that the two may take turns: prompts go through the model,
what follows through the engine, until something comes that it can't do. Then the model goes on, and `why_not(model)`
tells the reason.

Activations are float32 throughout, whatever the model's dtype; keys and values are rounded to the cache's. What a row
gets does not depend, to the last bit, on the other rows of the batch, on padding, nor on the number of threads.

Names: R rows of the cache, T new tokens of each (one, or guesses to be checked, or the beams of a prompt), V vocab.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .cache import KVCache
from .kernels.decode import Matrix, cache_row, decode_step, layer_row, table
from .kernels.decode import why_not as no_kernels
from .kernels.dispatch import parse, requested
from .quantized import PackedLinear

if TYPE_CHECKING:
    from .model import LlamaDecoderLayer, LlamaForCausalLM

MOST_TOKENS = 64  # R T, beyond which products of whole matrices win

_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def why_not(model: LlamaForCausalLM) -> list[str]:
    """Reasons why generation on this model does without the engine; empty when it is used.

    They hold at the moment, and where it is asked: `with use_backend("eager"):` is one.
    """
    return _circumstances(model.backend) or _plan(model).reasons


def step(model: LlamaForCausalLM, ids: Tensor, positions: Tensor | None, cache: KVCache, keep: int) -> Tensor | None:
    """Logits after the newest `keep` tokens of every row, (R, keep, V) float32, and the cache extended by all of them;
    None, and nothing done, where the model must do it.

    Args:
        ids: (R, T), all of them real tokens.
        positions: (T,) or (R, T); counted from the cache's length when not given.
        cache: filled with what came before.
    """
    if torch.is_grad_enabled() or _circumstances(model.backend) or _unfit(ids, cache):
        return None
    plan = _plan(model)
    if plan.reasons or cache.keys[0].dtype != plan.embedding.dtype or len(cache.keys) != len(plan.layers):
        return None
    return plan.run(model, ids, positions, cache, keep)


def describe() -> str:
    """A line for `pyllm kernels`: whether generation can use the engine on this machine's CPU."""
    reasons = _circumstances("auto") or no_kernels(torch.empty(0))
    return f"generation on CPU: {'one op at a time: ' + '; '.join(reasons) if reasons else 'a step in one call to C++'}"


def _circumstances(backend: str) -> list[str]:
    """Reasons that lie outside the model."""
    choice = requested(backend)
    if choice is not None and parse(choice)[0] != "cpu":
        return [f"backend {choice!r} was chosen"]
    if torch._C._len_torch_dispatch_stack():
        return ["a torch dispatch mode is active (batch_invariant, or one that counts FLOPs), which must see every op"]
    if torch.is_autocast_enabled("cpu"):
        return ["autocast is on"]
    return []


def _unfit(ids: Tensor, cache: KVCache) -> bool:
    """Whether this step, or what is in the cache, is not for the engine."""
    R, T = ids.shape
    return (
        ids.device.type != "cpu"
        or cache.seen == 0
        or cache.pinned
        or not 1 <= R * T <= MOST_TOKENS
        or cache.batch_size != R
        or (T > 1 and cache.window is not None and cache.seen + T > cache.window)  # a ring can't be read in order
    )


def _plan(model: LlamaForCausalLM) -> Plan:
    plan = _plans.get(model)
    if plan is None or not plan.holds(model):
        plan = _plans[model] = Plan(model)
    return plan


class Plan:
    """Where one model's weights lie, and whether that is still so.

    Pointers are taken once. `holds` compares before every step: modules, their types, parameters and addresses, hooks
    and patched methods. What is changed in place is seen anyway. It must not refer to the model itself, which could
    otherwise never be freed.
    """

    def __init__(self, model: LlamaForCausalLM):
        modules = [*model.modules()][1:]
        self.root = type(model)
        self.children = [model._modules, *(m._modules for m in modules)]
        self.members = self._members()
        self.types = [type(m) for m in self.members]
        self.dicts = [m.__dict__ for m in (model, *modules)]
        self.hooks = [hooks for m in (model, *modules) for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self.hooked = any(self.hooks)
        self.settings = self._settings()
        self.held = [d for m in modules for d in (m._parameters, m._buffers) if d and "inv_freq" not in d]
        self.places = self._places()
        self.reasons = _reasons(model, [model, *modules], self.hooked)
        if not self.reasons:
            self._lay_out(model)
        self._caches: tuple[list[int], Tensor] | None = None

    def holds(self, model: LlamaForCausalLM) -> bool:
        """Whether all is as it was."""
        return (
            type(model) is self.root
            and any(self.hooks) == self.hooked
            and self._members() == self.members
            and [type(m) for m in self.members] == self.types
            and self._settings() == self.settings
            and self._places() == self.places
        )

    def _members(self) -> list[Any]:
        return [*itertools.chain.from_iterable(d.values() for d in self.children)]

    def _settings(self) -> list[Any]:
        return [("forward" in d, d.get("eps"), d.get("window")) for d in self.dicts]

    def _places(self) -> list[Any]:
        tensors = [t for d in self.held for t in d.values() if t is not None]
        plain = [type(t) in _PLAIN and t.is_cpu for t in tensors]
        return [
            (t.data_ptr(), t.dtype, t.shape, t.is_contiguous()) if ordinary else id(t)
            for t, ordinary in zip(tensors, plain, strict=True)
        ]

    def _lay_out(self, model: LlamaForCausalLM) -> None:
        self.embedding, self.norm = model.model.embed_tokens.weight.detach(), model.model.norm.weight.detach()
        self.head = _matrix(model.lm_head)
        layers = _layers(model)
        matrices = [_matrices(layer) for layer in layers]
        first = layers[0]
        rows = [
            layer_row(own, _norms(layer), layer.self_attn.window) for own, layer in zip(matrices, layers, strict=True)
        ]
        self.layers = table(rows, "layer")
        self.windows = [layer.self_attn.window for layer in layers]
        self.sizes: dict[str, Any] = {
            "heads": (first.self_attn.q_shape[0], *first.self_attn.kv_shape),
            "width": _size(first.mlp.gate_proj)[0],
            "total_bytes": sum(m.weight.nbytes for m in itertools.chain(*matrices, [self.head])),
            "eps": first.input_layernorm.eps,
        }

    def run(self, model: LlamaForCausalLM, ids: Tensor, positions: Tensor | None, cache: KVCache, keep: int) -> Tensor:
        R, T = ids.shape
        if positions is None:
            positions = torch.arange(cache.seen, cache.seen + T)
        cos, sin = model.model.rotary_emb(positions)
        ring = cache.window is not None and cache.seen + T > cache.window
        cache.begin(R, T, None, ids.device)
        first, ends = cache.reserve()
        logits = decode_step(
            self.layers, self._cache_table(cache, T), self.embedding, self.norm, self.head,
            ids.to(torch.int64).contiguous(), cos.contiguous(), sin.contiguous(), first, ends,
            keep=keep, ring=ring, **self.sizes,
        )  # fmt: skip
        cache.advance(None)
        return logits

    def _cache_table(self, cache: KVCache, T: int) -> Tensor:
        if cache.tree is not None:
            columns = cache.seen + T
            masks = [cache.tree.mask(window, columns) for window in self.windows]
            rows = zip(cache.keys, cache.values, masks, strict=True)
            return table([cache_row(*row) for row in rows], "cache")
        places = [buffer.data_ptr() for buffer in (*cache.keys, *cache.values)] + [cache.keys[0].stride(0)]
        known = self._caches  # read once: another thread may be generating with the same model
        if known is None or known[0] != places:
            rows_of = zip(cache.keys, cache.values, strict=True)
            self._caches = known = places, table([cache_row(k, v, None) for k, v in rows_of], "cache")
        return known[1]


_PLAIN = (Tensor, nn.Parameter)


def _layers(model: LlamaForCausalLM) -> list[LlamaDecoderLayer]:
    return cast("list[LlamaDecoderLayer]", [*model.model.layers])


def _matrix(linear: nn.Module) -> Matrix:
    if isinstance(linear, PackedLinear):
        return linear.matrix
    assert isinstance(linear, nn.Linear)
    return Matrix(linear.weight, None, linear.bias)


def _linears(layer: LlamaDecoderLayer) -> list[Any]:
    a, m = layer.self_attn, layer.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]


def _matrices(layer: LlamaDecoderLayer) -> list[Matrix]:
    return [_matrix(linear) for linear in _linears(layer)]


def _norms(layer: LlamaDecoderLayer) -> list[Tensor | None]:
    a = layer.self_attn
    inner = [None if norm is None else norm.weight for norm in (a.q_norm, a.k_norm)]
    return [layer.input_layernorm.weight, layer.post_attention_layernorm.weight, *inner]


def _reasons(model: LlamaForCausalLM, modules: list[nn.Module], hooked: bool) -> list[str]:
    """What keeps a model from the engine."""
    from . import model as m  # the model's file imports generation, and that this

    known = {
        m.LlamaForCausalLM, m.LlamaModel, m.LlamaDecoderLayer, m.LlamaAttention, m.LlamaMLP, m.RMSNorm,
        m.RotaryEmbedding, nn.ModuleList, nn.Embedding, nn.Linear, PackedLinear,
    }  # fmt: skip
    weight = model.model.embed_tokens.weight
    reasons = no_kernels(weight)
    if hooked:
        reasons.append("a module has forward hooks, which want to see every call")
    for name, module in model.named_modules():
        if type(module) not in known:
            reasons.append(f"{name or 'the model'} is a {type(module).__module__}.{type(module).__qualname__}")
        elif "forward" in module.__dict__:
            reasons.append(f"{name or 'the model'} has a forward of its own")
    if reasons:
        return reasons
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if type(tensor) not in _PLAIN or tensor.device.type != "cpu" or not tensor.is_contiguous():
            reasons.append(f"{name} is not an ordinary contiguous tensor on the CPU")
        elif tensor.is_floating_point() and tensor.dtype != weight.dtype:
            reasons.append(f"{name} is {tensor.dtype}, the embedding {weight.dtype}")
    return reasons or _misfits(model)


def _misfits(model: LlamaForCausalLM) -> list[str]:
    """What is not of the size that all layers share: the C++ step takes that for granted, and would read beyond."""
    layers = _layers(model)
    if not layers:
        return ["the model has no layers"]
    V, C = model.model.embed_tokens.weight.shape
    attention = layers[0].self_attn
    (H, D), Hkv, F = attention.q_shape, attention.kv_shape[0], _size(layers[0].mlp.gate_proj)[0]
    matrices = [(H * D, C), (Hkv * D, C), (Hkv * D, C), (C, H * D), (F, C), (F, C), (C, F)]
    found = []
    if _size(model.lm_head) != (V, C) or model.lm_head.bias is not None or model.model.norm.weight.shape != (C,):
        found.append("the final norm or lm_head has another size than the embedding, or a bias")
    if len({m.eps for m in model.modules() if hasattr(m, "eps")}) > 1:
        found.append("the norms differ in eps")
    for index, layer in enumerate(layers):
        a = layer.self_attn
        own = _linears(layer)
        biases = [None if x.bias is None else x.bias.shape == (_size(x)[0],) for x in own]
        norms = [None if norm is None else tuple(norm.shape) for norm in _norms(layer)]
        inner = [(D,)] * 2 if a.q_norm is not None else [None] * 2
        alike = (tuple(a.q_shape), tuple(a.kv_shape)) == ((H, D), (Hkv, D)) and norms == [(C,), (C,), *inner]
        if [_size(x) for x in own] != matrices or False in biases or not alike:
            found.append(f"model.layers.{index} has other sizes than the first")
        if len({isinstance(x, PackedLinear) for x in own}) > 1:
            found.append(f"model.layers.{index} has some matrices quantised and others not")
    return found


def _size(linear: Any) -> tuple[int, int]:
    """(N, K)"""
    if isinstance(linear, PackedLinear):
        return linear.out_features, linear.in_features
    return linear.weight.shape[0], linear.weight.shape[1]
