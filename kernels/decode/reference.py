"""Weights of 8 and of 4 bits: how they are rounded, and how they lie in memory for the C++ kernels.

int8  W[n, k] = scale[n] q[n, k], q in [-127, 127], scale = max |W[n]| / 127, float32
int4  W[n, k] = scale[n, k // 32] (u[n, k] - 8), u in [0, 15]; scale is a bfloat16, chosen so that the group's largest
      element, whatever its sign, is 0 or 16 - 8: of the sixteen values one lies farther out, and it is used

Packed (csrc/decode/quantized.h): 16 outputs side by side, zeros beyond N and K. Both are integer tensors, the scales'
bits included, so that `module.to(dtype)` leaves them alone.

Names: N outputs, K inputs, Np and Kp padded to multiples of 16 and 32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, GROUP = 16, 32
FORMATS = ("int8", "int4")


def pack(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A matrix (N, K) to what the kernels take: packed numbers and the bits of the scales.

    Returns:
        int8: (Np / 16, Kp / 2, 16, 2) int8 and (Np / 16, 16) int32.
        int4: (Np / 16, Kp / 8, 16) int32 and (Np / 16, Kp / 32, 16) int16.
    Raises:
        ValueError: kind is unknown, or the weight isn't a matrix of finite floating point numbers.
    """
    if kind not in FORMATS:
        raise ValueError(f"quantize must be one of {', '.join(FORMATS)}, got {kind!r}")
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"weight must be a floating-point matrix, got {tuple(weight.shape)} {weight.dtype}")
    w = weight.detach().to(torch.float32)
    if not bool(w.isfinite().all()):
        raise ValueError("weight must be finite to be quantised, but it holds NaN or infinity")
    w = F.pad(w, (0, -w.shape[1] % GROUP, 0, -w.shape[0] % BLOCK))
    return _pack_int8(w) if kind == "int8" else _pack_int4(w)


def _pack_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    Np, Kp = w.shape
    scale = w.abs().amax(1) / 127
    q = (w / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    packed = q.view(Np // BLOCK, BLOCK, Kp // 2, 2).permute(0, 2, 1, 3).contiguous()
    return packed, scale.view(Np // BLOCK, BLOCK).view(torch.int32)


def _pack_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    Np, Kp = w.shape
    groups = w.view(Np, Kp // GROUP, GROUP)
    farthest = groups.gather(2, groups.abs().argmax(2, keepdim=True))  # (Np, groups, 1), with its sign
    scale = (farthest / -8).to(torch.bfloat16)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    u = (groups * inverse).round_().add_(8).clamp_(0, 15).to(torch.int32).view(Np, Kp // 8, 4, 2)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=w.device)
    halves = (u << shifts[:, None]).sum(2, dtype=torch.int32)  # (Np, Kp / 8, 2), 16 bits each
    packed = (halves[..., 0] | (halves[..., 1] << 16)).view(Np // BLOCK, BLOCK, Kp // 8).transpose(1, 2).contiguous()
    scales = scale.view(Np // BLOCK, BLOCK, Kp // GROUP).transpose(1, 2).contiguous()
    return packed, scales.view(torch.int16)


def unpack(packed: Tensor, scale: Tensor, N: int, K: int) -> Tensor:
    """The matrix (N, K) that packed numbers stand for, float32."""
    if packed.dtype == torch.int8:
        q = packed.permute(0, 2, 1, 3).reshape(scale.numel(), -1)
        return (q.float() * scale.view(torch.float32).view(-1, 1))[:N, :K].contiguous()
    blocks, eighths, _ = packed.shape
    numbers = packed.transpose(1, 2).reshape(blocks * BLOCK, eighths)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=packed.device)
    halves = torch.stack((numbers, numbers >> 16), -1)  # (Np, Kp / 8, 2)
    u = (halves[:, :, None] >> shifts[:, None]) & 15  # (Np, Kp / 8, 4, 2)
    scales = scale.view(torch.bfloat16).transpose(1, 2).reshape(blocks * BLOCK, -1, 1).float()
    return ((u.view(*scales.shape[:2], GROUP) - 8) * scales).reshape(blocks * BLOCK, -1)[:N, :K].contiguous()
