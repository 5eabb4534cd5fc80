"""Attention under a mask of any form, in eager PyTorch: for what the kernels' causality and window can't express.

Names: B batch, T queries, S keys, H query heads, Hkv key-value heads, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def row_mask(starts: Tensor, T: int, S: int, window: int | None) -> Tensor:
    """Causality where query i of row b is that row's token starts[b] + i: (B, 1, T, S) bool, True to attend."""
    key = torch.arange(S, device=starts.device)
    query = starts[:, None, None, None] + torch.arange(T, device=starts.device)[:, None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention under any mask, in eager PyTorch: softmax(q k^T / sqrt(D) under the mask) v.

    Args:
        q: (B, T, H, D).  k, v: (B, S, Hkv, D).
        mask: (B or 1, H or 1, T, S); bool, True where a query sees a key, or floating point, added to the scores.
    Returns:
        (B, T, H, D); zeros for a query that a bool mask lets see nothing.
    """
    B, T, H, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    lowest = torch.finfo(wide).min
    grouped = q.to(wide).view(B, T, k.shape[2], -1, D)
    scores = torch.einsum("bthgd,bshd->bhgts", grouped, k.to(wide)).reshape(B, H, T, -1) / D**0.5  # (B, H, T, S)
    if mask.dtype == torch.bool:
        # Not -inf: a row without any key would be NaN, and its gradient too.
        weights = scores.masked_fill(~mask, lowest).softmax(-1).masked_fill(~mask, 0.0)
    else:
        weights = (scores + mask.to(wide).clamp(min=lowest)).softmax(-1)
    weights = weights.to(v.dtype).to(wide).view(B, k.shape[2], -1, T, k.shape[1])
    return torch.einsum("bhgts,bshd->bthgd", weights, v.to(wide)).reshape(B, T, H, D).to(q.dtype)


def tree_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of a token per beam to a row that they share.

    Args:
        q: (P, n, H, D).  k, v: (P, S, Hkv, D), as they lie in the cache.
        mask: (P, 1, n, S) bool, True in at least one column of every row.
    Returns:
        (P, n, H, D). The H / Hkv query heads of a group are further rows of one product.
    """
    P, n, H, D = q.shape
    Hkv = k.shape[2]
    G = H // Hkv
    rows = q.view(P, n, Hkv, G, D).permute(0, 2, 3, 1, 4).reshape(P, Hkv, G * n, D)
    mask = mask[:, :, None].expand(-1, -1, G, -1, -1).reshape(P, 1, G * n, -1)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.view(P, Hkv, G, n, D).permute(0, 3, 1, 2, 4).reshape(P, n, H, D)
