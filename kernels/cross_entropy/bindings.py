"""Cross-entropy's C++ kernels (`csrc/cross_entropy/cross_entropy_cpu.cpp`): tensors become pointers here.

The linear form makes float32 logits in chunks of rows and has their gradient written over them: N rows, V classes,
C hidden; at most CHUNK_BYTES of logits (for large V, CHUNK_ROWS rows) are ever there. dlogits are not rounded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, as_rows, cpu
from ..products import column_sums, product
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


def pointer(t: Tensor | None, index: int = 0) -> int:
    """Address of an element of a dense vector, 0 for None."""
    return 0 if t is None else t.data_ptr() + index * t.element_size()


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


def _bwd(dloss: Tensor, logits: Tensor, lse: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
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


def by_torch(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: str
) -> Tensor:
    """The loss by torch's own cross-entropy: for few logits one call takes less than the Python around a kernel."""
    V, dtype = logits.shape[-1], acc(logits.dtype)
    weight = None if weight is None else weight.detach().to(dtype)
    options: dict[str, Any] = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    try:
        loss = F.cross_entropy(logits.to(dtype).reshape(-1, V), target.reshape(-1).long(), weight, **options)
    except IndexError:
        reference.check_targets(target, V, ignore_index)
        raise
    return loss.view(target.shape) if reduction == "none" else loss


# --- a linear layer's logits -----------------------------------------------------------------------------------------
CHUNK_BYTES = 28 << 20  # of float32 logits that exist at a time
CHUNK_ROWS = 192  # but no fewer rows than this: below it the products slow down
STRIP = 12  # rows that the products take together


