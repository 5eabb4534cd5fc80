"""Cross-entropy's C++ kernels (`csrc/cross_entropy/cross_entropy_cpu.cpp`): tensors become pointers here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, as_rows, cpu, pointer
from . import reference


class Options(NamedTuple):
    """Of the loss, in the order of the ops' schemas."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


def acc(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Classes(NamedTuple):
    """What the kernels need to know of the classes: their weights as the kernels read them, and the sum of these."""

    weight: Tensor | None
    total: float

    @classmethod
    def of(cls, weight: Tensor | None, V: int, label_smoothing: float, dtype: torch.dtype) -> Classes:
        if weight is None:
            return cls(None, float(V))
        weight = weight.detach().to(dtype).contiguous()
        return cls(weight, float(weight.sum()) if label_smoothing else 0.0)


def flat_target(target: Tensor) -> Tensor:
    """(rows,) int64, dense: itself where it is that already."""
    return target.reshape(-1).to(torch.int64).contiguous()


def check(bad_row: int, target: Tensor, V: int, ignore_index: int) -> None:
    """Raises where a kernel has found a target that is no class."""
    if bad_row >= 0:
        reference.check_targets(target, V, ignore_index)


def _fwd(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    given = Options(*options)
    V = logits.shape[-1]
    dtype = acc(logits.dtype)
    loss, lse = torch.empty(target.shape, dtype=dtype), torch.empty(target.shape, dtype=dtype)
    logits, stride = as_rows(logits)
    flat, classes = flat_target(target), Classes.of(weight, V, given.label_smoothing, dtype)
    # fmt: off
    bad_row = cpu.module.cross_entropy_fwd(
        logits.data_ptr(), flat.data_ptr(), pointer(classes.weight), 0, loss.data_ptr(), lse.data_ptr(), 0, 0,
        flat.shape[0], V, stride, 0, *given, classes.total, DTYPE_CODES[logits.dtype],
    )
    # fmt: on
    check(bad_row, flat, V, given.ignore_index)
    return loss, lse


def _bwd(
    dloss: Tensor, logits: Tensor, lse: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> Tensor:
    given = Options(*options)
    V = logits.shape[-1]
    logits, stride = as_rows(logits)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    flat, classes = flat_target(target), Classes.of(weight, V, given.label_smoothing, lse.dtype)
    dloss, dloss_stride = _per_row(dloss.to(lse.dtype))
    lse = lse.contiguous()
    # fmt: off
    bad_row = cpu.module.cross_entropy_bwd(
        logits.data_ptr(), flat.data_ptr(), pointer(classes.weight), dloss.data_ptr(), 0, lse.data_ptr(), 0,
        dlogits.data_ptr(), flat.shape[0], V, stride, dloss_stride, *given, classes.total, DTYPE_CODES[logits.dtype],
    )
    # fmt: on
    check(bad_row, flat, V, given.ignore_index)
    return dlogits


def _per_row(dloss: Tensor) -> tuple[Tensor, int]:
    """(dloss, its stride from row to row), 0 where one number is expanded to all rows."""
    rows, stride = as_rows(dloss.unsqueeze(-1))
    return rows, stride


def _why_not(logits: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> list[str]:
    return cpu.why_not(logits, weight)


CPU = Impl(_fwd, _bwd, _why_not)
