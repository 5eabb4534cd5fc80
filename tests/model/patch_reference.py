"""Models of transformers 4 and 5, and copies of them to patch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.reference import config, error, randomise, transformers

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
ERROR = 1e-5  # relative, of float32 logits and gradients

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"family": "mistral", "sliding_window": 6},
    "qwen2": {"family": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"family": "qwen3"},
}


def rope(rope_theta: float = 10000.0, **scaling: Any) -> dict[str, Any]:
    """The config's arguments for a type of RoPE, in the spelling of the installed version."""
    if VERSION >= (5, 0):
        return {"rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, **scaling}}
    return {"rope_theta": rope_theta, "rope_scaling": scaling or None}


def build(family: str = "llama", head: str = "ForCausalLM", **changes: Any) -> Any:
    """A model of transformers in eval mode, with weights under which every part matters."""
    made = config(family, **changes)
    name = type(made).__name__.removesuffix("Config") + head
    model = getattr(transformers, name)(made).eval()
    randomise(model)
    return model


def twins(**model: Any) -> tuple[Any, Any]:
    """The same model twice; the second is for patching."""
    model = build(**model)
    return model, copy.deepcopy(model)


def gradients(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    out = model(*args, **kwargs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], truth: Callable[[], dict[str, Tensor]] | None = None
) -> None:
    """To a relative 1e-5; a gradient a thousand times below the largest one is rounding in parts (a window of one key
    gives queries none at all) and judged as if it were that thousandth. Where sums cancel, theirs is rounding as well:
    then the truth, in float64, is asked how far each is off, and ours may be twice as far."""
    assert list(ours) == list(theirs)
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    exact: dict[str, Tensor] = {}
    for name, gradient in theirs.items():
        limit = ERROR * gradient.norm().clamp(min=1e-3 * largest)
        if (ours[name] - gradient).norm() < limit:
            continue
        assert truth is not None, name
        exact = exact or truth()
        off = [float((g.double() - exact[name].double()).norm()) for g in (ours[name], gradient)]
        assert off[0] <= max(float(limit), 2 * off[1], 1e-6 * largest), (name, off)


def compare(theirs: Any, ours: Any, ids: Tensor, mask: Tensor | None, labels: Tensor, **kwargs: Any) -> None:
    """Logits of real tokens, the loss and all gradients, in eval mode and in training."""
    real = slice(None) if mask is None else mask.bool()
    for training in (False, True):
        theirs.train(training)
        ours.train(training)
        a, da = gradients(theirs, ids, attention_mask=mask, labels=labels, **kwargs)
        b, db = gradients(ours, ids, attention_mask=mask, labels=labels, **kwargs)
        assert (b.logits is None) == training
        if not training:
            assert error(b.logits[real], a.logits[real]) < ERROR
            assert b.logits.dtype == a.logits.dtype
        assert b.loss.dtype == a.loss.dtype
        assert abs(b.loss - a.loss) <= ERROR * abs(a.loss)
        same_gradients(
            db,
            da,
            lambda: gradients(copy.deepcopy(theirs).double(), ids, attention_mask=mask, labels=labels, **kwargs)[1],
        )


def state(model: torch.nn.Module) -> list[Any]:
    """Everything of a model that patching might leave changed: classes, attributes, hooks, config."""
    found: list[Any] = []
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if not key.endswith("_hooks")}
        hooks = {key: list(value.items()) for key, value in vars(module).items() if key.endswith("_hooks")}
        hooks |= {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks_with_kwargs")}
        found.append((name, type(module), attributes, hooks, module.forward.__func__, id(module.forward.__self__)))
    config: Any = model.config
    return [*found, id(config), dict(vars(config)), config._attn_implementation]
