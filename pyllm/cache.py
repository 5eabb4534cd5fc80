"""The static key-value cache: what attention has computed for earlier tokens, kept in preallocated memory.

Names: B batch, T new tokens, S_max capacity, Hkv key-value heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, (B, S_max, Hkv, D) each, and how much of every row is filled.

    Rows hold their real tokens without gaps, whatever the padding of the batch: row b is filled up to `lengths[b]`.
    Memory is reserved at the first use and doubled when it runs out. One forward pass is `begin`, one `update` per
    layer, `advance`. Keys and values are stored without their gradient.

    Args:
        capacity: tokens per row to reserve at first; grown when needed.
        growable: False makes running out an error, for callers that rely on fixed addresses (CUDA graphs).
    """

    def __init__(self, capacity: int = 0, *, growable: bool = True):
        if capacity < 0:
            raise ValueError(f"KVCache: capacity must not be negative, got {capacity}")
        self.capacity = capacity
        self.growable = growable
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.seen = 0  # columns of input so far, padding included: the length of the attention mask
        self.mask: Tensor | None = None  # (B, seen) which of those columns were real; None: all of them
        self.lengths: Tensor | None = None  # (B,) int32, real tokens per row; None until there was padding
        self._new = 0
        self._at: tuple[Tensor, Tensor] | None = None  # where the new tokens go, for rows of unequal length

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
        if not self.growable and self.seen + new > self.capacity:
            raise ValueError(
                f"past_key_values has room for {self.capacity} tokens, but {self.seen} seen + {new} new are "
                f"{self.seen + new}; reserve more, or leave it growable"
            )
        if real is not None and self.lengths is None:
            self.lengths = torch.full((batch,), self.seen, dtype=torch.int32, device=device)
        self._new = new
        self._at = None
        if self.lengths is not None:
            columns = self.lengths[:, None].long() + torch.arange(new, device=device)  # (B, T)
            self._at = (torch.arange(batch, device=device)[:, None], columns)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (B, T, Hkv, D); returns all it has, (B, S, Hkv, D).

        S is the new length where rows are equally long; otherwise it covers the longest row, and the caller masks.
        """
        if layer == len(self.keys):
            size = (k.shape[0], max(self.capacity, self._new), *k.shape[2:])
            self.keys.append(k.new_zeros(size))  # zeros: what attention masks out must still be finite
            self.values.append(v.new_zeros(size))
        out = []
        for buffers, new in ((self.keys, k), (self.values, v)):
            buffer = buffers[layer] = self._grown(buffers[layer])
            end = self.seen + new.shape[1]
            with torch.no_grad():
                if self._at is None:
                    buffer[:, self.seen : end] = new
                else:
                    buffer[self._at] = new.to(buffer.dtype)
            if self.seen == 0:
                out.append(new)
            elif not (torch.is_grad_enabled() and new.requires_grad):
                out.append(buffer[:, :end])
            elif self._at is None:  # a copy that carries the new tokens' gradient, and that no later step overwrites
                out.append(torch.cat((buffer[:, : self.seen], new.to(buffer.dtype)), dim=1))
            else:
                out.append(buffer[:, :end].clone().index_put(self._at, new.to(buffer.dtype)))
        return out[0], out[1]

    def advance(self, real: Tensor | None) -> None:
        """End a forward pass: count its tokens. `real` as the batch had it, (B, T) bool in input order."""
        if self.lengths is not None:
            if real is None:
                real = torch.ones(len(self.lengths), self._new, dtype=torch.bool, device=self.lengths.device)
            past = torch.ones_like(real[:, :1]).expand(-1, self.seen) if self.mask is None else self.mask
            self.mask = torch.cat((past, real), dim=1)
            self.lengths = self.lengths + real.sum(1, dtype=torch.int32)
        self.seen += self._new

    def _grown(self, buffer: Tensor) -> Tensor:
        need = self.seen + self._new
        if buffer.shape[1] >= need:
            return buffer
        size = max(need, 2 * buffer.shape[1])
        self.capacity = max(self.capacity, size)
        grown = buffer.new_zeros((buffer.shape[0], size, *buffer.shape[2:]))
        grown[:, : self.seen] = buffer[:, : self.seen]
        return grown

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        self.seen, self.mask, self.lengths = 0, None, None

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was; their number may change (beams, samples of a prompt)."""
        rows = rows.long()
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]
        self.mask = None if self.mask is None else self.mask.index_select(0, rows)
        self.lengths = None if self.lengths is None else self.lengths.index_select(0, rows)

    def nbytes(self) -> int:
        """Memory reserved, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
