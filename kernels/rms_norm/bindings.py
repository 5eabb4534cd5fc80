"""RMSNorm's compiled kernels: C++ (`csrc/rms_norm/rms_norm_cpu.cpp`) and CUDA (`csrc/rms_norm/rms_norm_cuda.cu`).

Tensors become pointers here. The weight travels as float32 wherever that is exact and cheap (C elements), so that the
kernels are compiled for x's dtypes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import (
    DTYPE_CODES,
    acc_dtype,
    as_acc,
    as_rows,
    cpu,
    cuda,
    empty_like,
    new_empty,
    optional_rows,
    pointer,
    stream,
)


def _shape(x: Tensor) -> tuple[int, int]:
    cols = x.shape[-1]
    return (x.numel() // cols if cols else 0), cols


# --- CPU -------------------------------------------------------------------------------------------------------------
def _cpu_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    rows, cols = _shape(x)
    source = x if residual is None else residual
    x, x_stride = as_rows(x)
    weight = as_acc(weight, acc_dtype(source.dtype))
    y, rstd, h, r_stride = empty_like(x), new_empty(weight, x.shape[:-1]), None, 0
    if residual is not None:
        residual, r_stride = as_rows(residual)
        h = empty_like(residual)
    cpu.module.rms_norm_fwd(
        x.data_ptr(), pointer(residual), weight.data_ptr(), y.data_ptr(), pointer(h), rstd.data_ptr(),
        rows, cols, x_stride, r_stride, eps, offset, DTYPE_CODES[x.dtype], DTYPE_CODES[source.dtype],
    )  # fmt: skip
    return y, h, rstd


def _cpu_bwd(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    rows, cols = _shape(x)
    x, x_stride = as_rows(x)
    dy, dy_stride = as_rows(dy)
    dh, dh_stride = optional_rows(dh)
    rstd = rstd.contiguous()
    wide = as_acc(weight, rstd.dtype)
    dx, dweight = empty_like(x), torch.empty_like(wide)
    cpu.module.rms_norm_bwd(
        dy.data_ptr(), pointer(dh), x.data_ptr(), wide.data_ptr(), rstd.data_ptr(), dx.data_ptr(), dweight.data_ptr(),
        rows, cols, dy_stride, dh_stride, x_stride, offset, DTYPE_CODES[dy.dtype], DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return dx, dweight if wide is weight else dweight.to(weight.dtype)


# --- CUDA ------------------------------------------------------------------------------------------------------------
def _cuda_weight(weight: Tensor, x: Tensor) -> Tensor:
    return (weight if weight.dtype == x.dtype else weight.float()).contiguous()


def _cuda_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    rows, cols = _shape(x)
    x, x_stride = as_rows(x)
    residual, r_stride = optional_rows(residual)
    source = x if residual is None else residual
    h = None if residual is None else residual.new_empty(x.shape)
    weight = _cuda_weight(weight, x)
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    # fmt: off
    cuda.module.rms_norm_fwd(
        x.data_ptr(), pointer(residual), weight.data_ptr(), y.data_ptr(), pointer(h), rstd.data_ptr(),
        rows, cols, x_stride, r_stride, eps, offset,
        DTYPE_CODES[x.dtype], DTYPE_CODES[source.dtype], DTYPE_CODES[weight.dtype], stream(x),
    )
    # fmt: on
    return y, h, rstd


def _cuda_bwd(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    rows, cols = _shape(x)
    x, x_stride = as_rows(x)
    dy, dy_stride = as_rows(dy)
    dh, dh_stride = optional_rows(dh)
    rstd = rstd.contiguous()
    given = _cuda_weight(weight, x)
    dx = x.new_empty(x.shape)
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    parts = cuda.module.rms_norm_bwd_parts(rows, cols, multiprocessors)
    partial = x.new_empty((parts, cols), dtype=torch.float32)
    dweight = x.new_empty(cols, dtype=torch.float32)
    # fmt: off
    cuda.module.rms_norm_bwd(
        dy.data_ptr(), pointer(dh), x.data_ptr(), given.data_ptr(), rstd.data_ptr(), dx.data_ptr(), dweight.data_ptr(),
        partial.data_ptr(), parts, rows, cols, dy_stride, dh_stride, x_stride, offset,
        DTYPE_CODES[dy.dtype], DTYPE_CODES[x.dtype], DTYPE_CODES[given.dtype], stream(x),
    )
    # fmt: on
    return dx, dweight.to(weight.dtype)


# --- the two ops, for either module ----------------------------------------------------------------------------------
def _plain(fwd: Any, bwd: Any, extension: Any) -> Impl:
    def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        y, _, rstd = fwd(x, None, weight, eps, offset)
        return y, rstd

    def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> tuple[Tensor, Tensor]:
        return bwd(dy, None, x, weight, rstd, offset)

    def why_not(x: Tensor, weight: Tensor, eps: float, offset: float) -> list[str]:
        return extension.why_not(x, weight)

    return Impl(rms_norm_fwd, rms_norm_bwd, why_not)


def _add(fwd: Any, bwd: Any, extension: Any) -> Impl:
    def why_not(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> list[str]:
        reasons = extension.why_not(x, residual, weight)
        if not reasons and x.dtype != residual.dtype:
            if torch.float64 in (x.dtype, residual.dtype):
                reasons = [f"x is {x.dtype} and residual {residual.dtype}: float64 goes with float64 only"]
            elif extension is cuda and residual.dtype != torch.float32:
                reasons = [f"x is {x.dtype} and residual {residual.dtype}: they must agree, or the residual be float32"]
        return reasons

    return Impl(fwd, bwd, why_not)


CPU, CPU_ADD = _plain(_cpu_fwd, _cpu_bwd, cpu), _add(_cpu_fwd, _cpu_bwd, cpu)
CUDA, CUDA_ADD = _plain(_cuda_fwd, _cuda_bwd, cuda), _add(_cuda_fwd, _cuda_bwd, cuda)
