"""What a model returns, and the checks of what it is given."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .cache import KVCache

IGNORE = -100


@dataclass
class ModelOutput:
    """Attributes that are also keys and positions, as in Hugging Face: None fields don't count as either."""

    def _present(self) -> dict[str, Any]:
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self._present().values())

    def keys(self) -> list[str]:
        return list(self._present())

    def values(self) -> list[Any]:
        return list(self._present().values())

    def items(self) -> list[tuple[str, Any]]:
        return list(self._present().items())

    def get(self, name: str, default: Any = None) -> Any:
        return self._present().get(name, default)

    def __getitem__(self, key: int | slice | str) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())

    def __contains__(self, name: object) -> bool:
        return name in self._present()


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """What the layers computed: last_hidden_state (B, T, C), and for all layers hidden_states, L + 1 tensors."""

    last_hidden_state: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """loss () float32, logits (B, T or kept, V)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def _register(cls: type[ModelOutput]) -> None:
    """Make an output transparent to what looks for tensors in it: FSDP's hooks, torch.export."""
    names = [field.name for field in dataclasses.fields(cls)]
    _pytree.register_pytree_node(
        cls,
        lambda out: ([getattr(out, name) for name in names], None),
        lambda values, _: cls(**dict(zip(names, values, strict=True))),
        serialized_type_name=f"pyllm.{cls.__name__}",
    )


_register(BaseModelOutputWithPast)
_register(CausalLMOutputWithPast)


def check_inputs(
    vocab_size: int,
    hidden_size: int,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Refuse what the layers would misread. Values are looked at on CPU only: on a GPU that would stall the stream.

    Raises:
        ValueError: naming the argument, the rule and what was given.
    """
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {given}")
    if input_ids is not None:
        check_ids("input_ids", input_ids, vocab_size)
        B, T = input_ids.shape
    else:
        assert inputs_embeds is not None
        if not inputs_embeds.is_floating_point():
            raise ValueError(f"inputs_embeds must be floating point, got {inputs_embeds.dtype}")
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != hidden_size:
            raise ValueError(
                f"inputs_embeds must have shape (batch, length, hidden_size = {hidden_size}), "
                f"got {tuple(inputs_embeds.shape)}"
            )
        B, T = inputs_embeds.shape[:2]
    if cache is not None and not isinstance(cache, KVCache):
        raise ValueError(f"past_key_values must be a pyllm.KVCache, got {type(cache)}")
    past = 0 if cache is None else cache.seen
    if attention_mask is not None:
        _check_mask(attention_mask, B, T, past)
    if position_ids is not None:
        _integer("position_ids", position_ids)
        if tuple(position_ids.shape) not in ((T,), (1, T), (B, T)):
            raise ValueError(
                f"position_ids must have shape ({B}, {T}) or ({T},), that of the new tokens, "
                f"got {tuple(position_ids.shape)}"
            )
        if _readable(position_ids) and position_ids.numel() and int(position_ids.min()) < 0:
            raise ValueError(f"position_ids must not be negative, got {int(position_ids.min())}")
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, B * T)
        if attention_mask is not None or past:
            raise ValueError("cu_seqlens delimits packed documents; it can't be combined with attention_mask or a cache")


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Token ids: a 2-D integer tensor within the vocabulary."""
    _integer(name, ids)
    if ids.dim() != 2:
        raise ValueError(f"{name} must have shape (batch, length), got {tuple(ids.shape)}; unsqueeze a single sequence")
    if _readable(ids) and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name} must be within [0, vocab_size = {vocab_size}), got {low if low < 0 else high}; "
                "do the tokenizer and the model belong together?"
            )


def check_labels(name: str, labels: Tensor, B: int, T: int, vocab_size: int) -> None:
    """Targets: (B, T) integers within the vocabulary, or -100 where no loss is wanted."""
    _integer(name, labels)
    if tuple(labels.shape) != (B, T):
        hint = "; labels are shifted inside, pass them unshifted" if labels.shape == (B, T - 1) else ""
        raise ValueError(f"{name} must have the input's shape ({B}, {T}), got {tuple(labels.shape)}{hint}")
    if _readable(labels) and labels.numel():
        real = labels[labels != IGNORE]
        if real.numel() and (int(real.min()) < 0 or int(real.max()) >= vocab_size):
            bad = int(real.min()) if int(real.min()) < 0 else int(real.max())
            raise ValueError(f"{name} must be within [0, vocab_size = {vocab_size}) or {IGNORE}, got {bad}")


def warn_if_all_ignored(targets: Tensor) -> None:
    """Say that a batch has nothing to learn from. CPU only: asking a GPU would stall the stream."""
    if _readable(targets) and targets.numel() and bool((targets == IGNORE).all()):
        warnings.warn(f"every label is {IGNORE}: the loss is 0 and so are its gradients", stacklevel=3)


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def _integer(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor)}")
    if tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, got {tensor.dtype}")


def _check_mask(mask: Tensor, B: int, T: int, past: int) -> None:
    S = past + T
    if mask.dim() == 2:
        if tuple(mask.shape) != (B, S):
            hint = f" ({past} in the cache + {T} new)" if past else ""
            raise ValueError(f"attention_mask must have shape ({B}, {S}){hint}, got {tuple(mask.shape)}")
    elif mask.dim() == 4:
        if mask.shape[0] not in (1, B) or tuple(mask.shape[2:]) != (T, S):
            raise ValueError(f"a 4-D attention_mask must have shape ({B}, 1, {T}, {S}), got {tuple(mask.shape)}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"a 4-D attention_mask must be bool (True: attend) or floating point (added to the scores), "
                f"got {mask.dtype}"
            )
    else:
        raise ValueError(f"attention_mask must be 2-D or 4-D, got shape {tuple(mask.shape)}")


def _check_cu_seqlens(cu_seqlens: Tensor, total: int) -> None:
    _integer("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens must be 1-D, the starts of the documents and the end, got {tuple(cu_seqlens.shape)}"
        )
    if _readable(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != total or sorted(ends) != ends:
            raise ValueError(f"cu_seqlens must rise from 0 to batch * length = {total}, got {ends[:4]} ... {ends[-1]}")
