"""Rotary embedding of new tokens and their entry into a key-value cache, in eager PyTorch.

    p = cache_seqlens[b] - T + t                the position of sequence b's new token t: lengths count the new tokens
    q[b, t] -> rotated by row p of cos and sin
    k[b, t] -> rotated by the same, to place p of the cache;  v[b, t] -> to place p, as it is

Place p of sequence b is cache[b, p], or in a paged cache cache[block_table[b, p // block_size], p % block_size]. A
token whose p is negative (its sequence is shorter than T) or beyond the cache goes nowhere, and its q is turned by the
nearest row. No other element of the caches changes.

Shapes: q (B, T, H, D), k and v (B, T, Hkv, D), caches (B, S, Hkv, D) or (num_blocks, block_size, Hkv, D), cos and sin
(P, R/2), cache_seqlens (B,), block_table (B, max_blocks). Rotation and rounding as in `reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..spec import Cost, draw
from .reference import half_table, rotate_both, rotated, tables


def rope_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q rotated, k_cache, v_cache), token by token for reading; unlike the public function it leaves its caches."""
    T, D = q.shape[1], q.shape[3]
    cos, sin = (half_table(t, D, rotary_dim, interleaved) for t in (cos, sin))
    positions = cache_seqlens.long()[:, None] - T + torch.arange(T, device=q.device)
    q, k = rotate_both(q, k, cos, sin, positions.clamp(0, cos.shape[0] - 1), interleaved)
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    size = k_cache.shape[1]
    for b, row in enumerate(positions.tolist()):
        for t, p in enumerate(row):
            if 0 <= p < (size if block_table is None else size * block_table.shape[1]):
                place = (b, p) if block_table is None else (int(block_table[b, p // size]), p % size)
                k_cache[place], v_cache[place] = k[b, t], v[b, t]
    return q, k_cache, v_cache


def rope_append_kv_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """q rotated; writes the caches. Asks no device but the CPU."""
    (B, T), size = q.shape[:2], k_cache.shape[1]
    capacity = size if block_table is None else size * block_table.shape[1]
    positions = cache_seqlens.long()[:, None] - T + torch.arange(T, device=q.device)  # (B, T)
    if q.device.type == "cpu" and B * T:
        _check_values(cache_seqlens, capacity, cos.shape[0])
    q, k = rotate_both(q, k, cos, sin, positions.clamp(0, cos.shape[0] - 1), interleaved)
    q = q.contiguous()
    if capacity * k_cache.numel() * k.numel() == 0:
        return q
    placed = (positions >= 0) & (positions < capacity)
    inside = positions.clamp(0, capacity - 1)
    major = torch.arange(B, device=q.device)[:, None].expand(B, T)
    if block_table is not None:
        major = block_table.gather(1, inside // size).long()
        known = (major >= 0) & (major < k_cache.shape[0])
        if q.device.type == "cpu" and bool((placed & ~known).any()):
            raise ValueError(
                f"rope_append_kv: block_table must name blocks in [0, {k_cache.shape[0]}) where new tokens go, "
                f"got {int(major[placed & ~known][0])}"
            )
        placed = placed & known
    # How many tokens have a place is the device's secret, so all are written: those that have none do again what the
    # first one does that has (a place with one value, whoever writes it), or write back what is there.
    placed, major, minor = placed.flatten(), major.flatten(), (inside % size).flatten()
    first = placed.to(torch.int8).argmax()
    source = torch.where(placed, torch.arange(B * T, device=q.device), first)
    places = (major[source].clamp(0, k_cache.shape[0] - 1), minor[source])
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache[places] = torch.where(placed[first], new.flatten(0, 1)[source], cache[places])
    return q


def _check_values(cache_seqlens: Tensor, capacity: int, rows: int) -> None:
    longest = int(cache_seqlens.max())
    for limit, what in ((capacity, "the cache's {} places"), (rows, "the {} rows of cos and sin")):
        if longest > limit:
            raise ValueError(
                f"rope_append_kv: cache_seqlens must be at most {what.format(limit)}, new tokens counted, got {longest}"
            )


def why_not(*_: Any) -> list[str]:
    return []


EAGER = Impl(rope_append_kv_fwd, None, why_not)


# For tests and benchmarks.
CASES: Mapping[str, Mapping[str, Any]] = {
    "3x1-S12-D16": dict(B=3, T=1, S=12, H=4, Hkv=2, D=16),
    "2x3-S9-half-table-D80": dict(B=2, T=3, S=9, H=3, Hkv=1, D=80, table="half"),
    "4x3-S7-empty-partial": dict(B=4, T=3, S=7, H=4, Hkv=2, D=24, R=16, empty=True),
    "2x2-interleaved-blocks5": dict(B=2, T=2, S=14, H=2, Hkv=2, D=40, R=12, interleaved=True, block_size=5),
    "4x5-empty-blocks4": dict(B=4, T=5, S=16, H=4, Hkv=1, D=32, empty=True, block_size=4),
    "1x2-H20-D128": dict(B=1, T=2, S=5, H=20, Hkv=20, D=128),
}


def append_inputs(
    B: int,
    T: int,
    S: int,
    H: int,
    Hkv: int,
    D: int,
    R: int | None = None,
    table: str = "full",
    interleaved: bool = False,
    block_size: int | None = None,
    empty: bool = False,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    variant: str = "plain",
) -> dict[str, Any]:
    """Keyword arguments of `rope_append_kv`; the first sequence fills its cache to the brim.

    empty: the last sequence has no token, the one before it fewer than T. With a block_size the cache is paged, in
    shuffled blocks; entries of the table that nobody needs are -1, places that nobody fills NaN.
    """
    how: dict[str, Any] = dict(dtype=dtype, device=device, generator=generator, variant=variant)
    R = D if R is None else R
    cos, sin = (t.to(device) for t in tables(S, R, interleaved=interleaved, half=table == "half"))
    lengths = torch.randint(min(T, S), S + 1, (B,), generator=generator, dtype=torch.int32)
    lengths[:1] = S
    if empty:
        lengths[-2:] = torch.tensor([max(1, T - 1), 0], dtype=torch.int32)
    inputs: dict[str, Any] = dict(
        q=draw(B, T, H, D, **how),
        k=draw(B, T, Hkv, D, **how),
        v=draw(B, T, Hkv, D, **how),
        cos=cos,
        sin=sin,
        cache_seqlens=lengths.to(device),
        interleaved=interleaved,
        rotary_dim=R,
    )
    lead = (B, S)
    if block_size is not None:
        columns = -(-S // block_size)
        lead = (B * columns + 2, block_size)
        order = torch.randperm(lead[0], generator=torch.Generator().manual_seed(S))[: B * columns].view(B, columns)
        used = torch.arange(columns) * block_size < lengths[:, None]
        inputs["block_table"] = torch.where(used, order, -1).to(device, torch.int32)
    for name in ("k_cache", "v_cache"):
        inputs[name] = draw(*lead, Hkv, D, **how)
        if block_size is not None:
            inputs[name][-1] = math.nan
    return inputs


def append_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """q, k and v are read and written once; the tables' R/2 columns per token; 3 operations a rotated element."""
    q, k, cos = inputs["q"], inputs["k"], inputs["cos"]
    R = rotated(cos.shape[-1], q.shape[-1], 2, inputs.get("rotary_dim"))
    angles = q.shape[0] * q.shape[1] * R * cos.element_size()
    heads = (q.numel() + k.numel()) // max(1, q.shape[-1])
    return Cost(2 * (q.numel() + 2 * k.numel()) * q.element_size() + angles, heads * R * 3)
