"""RMSNorm in Triton. The formula and the backward's derivation are in `reference.py`.

Letters: N rows, C hidden; x, residual, dy, dh are read through a row stride, outputs are contiguous. Row offsets are
64-bit from the row index on.

Floor (bytes for N x C elements of size b): forward 2NCb, with the residual 4NCb; backward 3NCb, with dh 4NCb.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..extension import as_rows, optional_rows
from ..triton_support import lanes, multiprocessors, on_device

# A row lives in the registers of one program up to these widths, so it is read once; wider rows are looped over.
# The backward holds four rows at a time (dy, x, the weight, its gradient), hence a quarter of the forward's.
FWD_TILE = 32768
BWD_TILE = 8192
LOOP_TILE = 4096
LOOP_THREADS = 256


@triton.jit
def _rms_norm_fwd_kernel(
    X, R, W, Y, H, RSTD, N, C, x_stride, r_stride, eps, offset,
    HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N rows, each row whole in registers."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < N) & (cols < C)
    x = tl.load(X + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h = (x + tl.load(R + rows * r_stride + cols, mask=mask, other=0.0).to(tl.float32)).to(H.dtype.element_ty)
        tl.store(H + rows * C + cols, h, mask=mask)
        x = h.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / C + eps)
    tl.store(RSTD + rows, rstd, mask=rows < N)
    w = tl.load(W + cols, mask=cols < C, other=0.0).to(tl.float32) + offset
    tl.store(Y + rows * C + cols, (x * rstd * w).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_fwd_loop_kernel(
    X, R, W, Y, H, RSTD, C, x_stride, r_stride, eps, offset,
    HAS_RESIDUAL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per row, for rows too wide for registers: read twice, the second time mostly from L2."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x = tl.load(X + row * x_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            h = (x + tl.load(R + row * r_stride + cols, mask=cols < C, other=0.0).to(tl.float32)).to(H.dtype.element_ty)
            tl.store(H + row * C + cols, h, mask=cols < C)
            x = h.to(tl.float32)
        squares += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / C + eps)
    tl.store(RSTD + row, rstd)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        if HAS_RESIDUAL:  # the sum is rebuilt, not read back: nothing orders this program's stores before its loads
            x = tl.load(X + row * x_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
            x += tl.load(R + row * r_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
            x = x.to(H.dtype.element_ty).to(tl.float32)
        else:
            x = tl.load(X + row * x_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
        w = tl.load(W + cols, mask=cols < C, other=0.0).to(tl.float32) + offset
        tl.store(Y + row * C + cols, (x * rstd * w).to(Y.dtype.element_ty), mask=cols < C)


@triton.jit
def _rms_norm_bwd_kernel(
    DY, DH, X, W, RSTD, DX, PARTIAL, N, C, rows_per_program, dy_stride, dh_stride, x_stride, offset,
    HAS_DH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Persistent: a program walks its own rows_per_program rows and keeps their part of dweight in registers."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    cols = tl.arange(0, BLOCK_C)[None, :]
    w = tl.load(W + cols, mask=cols < C, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, rows_per_program, BLOCK_N):
        rows = first + start + tl.arange(0, BLOCK_N)[:, None]
        mask = (rows < last) & (cols < C)
        rstd = tl.load(RSTD + rows, mask=rows < last, other=0.0)
        unit = tl.load(X + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32) * rstd
        dy = tl.load(DY + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        dweight += tl.sum(dy * unit, axis=0)
        g = dy * w
        dx = (g - unit * (tl.sum(g * unit, axis=1, keep_dims=True) / C)) * rstd
        if HAS_DH:
            dx += tl.load(DH + rows * dh_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + rows * C + cols, dx.to(DX.dtype.element_ty), mask=mask)
    flat = tl.arange(0, BLOCK_C)
    tl.store(PARTIAL + program * C + flat, dweight, mask=flat < C)


@triton.jit
def _rms_norm_bwd_dx_loop_kernel(
    DY, DH, X, W, RSTD, DX, C, dy_stride, dh_stride, x_stride, offset,
    HAS_DH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per row, for wide rows: dx alone."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(RSTD + row)
    dots = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        unit = tl.load(X + row * x_stride + cols, mask=cols < C, other=0.0).to(tl.float32) * rstd
        dy = tl.load(DY + row * dy_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
        dots += dy * (tl.load(W + cols, mask=cols < C, other=0.0).to(tl.float32) + offset) * unit
    mean = tl.sum(dots, axis=0) / C
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        unit = tl.load(X + row * x_stride + cols, mask=cols < C, other=0.0).to(tl.float32) * rstd
        dy = tl.load(DY + row * dy_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
        g = dy * (tl.load(W + cols, mask=cols < C, other=0.0).to(tl.float32) + offset)
        dx = (g - unit * mean) * rstd
        if HAS_DH:
            dx += tl.load(DH + row * dh_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
        tl.store(DX + row * C + cols, dx.to(DX.dtype.element_ty), mask=cols < C)


@triton.jit
def _rms_norm_bwd_dweight_kernel(
    DY, X, RSTD, PARTIAL, N, C, rows_per_program, dy_stride, x_stride,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (c, p): BLOCK_C columns of the p-th run of rows, for wide rows."""
    part = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    dweight = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, rows_per_program, BLOCK_N):
        rows = first + start + tl.arange(0, BLOCK_N)[:, None]
        mask = (rows < last) & (cols < C)[None, :]
        rstd = tl.load(RSTD + rows, mask=rows < last, other=0.0)
        x = tl.load(X + rows * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + rows * dy_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dweight += tl.sum(dy * (x * rstd), axis=0)
    tl.store(PARTIAL + part * C + cols, dweight, mask=cols < C)


@triton.jit
def _sum_partials_kernel(PARTIAL, OUT, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """OUT[c] = sum over p of PARTIAL[p, c], in one fixed order: the same bits every run. One program per BLOCK_C."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        parts = (start + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
        mask = (parts < P) & (cols < C)[None, :]
        total += tl.sum(tl.load(PARTIAL + parts * C + cols[None, :], mask=mask, other=0.0), axis=0)
    tl.store(OUT + cols, total.to(OUT.dtype.element_ty), mask=cols < C)


def _shape(x: Tensor) -> tuple[int, int]:
    cols = x.shape[-1]
    return (x.numel() // cols if cols else 0), cols


def config(cols: int, tile: int, lanes: int = 32) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_C, num_warps) for rows of `cols` when `tile` elements fit a program; `lanes` of a warp.

    Narrow rows share a program until it has 1024 elements: one warp then has 16 bytes and more to load per lane and
    array. A thread per 16 elements of an array compiles without spills.
    """
    block_c = triton.next_power_of_2(max(cols, 1))
    block_n = max(1, 1024 // block_c)
    threads = min(1024 if tile == FWD_TILE else 512, block_n * block_c // 16)
    return block_n, block_c, max(1, threads // lanes)


def _fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    rows, cols = _shape(x)
    x, x_stride = as_rows(x)
    residual, r_stride = optional_rows(residual)
    h = None if residual is None else residual.new_empty(x.shape)
    weight = weight.contiguous()
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rows == 0:
        return y, h, rstd
    has_residual = residual is not None
    with on_device(x):
        if cols <= FWD_TILE:
            block_n, block_c, warps = config(cols, FWD_TILE, lanes(x.device))
            _rms_norm_fwd_kernel[(triton.cdiv(rows, block_n),)](
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
    has_dh = dh is not None
    dh, dh_stride = optional_rows(dh)
    weight, rstd = weight.contiguous(), rstd.contiguous()
    dx = x.new_empty(x.shape)
    if rows == 0:
        return dx, torch.zeros_like(weight)
    dweight = torch.empty_like(weight)
    block_n, block_c, warps = config(cols, BWD_TILE, lanes(x.device))
    # Two programs a multiprocessor hide each other's latency; more would only make more partial sums.
    parts = min(triton.cdiv(rows, block_n), 2 * multiprocessors(x.device))
    per_program = triton.cdiv(triton.cdiv(rows, parts), block_n) * block_n
    parts = triton.cdiv(rows, per_program)
    partial = x.new_empty((parts, cols), dtype=torch.float32)
    dh = dh if dh is not None else dy
    with on_device(x):
        if cols <= BWD_TILE:
            _rms_norm_bwd_kernel[(parts,)](
                dy, dh, x, weight, rstd, dx, partial, rows, cols, per_program, dy_stride, dh_stride, x_stride, offset,
                has_dh, block_n, block_c, num_warps=warps,
            )  # fmt: skip
        else:
            _rms_norm_bwd_dx_loop_kernel[(rows,)](
                dy, dh, x, weight, rstd, dx, cols, dy_stride, dh_stride, x_stride, offset,
                has_dh, LOOP_TILE, num_warps=LOOP_THREADS // lanes(x.device),
            )  # fmt: skip
            _rms_norm_bwd_dweight_kernel[(triton.cdiv(cols, 256), parts)](
                dy, x, rstd, partial, rows, cols, per_program, dy_stride, x_stride, 8, 256, num_warps=4
            )
        _sum_partials_kernel[(triton.cdiv(cols, 128),)](partial, dweight, parts, cols, 16, 128, num_warps=4)
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
