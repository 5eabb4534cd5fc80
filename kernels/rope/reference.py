"""Rotary position embedding of queries and keys, in eager PyTorch.

Every token's head vector is cut into R/2 pairs (x1, x2), and pair i is turned by the angle p * theta_i of the token's
position p:

    y1 = x1 * cos - x2 * sin        y2 = x2 * cos + x1 * sin

Half-split (Hugging Face, Llama): pair i is elements i and i + R/2. Interleaved (GPT-J, the original Llama code): pair i
is elements 2i and 2i + 1. Elements from R on pass unchanged. Backward is the rotation by the opposite angle.

Shapes: q (B, T, H, D), k (B, T, Hkv, D), both outputs alike; cos, sin (T, R/2), (T, R) or (B, T, R), position_ids
(B, T) or (T,). B batch, T tokens, H and Hkv heads, D head_dim, R <= D rotated elements. Packed: without B.
A table of R columns names every angle twice (half-split: columns i and i + R/2, interleaved: 2i and 2i + 1). The two
must agree, as every model's do: only the first is read.
Rounding: cos and sin are used in float32 whatever their dtype; computed in float32 (float64 for float64), rounded once.
Source: Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..spec import Cost, draw


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(q, k) rotated, by the formula above; arguments as the public function's, unchecked."""
    cos, sin = (
        half_table(cos, q.shape[-1], rotary_dim, interleaved),
        half_table(sin, q.shape[-1], rotary_dim, interleaved),
    )
    if q.dim() == 3:
        q, k = rotate_both(q.unsqueeze(0), k.unsqueeze(0), cos, sin, position_ids, interleaved)
        return q.squeeze(0), k.squeeze(0)
    return rotate_both(q, k, cos, sin, position_ids, interleaved)


