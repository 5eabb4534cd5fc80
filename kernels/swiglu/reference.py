"""SwiGLU's gate, the activation of Llama's feed-forward layer, in eager PyTorch.

    y = silu(gate) * up,   silu(g) = g * s,   s = 1 / (1 + exp(-g))

Backward:  dup = dy * g * s,   dgate = dy * up * s * (1 + g * (1 - s))

Shapes: gate, up, y (..., F); packed: gate_up (..., 2F) holds the gate in its first half and up in its second.
Rounding: computed in float32 (float64 for float64), rounded once. Hugging Face rounds silu(gate) on the way; we don't.
Source: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Impl
from ..spec import Cost, draw


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y, by the formula above."""
    acc = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(acc)) * up.to(acc)).to(gate.dtype)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """y of the two halves of the last dimension."""
    return swiglu(*gate_up.chunk(2, -1))


# What a backend owes the two ops. Backward is written out: inside a registered op there may be no autograd.
def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu(gate, up).contiguous()


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _bwd_into(dy, gate, up, dgate, dup)
    return dgate, dup


def swiglu_packed_fwd(gate_up: Tensor) -> Tensor:
    return swiglu_packed(gate_up).contiguous()


def swiglu_packed_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    grad = gate_up.new_empty(gate_up.shape)
    _bwd_into(dy, *gate_up.chunk(2, -1), *grad.chunk(2, -1))
    return grad


def _bwd_into(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    acc = torch.promote_types(gate.dtype, torch.float32)
    dy, gate = dy.to(acc), gate.to(acc)
    s = torch.sigmoid(gate)
    dup.copy_(dy * (gate * s))
    dgate.copy_(dy * up.to(acc) * s * (1 + gate * (1 - s)))


def why_not(*_: Any) -> list[str]:
    return []


EAGER = Impl(swiglu_fwd, swiglu_bwd, why_not)
EAGER_PACKED = Impl(swiglu_packed_fwd, swiglu_packed_bwd, why_not)


# For tests and benchmarks.
CASES: Mapping[str, Mapping[str, Any]] = {
    "8x64": dict(shape=(8, 64)),
    "3x5x1000": dict(shape=(3, 5, 1000)),
    "17x129": dict(shape=(17, 129)),
    "33x7": dict(shape=(33, 7)),
    "1d-40": dict(shape=(40,)),
    "5x4097": dict(shape=(5, 4097)),
    "7x33-large-gate": dict(shape=(7, 33), scale=30.0),
}


def swiglu_inputs(shape: tuple[int, ...], scale: float = 1.0, **how: Any) -> dict[str, Any]:
    """Keyword arguments of `swiglu`; a large scale of the gate saturates the sigmoid on both sides."""
    return dict(gate=draw(*shape, **how) * scale, up=draw(*shape, **how))


def swiglu_packed_inputs(shape: tuple[int, ...], scale: float = 1.0, **how: Any) -> dict[str, Any]:
    """Keyword arguments of `swiglu_packed`."""
    return dict(gate_up=torch.cat(list(swiglu_inputs(shape, scale, **how).values()), -1))


def swiglu_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """Forward reads gate and up and writes y; backward reads dy besides, and writes two gradients."""
    gate = inputs["gate"]
    return Cost(gate.numel() * gate.element_size() * (5 if backward else 3), gate.numel() * (11 if backward else 5))


def swiglu_packed_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """As swiglu's."""
    return swiglu_cost(dict(gate=inputs["gate_up"].chunk(2, -1)[0]), backward)


def one(inputs: dict[str, Any]) -> int:
    """Terms of an element: it has no sum."""
    return 1
