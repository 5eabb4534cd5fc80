"""A linear layer whose half precision is no trap on CPUs without instructions for it. Formula: `reference.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import Op, needs_grad, once, requested
from ..products import torch_is_fast
from ..spec import Spec
from . import bindings, reference

IMPLS = {"cpu": bindings.CPU, "eager": reference.EAGER}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = x @ weight.T + bias, as torch.nn.functional.linear, at float32's speed whatever the dtype.

    Args:
        x: (..., C), floating point; any strides.
        weight: (F, C) and bias: (F,), in x's dtype.
        backend: "cpu", "eager" (torch's own product), or None to choose: torch's wherever it is fast, which is on GPUs,
            in float32, and on CPUs that multiply matrices in x's dtype; see `products.py` for what was measured.
    Returns:
        (..., F) in x's dtype: sums in float32, rounded once. Under autocast all are cast to its dtype first.
    Raises:
        ValueError: shapes, dtypes or devices don't fit.
        BackendError: a named backend can't run this; its reasons are listed.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, bias)
    chosen = LINEAR.select(backend, x.device, x, weight, bias)
    if chosen == "eager":
        (x,), (weight,) = once(x), once(weight)  # one by one: together all would get a gradient as soon as one wants it
        return F.linear(x, weight, None if bias is None else once(bias)[0])
    if needs_grad(x, weight, bias):
        return _Linear.apply(x, weight, bias, chosen)
    return LINEAR.fwd(x, weight, bias, chosen)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the automatic choice is a kernel of ours, for operands of these dtypes and of this device."""
    if x.device.type != "cpu" or bindings.cpu.module is None:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    # A single row is read and multiplied once: there is nothing to gain from float32 pieces. Measured 0.6 of torch.
    single = x.numel() == x.shape[-1] and not needs_grad(x, weight)
    return not torch_is_fast(dtype) and not single


class _LinearOp(Op):
    """Its automatic choice depends on the dtype, not on the device alone."""

    def select(self, backend: str | None, device: torch.device, *args: Any) -> str:
        if requested(backend) is None and not pays(args[0], args[1]):
            return "eager"
        return super().select(backend, device, *args)


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    assert tensors[0] is not None
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise ValueError(f"linear: x must be floating point, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("linear: x must be (..., C), got a scalar")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"linear: weight must be (F, {x.shape[-1]}), C as in x, got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"linear: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise ValueError(f"linear: {name} must have x's dtype {x.dtype}, got {t.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"linear: {name} must be on x's device {x.device}, got {t.device}")


def _fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _bwd_fake(dy: Tensor, x: Tensor, weight: Tensor, *needs: bool) -> tuple[Tensor, ...]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True))


LINEAR = _LinearOp(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _fwd_fake,
    IMPLS,
    bwd_schema="(Tensor dy, Tensor x, Tensor weight, bool needs_x, bool needs_weight, bool needs_bias) -> "
    "(Tensor, Tensor, Tensor)",
    bwd_fake=_bwd_fake,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        return LINEAR.fwd(x, weight, bias, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        grads = LINEAR.bwd(dy, *ctx.saved_tensors, *needs, ctx.backend)
        return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None


SPECS = {
    "linear": Spec(
        linear,
        reference.linear,
        reference.linear,
        LINEAR,
        reference.CASES,
        reference.linear_inputs,
        ("x", "weight", "bias"),
        reference.linear_cost,
        reference.longest,
        {"weight": reference.rows, "bias": reference.rows},
    ),
}
