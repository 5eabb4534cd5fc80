"""SwiGLU's gate in Triton. The formula and its backward are in `reference.py`.

Letters: N rows, F columns of the gate. Tensors are read through a row stride, so that chunks of a wider tensor, padded
rows and the packed form need no copy; contiguous ones are one long row. The packed form is the same kernel: `half` is
the distance of up from gate in one buffer, 0 between two tensors. The sigmoid is computed again in the backward.
Offsets are 64-bit.

Floor (bytes for N x F elements of size b): forward 3NFb, backward 5NFb, whichever form.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..extension import as_rows, empty_like
from ..triton_support import cdiv, lanes, multiprocessors, on_device, power_of_2


@triton.jit
def _tile(N, F, blocks, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """Rows, columns and mask of this program's tile; `blocks` tiles lie side by side in a row, neighbours first."""
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    cols = (program % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return rows, cols, (rows < N) & (cols < F)


@triton.jit
def _sigmoid(x):
    """Where exp(-x) overflows this is 0, as it should be: no NaN whatever the gate, and no branch."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _swiglu_fwd_kernel(
    GATE, UP, Y, N, F, blocks, gate_stride, up_stride, half,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program per tile of BLOCK_N x BLOCK_F. Reads gate and up, writes y."""
    rows, cols, mask = _tile(N, F, blocks, BLOCK_N, BLOCK_F)
    gate = tl.load(GATE + rows * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(UP + half + rows * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + rows * F + cols, (gate * _sigmoid(gate) * up).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    DY, GATE, UP, DGATE, DUP, N, F, blocks, dy_stride, gate_stride, up_stride, grad_stride, half,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program per tile of BLOCK_N x BLOCK_F. Reads dy, gate and up, writes both gradients."""
    rows, cols, mask = _tile(N, F, blocks, BLOCK_N, BLOCK_F)
    dy = tl.load(DY + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(GATE + rows * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(UP + half + rows * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    s = _sigmoid(gate)
    grads = rows * grad_stride + cols
    tl.store(DUP + half + grads, (dy * (gate * s)).to(DUP.dtype.element_ty), mask=mask)
    tl.store(DGATE + grads, (dy * up * s * (1.0 + gate * (1.0 - s))).to(DGATE.dtype.element_ty), mask=mask)


def config(rows: int, cols: int, processors: int, lanes: int = 32) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_F, num_warps) for `rows` of `cols` on a GPU of `processors` multiprocessors, `lanes` a warp.

    A tile of 2048 elements on 128 threads gives each two 16-byte loads per half-precision tensor (four in float32),
    which many resident programs multiply to more bytes in flight than any memory's latency asks for. Where that would
    leave multiprocessors without work (decoding), 16 bytes a lane of one warp, the least that is wide.
    Narrow rows share a program.
    """
    small = rows * cols < 2048 * processors
    tile, threads = (8 * lanes, lanes) if small else (2048, 128)
    block_f = min(tile, power_of_2(cols))
    return tile // block_f, block_f, max(1, threads // lanes)


def _launch(kernel, like: Tensor, tensors: tuple[Tensor, ...], rows: int, cols: int, *strides: int) -> None:
    """One launch over rows x cols; `strides` as the kernel takes them."""
    block_n, block_f, warps = config(rows, cols, multiprocessors(like.device), lanes(like.device))
    blocks = cdiv(cols, block_f)
    grid = (cdiv(rows, block_n) * blocks,)
    with on_device(like):
        kernel[grid](*tensors, rows, cols, blocks, *strides, block_n, block_f, num_warps=warps)


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    y = empty_like(gate)
    n = y.numel()
    if n == 0:
        return y
    if gate.is_contiguous() and up.is_contiguous():
        _launch(_swiglu_fwd_kernel, y, (gate, up, y), 1, n, 0, 0, 0)
    else:
        gate, gate_stride = as_rows(gate)
        up, up_stride = as_rows(up)
        F = y.shape[-1]
        _launch(_swiglu_fwd_kernel, y, (gate, up, y), n // F, F, gate_stride, up_stride, 0)
    return y


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = empty_like(gate), empty_like(gate)
    n = dgate.numel()
    if n == 0:
        return dgate, dup
    if dy.is_contiguous() and gate.is_contiguous() and up.is_contiguous():
        _launch(_swiglu_bwd_kernel, dy, (dy, gate, up, dgate, dup), 1, n, 0, 0, 0, 0, 0)
    else:
        dy, dy_stride = as_rows(dy)
        gate, gate_stride = as_rows(gate)
        up, up_stride = as_rows(up)
        F = dgate.shape[-1]
        tensors = (dy, gate, up, dgate, dup)
        _launch(_swiglu_bwd_kernel, dy, tensors, n // F, F, dy_stride, gate_stride, up_stride, F, 0)
    return dgate, dup


def swiglu_packed_fwd(gate_up: Tensor) -> Tensor:
    F = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], F))
    n = y.numel()
    if n:
        gate_up, stride = as_rows(gate_up)
        _launch(_swiglu_fwd_kernel, y, (gate_up, gate_up, y), n // F, F, stride, stride, F)
    return y


def swiglu_packed_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    grad = empty_like(gate_up)
    n = dy.numel()
    if n:
        F = gate_up.shape[-1] // 2
        dy, dy_stride = as_rows(dy)
        gate_up, stride = as_rows(gate_up)
        tensors = (dy, gate_up, gate_up, grad, grad)
        _launch(_swiglu_bwd_kernel, dy, tensors, n // F, F, dy_stride, stride, stride, 2 * F, F)
    return grad
