"""Layers whose weights are kept in 8 or 4 bits: made from a trained model, for inference on CPUs.

`model.quantize("int8")`, or `from_pretrained(folder, quantize="int8")`. Embedding, norms and biases stay as they are;
the output matrix is kept in 8 bits in either case, since its rounding goes into the logits undamped. What is computed
is the product with the rounded weights, in (almost) float32: only the weights lose precision, not the activations.

Names: N outputs, K inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.decode import FORMATS, Matrix, pack, packed_linear, unpack, why_not

if TYPE_CHECKING:
    from .model import LlamaForCausalLM


class PackedLinear(nn.Module):
    """x W^T + bias with W (N, K) in 8 or 4 bits; `packed` and `scale` as in `pyllm/kernels/decode/reference.py`.

    Gradients go to x and the bias only. The output has x's dtype.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, kind: str):
        super().__init__()
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        packed, scale = pack(linear.weight, kind)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self._dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:
        """The matrix that the numbers stand for, (N, K), computed anew at every access."""
        return unpack(self.packed, self.scale, self.out_features, self.in_features).to(self._dtype)

    @property
    def matrix(self) -> Matrix:
        return Matrix(self.packed, self.scale, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        trained = torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad))
        alike = self.bias is None or (self.bias.dtype == x.dtype and self.bias.device == x.device)
        if not (trained or torch.compiler.is_compiling() or x.numel() == 0) and alike and not why_not(x):
            return packed_linear(x, self.matrix, self.out_features)
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}, bias={self.bias is not None}"


def check_format(kind: str, device: torch.device | str | None) -> None:
    """Raises ValueError for a name that is none of a format, and for weights that are not on a CPU."""
    if kind not in FORMATS:
        raise ValueError(f"quantize must be one of {', '.join(FORMATS)}, got {kind!r}")
    if device is not None and torch.device(device).type != "cpu":
        raise ValueError(f"quantize: weights of 8 and 4 bits are for CPUs, got {device}")


@torch.no_grad()
def quantize(model: LlamaForCausalLM, kind: str) -> None:
    """Replace every matrix of a model by one of 8 or 4 bits, in place; the output matrix always has 8.

    Raises:
        ValueError: kind is unknown, the model is not on a CPU, or a layer isn't an ordinary nn.Linear (a LoRA adapter,
            say, or one that is quantised already).
    """
    check_format(kind, model.device)
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    linears = [(layer, name) for layer in model.model.layers for name in names]
    for layer, name in linears:
        if type(layer.get_submodule(name)) is not nn.Linear:
            raise ValueError(f"quantize: {name} must be an nn.Linear, got {type(layer.get_submodule(name)).__name__}")
    if type(model.lm_head) is not nn.Linear:
        raise ValueError(f"quantize: lm_head must be an nn.Linear, got {type(model.lm_head).__name__}")
    for layer, name in linears:  # one by one: the memory of each matrix is given back before the next is packed
        parent, _, child = name.partition(".")
        linear = cast(nn.Linear, layer.get_submodule(name))
        setattr(layer.get_submodule(parent), child, PackedLinear(linear, kind))
    model.lm_head = PackedLinear(model.lm_head, "int8")  # type: ignore[assignment]


def is_quantized(model: nn.Module) -> bool:
    """Whether any of a model's matrices is packed."""
    return any(isinstance(module, PackedLinear) for module in model.modules())
