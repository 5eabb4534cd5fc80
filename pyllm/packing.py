"""Rows of tokens for training: packed without padding, in an order that a seed and a number decide.

A row is a window of T tokens of the corpus, with whatever documents happen to lie in it; `cu_seqlens` says where they
begin, and attention never looks across. Nothing is padded, cut off or left out: an epoch's windows lie end to end and
go once around the corpus.

The order is a permutation that is computed, not stored: Feistel rounds turn the number of a row into the number of a
window, whatever the size of the corpus. So all there is to remember of a position in the data is how many rows
have been read, and any rank or any later run can ask for any row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .inputs import IGNORE
from .shards import TokenShards


def mix(x: np.ndarray | int) -> np.ndarray:
    """A good hash of 64-bit numbers (the finaliser of splitmix64; Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permute(index: int | np.ndarray, count: int, key: int) -> np.ndarray:
    """The place of each index in a pseudo-random order of range(count); one to one for every key.

    A Feistel network permutes the 4^b >= count numbers of 2b bits, whatever its round function: (l, r) -> (r, l ^ f(r))
    can be undone. Results beyond count go through it again until they fall inside ("cycle walking"), which keeps it
    one to one and takes four rounds or fewer on average.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    bits = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    half = np.uint64((1 << bits) - 1)
    x = np.atleast_1d(np.asarray(index, dtype=np.uint64)).copy()
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left, right = x[outside] >> np.uint64(bits), x[outside] & half
        for round_ in range(4):
            scrambled = mix(right ^ mix(np.uint64((key * 4 + round_) & (2**64 - 1)))) & half
            left, right = right, left ^ scrambled
        x[outside] = left << np.uint64(bits) | right
        outside = x >= count
    return x.astype(np.int64)


@dataclass
class Batch:
    """Some rows of training data.

    Attributes:
        inputs: (B, T) int64.
        targets: (B, T) int64, the token behind each; -100 where there is none to predict.
        cu_seqlens: (documents + 1,) int32 over the B * T inputs, or None when every row is one document's.
        count: targets that count.
    """

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    count: int

    def to(self, device: torch.device) -> Batch:
        cu = None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True)
        inputs, targets = (t.to(device, non_blocking=True) for t in (self.inputs, self.targets))
        return Batch(inputs, targets, cu, self.count)

    @property
    def pairs(self) -> int:
        """Pairs of query and key that causal attention has in it."""
        if self.cu_seqlens is None:
            B, T = self.inputs.shape
            return B * T * (T + 1) // 2
        lengths = self.cu_seqlens.long().diff()
        return int((lengths * (lengths + 1) // 2).sum())


class PackedRows:
    """Row number r of an endless, shuffled, packed reading of a corpus; any r, at the cost of reading that row.

    An epoch cuts the corpus into ceil(N / T) windows that lie end to end, and deals them out in a random order. Where
    the cuts fall changes from epoch to epoch. The last window goes round to where the first began, so that every token
    is a target once an epoch, and up to T - 1 of them twice.

    Args:
        shards: the corpus.
        length: T, tokens of a row.
        seed: of order and cuts.
        shuffle: False deals the windows out in order, from the beginning: for validation.
    """

    def __init__(self, shards: TokenShards, length: int, seed: int = 0, shuffle: bool = True):
        if length < 1:
            raise ValueError(f"data: length must be at least 1, got {length}")
        self.shards, self.length, self.seed, self.shuffle = shards, length, seed, shuffle
        self.per_epoch = -(-shards.tokens // length)

    def start(self, row: int) -> int:
        """The position in the corpus where a row begins."""
        epoch, index = divmod(row, self.per_epoch)
        if not self.shuffle:
            return index * self.length
        key = int(mix(np.uint64((self.seed * 0x9E3779B9 + epoch) & (2**64 - 1))))
        shift = 0 if epoch == 0 else key % self.length
        return (int(permute(index, self.per_epoch, key)[0]) * self.length + shift) % self.shards.tokens

    def batch(self, first: int, count: int) -> Batch:
        """Rows first, first + 1, ... as a batch."""
        T = self.length
        inputs, targets = np.empty((count, T), dtype=np.int64), np.empty((count, T), dtype=np.int64)
        starts: list[np.ndarray] = []
        for i in range(count):
            ids, firsts = self.shards.read(self.start(first + i), T + 1)
            inputs[i], targets[i] = ids[:-1], ids[1:]
            inner = firsts[(firsts > 0) & (firsts < T)]
            if self.shards.masked_ends:
                targets[i, firsts[firsts > 0] - 1] = IGNORE
            starts += [np.array([i * T]), inner + i * T]
        cu = np.concatenate([*starts, np.array([count * T])])
        packed = None if len(cu) == count + 1 else torch.from_numpy(cu.astype(np.int32))
        real = int((targets != IGNORE).sum()) if self.shards.masked_ends else targets.size
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), packed, real)
