"""Cross-entropy's CUDA kernels (`csrc/cross_entropy/cross_entropy_cuda.cu`): tensors become pointers here."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, as_rows, cuda, pointer, stream
from . import panels, reference

SIMT_MULTIPROCESSORS = 4  # what the CPU's SIMT machine plays


def _options(
    target: Tensor, weight: Tensor | None, V: int, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Target as (rows,) int64, the classes' weights in float32, and their sum where label smoothing needs it: on the
    device, since nobody waits for it."""
    reference.check_targets(target, V, ignore_index)  # on a GPU it asks nothing
    flat = target.reshape(-1).to(torch.int64).contiguous()
    weight = None if weight is None else weight.detach().to(torch.float32).contiguous()
    return flat, weight, weight.sum() if weight is not None and label_smoothing else None


def _launch_fwd(
    logits: Tensor, row_stride: int, flat: Tensor, weight: Tensor | None, weight_sum: Tensor | None,
    options: panels.Options, loss: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    rows, V = flat.shape[0], logits.shape[-1]
    sms = SIMT_MULTIPROCESSORS
    if logits.is_cuda:
        sms = torch.cuda.get_device_properties(logits.device).multi_processor_count
    parts = cuda.module.cross_entropy_fwd_parts(rows, V, sms)
    part = loss.new_empty((rows, parts, 4)) if parts > 1 else None
    cuda.module.cross_entropy_fwd(
        logits.data_ptr(), flat.data_ptr(), pointer(weight), pointer(weight_sum), loss.data_ptr(), lse.data_ptr(),
        pointer(part), parts, rows, V, row_stride, *options, DTYPE_CODES[logits.dtype], stream(logits),
    )  # fmt: skip


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    V = logits.shape[-1]
    flat, weight, weight_sum = _options(target, weight, V, ignore_index, label_smoothing)
    logits, row_stride = as_rows(logits)
    loss = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(loss)
    options = panels.Options(ignore_index, label_smoothing, z_loss, softcap)
    _launch_fwd(logits, row_stride, flat, weight, weight_sum, options, loss, lse)
    return loss, lse


def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, lse: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    V = logits.shape[-1]
    flat, weight, weight_sum = _options(target, weight, V, ignore_index, label_smoothing)
    logits, row_stride = as_rows(logits)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    dloss, dloss_stride = as_rows(dloss.float().unsqueeze(-1))
    lse = lse.contiguous()
    cuda.module.cross_entropy_bwd(
        dloss.data_ptr(), logits.data_ptr(), lse.data_ptr(), flat.data_ptr(), pointer(weight), pointer(weight_sum),
        dlogits.data_ptr(), flat.shape[0], V, V, 0, row_stride, dloss_stride, ignore_index, label_smoothing, z_loss,
        softcap, DTYPE_CODES[logits.dtype], DTYPE_CODES[logits.dtype], stream(logits),
    )  # fmt: skip
    return dlogits


def _why_not(logits: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> list[str]:
    reasons = cuda.why_not(logits)
    if not reasons and ((weight is not None and weight.device != logits.device) or target.device != logits.device):
        reasons = ["logits, target and weight are not all on one device"]
    return reasons


CUDA = Impl(cross_entropy_fwd, cross_entropy_bwd, _why_not)


# --- of a linear layer's logits: the GEMMs are torch's, the rows of a panel are these kernels' -----------------------
def _panel_fwd(
    logits: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None, weight_sum: Tensor | None,
    options: panels.Options, loss: Tensor, lse: Tensor, predictions: Tensor | None,
) -> None:  # fmt: skip
    if bias is not None:
        logits += bias
    flat = target.to(torch.int64).contiguous()
    weight = None if weight is None else weight.detach().to(torch.float32)
    _launch_fwd(logits, logits.shape[-1], flat, weight, weight_sum, options, loss, lse)
    if predictions is not None:
        torch.argmax(logits, -1, out=predictions)


def _panel_bwd(
    dloss: Tensor, logits: Tensor, bias: Tensor | None, lse: Tensor, target: Tensor, weight: Tensor | None,
    weight_sum: Tensor | None, options: panels.Options, dlogits: Tensor, first: int, V: int,
) -> None:  # fmt: skip
    rows, columns = logits.shape
    if bias is not None:
        logits += bias[first : first + columns]
    flat = target.to(torch.int64).contiguous()
    weight = None if weight is None else weight.detach().to(torch.float32)
    dloss, dloss_stride = as_rows(dloss.float().unsqueeze(-1))
    lse = lse.contiguous()
    cuda.module.cross_entropy_bwd(
        dloss.data_ptr(), logits.data_ptr(), lse.data_ptr(), flat.data_ptr(), pointer(weight), pointer(weight_sum),
        dlogits.data_ptr(), rows, V, columns, first, columns, dloss_stride, *options, DTYPE_CODES[logits.dtype],
        DTYPE_CODES[dlogits.dtype], stream(logits),
    )  # fmt: skip


def _why_not_linear(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None, *_: Any
) -> list[str]:
    return cuda.why_not(input, linear_weight, linear_bias) or _why_not(input, target, weight)


CUDA_LINEAR = Impl(
    functools.partial(panels.forward, _panel_fwd), functools.partial(panels.backward, _panel_bwd), _why_not_linear
)
