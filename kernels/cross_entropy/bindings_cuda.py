"""Cross-entropy's CUDA kernels (`csrc/cross_entropy/cross_entropy_cuda.cu`): tensors become pointers here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, as_rows, cuda, pointer, stream
from . import reference

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


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    V = logits.shape[-1]
    flat, weight, weight_sum = _options(target, weight, V, ignore_index, label_smoothing)
    logits, row_stride = as_rows(logits)
    rows = flat.shape[0]
    loss = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(loss)
    sms = SIMT_MULTIPROCESSORS
    if logits.is_cuda:
        sms = torch.cuda.get_device_properties(logits.device).multi_processor_count
    parts = cuda.module.cross_entropy_fwd_parts(rows, V, sms)
    part = loss.new_empty((rows, parts, 4)) if parts > 1 else None
    cuda.module.cross_entropy_fwd(
        logits.data_ptr(), flat.data_ptr(), pointer(weight), pointer(weight_sum), loss.data_ptr(), lse.data_ptr(),
        pointer(part), parts, rows, V, row_stride, ignore_index, label_smoothing, z_loss, softcap,
        DTYPE_CODES[logits.dtype], stream(logits),
    )  # fmt: skip
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
        dlogits.data_ptr(), flat.shape[0], V, row_stride, dloss_stride, ignore_index, label_smoothing, z_loss, softcap,
        DTYPE_CODES[logits.dtype], stream(logits),
    )  # fmt: skip
    return dlogits


def _why_not(logits: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> list[str]:
    reasons = cuda.why_not(logits)
    if not reasons and ((weight is not None and weight.device != logits.device) or target.device != logits.device):
        reasons = ["logits, target and weight are not all on one device"]
    return reasons


CUDA = Impl(cross_entropy_fwd, cross_entropy_bwd, _why_not)
