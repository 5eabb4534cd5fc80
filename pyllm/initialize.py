"""What weights begin as."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def initialize(module: nn.Module, name: str, parameter: Tensor, spread: float) -> None:
    """Fill one parameter of a module: matrices and embeddings normal, biases 0, norms 1, the padding token's row 0.

    Args:
        name: of the parameter in its module, "weight" or "bias".
        spread: standard deviation, the config's `initializer_range`.
    """
    if name == "bias":
        parameter.zero_()
    elif isinstance(module, (nn.Linear, nn.Embedding)):
        parameter.normal_(0.0, spread)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            parameter[module.padding_idx].zero_()
    elif parameter.dim() == 1:
        parameter.fill_(1.0)
