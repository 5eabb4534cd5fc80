"""SwiGLU's compiled kernels: C++ (`csrc/swiglu/swiglu_cpu.cpp`) and CUDA (`csrc/swiglu/swiglu_cuda.cu`).

The packed form is the same kernel, with pointers into both halves of one buffer: nothing is split or joined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, as_rows, cpu, cuda, empty_like, new_empty, stream

LONGEST = 1 << 30  # columns that the CUDA kernels count


def _rows(*tensors: Tensor) -> tuple[int, int, list[Tensor], list[int]]:
    """(rows, columns, tensors, row strides) of tensors of one shape, not all of them contiguous."""
    cols = tensors[0].shape[-1]
    laid = [as_rows(t) for t in tensors]
    return tensors[0].numel() // max(1, cols), cols, [t for t, _ in laid], [stride for _, stride in laid]


def _halves(gate_up: Tensor) -> tuple[Tensor, int, int, int, int, int]:
    """(gate_up with dense rows, row stride, rows, F, addresses of both halves): chunk() would cost as much as all."""
    packed, stride = as_rows(gate_up)
    cols, first = packed.shape[-1] // 2, packed.data_ptr()
    rows = packed.numel() // max(1, 2 * cols)
    return packed, stride, rows, cols, first, first + cols * packed.element_size()


def _kernels(extension: Any) -> tuple[Impl, Impl]:
    """The two ops, by the functions of one of the modules. Those of CUDA take a stream last."""
    on_gpu = extension is cuda

    def last(x: Tensor) -> tuple[int, ...]:
        return (DTYPE_CODES[x.dtype], stream(x)) if on_gpu else (DTYPE_CODES[x.dtype],)

    def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
        y = empty_like(gate)
        n = y.numel()
        if gate.is_contiguous() and up.is_contiguous() and n <= LONGEST:  # one long row
            extension.module.swiglu_fwd(gate.data_ptr(), up.data_ptr(), y.data_ptr(), 1, n, n, n, *last(y))
            return y
        rows, cols, (gate, up), strides = _rows(gate, up)
        extension.module.swiglu_fwd(gate.data_ptr(), up.data_ptr(), y.data_ptr(), rows, cols, *strides, *last(y))
        return y

    def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup = empty_like(gate), empty_like(up)
        n = dy.numel()
        if dy.is_contiguous() and gate.is_contiguous() and up.is_contiguous() and n <= LONGEST:
            addresses = dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr()
            extension.module.swiglu_bwd(*addresses, 1, n, n, n, n, n, n, *last(dy))
            return dgate, dup
        rows, cols, (dy, gate, up), strides = _rows(dy, gate, up)
        addresses = dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr()
        extension.module.swiglu_bwd(*addresses, rows, cols, *strides, cols, cols, *last(dy))
        return dgate, dup

    def swiglu_packed_fwd(gate_up: Tensor) -> Tensor:
        _packed, stride, rows, cols, gate, up = _halves(gate_up)  # _packed may be a copy that `gate` points into
        y = new_empty(gate_up, torch.Size((*gate_up.shape[:-1], cols)))
        extension.module.swiglu_fwd(gate, up, y.data_ptr(), rows, cols, stride, stride, *last(y))
        return y

    def swiglu_packed_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
        packed, stride, rows, cols, gate, up = _halves(gate_up)
        dy, dy_stride = as_rows(dy)
        grad, _, _, _, dgate, dup = _halves(empty_like(packed))
        extension.module.swiglu_bwd(
            dy.data_ptr(), gate, up, dgate, dup, rows, cols, dy_stride, stride, stride, 2 * cols, 2 * cols, *last(dy)
        )
        return grad

    return Impl(swiglu_fwd, swiglu_bwd, extension.why_not), Impl(
        swiglu_packed_fwd, swiglu_packed_bwd, extension.why_not
    )


CPU, CPU_PACKED = _kernels(cpu)
CUDA, CUDA_PACKED = _kernels(cuda)
