"""SwiGLU's compiled kernels: C++ (`csrc/swiglu/swiglu_cpu.cpp`).

The packed form is the same kernel, with pointers into both halves of one buffer: nothing is split or joined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, as_rows, cpu


def _fwd(gate: Tensor, up: Tensor) -> Tensor:
    cols = gate.shape[-1] if gate.dim() else 1
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    gate, gate_stride = _rows(gate)
    up, up_stride = _rows(up)
    # fmt: off
    cpu.module.swiglu_fwd(
        gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel() // cols, cols, gate_stride, up_stride,
        DTYPE_CODES[y.dtype],
    )
    # fmt: on
    return y


def _bwd_into(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    if dy.numel() == 0:
        return
    cols = gate.shape[-1] if gate.dim() else 1
    dy, dy_stride = _rows(dy)
    gate, gate_stride = _rows(gate)
    up, up_stride = _rows(up)
    _, dgate_stride = _rows(dgate)
    _, dup_stride = _rows(dup)
    # fmt: off
    cpu.module.swiglu_bwd(
        dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr(),
        dy.numel() // cols, cols, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride, DTYPE_CODES[dy.dtype],
    )
    # fmt: on


def _rows(x: Tensor) -> tuple[Tensor, int]:
    return as_rows(x) if x.dim() else (x, 1)


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = torch.empty_like(dgate)
    _bwd_into(dy, gate, up, dgate, dup)
    return dgate, dup


def swiglu_packed_fwd(gate_up: Tensor) -> Tensor:
    return _fwd(*gate_up.chunk(2, -1))


def swiglu_packed_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    grad = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    _bwd_into(dy, *gate_up.chunk(2, -1), *grad.chunk(2, -1))
    return grad


def why_not(*tensors: Any) -> list[str]:
    return cpu.why_not(*tensors)


CPU = Impl(_fwd, swiglu_bwd, why_not)
CPU_PACKED = Impl(swiglu_packed_fwd, swiglu_packed_bwd, why_not)
