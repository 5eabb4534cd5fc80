"""What the tests of the references share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CLOSE: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)  # float32 against float32 of another order of operations


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def assert_same_grads(mine: Tensor, theirs: Tensor, leaves: list[Tensor], **tolerance: Any) -> None:
    """Two outputs of the same leaves, and the gradients for one random upstream gradient."""
    torch.testing.assert_close(mine, theirs, **tolerance)
    upstream = torch.randn_like(mine)
    got = torch.autograd.grad(mine, leaves, upstream, retain_graph=True)
    expected = torch.autograd.grad(theirs, leaves, upstream, retain_graph=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