def rotated(width: int, head_dim: int, dims: int, rotary_dim: int | None) -> int:
    """R, from a table's number of columns; 0 when they don't fit.

    Without `rotary_dim` a 2-D table of at most D/2 columns is a half table, every other one is full.
    """
    if rotary_dim is None:
        rotary_dim = 2 * width if dims == 2 and 2 * width <= head_dim else width
    fits = width in (rotary_dim, rotary_dim // 2) and rotary_dim % 2 == 0 and 0 <= rotary_dim <= head_dim
    return rotary_dim if fits else 0


def half_table(table: Tensor, head_dim: int, rotary_dim: int | None, interleaved: bool) -> Tensor:
    """The R/2 columns of a table that name every angle once, as a view."""
    width = table.shape[-1]
    half = rotated(width, head_dim, table.dim(), rotary_dim) // 2
    if width == half:
        return table
    return table[..., ::2] if interleaved else table[..., :half]


def rotate_both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (_rows(t.detach(), position_ids, q.shape[1]).to(acc) for t in (cos, sin))
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rows(table: Tensor, position_ids: Tensor | None, T: int) -> Tensor:
    """The tokens' rows of a table, ready to multiply (B, T, H, R/2)."""
    if position_ids is not None:
        positions = position_ids.reshape(-1)
        if table.device.type != "cpu":  # on CPUs a bad position raises IndexError; here asking would stall the stream
            positions = positions.clamp(0, table.shape[0] - 1)
        table = table.index_select(0, positions).view(*position_ids.shape, table.shape[-1])
    elif table.dim() == 2:
        table = table[:T]
    return table.unsqueeze(-2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    wide = x[..., : 2 * half].to(cos.dtype)
    if interleaved:
        x1, x2 = wide[..., ::2], wide[..., 1::2]
    else:
        x1, x2 = wide[..., :half], wide[..., half:]
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    y = y.to(x.dtype)
    return torch.cat((y, x[..., 2 * half :]), -1) if 2 * half < x.shape[-1] else y


# What a backend owes the op: q and k have a batch dimension here, cos and sin R/2 columns.
def rope_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    q, k = rotate_both(q, k, cos, sin, position_ids, interleaved)
    return q.contiguous(), k.contiguous()


def rope_bwd(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return rope_fwd(dq, dk, cos, -sin, position_ids, interleaved)


def why_not(*_: Any) -> list[str]:
    return []


EAGER = Impl(rope_fwd, rope_bwd, why_not)


# For tests and benchmarks.
CASES: Mapping[str, Mapping[str, Any]] = {
    "2x7-heads3-1-D16": dict(B=2, T=7, H=3, Hkv=1, D=16),
    "2x5-half-table-D64": dict(B=2, T=5, H=4, Hkv=2, D=64, table="half"),
    "2x5-batch-table-D64": dict(B=2, T=5, H=4, Hkv=2, D=64, table="batch"),
    "1x9-interleaved-D32": dict(B=1, T=9, H=2, Hkv=2, D=32, interleaved=True),
    "2x9-interleaved-half-partial": dict(B=2, T=9, H=2, Hkv=1, D=40, R=12, interleaved=True, table="half"),
    "3x4-partial-positions": dict(B=3, T=4, H=2, Hkv=1, D=24, R=16, positions=True),
    "packed-13-positions": dict(B=0, T=13, H=4, Hkv=2, D=64, positions=True),
    "2x3-D2": dict(B=2, T=3, H=2, Hkv=1, D=2),
    "1x200-heads3-1-D128": dict(B=1, T=200, H=3, Hkv=1, D=128),
}


def tables(
    rows: int, R: int, *, interleaved: bool = False, half: bool = False, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """cos and sin (rows, R), or (rows, R/2), of the plain rotary embedding, in float32."""
    inverse = theta ** (-torch.arange(0, R, 2, dtype=torch.float32) / R)
    angles = torch.arange(rows, dtype=torch.float32)[:, None] * inverse
    if not half:
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rope_inputs(
    B: int,
    T: int,
    H: int,
    Hkv: int,
    D: int,
    R: int | None = None,
    table: str = "full",
    interleaved: bool = False,
    positions: bool = False,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    variant: str = "plain",
) -> dict[str, Any]:
    """Keyword arguments of `apply_rope`. B = 0 makes the packed form; table is "full", "half" or "batch"."""
    how: dict[str, Any] = dict(dtype=dtype, device=device, generator=generator, variant=variant)
    lead = (B, T) if B else (T,)
    q, k = draw(*lead, H, D, **how), draw(*lead, Hkv, D, **how)
    R = D if R is None else R
    rows = 3 * T if positions else T
    cos, sin = (t.to(device) for t in tables(rows, R, interleaved=interleaved, half=table == "half"))
    if table == "batch":
        cos, sin = (torch.stack([t.roll(b, 0) for b in range(B)]) for t in (cos, sin))
    inputs = dict(q=q, k=k, cos=cos, sin=sin, interleaved=interleaved, rotary_dim=R)
    if positions:
        inputs["position_ids"] = torch.randint(rows, lead, generator=generator).to(device)
    return inputs


def rope_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """Reads and writes q and k, forward and backward, and reads the angles; 3 operations a rotated element."""
    q, k, cos = inputs["q"], inputs["k"], inputs["cos"]
    R = rotated(cos.shape[-1], q.shape[-1], cos.dim(), inputs.get("rotary_dim"))
    heads = (q.numel() + k.numel()) // max(1, q.shape[-1])
    return Cost(2 * (q.numel() + k.numel()) * q.element_size() + read_angles(inputs, R), heads * R * 3)


def read_angles(inputs: dict[str, Any], R: int) -> int:
    """Bytes of the R/2 columns of cos and sin that are read, a row once, and of the positions that choose them."""
    cos, position_ids, T = inputs["cos"], inputs.get("position_ids"), inputs["q"].shape[-3]
    rows, chosen = (cos.shape[0] if cos.dim() == 3 else 1) * T, 0
    if position_ids is not None:
        rows, chosen = min(cos.shape[0], position_ids.numel()), position_ids.numel() * position_ids.element_size()
    return rows * (R // 2) * 2 * cos.element_size() + chosen


def pair(inputs: dict[str, Any]) -> int:
    """Terms of a rotated element."""
    return 2
