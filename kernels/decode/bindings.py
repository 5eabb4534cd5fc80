"""The decoding step's compiled side: tensors become pointers, and tables of pointers (`csrc/decode/decode_cpu.h`).

A table is an int64 tensor whose rows are the C++ structs `DecodeLayer` and `DecodeCache`, field by field. It holds
addresses, so that whoever makes one keeps the tensors alive and notices when they move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..extension import DTYPE_CODES, as_rows, cpu, pointer

PACKED_CODES = {torch.int8: 4, torch.int32: 5}  # csrc/decode/decode_cpu.h
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Matrix(NamedTuple):
    """A weight (N, K) as it is, or packed with its scale."""

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    @property
    def kind(self) -> int:
        return DTYPE_CODES[self.weight.dtype] if self.scale is None else PACKED_CODES[self.weight.dtype]

    def numbers(self) -> list[int]:
        return [self.weight.data_ptr(), pointer(self.scale), pointer(self.bias), self.kind]


def layer_row(matrices: Sequence[Matrix], norms: Sequence[Tensor | None], window: int | None) -> list[int]:
    """One layer: q, k, v, o, gate, up, down; the norms before attention and MLP, of q and of k."""
    row = [number for matrix in matrices for number in matrix.numbers()]
    return [*row, *(pointer(norm) for norm in norms), window or 0]


def cache_row(keys: Tensor, values: Tensor, mask: Tensor | None) -> list[int]:
    """One layer's keys and values (R, S, Hkv, D), contiguous, and who sees what: (R, 1, T, columns) bool."""
    seen = [0, 0, 0] if mask is None else [mask.data_ptr(), mask.stride(0), mask.stride(2)]
    return [keys.data_ptr(), values.data_ptr(), keys.stride(0), *seen]


def decode_step(
    layers: Tensor,
    caches: Tensor,
    embedding: Tensor,
    norm: Tensor,
    head: Matrix,
    ids: Tensor,
    cos: Tensor,
    sin: Tensor,
    first: Tensor,
    ends: Tensor,
    *,
    keep: int,
    heads: tuple[int, int, int],
    width: int,
    total_bytes: int,
    eps: float,
    ring: bool,
) -> Tensor:
    """Logits after the last `keep` of the new tokens, (R, keep, V) float32; writes their keys and values to the cache.

    Args:
        layers, caches: tables, one row per layer.
        embedding: (V, C).  norm: (C,).  ids: (R, T) int64.  cos, sin: (T, D/2) or (R, T, D/2) float32.
        first, ends: (R,) int32, the column of each row's first new token, and columns filled with them.
        heads: (H, Hkv, D).  width: F.  ring: columns are in no order, all that are filled are seen.
    """
    R, T = ids.shape
    V, C = embedding.shape
    logits = torch.empty(R, keep, V, dtype=torch.float32)
    # fmt: off
    cpu.module.decode_step(
        layers.data_ptr(), caches.data_ptr(), len(layers), embedding.data_ptr(), norm.data_ptr(),
        head.weight.data_ptr(), pointer(head.scale), head.kind, ids.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        cos.stride(0) if cos.dim() == 3 else 0, first.data_ptr(), ends.data_ptr(), logits.data_ptr(), R, T, keep, C,
        *heads, width, V, total_bytes, eps, ring, DTYPE_CODES[embedding.dtype],
    )
    # fmt: on
    return logits


def packed_linear(x: Tensor, matrix: Matrix, N: int) -> Tensor:
    """x (..., K) times a packed matrix (N, K), plus its bias; in x's dtype."""
    K = x.shape[-1]
    rows = x.numel() // K
    x, stride = as_rows(x)
    y = x.new_empty(*x.shape[:-1], N)
    cpu.module.packed_linear(
        *matrix.numbers()[:3], matrix.kind, x.data_ptr(), y.data_ptr(), rows, N, K, stride, DTYPE_CODES[x.dtype]
    )
    return y


def why_not(x: Tensor) -> list[str]:
    """Reasons why these kernels can't take a tensor like x."""
    found = cpu.why_not(x)
    return found or ([] if x.dtype in FLOATS else [f"dtype {x.dtype} is not served"])


def table(rows: list[list[int]], kind: str) -> Tensor:
    """The int64 tensor of a list of structs."""
    made: Any = torch.tensor(rows, dtype=torch.int64)
    expected = getattr(cpu.module, f"decode_{kind}_numbers")
    assert made.shape[1] == expected, f"a {kind} has {expected} numbers, got {made.shape[1]}"
    return made
