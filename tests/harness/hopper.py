"""What is tried of attention's CUDA forward for Hopper, beside the op's own cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyllm.kernels import OPS, attention

# More tiles than stages, every width of tiles, and what comes with them.
CASES: dict[str, dict[str, Any]] = {
    "rounds": dict(B=1, T=70, S=700, H=2, Hkv=1, D=8, causal=True),
    "rounds, window, sinks": dict(B=2, T=140, S=600, H=2, Hkv=2, D=64, causal=True, window=300, sinks=True),
    "rounds, D 96": dict(B=1, T=130, S=400, H=2, Hkv=1, D=96, causal=True),
    "rounds, D 128": dict(B=1, T=130, S=520, H=2, Hkv=1, D=128),
    "rounds, D 256, softcap": dict(B=1, T=20, S=330, H=1, Hkv=1, D=256, causal=True, softcap=9.0),
    "rounds, packed": dict(lengths=(300, 0, 129, 1, 390), H=2, Hkv=1, D=24, causal=True),
}


def apart(inputs: dict[str, Any]) -> dict[str, Any]:
    """q, k and v in rows with NaN between them, as TMA still can read them; the dimensions lie as they did."""
    laid = dict(inputs)
    for name in ("q", "k", "v"):
        x = inputs[name].detach()
        buffer = x.new_full((*x.shape[:-1], x.shape[-1] + 8), float("nan"))
        laid[name] = buffer[..., :-8].copy_(x).requires_grad_(inputs[name].requires_grad)
    return laid


def check_neighbours(device: str = "cpu") -> None:
    """The last tile of a packed sequence's keys reaches into the next sequence: NaN there is nothing to it."""
    inputs = OPS["attention"].inputs(
        lengths=(70, 130, 5), H=2, Hkv=1, D=64, causal=True, dtype=torch.bfloat16, device=device,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    clean = attention(**inputs, backend="cuda")
    for name in ("k", "v"):
        inputs[name] = inputs[name].detach().clone()
        inputs[name][70:200] = float("nan")
    spoiled: Tensor = attention(**inputs, backend="cuda")
    for rows in (slice(0, 70), slice(200, 205)):
        assert torch.equal(clean[rows], spoiled[rows]), f"rows {rows} see a neighbour's NaN"
