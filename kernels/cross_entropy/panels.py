"""Cross-entropy of a linear layer's logits on a GPU, in panels: what Triton's and CUDA's kernels have in common.

Letters: N rows, V classes, C hidden. Formulas are in `reference.py`. Nothing of size N x V is ever alive.

Forward (where no kernel does it without logits): cuBLAS makes the logits in chunks of rows, a row kernel reads them.
It saves lse alone.

Backward walks the N x V logits in panels of LOGITS_BYTES (256 MB of float32), the classes outside, the rows inside:
logits = h W_p^T in float32, dlogits by a row kernel, rounded to the inputs' dtype,
dh += dlogits W_p, dW_p += dlogits^T h. With lse known the panels need not be whole rows, so they are near squares of
8192, on which a GEMM is at its best, and up to 8192 rows a panel's dW is a single product: summed in float32 inside the
GEMM, rounded once, no float32 copy of W's size. Chunks of whole rows, which gradients computed in the forward need,
would read and write all of dW in float32 for every chunk: for Llama 3's head (V 128256, C 4096) 4.2 GB for 523 rows,
about twice the time of the product itself, and 2.1 GB held. That, and a backward for reduction "none" or any upstream
gradient at all, is why gradients are not computed in the forward; the price is 8NVC FLOPs instead of 6NVC. Whatever
gradient is not needed is not computed.

Logits are float32 from the inputs as they are: cuBLAS writes its float32 accumulator (`out_dtype`, torch 2.8 on
NVIDIA). Elsewhere the operands of a panel are widened first, which is as exact, slower, and needs 4C bytes more for
each row and class of a panel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..triton_support import cdiv
from . import reference

SIDE = 8192  # rows of a panel: enough for the GEMMs, and for dh's float32 sum to be read and written rarely


class Options(NamedTuple):
    """The op's, in the order of its schema."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


def weight_sum(weight: Tensor | None, options: Options) -> Tensor | None:
    """The sum of the classes' weights where label smoothing needs it; stays on the device."""
    return weight.sum(dtype=torch.float32) if weight is not None and options.label_smoothing else None


def panels(N: int, V: int) -> tuple[int, int]:
    """(rows, classes) of a panel of logits: LOGITS_BYTES of float32, near SIDE rows, in even shares, classes by 64."""
    budget = reference.LOGITS_BYTES // 4
    cols = max(64, budget // max(1, min(N, SIDE)) // 64 * 64)
    cols = min(V, cdiv(cdiv(V, cdiv(V, cols)), 64) * 64)
    rows = max(1, min(N, budget // cols))
    return cdiv(N, cdiv(N, rows)) if N else 1, cols


def workspace(N: int, V: int, C: int, itemsize: int) -> int:
    """Bytes that backward holds at its peak besides inputs and gradients, with `out_dtype` at hand."""
    rows, cols = panels(N, V)
    if itemsize == 4:
        return rows * cols * 4
    return rows * cols * (4 + itemsize) + 4 * C * (N + cols)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, with a float32 out and float32 sums whatever the dtype of a and b."""
    if a.dtype != torch.float32 and a.is_cuda and torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype_out"):
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif add:
        out.addmm_(a.float(), b.float())
    else:
        torch.mm(a.float(), b.float(), out=out)


@torch.no_grad()
def forward(
    row_forward: Any,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_predictions: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, predictions) of every row; predictions are empty unless asked for.

    row_forward: of a chunk's logits, (logits, bias, target, weight, weight_sum, options, loss, lse, predictions).
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    V, C = linear_weight.shape
    reference.check_targets(target, V, ignore_index)
    hidden, flat = input.reshape(-1, C), target.reshape(-1)
    bias = None if linear_bias is None else linear_bias.contiguous()
    weight = None if weight is None else weight.contiguous()
    wsum = weight_sum(weight, options)
    loss = input.new_empty(flat.shape, dtype=torch.float32)
    lse = input.new_empty(flat.shape, dtype=torch.float32)
    predictions = flat.new_empty(flat.shape if return_predictions else 0, dtype=torch.int64)
    spans = reference.chunks(flat.shape[0], V) if flat.shape[0] else []
    buffer = input.new_empty((spans[0][1] if spans else 0, V), dtype=torch.float32)
    with reference.full_precision(input.device.type):
        for begin, end in spans:
            rows = slice(begin, end)
            logits = buffer[: end - begin]
            product(hidden[rows], linear_weight.t(), logits)
            predicted = predictions[rows] if return_predictions else None
            row_forward(logits, bias, flat[rows], weight, wsum, options, loss[rows], lse[rows], predicted)
    return loss.view(target.shape), lse.view(target.shape), predictions.view(target.shape if return_predictions else 0)


@torch.no_grad()
def backward(
    row_backward: Any,
    dloss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    lse: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dinput, dlinear_weight, dlinear_bias), empty where not needed.

    row_backward: of a panel's logits, (dloss, logits, bias, lse, target, weight, weight_sum, options, dlogits, first
    class, V).
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    V, C = linear_weight.shape
    hidden, flat = input.reshape(-1, C), target.reshape(-1)
    dloss, lse = dloss.reshape(-1), lse.reshape(-1)
    N, dtype = flat.shape[0], input.dtype
    bias = None if linear_bias is None else linear_bias.contiguous()
    weight = None if weight is None else weight.contiguous()
    wsum = weight_sum(weight, options)
    height, width = panels(N, V)
    dinput = input.new_empty(input.shape if needs_input else 0)
    dweight = linear_weight.new_empty(linear_weight.shape if needs_weight else 0)
    dbias = lse.new_empty(0) if linear_bias is None else linear_bias.new_empty(V if needs_bias else 0)
    if N == 0:
        return dinput, dweight.zero_(), dbias.zero_()
    wide = dtype == torch.float32
    # Sums are taken in the gradients themselves where those are float32, else beside them.
    sum_input = dinput.view(N, C) if wide and needs_input else lse.new_empty((N, C) if needs_input else (0,))
    sum_weight = dweight if wide else lse.new_empty((width, C) if needs_weight else (0,))
    sum_bias = lse.new_empty(V if needs_bias else 0)
    logits_buffer = input.new_empty(height * width, dtype=torch.float32)
    dlogits_buffer = logits_buffer if wide else input.new_empty(height * width)
    with reference.full_precision(input.device.type):
        for first in range(0, V, width):
            last = min(first + width, V)
            matrix = linear_weight[first:last]
            sums = sum_weight[first:last] if wide else sum_weight[: last - first]
            for begin in range(0, N, height):
                rows = slice(begin, min(begin + height, N))
                count = rows.stop - begin
                logits = logits_buffer[: count * (last - first)].view(count, last - first)
                dlogits = dlogits_buffer[: count * (last - first)].view(count, last - first)
                product(hidden[rows], matrix.t(), logits)
                row_backward(dloss[rows], logits, bias, lse[rows], flat[rows], weight, wsum, options, dlogits, first, V)
                if needs_input:
                    product(dlogits, matrix, sum_input[rows], add=first > 0)
                if needs_weight:
                    product(dlogits.t(), hidden[rows], sums, add=begin > 0)
                if needs_bias:
                    share = dlogits.sum(0, dtype=torch.float32)
                    sum_bias[first:last] = share if begin == 0 else sum_bias[first:last] + share
            if needs_weight and not wide:
                dweight[first:last] = sums
    if needs_input and not wide:
        dinput.view(N, C).copy_(sum_input)
    if needs_bias:
        dbias.copy_(sum_bias)
    return dinput, dweight, dbias
