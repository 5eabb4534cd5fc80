"""What a user of Hugging Face's Llama runs today, in eager PyTorch: the forms that the fused kernels are timed against.

Same shapes as pyllm's ops. They round where Hugging Face's modules round, which is not always where ours do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """LlamaRMSNorm: normalise in float32, round, multiply by the weight. (offset is 0 for Llama.)"""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The addition that ends a block and the norm that begins the next."""
    h = residual + x
    return rms_norm(h, weight, eps), h


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb: x * cos + rotate_half(x) * sin, with tables of full width in x's dtype."""
    cos, sin = cos.to(q.dtype).unsqueeze(-2), sin.to(q.dtype).unsqueeze(-2)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """LlamaMLP's act_fn(gate) * up."""
    return F.silu(gate) * up


EAGER = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "apply_rope": apply_rope, "swiglu": swiglu}
