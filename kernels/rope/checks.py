"""What the arguments of the rotary ops must be, and what their errors say."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import rotated

# A head lies whole in a Triton program's registers. No model's comes near; this is what compiles.
MAX_TRITON_HEAD = 8192


def check(
    name: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, rotary_dim: int | None
) -> int:
    """R, the rotated elements of a head; ValueError for arguments that don't fit together."""
    if q.dim() not in (3, 4):
        raise ValueError(f"{name}: q must be (B, T, H, D) or packed (T, H, D), got {tuple(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"{name}: q must be floating point, got {q.dtype}")
    if k.dtype != q.dtype:
        raise ValueError(f"{name}: k must have q's dtype {q.dtype}, got {k.dtype}")
    if k.dim() != q.dim() or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{name}: k must agree with q {tuple(q.shape)} in all but the number of heads, got {tuple(k.shape)}"
        )
    T, D = q.shape[-3], q.shape[-1]
    B = q.shape[0] if q.dim() == 4 else 1
    if sin.shape != cos.shape:
        raise ValueError(f"{name}: sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if not (cos.is_floating_point() and sin.is_floating_point()):
        raise ValueError(f"{name}: cos and sin must be floating point, got {cos.dtype} and {sin.dtype}")
    for what, t in (("k", k), ("cos", cos), ("sin", sin), ("position_ids", position_ids)):
        if t is not None and t.device != q.device:
            raise ValueError(f"{name}: {what} must be on q's device {q.device}, got {t.device}")
    if cos.dim() not in (2, 3):
        raise ValueError(f"{name}: cos must be (T, R/2), (T, R) or (B, T, R), got {tuple(cos.shape)}")
    R = rotated(cos.shape[-1], D, cos.dim(), rotary_dim)
    if R == 0:
        rule = "R or R/2 columns, R even and at most head_dim"
        raise ValueError(f"{name}: cos must have {rule} {D}, got {cos.shape[-1]} columns and rotary_dim={rotary_dim}")
    if cos.dim() == 3 and (position_ids is not None or cos.shape[0] not in (1, B) or cos.shape[1] != T):
        if position_ids is not None:
            raise ValueError(f"{name}: position_ids index a 2-D table, but cos is 3-D with a row per token already")
        raise ValueError(f"{name}: cos must be (1 or {B}, {T}, R) for q {tuple(q.shape)}, got {tuple(cos.shape)}")
    if position_ids is None:
        if cos.shape[-2] < T:
            raise ValueError(f"{name}: cos must have a row for each of the {T} tokens, got {tuple(cos.shape)}")
    elif position_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: position_ids must be int64 or int32, got {position_ids.dtype}")
    elif tuple(position_ids.shape) not in ((T,), (1, T), (B, T)):
        raise ValueError(f"{name}: position_ids must be ({B}, {T}) or ({T},), got {tuple(position_ids.shape)}")
    elif cos.shape[0] == 0 and T > 0:
        raise ValueError(f"{name}: cos must have the rows that position_ids point to, got {tuple(cos.shape)}")
    return R


def check_weight(name: str, which: str, weight: Tensor, x: Tensor) -> None:
    """ValueError unless the weight can be that of a norm over x's last dimension."""
    if not weight.is_floating_point():
        raise ValueError(f"{name}: {which} must be floating point, got {weight.dtype}")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"{name}: {which} must have shape ({x.shape[-1]},), head_dim, got {tuple(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"{name}: {which} must be on q's device {x.device}, got {weight.device}")


def outside(name: str, cos: Tensor, position_ids: Tensor | None) -> ValueError:
    """What an IndexError means. Whoever reads the positions raises it: to look beforehand would be another pass."""
    return ValueError(
        f"{name}: position_ids must be in [0, {cos.shape[-2]}), the rows of cos and sin, got {position_ids}"
    )
