"""What the Triton kernels of attention, forward and backward, share. The formulas are in `reference.py`.

Scores are kept in units of log 2 (`LOG2_E` is folded into the scale), since GPUs have an exp2 and no exp.

Layouts, by the letters of `reference.py`: rows are (b, t) pairs; x.stride(-2) leads to the next head. Kernels take any
strides whose last one is 1. A *descriptor* (TMA, sm_90 on) sees a tensor as the matrix [B * T, H * D]; it needs heads
side by side and rows at one distance, multiples of 16 bytes.

Packed batches. Nobody on the host knows the lengths, and asking would stall the device. Sequence b therefore owns the
tiles from cu[b] // BLOCK + b on: cdiv(length, BLOCK) of them always fit before the next sequence's first one, since
ceil(n / BLOCK) <= (start + n) // BLOCK - start // BLOCK + 1, and all of them before total // BLOCK + B. `sequence_of`
finds a tile's sequence by bisection; tiles that start past the end of theirs have nothing to do (about one a sequence).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton 3.3: everything goes by pointers
    TensorDescriptor = None


@triton.jit
def sequence_of(CU, tile, sequences, BLOCK: tl.constexpr):
    """(b, index): `tile` is the index-th of sequence b; b is -1 before the first sequence (where cu[0] > 0)."""
    low = tile * 0
    high = low + sequences
    while low < high:
        middle = (low + high) // 2
        before = tl.load(CU + middle) // BLOCK + middle <= tile
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    b = low - 1
    first = tl.load(CU + tl.maximum(b, 0), mask=sequences > 0, other=0) // BLOCK + b
    return b, tile - first


@triton.jit
def visible(query, key, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether a query at position `query`, on the scale of the keys, sees `key`; both broadcast. One bound or two."""
    if HAS_LEFT and HAS_RIGHT:
        return (key >= query - left) & (key <= query + right)
    elif HAS_LEFT:
        return key >= query - left
    else:
        return key <= query + right


@triton.jit
def load_rows(base, stride, rows, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr):
    """[rows, BLOCK_D] from a row pointer `base` at the tile's first row; zeros beyond n_rows, if MASK, and beyond D.

    rows: the tile's own, 0 to BLOCK - 1, so that offsets fit 32 bits (`strides` makes sure); base is 64-bit.
    """
    cols = tl.arange(0, BLOCK_D)
    where = base + rows[:, None] * stride + cols[None, :]
    if MASK and D < BLOCK_D:
        return tl.load(where, mask=(rows[:, None] < n_rows) & (cols[None, :] < D), other=0.0)
    elif MASK:
        return tl.load(where, mask=rows[:, None] < n_rows, other=0.0)
    elif D < BLOCK_D:
        return tl.load(where, mask=cols[None, :] < D, other=0.0)
    else:
        return tl.load(where)


@functools.cache
def architecture(device: torch.device) -> int:
    """90 for sm_90, 0 for AMD. The interpreter plays an sm_90, so that tests see descriptors as well as pointers."""
    if device.type != "cuda":
        return 90
    if torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, batch, row and head stride) with a dense last dimension; x itself wherever its strides allow.

    A stride between rows of 4 M elements and more would overflow a tile's 32-bit offsets: then it's a copy as well.
    """
    if (x.stride(-1) != 1 and x.shape[-1] > 1) or x.stride(-3) >= 1 << 22:
        x = x.contiguous()
    return x, x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2)


def matrix_stride(x: Tensor) -> int | None:
    """Elements between the rows of x as the matrix [B * T, H * D], where a descriptor can have it so, else None."""
    *_, T, H, D = x.shape
    if x.numel() == 0 or (H > 1 and x.stride(-2) != D):
        return None
    row = x.stride(-3)
    if x.dim() == 4 and x.shape[0] > 1:
        row = x.stride(0) if T == 1 else row
        if x.stride(0) != T * row:
            return None
    if x.numel() == H * D:  # a single row: its stride may be anything
        row = H * D
    size = x.element_size()
    fits = row >= H * D and row * size % 16 == 0 and D * size % 16 == 0 and x.data_ptr() % 16 == 0
    return row if fits else None


def row_strides(arch: int, *tensors: Tensor) -> list[int] | None:
    """Strides of tensors as matrices of rows, for descriptors; None where one can't be or the GPU has no TMA.

    16-bit dtypes and powers of two only (or a box would hold the next head's columns too), and not sm_120, whose 99 KB
    want the smaller tiles.
    """
    D = tensors[0].shape[-1]
    if TensorDescriptor is None or not 90 <= arch < 120 or tensors[0].element_size() != 2 or D < 16 or D & (D - 1):
        return None
    found = [stride for stride in map(matrix_stride, tensors) if stride is not None]
    return found if len(found) == len(tensors) else None


def matrix_descriptor(x: Tensor, stride: int, rows: int) -> TensorDescriptor:
    """x as the matrix [B * T, H * D], by boxes of `rows` rows of one head."""
    H, D = x.shape[-2:]
    return TensorDescriptor(x, [x.numel() // (H * D), H * D], [stride, 1], [rows, D])


def clamped_bounds(left: int, right: int, T: int, S: int) -> tuple[int, int]:
    """Bounds that hide nothing become -1; the others then fit 32 bits. T and S: the longest there can be."""
    return -1 if left >= S - 1 else left, -1 if right >= T - 1 else right
