"""What a user of Hugging Face's Llama runs today: the forms that the fused kernels are timed against.

`EAGER` is Hugging Face's modules in eager PyTorch, `TORCH` torch's own fused ops, `liger()` the Liger kernels where
they are installed; torch.compile takes the eager forms. Same shapes as pyllm's ops; they round where their authors
round, which is not always where ours do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyllm.kernels.sampling import reference as sampling


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


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Qwen3Attention: its two norms, then the rotation."""
    return apply_rope(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin)


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """LlamaMLP's act_fn(gate) * up."""
    return F.silu(gate) * up


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """The same of a joined projection."""
    return swiglu(*gate_up.chunk(2, -1))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """ForCausalLMLoss: logits are upcast first."""
    return F.cross_entropy(logits.float().flatten(0, -2), target.flatten())


def linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """lm_head, then ForCausalLMLoss."""
    return cross_entropy(F.linear(input, linear_weight), target)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **_: Any) -> Tensor:
    """eager_attention_forward: keys and values repeated, scores in memory, softmax in float32."""
    (T, H, D), (S, Hkv) = q.shape[1:], k.shape[1:3]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(H // Hkv, 2), v.repeat_interleave(H // Hkv, 2)))
    scores = q @ k.transpose(2, 3) * D**-0.5
    if causal:
        scores = scores + torch.full((T, S), float("-inf"), dtype=q.dtype, device=q.device).triu(S - T + 1)
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2).contiguous()


def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, **_: Any) -> Tensor:
    """What a static cache runs: all of the cache, with a mask."""
    S, H = k_cache.shape[1], q.shape[2]
    seen = torch.arange(S, device=q.device) < cache_seqlens[:, None, None, None]
    group = H // k_cache.shape[2]
    k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k_cache, v_cache))
    scores = (q.transpose(1, 2) @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2).contiguous()


EAGER: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "apply_rope": apply_rope,
    "qk_norm_rope": qk_norm_rope,
    "swiglu": swiglu,
    "swiglu_packed": swiglu_packed,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "attention": attention,
    "attention_decode": attention_decode,
    "linear": F.linear,
    "sample": sampling.sample,  # transformers' filters one after the other, then a draw
}


def _fused_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _fused_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def _fused_linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(input.flatten(0, -2), linear_weight, target.flatten())


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **_: Any) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


# Torch's own fused ops. SDPA aligns causal masks at the top left: the same as ours where T == S, as in all cases here.
TORCH: dict[str, Callable[..., Any]] = {
    "rms_norm": _fused_rms_norm,
    "cross_entropy": _fused_cross_entropy,
    "attention": _sdpa,
}
# SDPA's kernels by name; SDPA itself chooses between them.
SDPA = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
NAMES = ("torch", *SDPA, "compile", "liger")  # of contenders that aren't ours, eager apart


def sdpa_by(who: str) -> Callable[..., Tensor]:
    """SDPA with one of the kernels of `SDPA`; RuntimeError at the call where torch has none for this GPU and shape."""

    def attend(*args: Any, **options: Any) -> Tensor:
        with sdpa_kernel(SDPA[who]):
            return _sdpa(*args, **options)

    return attend


if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
    TORCH["linear_cross_entropy"] = _fused_linear_cross_entropy


def liger() -> tuple[dict[str, Callable[..., Any]], str]:
    """(Liger's forms of the ops, ""), or ({}, why not). Out of place, as far as Liger offers it."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}, "liger-kernel is not installed"
    from liger_kernel.transformers import functional as L

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        cos, sin = cos.to(q.dtype)[None], sin.to(q.dtype)[None]
        return L.liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return {
        "rms_norm": lambda x, weight, eps, offset=0.0: L.liger_rms_norm(x, weight, eps, offset, "llama", False),
        "add_rms_norm": lambda x, residual, weight, eps, offset=0.0: L.liger_fused_add_rms_norm(
            x, residual, weight, eps, offset, "llama", False
        ),
        "apply_rope": rope,
        "swiglu": L.liger_swiglu,
        "cross_entropy": lambda logits, target: L.liger_cross_entropy(logits.flatten(0, -2), target.flatten()),
        "linear_cross_entropy": lambda input, linear_weight, target: L.liger_fused_linear_cross_entropy(
            input.flatten(0, -2), linear_weight, target.flatten()
        ),
    }, ""


# These write over what they were given (logits by their gradient), so that only a whole step of them can be timed.
CONSUMES_ITS_INPUT = {("liger", "cross_entropy"), ("liger", "swiglu"), ("liger", "apply_rope")}
