"""Rows whose tokens form a tree: continuations of one prompt that share what they have in common.

The beams of a prompt are one row of the cache. Each step appends one token per beam, and every token sees its own
ancestors only:

    prompt  a  b | c1 d2 | e1 ...       beam 1 sees  prompt a c1 e1
                                        beam 2 sees  prompt b d2

So nothing in the cache moves when beams are reordered: only this table of who sees whom does, a byte per token and
beam. Branches that died out stay in the row until they outnumber the living, then they are cleared away. A step
reads the prompt's keys once rather than once per beam.

Names: P prompts, n beams, S columns of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import KVCache


class TokenTree:
    """Which columns of a cache's rows every beam sees.

    Args:
        cache: filled with the prompts, (P rows); from now on it belongs to the tree.
        beams: n.
        columns: S that the rows may grow to at most.
    """

    def __init__(self, cache: KVCache, beams: int, columns: int):
        device = cache.keys[0].device
        self.cache, self.beams = cache, beams
        P, S = len(cache.keys[0]), cache.seen
        lengths = cache.lengths if cache.lengths is not None else torch.full((P,), S, device=device)
        self.lengths = lengths.long()  # (P,) columns in use
        self.shared = S if cache.lengths is None else int(self.lengths.min())  # columns that every beam sees
        self.position = torch.arange(columns, device=device).repeat(P, 1)  # (P, columns) of the token in each
        prompt = self.position < self.lengths[:, None]
        self.visible = prompt[:, None].repeat(1, beams, 1)  # (P, n, columns) bool
        self.at = self.lengths.clone()  # (P,) position of the next token
        self.appended = 0  # columns since the last clearing
        self.kept = 0  # columns beyond the prompt that it left
        self._masks: dict[int | None, Tensor] = {}
        cache.mask, cache.tree = None, self

    def grow(self) -> Tensor:
        """Room for a token of each beam; returns their positions, (P, n)."""
        column = self.lengths[:, None] + torch.arange(self.beams, device=self.lengths.device)  # (P, n)
        self.visible.scatter_(2, column[:, :, None], True)
        position = self.at[:, None].expand(-1, self.beams)
        self.position.scatter_(1, column, position)
        self.lengths = self.lengths + self.beams
        self.at = self.at + 1
        self.appended += self.beams
        self._masks = {}
        return position

    def mask(self, window: int | None, columns: int) -> Tensor:
        """(P, 1, n, columns) bool, True where a beam's newest token sees a column."""
        if window not in self._masks:
            seen = self.visible[:, :, :columns]
            if window is not None:
                seen = seen & (self.position[:, :columns] > self.at[:, None] - 1 - window)[:, None]
            self._masks[window] = seen[:, None]
        return self._masks[window]

    def reorder(self, beams: Tensor) -> None:
        """Beam i of a prompt goes on from what beam `beams[p, i]` was, (P, n)."""
        self.visible = self.visible.gather(1, beams[:, :, None].expand_as(self.visible))
        if self.appended >= max(16 * self.beams, self.kept):
            self._clear()

    def _clear(self) -> None:
        """Move the living together. Each clearing is paid for by as many tokens appended since the last one."""
        alive = self.visible.any(1)  # (P, columns)
        self.lengths = alive.sum(1)
        columns = int(self.lengths.max())
        order = torch.argsort(~alive, dim=1, stable=True)
        # Columns of a shorter row beyond its length hold a dead token, which nobody sees.
        self.cache.compact(order[:, self.shared : columns], self.shared, self.lengths)
        self.visible = self.visible.gather(2, order[:, None].expand_as(self.visible))
        self.position = self.position.gather(1, order)
        self.appended, self.kept = 0, columns - self.shared
