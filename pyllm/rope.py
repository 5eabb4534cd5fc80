"""Rotary position embeddings: how fast each pair of dimensions turns, for every RoPE type that a config may name.

Names: T query length, B batch, D head_dim. Angles are float32 whatever the model's dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .kernels import extension, triton_support
from .kernels.dispatch import AUTO_ORDER, parse, requested

if TYPE_CHECKING:
    from .config import LlamaConfig


def rope_frequencies(
    config: LlamaConfig, *, sequence_length: Tensor | int | None = None, device: torch.device | str | None = None
) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions, and the factor that cos and sin are multiplied by.

    default  theta^(-2i/D)                                  Su et al. 2021, arXiv:2104.09864
    linear   all divided by `factor`                        positions interpolated: Chen et al. 2023, arXiv:2306.15595
    dynamic  theta grows with the sequence beyond `max_position_embeddings` ("NTK-aware")
    llama3   slow pairs divided by `factor`, fast ones kept, a ramp between
    yarn     the same idea with a linear ramp over dimensions, and a temperature: Peng et al. 2023, arXiv:2309.00071

    Args:
        sequence_length: largest position + 1, read by `dynamic` only; a tensor is not synchronised on.
    Returns:
        (D/2,) float32, and the attention scaling (1 except for yarn).
    """
    rope = config.rope
    D = config.width
    theta = rope["rope_theta"]
    exponent = torch.arange(0, D, 2, dtype=torch.int64, device=device).to(torch.float32) / D  # (D/2,)
    if rope["rope_type"] == "dynamic":
        trained = config.max_position_embeddings
        length = trained if sequence_length is None else sequence_length
        length = torch.as_tensor(length, device=device).clamp(min=trained)
        stretch = rope["factor"] * length / trained - (rope["factor"] - 1)
        return 1.0 / (theta * stretch ** (D / (D - 2))) ** exponent, 1.0
    if rope["rope_type"] == "yarn":
        return _yarn(config, theta**exponent)
    inv_freq = 1.0 / theta**exponent
    if rope["rope_type"] == "linear":
        inv_freq = inv_freq / rope["factor"]
    elif rope["rope_type"] == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    return inv_freq, 1.0


def _llama3(rope: dict, inv_freq: Tensor) -> Tensor:
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    # Turns in the trained context: at most `low` is slow, at least `high` is fast, the rest is blended.
    smooth = (trained / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    slow, fast = wavelength > trained / low, wavelength < trained / high
    return torch.where(slow, inv_freq / factor, torch.where(fast, inv_freq, blended))


def _yarn(config: LlamaConfig, period: Tensor) -> tuple[Tensor, float]:
    rope = config.rope
    D, theta, trained = config.width, rope["rope_theta"], rope["original_max_position_embeddings"]
    factor = rope["factor"] or config.max_position_embeddings / trained

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scaling = rope.get("attention_factor")
    if scaling is None:
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            scaling = temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
        else:
            scaling = temperature(1.0)

    def dimension(turns: float) -> float:  # the dimension that makes this many turns in the trained context
        return D * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(D // 2, dtype=torch.float32, device=period.device) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (factor * period) * (1 - keep) + 1.0 / period * keep, float(scaling)


def fuses_qk_norm(x: Tensor, backend: str | None) -> bool:
    """Whether QK-norm and rotation run as one op: where the backend that would run the two has the fused one as well.

    In eager PyTorch two ops are faster, and round as Hugging Face's do; CUDA C++ has the norm only.
    """
    for name in parse(requested(backend) or "auto") or AUTO_ORDER.get(x.device.type, ()):
        if name == "triton" and not triton_support.why_not(x):
            return True
        if name == "cpu" and not extension.cpu.why_not(x):
            return True
        if name == "eager" or (name == "cuda" and not extension.cuda.why_not(x)):
            return False
    return False


class RotaryEmbedding(nn.Module):
    """cos and sin of a batch's positions. Holds no state worth saving."""

    inv_freq: Tensor

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self._rebuild(None)

    def _rebuild(self, device: torch.device | None) -> None:
        inv_freq, self.scaling = rope_frequencies(self.config, device=device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn, recurse=True):
        # model.to(bfloat16) must not round the frequencies, and to_empty() must not leave them undefined.
        super()._apply(fn, recurse)
        self._rebuild(self.inv_freq.device)
        return self

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids (T,) or (B, T) to float32 cos and sin, (T, D/2) or (B, T, D/2)."""
        inv_freq = self.inv_freq
        if self.config.rope["rope_type"] == "dynamic":
            length = position_ids.max() + 1 if position_ids.numel() else None
            inv_freq, _ = rope_frequencies(self.config, sequence_length=length, device=position_ids.device)
        angles = position_ids[..., None].to(torch.float32) * inv_freq  # (..., T, D/2)
        return angles.cos() * self.scaling, angles.sin() * self.scaling
