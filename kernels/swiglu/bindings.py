"""SwiGLU's compiled kernels: C++ (`csrc/swiglu/swiglu_cpu.cpp`) and CUDA (`csrc/swiglu/swiglu_cuda.cu`).

The packed form is the same kernel, with pointers into both halves of one buffer: nothing is split or joined.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, as_rows, cpu, cuda, empty_like, stream


def _rows(x: Tensor) -> tuple[Tensor, int]:
    return as_rows(x) if x.dim() else (x, 1)


def _where(extension: Any, x: Tensor) -> tuple[int, ...]:
    """What a binding takes last: the CUDA ones a stream."""
    return (stream(x),) if extension is cuda else ()


def _kernels(extension: Any) -> tuple[Impl, Impl]:
    """The two ops, by the functions of one of the modules."""

    def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
        cols = gate.shape[-1] if gate.dim() else 1
        y = empty_like(gate)
        if y.numel() == 0:
            return y
        gate, gate_stride = _rows(gate)
        up, up_stride = _rows(up)
        extension.module.swiglu_fwd(
            gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel() // cols, cols, gate_stride, up_stride,
            DTYPE_CODES[y.dtype], *_where(extension, y),
        )  # fmt: skip
        return y

    def bwd_into(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
        if dy.numel() == 0:
            return
        cols = gate.shape[-1] if gate.dim() else 1
        dy, dy_stride = _rows(dy)
        gate, gate_stride = _rows(gate)
        up, up_stride = _rows(up)
        _, dgate_stride = _rows(dgate)
        _, dup_stride = _rows(dup)
        extension.module.swiglu_bwd(
            dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr(), dy.numel() // cols, cols,
            dy_stride, gate_stride, up_stride, dgate_stride, dup_stride, DTYPE_CODES[dy.dtype], *_where(extension, dy),
        )  # fmt: skip

    def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup = empty_like(gate), empty_like(gate)
        bwd_into(dy, gate, up, dgate, dup)
        return dgate, dup

    def swiglu_packed_fwd(gate_up: Tensor) -> Tensor:
        return swiglu_fwd(*gate_up.chunk(2, -1))

    def swiglu_packed_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
        grad = empty_like(gate_up)
        bwd_into(dy, *gate_up.chunk(2, -1), *grad.chunk(2, -1))
        return grad

    def why_not(*tensors: Any) -> list[str]:
        return extension.why_not(*tensors)

    return Impl(swiglu_fwd, swiglu_bwd, why_not), Impl(swiglu_packed_fwd, swiglu_packed_bwd, why_not)


CPU, CPU_PACKED = _kernels(cpu)
CUDA, CUDA_PACKED = _kernels(cuda)
