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
        self.dicts = [m.__dict__ for m in modules]
        self.hooks = [hooks for m in (model, *modules) for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self.hooked = any(self.hooks)
        self.patched = any("forward" in d for d in self.dicts)
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
            and "forward" not in model.__dict__
            and any("forward" in d for d in self.dicts) == self.patched
            and self._places() == self.places
        )

    def _members(self) -> list[Any]:
        return [*itertools.chain.from_iterable(d.values() for d in self.children)]

    def _places(self) -> list[Any]:
        tensors = [t for d in self.held for t in d.values() if t is not None]
        return [(t.data_ptr(), t.dtype) if type(t) in _PLAIN and t.device.type == "cpu" else id(t) for t in tensors]

    def _lay_out(self, model: LlamaForCausalLM) -> None:
        config = model.config
        self.embedding, self.norm = model.model.embed_tokens.weight.detach(), model.model.norm.weight.detach()
        self.head = _matrix(model.lm_head)
        layers = _layers(model)
        matrices = [_matrices(layer) for layer in layers]
        rows = [
            layer_row(own, _norms(layer), layer.self_attn.window) for own, layer in zip(matrices, layers, strict=True)
        ]
        self.layers = table(rows, "layer")
        self.windows = [layer.self_attn.window for layer in layers]
        self.sizes: dict[str, Any] = {
            "heads": (config.num_attention_heads, config.kv_heads, config.width),
            "width": config.intermediate_size,
            "total_bytes": sum(m.weight.nbytes for m in itertools.chain(*matrices, [self.head])),
            "eps": config.rms_norm_eps,
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
        if self._caches is None or self._caches[0] != places:
            rows_of = zip(cache.keys, cache.values, strict=True)
            self._caches = places, table([cache_row(k, v, None) for k, v in rows_of], "cache")
        return self._caches[1]


_PLAIN = (Tensor, nn.Parameter)


def _layers(model: LlamaForCausalLM) -> list[LlamaDecoderLayer]:
    return cast("list[LlamaDecoderLayer]", [*model.model.layers])


def _matrix(linear: nn.Module) -> Matrix:
    if isinstance(linear, PackedLinear):
        return linear.matrix
    assert isinstance(linear, nn.Linear)
    return Matrix(linear.weight, None, linear.bias)


def _matrices(layer: LlamaDecoderLayer) -> list[Matrix]:
    a, m = layer.self_attn, layer.mlp
    return [_matrix(x) for x in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)]


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
    for index, layer in enumerate(_layers(model)):
        matrices = _matrices(layer)
        if len({matrix.scale is None for matrix in matrices}) > 1:
            reasons.append(f"model.layers.{index} has some of its matrices quantised and others not")
    return reasons
