"""The second half of a gradient that is summed over rows: each program of the first has left its part in float32.

No atomics, one fixed order: the same bits every run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_support import cdiv, lanes

ELEMENTS = 4096  # of a tile
THREADS = 256


@triton.jit
def _sum_partials_kernel(
    PARTIAL, OUT, OUT2, P, C, TWO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Program (c, i): BLOCK_C columns of the i-th sum. OUT[c] = sum over p of PARTIAL[p, c], with TWO, OUT2 of the C
    columns after those."""
    which = tl.program_id(1)
    width = 2 * C if TWO else C
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        parts = (start + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        mask = (parts < P) & (cols < C)[None, :]
        total += tl.load(PARTIAL + parts * width + which * C + cols[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if which == 0:
        tl.store(OUT + cols, result.to(OUT.dtype.element_ty), mask=cols < C)
    elif TWO:
        tl.store(OUT2 + cols, result.to(OUT2.dtype.element_ty), mask=cols < C)


def tile(cols: int) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_C) of a sum of `cols` columns.

    Few columns a program share a narrow sum over many multiprocessors, and end it after a few turns of the loop, each
    as long as a trip to memory: 32 columns are 128 bytes, a whole line. Wide sums have programs enough.
    """
    block_c = 32 if cols <= 8192 else 128
    return ELEMENTS // block_c, block_c


def sum_partials(partial: Tensor, out: Tensor, out2: Tensor | None = None) -> None:
    """out (C,) = partial (P, C) summed over P; with out2 (C,), partial is (P, 2 C), one behind the other.

    partial is float32 and contiguous; each sum is rounded to its tensor's dtype. The caller has made the GPU of both
    the current one.
    """
    cols = out.shape[0]
    if cols == 0:
        return
    block_p, block_c = tile(cols)
    _sum_partials_kernel[(cdiv(cols, block_c), 1 if out2 is None else 2)](
        partial, out, out if out2 is None else out2, partial.shape[0], cols, out2 is not None, block_p, block_c,
        num_warps=THREADS // lanes(partial.device),
    )  # fmt: skip
