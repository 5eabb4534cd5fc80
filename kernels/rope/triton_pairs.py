"""What the Triton kernels of this folder share: tokens, heads and the pairs of a head's elements, as tiles.

A tile is (tokens, heads, columns): BLOCK_T tokens of one batch row by BLOCK_H heads. A head of D elements is three
tiles: the R/2 first and the R/2 second elements of its pairs, and the rest of D - R that isn't rotated. D and R are
constants of the compiled code, so that a 16-byte access is seen to be aligned and inside the row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import power_of_2

TILE = 2048  # elements of a tile, when there are that many
TILE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tiles(NamedTuple):
    """Extents of a program's tiles, powers of two, and its warps."""

    tokens: int
    q_heads: int
    k_heads: int
    half: int
    rest: int
    warps: int


def config(T: int, H: int, Hkv: int, D: int, R: int, lanes: int = 32, threads: int = 128) -> Tiles:
    """Tiles of 2048 elements, 16 a thread: two 16-byte loads of bfloat16, four of float32, in flight at once.

    k has fewer heads than q, so tokens are added until k's tile is full; q's is then cut to the same size. Few tokens
    (decoding) leave room for more of q's heads. A head wider than a tile gets more threads instead of more registers.
    """
    half, rest = power_of_2(R // 2), power_of_2(D - R) if R < D else 0
    width = 2 * half + rest
    room = max(1, TILE // power_of_2(width))
    k_heads = min(power_of_2(Hkv), room)
    tokens = min(power_of_2(T), max(1, room // k_heads))
    q_heads = min(power_of_2(H), max(1, room // tokens))
    wanted = min(1024, max(threads, width // 16)) if width > TILE else threads
    return Tiles(tokens, q_heads, k_heads, half, rest, max(1, wanted // lanes))


def head_splits(token_blocks: int, head_blocks: int, multiprocessors: int) -> int:
    """Programs among which the heads of a block of tokens are shared: one, unless tokens alone can't fill the GPU."""
    return 1 if token_blocks >= 4 * multiprocessors else max(1, head_blocks)


def dense_heads(x: Tensor) -> Tensor:
    """x, or a copy where a head's elements aren't neighbours."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    """cos and sin of one layout, and its strides from batch to batch (0 where they share a table), row and column."""
    if cos.dtype not in TILE_DTYPES or sin.dtype != cos.dtype:
        cos, sin = cos.float(), sin.float()
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch = cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0
    return cos, sin, batch, cos.stride(-2), cos.stride(-1)


def positions(position_ids: Tensor | None, B: int, T: int, otherwise: Tensor) -> tuple[Tensor, int, int]:
    """Positions and their strides from batch row to row and token to token; `otherwise` stands in for none."""
    if position_ids is None:
        return otherwise, 0, 0
    position_ids = position_ids.expand(B, T)
    return position_ids, position_ids.stride(0), position_ids.stride(1)


@triton.jit
def token_tile(block, T, blocks, BLOCK_T: tl.constexpr):
    """(b, t, live) of the block-th run of BLOCK_T tokens, of which a batch row has `blocks`: t is (BLOCK_T, 1, 1)."""
    b = (block // blocks).to(tl.int64)
    t = (block % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    return b, t, t < T


@triton.jit
def load_angles(
    COS, SIN, P, b, t, live, table_rows, c_stride_b, c_stride_t, c_stride_d, p_stride_b, p_stride_t,
    HAS_P: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """(cos, sin) of the tokens, (BLOCK_T, 1, BLOCK_HALF) float32. A position outside the table becomes its edge."""
    if HAS_P:
        row = tl.load(P + b * p_stride_b + t * p_stride_t, mask=live, other=0).to(tl.int64)
        row = tl.maximum(tl.minimum(row, table_rows - 1), 0)
    else:
        row = t
    cols = tl.arange(0, BLOCK_HALF)[None, None, :]
    at = b * c_stride_b + row * c_stride_t + cols * c_stride_d
    mask = live & (cols < HALF)
    cos = tl.load(COS + at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(SIN + at, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def load_pairs(X, at, mask, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second elements of the pairs of the heads at X + at, float32.

    Interleaved pairs are read whole, in one access, and separated in registers.
    """
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        x = tl.load(X + at + cols, mask=mask & (cols < 2 * HALF), other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], BLOCK_HALF, 2]))
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, None, :]
        x1 = tl.load(X + at + cols, mask=mask & (cols < HALF), other=0.0).to(tl.float32)
        x2 = tl.load(X + at + HALF + cols, mask=mask & (cols < HALF), other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def store_pairs(Y, at, y1, y2, mask, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The reverse of `load_pairs`; rounds."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        y = tl.reshape(tl.join(y1, y2), [y1.shape[0], y1.shape[1], 2 * BLOCK_HALF])
        tl.store(Y + at + cols, y.to(Y.dtype.element_ty), mask=mask & (cols < 2 * HALF))
    else:
        cols = tl.arange(0, BLOCK_HALF)[None, None, :]
        tl.store(Y + at + cols, y1.to(Y.dtype.element_ty), mask=mask & (cols < HALF))
        tl.store(Y + at + HALF + cols, y2.to(Y.dtype.element_ty), mask=mask & (cols < HALF))


@triton.jit
def turn(x1, x2, cos, sin, CONJUGATE: tl.constexpr):
    """Pairs turned by their angles; by the opposite ones where CONJUGATE."""
    if CONJUGATE:
        sin = -sin
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin
