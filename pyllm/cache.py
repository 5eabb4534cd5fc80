"""The static key-value cache: what attention has computed for earlier tokens, kept in preallocated memory.

Names: B batch, T new tokens, S_max capacity, Hkv key-value heads, D head_dim, W window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tree import TokenTree


class KVCache:
    """Keys and values of every layer, (B, S_max, Hkv, D) each, and how much of every row is filled.

    Rows hold their real tokens without gaps, whatever the padding of the batch: row b is filled up to `lengths[b]`.
    Memory is reserved at the first use and doubled when it runs out. One forward pass is `begin`, one `update` per
    layer, `advance`. Keys and values are stored without their gradient.

    With a window, for models whose layers all have one, no more than W tokens are kept: the token at position p lies
    at p mod W, over the one that just left the window. Softmax does not mind the order, so that a single new token
    attends to the ring as it lies; several at once get the last W - 1 in order, and themselves behind.

    Args:
        capacity: tokens per row to reserve at first; grown when needed.
        growable: False makes running out an error, for callers that rely on fixed addresses (CUDA graphs).
        window: W; None: everything is kept.
    """

    ends: Tensor  # (B,) int32, set by `begin`: how many keys per row `update` returns

    def __init__(self, capacity: int = 0, *, growable: bool = True, window: int | None = None):
        if capacity < 0:
            raise ValueError(f"KVCache: capacity must not be negative, got {capacity}")
        if window is not None and window < 1:
            raise ValueError(f"KVCache: window must be at least 1 or None, got {window}")
        self.capacity = capacity
        self.growable = growable
        self.window = window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.seen = 0  # columns of input so far, padding included: the length of the attention mask
        self.mask: Tensor | None = None  # (B, seen) which of those columns were real; None: all of them
        self.lengths: Tensor | None = None  # (B,) int32, real tokens per row; None until there was padding
        self.tree: TokenTree | None = None  # rows whose tokens do not all see each other (beams)
        self.pinned = False
        self.starts: Tensor | None = None  # of this pass, as `ends`: keys that were there before; None: rows are alike
        self._new = 0
        self._at: tuple[Tensor, Tensor] | None = None  # where the new tokens go; None: all rows behind each other
        self._order: Tensor | None = None  # (B, S) columns of (ring, new tokens) in the order of positions

    def __len__(self) -> int:
        return self.seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included (Hugging Face's name)."""
        return self.seen

    @property
    def batch_size(self) -> int | None:
        """Rows, or None before the first use."""
        return self.keys[0].shape[0] if self.keys else None

    @property
    def padded(self) -> bool:
        """Whether rows may differ in length."""
        return self.lengths is not None

    # One forward pass

    def begin(self, batch: int, new: int, real: Tensor | None, device: torch.device) -> None:
        """Announce a forward pass over `new` columns.

        Args:
            real: (B, new) bool, which of them are tokens rather than padding; None: all. In each row the real ones
                must have been moved to the front.
        Raises:
            ValueError: another batch size than before, or no room and not growable.
        """
        if self.batch_size not in (None, batch):
            raise ValueError(
                f"past_key_values holds {self.batch_size} rows, but the input has {batch}; was the batch expanded "
                "without expanding the cache?"
            )
        if not self.growable and self._room(self.seen + new) > self.capacity:
            raise ValueError(
                f"past_key_values has room for {self.capacity} tokens, but {self.seen} seen + {new} new are "
                f"{self.seen + new}; reserve more, or leave it growable"
            )
        if real is not None and self.lengths is None:
            self.lengths = torch.full((batch,), self.seen, dtype=torch.int32, device=device)
        self._new, self._at, self._order = new, None, None
        if self.window is not None and self.seen + new > self.window:
            self._begin_ring(batch, new, real, device)
            return
        self.starts = self.lengths
        if self.lengths is None:
            self.ends = torch.full((batch,), self.seen + new, dtype=torch.int32, device=device)
            return
        self.ends = self.lengths + new
        columns = self.lengths[:, None].long() + torch.arange(new, device=device)  # (B, T)
        self._at = (torch.arange(batch, device=device)[:, None], columns)

    def _begin_ring(self, batch: int, new: int, real: Tensor | None, device: torch.device) -> None:
        W = self.window
        assert W is not None
        lengths = self.lengths
        if lengths is None:
            lengths = torch.full((batch,), self.seen, dtype=torch.int32, device=device)
        past = lengths[:, None].long()  # (B, 1)
        token = torch.arange(new, device=device)
        slot = (past + token) % W  # (B, T)
        # What is no token, or leaves the window within this very pass, goes to a slot of its own that nobody reads.
        count = torch.full_like(past, new) if real is None else real.sum(1, keepdim=True)
        slot = torch.where((token < count) & (token >= count - W), slot, W)
        self._at = (torch.arange(batch, device=device)[:, None], slot)
        if new == 1 and real is None and not torch.is_grad_enabled():
            self.starts, self.ends = None, (lengths + 1).clamp(max=W)
            return
        kept = past.clamp(max=W - 1)  # (B, 1) tokens of the past that are still seen
        column = torch.arange(min(self.seen, W - 1) + new, device=device)
        ring = (past - kept + column) % W
        self._order = torch.where(column < kept, ring, W + 1 + (column - kept).clamp(max=new - 1))
        self.starts = None if self.lengths is None else kept[:, 0].to(torch.int32)
        self.ends = (kept[:, 0] + new).to(torch.int32)

    def reserve(self) -> tuple[Tensor, Tensor]:
        """Instead of `update`, for who writes into `keys` and `values` itself: makes room for the new tokens of all
        layers.

        Returns:
            (B,) int32, the column of each row's first new token, and as `ends` how many are filled with all of them.
        """
        for buffers in (self.keys, self.values):
            buffers[:] = [self._grown(buffer) for buffer in buffers]
        if self._at is None:
            return torch.full_like(self.ends, self.seen), self.ends
        return self._at[1][:, 0].to(torch.int32), self.ends

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (B, T, Hkv, D); returns all it has, (B, S, Hkv, D).

        S is the new length where rows are equally long; otherwise it covers the longest row, and the caller masks:
        row b has `ends[b]` keys.
        """
        if layer == len(self.keys):
            size = (k.shape[0], self._room(max(self.capacity, self._new)), *k.shape[2:])
            self.keys.append(k.new_zeros(size))  # zeros: what attention masks out must still be finite
            self.values.append(v.new_zeros(size))
        return self._store(self.keys, layer, k), self._store(self.values, layer, v)

    def _store(self, buffers: list[Tensor], layer: int, new: Tensor) -> Tensor:
        buffer = buffers[layer] = self._grown(buffers[layer])
        graph = torch.is_grad_enabled() and new.requires_grad
        out = None
        if self._order is not None and self.seen:  # before the new tokens take the places of old ones
            both = torch.cat((buffer, new.to(buffer.dtype)), dim=1)
            out = both.gather(1, self._order[:, :, None, None].expand(-1, -1, *new.shape[2:]))
        end = self.seen + new.shape[1]
        with torch.no_grad():
            if self._at is None:
                buffer[:, self.seen : end] = new
            else:
                buffer[self._at] = new.to(buffer.dtype)
        if out is not None:
            return out
        if self.seen == 0:
            return new
        if self.pinned:
            return buffer
        end = end if self.window is None else min(end, self.window)
        if not graph:
            return buffer[:, :end]
        if self._at is None:  # a copy that carries the new tokens' gradient, and that no later step overwrites
            return torch.cat((buffer[:, : self.seen], new.to(buffer.dtype)), dim=1)
        return buffer[:, :end].clone().index_put(self._at, new.to(buffer.dtype))

    def advance(self, real: Tensor | None) -> None:
        """End a forward pass: count its tokens. `real` as the batch had it, (B, T) bool in input order."""
        if self.pinned:
            assert self.lengths is not None
            self.lengths += self._new  # in place: a graph that was captured counts here
        elif self.lengths is not None:
            if real is None:
                real = torch.ones(len(self.lengths), self._new, dtype=torch.bool, device=self.lengths.device)
            if self.tree is None:
                past = torch.ones_like(real[:, :1]).expand(-1, self.seen) if self.mask is None else self.mask
                self.mask = torch.cat((past, real), dim=1)
            self.lengths = self.lengths + real.sum(1, dtype=torch.int32)
        self.seen += self._new

    def _room(self, need: int) -> int:
        """Columns to reserve for so many tokens: of a ring W and one for what is dropped."""
        return need if self.window is None or need <= self.window else self.window + 1

    def _grown(self, buffer: Tensor) -> Tensor:
        need = self._room(self.seen + self._new)
        if buffer.shape[1] >= need:
            return buffer
        size = self._room(max(need, 2 * buffer.shape[1]))
        self.capacity = max(self.capacity, size)
        grown = buffer.new_zeros((buffer.shape[0], size, *buffer.shape[2:]))
        grown[:, : buffer.shape[1]] = buffer
        return grown

    # Between passes

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        self.seen, self.mask, self.lengths, self.tree, self.pinned = 0, None, None, None, False

    def crop(self, length: int) -> int:
        """Forget all but the first `length` columns, for a chat that goes on from an earlier point.

        Returns:
            How many are left: 0 instead of `length` where a ring has overwritten what would be seen again.
        """
        if length < 0:
            raise ValueError(f"KVCache: can't be cropped to {length} tokens")
        if length >= self.seen:
            return self.seen
        if self.window is not None and self.seen > self.window and length < self.seen - 1:
            length = 0
        if length == 0:
            self.reset()
        elif self.mask is not None:
            self.mask = self.mask[:, :length]
            self.lengths = self.mask.sum(1, dtype=torch.int32)
        elif self.lengths is not None:
            self.lengths = self.lengths - (self.seen - length)
        self.seen = length
        return length

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was; their number may change (samples of a prompt)."""
        rows = rows.long()
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]
        self.mask = None if self.mask is None else self.mask.index_select(0, rows)
        self.lengths = None if self.lengths is None else self.lengths.index_select(0, rows)

    def compact(self, order: Tensor, start: int, lengths: Tensor) -> None:
        """Drop tokens in the middle: the columns from `start` on become those that `order` names, (B, columns)."""
        for buffers in (self.keys, self.values):
            for buffer in buffers:
                index = order[:, :, None, None].expand(-1, -1, *buffer.shape[2:])
                buffer[:, start : start + order.shape[1]] = buffer.gather(1, index)
        self.lengths, self.seen = lengths.to(torch.int32), start + order.shape[1]

    def pin(self) -> None:
        """From here on addresses and shapes stay, and lengths are counted on the device: what a CUDA graph needs."""
        if self.growable or self.window is not None or not self.keys:
            raise ValueError("KVCache: only a filled cache that is not growable and has no window can be pinned")
        if self.lengths is None:
            keys = self.keys[0]
            self.lengths = torch.full((keys.shape[0],), self.seen, dtype=torch.int32, device=keys.device)
        self.pinned = True

    def nbytes(self) -> int:
        """Memory reserved, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