def chunks(N: int, V: int) -> list[slice]:
    """The rows whose logits are made together, in even shares."""
    most = max(CHUNK_ROWS, CHUNK_BYTES // (4 * V))
    step = -(-N // -(-N // most)) if N else 1
    step = -(-step // STRIP) * STRIP
    return [slice(begin, min(begin + step, N)) for begin in range(0, N, step)]


class Head:
    """A linear layer and the loss of its outputs, a chunk of rows at a time."""

    def __init__(
        self, input: Tensor, matrix: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None, *options: Any
    ):
        self.given, self.dtype = Options(*options), acc(input.dtype)
        self.V, self.C = matrix.shape
        self.hidden, self.matrix, self.target = input.reshape(-1, self.C), matrix, flat_target(target)
        self.bias = None if bias is None else bias.detach().to(self.dtype).contiguous()
        self.classes = Classes.of(weight, self.V, self.given.label_smoothing, self.dtype)
        self.N = self.target.shape[0]
        self.spans = chunks(self.N, self.V)
        self.buffer = self.new(self.spans[0].stop if self.N else 0, self.V)

    def new(self, *shape: int, needed: bool = True) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=self.dtype)

    def logits(self, rows: slice) -> Tensor:
        return product(self.hidden[rows], self.matrix.t(), self.buffer[: rows.stop - rows.start], bias=self.bias)

    def run(
        self, kernel: Any, logits: Tensor, rows: slice, lse: Tensor, *, loss: Tensor | None = None,
        predictions: Tensor | None = None, dloss: Tensor | None = None, dloss_stride: int = 0,
    ) -> None:  # fmt: skip
        """A kernel over a chunk of logits. Given dloss, their gradient takes their place."""
        first = rows.start
        # fmt: off
        bad_row = kernel(
            logits.data_ptr(), pointer(self.target, first), pointer(self.classes.weight),
            pointer(dloss, first * dloss_stride), pointer(loss, first), pointer(lse, first),
            pointer(predictions, first), 0 if dloss is None else logits.data_ptr(), logits.shape[0], self.V, self.V,
            dloss_stride, *self.given, self.classes.total, DTYPE_CODES[logits.dtype],
        )
        # fmt: on
        check(bad_row, self.target, self.V, self.given.ignore_index)

    def mean_gradient(self) -> Tensor:
        """What one loss counts in the mean over all: 1 / (rows that count), or / (sum of their targets' weights)."""
        kept = self.target != self.given.ignore_index
        if self.classes.weight is None:
            count = kept.sum().to(self.dtype)
        else:
            count = self.classes.weight[self.target.clamp(0, self.V - 1)].masked_fill(~kept, 0.0).sum()
        return torch.where(count > 0, 1 / count, 1.0)

    def sums(self, needs_weight: bool, needs_bias: bool) -> tuple[Tensor, Tensor]:
        """Where the gradients of matrix and bias are summed over all chunks; empty where not needed."""
        sums = self.new(self.V, self.C, needed=needs_weight), self.new(self.V, needed=needs_bias)
        return sums if self.N else (sums[0].zero_(), sums[1].zero_())

    def gradients(self, dlogits: Tensor, rows: slice, dinput: Tensor, dweight: Tensor, dbias: Tensor) -> None:
        """A chunk's share of the layer's gradients; empty ones are not wanted."""
        later = rows.start > 0
        if dinput.dim() == 2:
            product(dlogits, self.matrix, dinput[rows])
        if dweight.dim() == 2:
            product(dlogits.t(), self.hidden[rows], dweight, add=later)
        if dbias.shape[0]:
            column_sums(dlogits, dbias, add=later)


def _linear_fwd(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *given, predict = options
    head = Head(input, linear_weight, target, linear_bias, weight, *given)
    loss, lse = head.new(head.N), head.new(head.N)
    predictions = torch.empty((head.N if predict else 0,), dtype=torch.int64)
    for rows in head.spans:
        predicted = predictions if predict else None
        head.run(cpu.module.cross_entropy_fwd, head.logits(rows), rows, lse, loss=loss, predictions=predicted)
    return loss.view(target.shape), lse.view(target.shape), predictions.view(target.shape if predict else (0,))


def _linear_bwd(
    dloss: Tensor, input: Tensor, linear_weight: Tensor, lse: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *given, needs_input, needs_weight, needs_bias = options
    head = Head(input, linear_weight, target, linear_bias, weight, *given)
    needs_bias = needs_bias and linear_bias is not None
    dloss, lse = dloss.to(head.dtype).reshape(-1).contiguous(), lse.reshape(-1).contiguous()
    dinput = torch.empty((head.N, head.C) if needs_input else (0,), dtype=input.dtype)
    dweight, dbias = head.sums(needs_weight, needs_bias)
    for rows in head.spans:
        logits = head.logits(rows)
        head.run(cpu.module.cross_entropy_bwd, logits, rows, lse, dloss=dloss, dloss_stride=1)
        head.gradients(logits, rows, dinput, dweight, dbias)
    del head
    dbias = dbias if linear_bias is None else dbias.to(linear_bias.dtype)
    return dinput.view(input.shape) if needs_input else dinput, dweight.to(linear_weight.dtype), dbias


def linear_step(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Forward, and gradients that are not rounded for the same dloss in every row: see step.py."""
    *given, predict, needs_input, needs_weight, needs_bias = options
    head = Head(input, linear_weight, target, linear_bias, weight, *given)
    scale = head.mean_gradient()
    loss, lse = head.new(head.N), head.new(head.N)
    predictions = torch.empty((head.N if predict else 0,), dtype=torch.int64)
    dinput = head.new(head.N, head.C, needed=needs_input)
    dweight, dbias = head.sums(needs_weight, needs_bias and linear_bias is not None)
    for rows in head.spans:
        logits = head.logits(rows)
        predicted = predictions if predict else None
        head.run(cpu.module.cross_entropy_step, logits, rows, lse, loss=loss, predictions=predicted, dloss=scale)
        head.gradients(logits, rows, dinput, dweight, dbias)
    return (
        loss.view(target.shape), lse.view(target.shape), predictions.view(target.shape if predict else (0,)),
        scale, dinput, dweight, dbias,
    )  # fmt: skip


def _why_not_linear(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None, *_: Any
) -> list[str]:
    return cpu.why_not(input, linear_weight, linear_bias, weight)


CPU_LINEAR = Impl(_linear_fwd, _linear_bwd, _why_not_linear)
