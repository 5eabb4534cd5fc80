"""RMSNorm of every head of q and of k, and their rotation after it, in eager PyTorch (Qwen3's attention).

    rstd = 1 / sqrt(mean(x^2 over D) + eps)       n = x * rstd * (offset + weight)       y = rotate(n)

x is a head of q with q_weight, or of k with k_weight; `rotate` is `reference.py`'s, elements from R on keep n.
Backward, with g = dy rotated by the opposite angles, which is n's gradient, and ^ for x * rstd:

    dx = rstd * (g w - x^ * mean(g w * x^)), w = offset + weight      dweight = sum over tokens and heads of g * x^

Shapes: q, q_out (B, T, H, D), rstd_q (B, T, H), q_weight (D,); k the same with Hkv heads. Tables as in `reference.py`.
Rounding: computed in float32 (float64 for float64), rounded once, after the rotation. Hugging Face rounds after the
norm as well, and so does `rms_norm` followed by `apply_rope`.
Source: Henry et al. 2020, arXiv:2010.04245 (QK-norm); Yang et al. 2025, arXiv:2505.09388 (Qwen3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..spec import Cost, draw
from .reference import half_table, read_angles, rope_inputs, rotate_both, rotated, why_not


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(q, k) by the formula above; arguments as the public function's, unchecked."""
    cos, sin = (half_table(t, q.shape[-1], rotary_dim, interleaved) for t in (cos, sin))
    packed = q.dim() == 3
    if packed:
        q, k = q.unsqueeze(0), k.unsqueeze(0)
    q, k = norm_and_rotate(q, k, q_weight, k_weight, cos, sin, position_ids, eps, offset, interleaved)[:2]
    return (q.squeeze(0), k.squeeze(0)) if packed else (q, k)


def norm_and_rotate(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q_out, k_out, rstd_q, rstd_k)."""
    (q_wide, rstd_q), (k_wide, rstd_k) = _norm(q, q_weight, eps, offset), _norm(k, k_weight, eps, offset)
    q_wide, k_wide = rotate_both(q_wide, k_wide, cos, sin, position_ids, interleaved)
    return q_wide.to(q.dtype), k_wide.to(k.dtype), rstd_q, rstd_k


def _norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(acc)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * rstd * (weight.to(acc) + offset), rstd.squeeze(-1)


# What a backend owes the op: q and k have a batch dimension here, cos and sin R/2 columns.
def qk_norm_rope_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, rstd_q, rstd_k = norm_and_rotate(*args)
    return q.contiguous(), k.contiguous(), rstd_q, rstd_k


def qk_norm_rope_bwd(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = rstd_q.dtype
    gq, gk = rotate_both(dq.to(acc), dk.to(acc), cos, -sin, position_ids, interleaved)
    dq, dq_weight = _norm_bwd(gq, q, q_weight, rstd_q, offset)
    dk, dk_weight = _norm_bwd(gk, k, k_weight, rstd_k, offset)
    return dq, dk, dq_weight, dk_weight


def _norm_bwd(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    # eps isn't saved: the gradient of 1/sqrt(mean(x^2) + eps) is known from its value, rstd.
    unit = x.to(g.dtype) * rstd.unsqueeze(-1)
    dweight = (g * unit).sum((0, 1, 2))
    g = g * (weight.to(g.dtype) + offset)
    dx = (g - unit * (g * unit).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)


EAGER = Impl(qk_norm_rope_fwd, qk_norm_rope_bwd, why_not)


# For tests and benchmarks.
CASES: Mapping[str, Mapping[str, Any]] = {
    "2x7-heads3-1-D16": dict(B=2, T=7, H=3, Hkv=1, D=16),
    "2x5-half-table-D64-offset1": dict(B=2, T=5, H=4, Hkv=2, D=64, table="half", offset=1.0),
    "1x33-interleaved-batch-table-D80": dict(B=1, T=33, H=3, Hkv=1, D=80, table="batch", interleaved=True),
    "2x9-interleaved-half-partial": dict(B=2, T=9, H=2, Hkv=1, D=40, R=12, interleaved=True, table="half"),
    "3x4-partial-positions-offset1": dict(B=3, T=4, H=2, Hkv=1, D=24, R=16, positions=True, offset=1.0),
    "packed-41-positions-interleaved": dict(B=0, T=41, H=4, Hkv=2, D=64, positions=True, interleaved=True),
    "1x200-heads3-1-D128": dict(B=1, T=200, H=3, Hkv=1, D=128),
}


def qk_norm_rope_inputs(
    *,
    D: int,
    offset: float = 0.0,
    eps: float = 1e-6,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    **case: Any,
) -> dict[str, Any]:
    """Keyword arguments of `qk_norm_rope`; the shapes, the table and the variant are those of `rope_inputs`."""
    how: dict[str, Any] = dict(dtype=dtype, device=device, generator=generator)
    inputs = rope_inputs(D=D, **case, **how)
    return dict(inputs, q_weight=draw(D, **how), k_weight=draw(D, **how), eps=eps, offset=offset)


def qk_norm_rope_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """Forward reads and writes q and k; backward reads their gradients too. Angles, rstd and the weights (backward:
    and their gradients) besides. 4 operations an element for the norm, 9 backward, 3 a rotated one."""
    q, k, cos = inputs["q"], inputs["k"], inputs["cos"]
    elements, D = q.numel() + k.numel(), q.shape[-1]
    heads = elements // max(1, D)
    weights = sum(inputs[w].numel() * inputs[w].element_size() for w in ("q_weight", "k_weight"))
    moved = elements * q.element_size() * (3 if backward else 2) + weights * (2 if backward else 1) + heads * 4
    R = rotated(cos.shape[-1], D, cos.dim(), inputs.get("rotary_dim"))
    return Cost(moved + read_angles(inputs, R), elements * (9 if backward else 4) + heads * R * 3)


def columns(inputs: dict[str, Any]) -> int:
    """Terms of a head's sum of squares."""
    return int(inputs["q"].shape[-1])


def q_rows(inputs: dict[str, Any]) -> int:
    """Terms of q_weight's gradient."""
    return int(inputs["q"].numel() // max(1, inputs["q"].shape[-1]))


def k_rows(inputs: dict[str, Any]) -> int:
    """Terms of k_weight's gradient."""
    return int(inputs["k"].numel() // max(1, inputs["k"].shape[-1]))
