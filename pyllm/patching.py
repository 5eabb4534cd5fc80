"""`pyllm.patch`: the kernels in a model of transformers, in place, and out again.

(The function has the short name, so this module has another: a submodule `pyllm.patch` would hide it.)
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import hf_attention
from .hf_modules import (
    Patched,
    PatchedAttention,
    PatchedForCausalLM,
    PatchedMLP,
    PatchedRMSNorm,
    PatchedRotaryEmbedding,
    Switches,
    patched_class,
)
from .kernels.dispatch import parse

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
SHOWN = ("Model", "ForCausalLM", "ForSequenceClassification")

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Undo:
    """What unpatching restores and the modules don't know themselves; the patched model holds it as `_pyllm_undo`."""

    config: Any  # the model's own
    before: dict[str, Any]  # the contents of the copy that stands for it, as they were


def patch(
    model: Model,
    *,
    rms_norm: bool = True,
    rope: bool = True,
    swiglu: bool = True,
    attention: bool = True,
    linear_cross_entropy: bool = True,
    backend: str | None = None,
) -> Model:
    """Run a model of transformers on pyllm's kernels, in place: same weights, same outputs, same interface.

    Only this object's modules change; other models, and transformers itself, stay as they are. `unpatch` undoes it.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 of transformers (4.53 or newer), bare or with a head, also inside a
            PEFT model or one compiled by torch.compile.
        rms_norm: every norm, QK-norms included, rounds once, where transformers rounds before the weight, too; so in
            half precision results differ in the last bit, for the better.
        rope: the rotation, with cos and sin in float32 whatever the model's dtype.
        swiglu: silu(gate) * up of every MLP.
        attention: the attention implementation "pyllm", registered with transformers. Dropout and masks that are
            neither causality, window, padding nor packed documents run as under "sdpa". Documents packed by
            position_ids that restart, or by cu_seq_lens_q and cu_seq_lens_k, don't see each other, as under flash
            attention. What padding computes is finite and means nothing.
        linear_cross_entropy: the loss of a ForCausalLM, given labels. In training the logits are never in memory and
            `.logits` is None, unless the call says return_logits=True. In eval mode `.logits` is there, as Trainer's
            evaluation needs it, unless the call says return_logits=False. Where the loss can't be had this way (a
            loss_function of your own, logits_to_keep, an lm_head that is no plain nn.Linear) it is computed by
            transformers. num_items_in_batch, ignore_index and shift_labels mean what they mean there.
        backend: "triton", "cuda", "cpu", "eager", several with commas, or None to choose per call.
    Returns:
        The same model.
    Raises:
        ValueError: the model's class is not known, one of its modules has a forward of its own, or it is patched.
        ImportError: transformers is too old.
    """
    parse(backend or "auto")
    root, modeling, family = _known(model)
    _check_version()
    for name, module in root.named_modules():
        if isinstance(module, Patched) or "_pyllm_undo" in vars(module):
            where = f", in {name}," if name else ""
            raise ValueError(f"pyllm.patch: this {type(root).__name__} is patched{where} already; unpatch it first")
    switches = Switches(rms_norm, rope, swiglu, attention, linear_cross_entropy, backend)
    todo = list(_replacements(root, modeling, family, switches))  # all checks come first: an error changes nothing
    config = root.config
    if attention:
        hf_attention.register()
        # The implementation's name is in the config, which other models may share.
        root_config: Any = copy.copy(config)
        root_config._attn_implementation = hf_attention.NAME
        _set_config(model, config, root_config)
    vars(root)["_pyllm_undo"] = _Undo(config, dict(vars(root.config)))
    for module, replacement in todo:
        cls: Any = type(module)
        vars(module)["_pyllm"] = switches
        module.__class__ = patched_class(replacement, cls)
        if "_old_forward" in vars(module):
            vars(module)["_pyllm_hidden"] = vars(module)["_old_forward"]
            vars(module)["_old_forward"] = MethodType(patched_class(replacement, cls).forward, module)
    if attention:
        base = root.get_submodule(root.base_model_prefix) if hasattr(root, root.base_model_prefix) else root
        vars(root)["_pyllm_hook"] = base.register_forward_pre_hook(_mark_documents, with_kwargs=True)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`: every module has its class and config back. What was set on the config meanwhile is kept.

    Returns:
        The same model.
    Raises:
        ValueError: it is not patched.
    """
    root = _unwrapped(model)
    undo = vars(root).pop("_pyllm_undo", None)
    if undo is None:
        inside = any(isinstance(module, Patched) for module in root.modules())
        hint = "; it is part of a model that is, unpatch that" if inside else ""
        raise ValueError(f"pyllm.unpatch: this {type(root).__name__} is not patched{hint}")
    if "_pyllm_hook" in vars(root):
        vars(root).pop("_pyllm_hook").remove()
    for module in root.modules():
        if isinstance(module, Patched):
            module.__class__ = type(module).__bases__[1]
            del vars(module)["_pyllm"]
            if "_pyllm_hidden" in vars(module):
                hidden = vars(module).pop("_pyllm_hidden")
                if "_old_forward" in vars(module):
                    vars(module)["_old_forward"] = hidden
    if root.config is not undo.config:
        for key, value in vars(root.config).items():
            old = undo.before.get(key)
            if key != "_attn_implementation_internal" and (key not in undo.before or value != old):
                vars(undo.config)[key] = value
        _set_config(model, root.config, undo.config)
    return model


@contextlib.contextmanager
def patched(model: Model, **switches: Any) -> Iterator[Model]:
    """`with pyllm.patched(model):` is `patch` at the start and `unpatch` at the end of the block, errors included."""
    patch(model, **switches)
    try:
        yield model
    finally:
        unpatch(model)


def _unwrapped(model: Any) -> Any:
    """The model of transformers inside torch.compile's and PEFT's wrappers."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _known(model: Any) -> tuple[Any, Any, str]:
    """(the model inside its wrappers, the module of transformers that defines it, its family's name)."""
    root = _unwrapped(model)
    if type(root).__module__.startswith("pyllm.hf."):
        raise ValueError(f"pyllm.patch: {type(root).__module__}.{type(root).__name__} has the kernels already")
    for cls in type(root).__mro__:
        found = re.fullmatch(r"transformers\.models\.(\w+)\.modeling_(\w+)", cls.__module__)
        family = FAMILIES.get(found[1]) if found else None
        if family is not None and cls.__name__.removeprefix(family) in HEADS:
            return root, importlib.import_module(cls.__module__), family
    names = ", ".join(family + head for family in FAMILIES.values() for head in SHOWN)
    raise ValueError(f"pyllm.patch: {type(root).__module__}.{type(root).__name__} is not known; known are {names}")


def _check_version() -> None:
    version = importlib.import_module("transformers").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < (4, 53):  # where masks got a registry
        raise ImportError(f"pyllm.patch needs transformers 4.53 or newer, this is {version}")


def _replacements(root: Any, modeling: Any, family: str, switches: Switches) -> Iterator[tuple[nn.Module, Any]]:
    """The modules to patch, and with what.

    Raises:
        ValueError: one has a forward of its own, which would be lost or would bypass the kernels.
    """
    parts = {
        "RMSNorm": (PatchedRMSNorm, "rms_norm", switches.rms_norm),
        "RotaryEmbedding": (PatchedRotaryEmbedding, "rope", switches.rope),
        "Attention": (PatchedAttention, "rope and attention", switches.rope or switches.attention),
        "MLP": (PatchedMLP, "swiglu", switches.swiglu),
        "ForCausalLM": (PatchedForCausalLM, "linear_cross_entropy", switches.linear_cross_entropy),
    }
    if switches.swiglu and root.config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f'pyllm.patch: SwiGLU needs hidden_act "silu", the config has {root.config.hidden_act!r}; pass swiglu=False'
        )
    for part, (replacement, switch, wanted) in parts.items():
        cls = getattr(modeling, family + part)
        for name, module in root.named_modules():
            if not wanted or not isinstance(module, cls):
                continue
            own = type(module).forward is not cls.forward or "forward" in vars(module)
            if "_old_forward" in vars(module):  # hooks of accelerate, which call the module's forward by this name
                own = getattr(module._old_forward, "__func__", None) is not cls.forward
            if own:
                raise ValueError(
                    f"pyllm.patch: {name or 'the model'} has a forward of its own, in the place of "
                    f"{cls.__name__}'s (a subclass, or hooks of another library); to leave it alone turn {switch} off"
                )
            yield module, replacement


def _set_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = new


def _mark_documents(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a forward of the bare model: where position_ids restart, say so as cu_seq_lens, which the kernels take.

    Otherwise transformers either makes a (T, T) mask of them or, when there is a cache, lets the documents see each
    other. Not while compiling, when values can't be looked at: then all is as in transformers.
    """
    position_ids, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
    if position_ids is None or args or kwargs.get("attention_mask") is not None or torch.compiler.is_compiling():
        return None
    if kwargs.get("cu_seq_lens_q") is not None or (cache is not None and cache.get_seq_length()):
        return None
    given = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    B, T = given.shape[:2]
    steps = position_ids.expand(B, T).diff()  # (B, T - 1)
    if not bool((steps < 1).any()) or bool((steps > 1).any()):  # gaps have no meaning that everyone shares
        return None
    starts = torch.nn.functional.pad(steps < 1, (1, 0), value=True).flatten()  # a row is a document's end, too
    end = torch.tensor([B * T], device=starts.device)
    cu: Tensor = torch.cat((starts.nonzero().squeeze(1), end)).to(torch.int32)
    no_padding = torch.ones(B, T, dtype=torch.bool, device=starts.device)
    return args, {**kwargs, "attention_mask": no_padding, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
