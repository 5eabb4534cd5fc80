"""`sample` drawn so densely that every token that stays, or should not have stayed, is seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyllm.kernels import sample
from pyllm.kernels.sampling import reference


def given() -> Iterator[tuple[str, Tensor, int, dict[str, Any]]]:
    """(what it is, logits (V,), how many draws, options)."""
    generator = torch.Generator().manual_seed(11)
    plain = 2 * torch.randn(70, generator=generator) - 5  # negative, whose bits order the other way round
    for options in (
        dict(top_k=9),
        dict(top_p=0.6),
        dict(min_p=0.1),
        dict(temperature=1.4, top_k=20, top_p=0.8, min_p=0.05),
    ):
        yield "all kinds", plain, 24, options
    # More in one bin than shared memory holds, all different.
    close = 0.01 * torch.randn(6000, generator=generator)
    yield "close together", close, 6, dict(top_k=3000)
    yield "close together", close, 6, dict(top_p=0.3)
    # The first kept one of 9000 that tie: the first draw, by 0, is that one.
    yield "all tie", torch.zeros(9000), 4, dict(top_p=0.3701)
    ties = torch.randint(0, 3, (300,), generator=generator).float()
    yield "ties", ties, 16, dict(top_k=50, top_p=0.617)
    yield "ties", ties, 16, dict(top_k=150, top_p=0.883)
    yield "apart by their last bits", 1 + torch.arange(40) * 2.0**-22, 16, dict(top_k=9)
    # So far below that its weight is nothing; it must not pass for a near one.
    yield "far", torch.tensor([0.0, -0.4, -0.9, -32.05]), 16, dict(top_k=2)
    # What ties with the k-th in the k-th's own bin counts for top-p, what lies below it there doesn't.
    yield "one bin", torch.tensor([0.0, -0.01, -0.02, -0.03, -0.04, -0.05]), 24, dict(top_k=3, top_p=0.7)


def check_draws(backend: str, device: str = "cpu") -> None:
    """Every draw equals the reference's in float64."""
    for dtype in (torch.float32, torch.bfloat16):
        for what, logits, n, options in given():
            rows = logits.to(dtype).expand(n, -1)
            numbers = torch.arange(n, dtype=torch.float64) / n + 1e-7 * torch.arange(n)  # 0, and no round fraction
            expected = reference.sample(rows.double(), numbers, **options)
            got = sample(rows.to(device), numbers.to(device), **options, backend=backend).cpu()
            assert torch.equal(got, expected), (what, dtype, options, got.tolist(), expected.tolist())
