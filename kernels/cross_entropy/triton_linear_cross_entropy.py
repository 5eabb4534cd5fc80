"""Cross-entropy of a linear layer's logits on a GPU: forward, and a backward that makes the logits again in panels.

Letters: N rows, V classes, C hidden. Formulas are in `reference.py`. Nothing of size N x V is ever alive.

Forward. In half precision `triton_linear_forward.py` computes the loss without logits, for training and evaluation
alike, as backward needs none of them. In float32 cuBLAS makes them in chunks of rows, since products of float32
outside tensor cores are its strength. Forward saves lse alone.

Backward is that of `panels.py`, with the row kernel of `triton_cross_entropy.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import panels
from . import triton_cross_entropy as row_kernels
from . import triton_linear_forward as fused


def uses_fused_forward(dtype: torch.dtype) -> bool:
    return dtype != torch.float32


def linear_cross_entropy_fwd(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, predictions) of every row; predictions are empty unless asked for."""
    if uses_fused_forward(input.dtype):
        with torch.no_grad():
            return fused.linear_cross_entropy_fwd(input, *args)
    return panels.forward(row_kernels.forward, input, *args)


linear_cross_entropy_bwd = functools.partial(panels.backward, row_kernels.backward)
