"""RMSNorm in Triton. The formula and the backward's derivation are in `reference.py`.

Letters: N rows, C hidden; x, residual, dy, dh are read through a row stride, outputs are contiguous. Row offsets are
64-bit from the row index on.

Floor (bytes for N x C elements of size b): forward 2NCb, with the residual 4NCb; backward 3NCb, with dh 4NCb. Rows
that fit a program's registers are at the floor; wider ones are read a second time, which L2 answers while the rows in
progress on all multiprocessors fit it. The partial sums of dweight add 8/(Rb) of NCb for R rows a program.

torch's own rms_norm is not called: on an H100 it takes 1.2 times as long forward and 1.9 times backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..extension import as_rows, empty_like, optional_rows
from ..triton_reduce import sum_partials
from ..triton_support import cdiv, lanes, multiprocessors, on_device, power_of_2

# A row lives in the registers of one program up to these widths, so it is read once; wider rows are looped over.
# The backward holds four rows at a time (dy, x, the weight, its gradient), hence a quarter of the forward's.
FWD_TILE = 32768
BWD_TILE = 8192
# Tile of the forward's loop over wide rows.
LOOP_TILE = 4096
LOOP_THREADS = 256


@triton.jit
def _weight(W, cols, C, offset):
    return tl.load(W + cols, mask=cols < C, other=0.0).to(tl.float32) + offset


@triton.jit
def _rms_norm_fwd_kernel(
    X, R, W, Y, H, RSTD, N, C, x_stride, r_stride, eps, offset,
    HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N rows, each row whole in registers.

    1 / sqrt, not rsqrt: as exact, and the widest float32 tile spills with rsqrt on sm_90.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < N) & (cols < C)
    x = tl.load(X + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if BLOCK_C <= 16384:  # the weight's way from L2 is over when the sum is; the widest tile has no registers for it
        w = _weight(W, cols, C, offset)
    if HAS_RESIDUAL:
        h = (x + tl.load(R + rows * r_stride + cols, mask=mask, other=0.0).to(tl.float32)).to(H.dtype.element_ty)
        tl.store(H + rows * C + cols, h, mask=mask)
        x = h.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / C + eps)
    tl.store(RSTD + rows, rstd, mask=rows < N)
    if BLOCK_C > 16384:
        w = _weight(W, cols, C, offset)
    tl.store(Y + rows * C + cols, (x * rstd * w).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _sum_of(X, R, x_row, r_row, cols, mask, dtype: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVICT: tl.constexpr):
    """x, or x + residual rounded to `dtype`: a tile of a row."""
    x = tl.load(X + x_row + cols, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(R + r_row + cols, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def _rms_norm_fwd_loop_kernel(
    X, R, W, Y, H, RSTD, C, x_stride, r_stride, eps, offset,
    HAS_RESIDUAL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per row, for rows too wide for registers: read twice, the second time mostly from L2.

    The sum with the residual is rebuilt, not read back: nothing orders this program's stores before its loads.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, r_row = row * x_stride, row * r_stride
    dtype = H.dtype.element_ty
    squares = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x = _sum_of(X, R, x_row, r_row, cols, cols < C, dtype, HAS_RESIDUAL, "evict_last")
        if HAS_RESIDUAL:
            tl.store(H + row * C + cols, x.to(dtype), mask=cols < C)
        squares += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / C + eps)
    tl.store(RSTD + row, rstd)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x = _sum_of(X, R, x_row, r_row, cols, cols < C, dtype, HAS_RESIDUAL, "evict_first")
        y = x * rstd * _weight(W, cols, C, offset)
        tl.store(Y + row * C + cols, y.to(Y.dtype.element_ty), mask=cols < C)


@triton.jit
def _rms_norm_bwd_kernel(
    DY, DH, X, W, RSTD, DX, PARTIAL, N, C, rows_per_program, dy_stride, dh_stride, x_stride, offset,
    HAS_DH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Persistent: a program walks its own rows_per_program rows and keeps their part of dweight in registers.

    In two stages the next tile's loads (cp.async) run while this one is reduced and stored.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    cols = tl.arange(0, BLOCK_C)[None, :]
    w = _weight(W, cols, C, offset)
    dweight = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    for start in tl.range(0, rows_per_program, BLOCK_N, num_stages=STAGES):
        rows = first + start + tl.arange(0, BLOCK_N)[:, None]
        mask = (rows < last) & (cols < C)
        x = tl.load(X + rows * x_stride + cols, mask=mask, other=0.0)
        dy = tl.load(DY + rows * dy_stride + cols, mask=mask, other=0.0)
        rstd = tl.load(RSTD + rows, mask=rows < last, other=0.0)
        if HAS_DH:
            dh = tl.load(DH + rows * dh_stride + cols, mask=mask, other=0.0)
        unit = x.to(tl.float32) * rstd
        dy = dy.to(tl.float32)
        dweight += dy * unit
        g = dy * w
        dx = (g - unit * (tl.sum(g * unit, axis=1, keep_dims=True) / C)) * rstd
        if HAS_DH:
            dx += dh.to(tl.float32)
        tl.store(DX + rows * C + cols, dx.to(DX.dtype.element_ty), mask=mask)
    flat = tl.arange(0, BLOCK_C)
    tl.store(PARTIAL + program * C + flat, tl.sum(dweight, axis=0), mask=flat < C)


@triton.jit
def _rms_norm_bwd_loop_kernel(
    DY, DH, X, W, RSTD, DX, PARTIAL, N, C, rows_per_program, dy_stride, dh_stride, x_stride, offset,
    HAS_DH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Persistent as above, for wide rows: BLOCK_N at a time, read twice, their part of dweight kept in memory (L2)."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    for block in range(0, rows_per_program, BLOCK_N):
        rows = first + block + tl.arange(0, BLOCK_N)[:, None]
        rstd = tl.load(RSTD + rows, mask=rows < last, other=0.0)
        dots = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
        for start in tl.range(0, C, BLOCK_C, num_stages=2):
            cols = start + tl.arange(0, BLOCK_C)[None, :]
            mask = (rows < last) & (cols < C)
            x = tl.load(X + rows * x_stride + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            dy = tl.load(DY + rows * dy_stride + cols, mask=mask, other=0.0, eviction_policy="evict_last")
            dots += dy.to(tl.float32) * _weight(W, cols, C, offset) * (x * rstd)
        mean = tl.sum(dots, axis=1, keep_dims=True) / C
        tl.debug_barrier()  # other threads' partial sums of the rows before must be in memory
        for start in tl.range(0, C, BLOCK_C, num_stages=2):
            flat = start + tl.arange(0, BLOCK_C)
            sums = PARTIAL + program * C + flat
            before = tl.load(sums, mask=(flat < C) & (block > 0), other=0.0)
            cols = start + tl.arange(0, BLOCK_C)[None, :]
            mask = (rows < last) & (cols < C)
            unit = tl.load(X + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32) * rstd
            dy = tl.load(DY + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
            dx = (dy * _weight(W, cols, C, offset) - unit * mean) * rstd
            if HAS_DH:
                dx += tl.load(DH + rows * dh_stride + cols, mask=mask, other=0.0).to(tl.float32)
            tl.store(DX + rows * C + cols, dx.to(DX.dtype.element_ty), mask=mask)
            tl.store(sums, before + tl.sum(dy * unit, axis=0), mask=flat < C)


def _shape(x: Tensor) -> tuple[int, int]:
    cols = x.shape[-1]
    return (x.numel() // cols if cols else 0), cols


def config(cols: int, tile: int, lanes: int = 32) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_C, num_warps) for rows of `cols` when `tile` elements fit a program; `lanes` of a warp.

    Narrow rows share a program until it has 1024 elements: one warp then has 16 bytes and more to load per lane and
    array. A thread per 16 elements of an array compiles without spills.
    """
    block_c = power_of_2(cols)
    block_n = max(1, 1024 // block_c)
    threads = min(1024 if tile == FWD_TILE else 512, block_n * block_c // 16)
    return block_n, block_c, max(1, threads // lanes)


def stages(element_size: int, block_c: int, tensors: int) -> int:
    """Stages of the persistent backward: the tiles loaded ahead must fit a GeForce's shared memory, 99 KB.

    All do but three float32 rows of 8192, which take 98 to 104 KB with the compiler's padding.
    """
    return 2 if element_size * block_c * tensors < 98304 else 1


def bwd_loop_config(element_size: int, lanes: int = 32) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_C, num_warps) of the backward's loop over wide rows of x.

    Two rows share an update of the partial sums. 8 KB of each, in two stages, stay below the shared memory of a
    GeForce; a thread per 16 elements compiles without spills.
    """
    block_c = 8192 // element_size
    return 2, block_c, 2 * block_c // 16 // lanes


def shares(rows: int, block_n: int, threads: int, processors: int) -> tuple[int, int]:
    """(programs of a persistent backward, rows of each) on a GPU of `processors` multiprocessors.

    As many programs as are resident at once: the kernels need up to 128 registers, so 512 threads fill a
    multiprocessor, and with the loads of a tile ahead have 32 KB and more in flight on each. But a program's part of
    dweight costs 8 bytes a column, written and read again: at least 16 rows share it, unless multiprocessors would
    then have nothing to do.
    """
    resident = max(1, 512 // threads) * processors
    programs = min(cdiv(rows, block_n), max(processors, min(resident, rows // 16)))
    share = cdiv(cdiv(rows, programs), block_n) * block_n
    return cdiv(rows, share), share


def _fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    rows, cols = _shape(x)
    x, x_stride = as_rows(x)
    residual, r_stride = optional_rows(residual)
    h = None if residual is None else empty_like(residual)
    weight = weight.contiguous()
    y = empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if rows == 0:
        return y, h, rstd
    has_residual = residual is not None
    with on_device(x):
        if cols <= FWD_TILE:
            block_n, block_c, warps = config(cols, FWD_TILE, lanes(x.device))
            _rms_norm_fwd_kernel[(cdiv(rows, block_n),)](
                x, residual if has_residual else x, weight, y, h if has_residual else y, rstd, rows, cols,
                x_stride, r_stride, eps, offset, has_residual, block_n, block_c, num_warps=warps,
            )  # fmt: skip
        else:
            _rms_norm_fwd_loop_kernel[(rows,)](
                x, residual if has_residual else x, weight, y, h if has_residual else y, rstd, cols,
                x_stride, r_stride, eps, offset, has_residual, LOOP_TILE, num_warps=LOOP_THREADS // lanes(x.device),
            )  # fmt: skip
    return y, h, rstd


def _bwd(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    rows, cols = _shape(x)
    x, x_stride = as_rows(x)
    dy, dy_stride = as_rows(dy)
    dh, dh_stride = optional_rows(dh)
    weight, rstd = weight.contiguous(), rstd.contiguous()
    dx = empty_like(x)
    if rows == 0:
        return dx, torch.zeros_like(weight)
    dweight = torch.empty_like(weight)
    warp = lanes(x.device)
    if cols <= BWD_TILE:
        kernel = _rms_norm_bwd_kernel
        block_n, block_c, warps = config(cols, BWD_TILE, warp)
        size = max(x.element_size(), dy.element_size())
        tile: tuple[int, ...] = (block_n, block_c, stages(size, block_c, 2 if dh is None else 3))
    else:
        kernel = _rms_norm_bwd_loop_kernel
        block_n, block_c, warps = bwd_loop_config(x.element_size(), warp)
        tile = (block_n, block_c)
    parts, share = shares(rows, block_n, warps * warp, multiprocessors(x.device))
    partial = torch.empty((parts, cols), dtype=torch.float32, device=x.device)
    with on_device(x):
        kernel[(parts,)](
            dy, dy if dh is None else dh, x, weight, rstd, dx, partial, rows, cols, share,
            dy_stride, dh_stride, x_stride, offset, dh is not None, *tile, num_warps=warps,
        )  # fmt: skip
        sum_partials(partial, dweight)
    return dx, dweight


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _fwd(x, None, weight, eps, offset)
    return y, rstd


def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    return _bwd(dy, None, x, weight, rstd, offset)


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, rstd = _fwd(x, residual, weight, eps, offset)
    assert h is not None
    return y, h, rstd


add_rms_norm_bwd = _bwd
