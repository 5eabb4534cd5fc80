"""The model's side of generation: prompts in, then a token per row and step, with the cache or without.

Names: B rows, T prompt length, t tokens so far, C hidden, V vocab.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import engine
from .cache import KVCache
from .exact import batch_invariant

if TYPE_CHECKING:
    from .model import LlamaForCausalLM


class Decoder:
    """Feeds a batch of rows to a model.

    Args:
        ids: (B, T), padded on the left.
        mask: (B, T), 0 at padding; None where there is none.
        cache: None computes everything again at every step.
        chunk: tokens per pass over the prompt at most.
    """

    def __init__(
        self, model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None, cache: KVCache | None, chunk: int | None = None
    ):
        self.model, self.mask, self.cache, self.chunk = model, mask, cache, chunk
        self.ids = ids
        self.after: Tensor | None = None  # (B, 1) position of each row's next token, where rows differ

    def prefill(self) -> Tensor:
        """Logits after the last token of every prompt, (B, V) float32."""
        B, T = self.ids.shape
        done = 0 if self.cache is None else self.cache.seen
        if self.mask is None:
            last, positions = None, None
        else:
            last = (self.mask * torch.arange(1, T + 1, device=self.mask.device)).argmax(1)  # (B,) last real column
            positions = positions_of(self.mask)
            self.after = positions[:, -1:] + 1
            if bool((last == T - 1).all()):
                last = None
            elif bool((last < done).any()):
                raise ValueError("generate: a prompt has no token that past_key_values does not hold already")
            else:
                warnings.warn(
                    "generate: the prompts are padded on the right, so their continuations come after the padding; "
                    "pad on the left (padding_side='left' of a tokenizer)",
                    stacklevel=6,
                )
        found: Tensor | None = None
        for start in range(done, T, self.chunk or T):
            end = min(T, start + (self.chunk or T))
            part = None if positions is None else positions[:, start:end]
            mask = None if self.mask is None else self.mask[:, :end]
            if last is None:
                found = self._logits(self.ids[:, start:end], mask, part, keep=1)[:, -1]
                continue
            logits = self._logits(self.ids[:, start:end], mask, part, keep=0)
            here = logits[torch.arange(B, device=last.device), (last - start).clamp(0, end - start - 1)]
            inside = ((last >= start) & (last < end))[:, None]
            found = here if found is None else torch.where(inside, here, found)
        assert found is not None
        return found

    def expand(self, rows: Tensor) -> None:
        """Go on with row rows[i] as row i: several continuations of a prompt."""
        self.mask = None if self.mask is None else self.mask[rows]
        self.after = None if self.after is None else self.after[rows]
        if self.cache is not None:
            self.cache.reorder(rows)

    def step(self, ids: Tensor) -> Tensor:
        """Logits after the newest token of every row, (B, V) float32; ids (B, t) are all so far."""
        return self.steps(ids, 1)[:, -1]

    def steps(self, ids: Tensor, keep: int) -> Tensor:
        """Logits after each of the newest `keep` tokens, (B, keep, V) float32.

        The cache may lack more tokens than these (after a `crop`): they are fed too.
        """
        t = ids.shape[1]
        if self.cache is None:
            if self.mask is None:
                return self._logits(ids, None, None, keep)
            mask = torch.cat((self.mask, self.mask.new_ones(len(ids), t - self.mask.shape[1])), dim=1)
            return self._logits(ids, mask, positions_of(mask), keep)
        new = ids[:, self.cache.seen :]
        positions = None
        if self.after is not None:  # a cache knows where the prompts were padded, and what is generated never is
            back = torch.arange(new.shape[1], device=ids.device) + self.cache.seen - self.ids.shape[1]
            positions = self.after + back
        return self._logits(new, None, positions, keep)

    def _logits(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, keep: int) -> Tensor:
        if mask is None and self.cache is not None:
            logits = engine.step(self.model, ids, positions, self.cache, keep)
            if logits is not None:
                return logits
        out = self.model(ids, mask, positions, self.cache, use_cache=self.cache is not None, logits_to_keep=keep)
        return out.logits.to(torch.float32)


def positions_of(mask: Tensor) -> Tensor:
    """Positions that count real tokens only."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def cache_window(model: LlamaForCausalLM) -> int | None:
    """The window of all layers, for a ring; None where one of them sees everything, so that nothing may be dropped."""
    windows = model.config.windows
    return (
        None if None in windows or batch_invariant.active else max(window for window in windows if window is not None)
    )
