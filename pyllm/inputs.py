"""What a model is given: checks of the arguments, and the small rearrangements of padding, documents and labels.

Names: B batch, T new tokens, S cached and new tokens, C hidden, V vocab.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import KVCache
from .config import LlamaConfig

IGNORE = -100


@dataclass
class Pass:
    """What all layers of one forward pass share."""

    cos: Tensor  # (T, D/2), or (B, T, D/2) where rows have positions of their own
    sin: Tensor
    backend: str | None
    cache: KVCache | None = None
    cu_seqlens: Tensor | None = None  # (documents + 1,) int32: B * T tokens are documents, end to end
    mask: Tensor | None = None  # (B or 1, 1 or H, T, S), bool or additive: replaces causality altogether
    starts: Tensor | None = None  # (B,) int32, keys in each row's cache before this pass, where rows differ
    blind: Tensor | None = None  # (B, T, 1, 1) bool, padding that no token precedes: it sees nothing
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # of rows that start apart, by window


def check_inputs(
    config: LlamaConfig,
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
        check_ids("input_ids", input_ids, config.vocab_size)
        B, T = input_ids.shape
    else:
        assert inputs_embeds is not None
        if not inputs_embeds.is_floating_point():
            raise ValueError(f"inputs_embeds must be floating point, got {inputs_embeds.dtype}")
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds must have shape (batch, length, hidden_size = {config.hidden_size}), "
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
            raise ValueError("cu_seqlens delimits packed documents; it does not go with attention_mask or a cache")


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


def check_labels(name: str, labels: Tensor | None, B: int, T: int, vocab_size: int) -> Tensor:
    """Targets: (B, T) integers within the vocabulary, or -100 where no loss is wanted."""
    _integer(name, labels)
    assert labels is not None
    if tuple(labels.shape) != (B, T):
        hint = "; labels are shifted inside, pass them unshifted" if labels.shape == (B, T - 1) else ""
        raise ValueError(f"{name} must have the input's shape ({B}, {T}), got {tuple(labels.shape)}{hint}")
    if _readable(labels) and labels.numel():
        real = labels[labels != IGNORE]
        if real.numel() and (int(real.min()) < 0 or int(real.max()) >= vocab_size):
            bad = int(real.min()) if int(real.min()) < 0 else int(real.max())
            raise ValueError(f"{name} must be within [0, vocab_size = {vocab_size}) or {IGNORE}, got {bad}")
    return labels


def warn_if_all_ignored(targets: Tensor, ignore_index: int = IGNORE) -> None:
    """Say that a batch has nothing to learn from. CPU only: asking a GPU would stall the stream."""
    if _readable(targets) and targets.numel() and bool((targets == ignore_index).all()):
        warnings.warn(f"every label is {ignore_index}: the loss is 0 and so are its gradients", stacklevel=3)


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def _integer(name: str, tensor: Any) -> None:
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


def real_tokens(mask: Tensor | None, cache: KVCache | None, T: int) -> Tensor | None:
    """Which new tokens are real, (B, T) bool; None when all are, as far as can be told without waiting for a GPU."""
    if mask is None or mask.dim() == 4:
        return None
    seen = 0 if cache is None else cache.seen
    real = mask[:, seen:] != 0
    looked = _readable(mask)
    if cache is not None and seen and looked:
        before = mask[:, :seen] != 0
        if not (before.all() if cache.mask is None else torch.equal(before, cache.mask)):
            raise ValueError("attention_mask differs from the one that past_key_values was filled with")
    return None if looked and bool(real.all()) else real


def take(x: Tensor, order: Tensor) -> Tensor:
    """x (B, T) or (B, T, C) with each row's T positions in the given order."""
    return x.gather(1, order if x.dim() == 2 else order[:, :, None].expand(-1, -1, x.shape[2]))


def positions(
    given: Tensor | None, seen: int, B: int, T: int, device: torch.device, cu_seqlens: Tensor | None
) -> Tensor:
    """Positions of the new tokens, (T,) or (B, T): as given, or restarting with every packed document, or counted on
    from the cache, padding included, as Hugging Face does."""
    if given is not None:
        return given[0] if given.dim() == 2 and given.shape[0] == 1 else given
    if cu_seqlens is not None:
        return document_positions(cu_seqlens, B, T)
    return torch.arange(seen, seen + T, device=device)


def leading_padding(real: Tensor, starts: Tensor | None) -> Tensor:
    """(B, T) bool, padding before a row's first token. It attends to nothing, as in Hugging Face.

    The loss depends on it: at the last of it, the target is the row's first token.
    """
    before = real.cumsum(1)
    return before == 0 if starts is None else before + starts[:, None] == 0


def document_positions(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """Positions that restart with every document, (B, T)."""
    index = torch.arange(B * T, device=cu_seqlens.device)
    start = torch.searchsorted(cu_seqlens.long(), index, right=True) - 1
    return (index - cu_seqlens.long()[start]).view(B, T)


def documents_of(
    position_ids: Tensor | None, attention_mask: Tensor | None, cache: KVCache | None, B: int, T: int
) -> Tensor | None:
    """cu_seqlens of documents that position_ids tell apart by not going on within a row; None where they all do.

    As in Hugging Face, whose collators pack so: without mask or cache only. Compiled code can't ask, and for a GPU it
    has to wait; cu_seqlens avoids both.
    """
    if position_ids is None or attention_mask is not None or cache is not None or T < 2:
        return None
    if torch.compiler.is_compiling():
        return None
    rows = position_ids.expand(B, T)
    starts = rows[:, 1:] - rows[:, :-1] != 1
    if not bool(starts.any()):
        return None
    index = F.pad(starts, (1, 0), value=True).flatten().nonzero().squeeze(1)
    return F.pad(index, (0, 1), value=B * T)


def kept_positions(logits_to_keep: int | Tensor, T: int) -> slice | Tensor:
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1:
            raise ValueError(f"logits_to_keep must be an int or 1-D indices, got shape {tuple(logits_to_keep.shape)}")
        return logits_to_keep
    if logits_to_keep < 0:
        raise ValueError(f"logits_to_keep must not be negative, got {logits_to_keep}; 0 keeps all")
    return slice(max(0, T - logits_to_keep) if logits_to_keep else 0, T)


def shifted(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int = IGNORE) -> Tensor:
    """Targets (B, T): at every position the next token, and none at the end of a row or of a packed document."""
    if cu_seqlens is None:
        return F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    targets = F.pad(labels.reshape(-1)[1:], (0, 1), value=IGNORE)  # documents may run from one row into the next
    return targets.index_fill(0, (cu_seqlens[1:].long() - 1).clamp(min=0), IGNORE).view_as(labels)
