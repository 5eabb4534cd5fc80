"""Scaled dot-product attention with grouped key-value heads, in eager PyTorch.

    s_ij = scale * q_i . k_j                      (softcap c > 0: then c * tanh(s / c))
    s_ij = -inf                                   where query i may not see key j
    m_i = max_j s_ij,  p_ij = exp(s_ij - m_i),  l_i = sum_j p_ij  (+ exp(sink - m_i), a learned logit per head)
    out_i = sum_j p_ij v_j / l_i,  lse_i = m_i + log(l_i)

Query i sees key j when  i' - left <= j <= i' + right  with i' = i + S - T, which aligns the last query with the last
key; -1 is no bound, and causal is right = 0. Query head h reads key-value head h // (H / Hkv): nothing is repeated.
A query that sees nothing gets zeros and lse -inf (with a sink: zeros and the sink), and no NaN in any gradient.

Backward, with P = exp(s - lse), D_i = do_i . out_i - dlse_i:

    dv = P^T do,  dP = do v^T,  dS = P * (dP - D) (* (1 - (s/c)^2)),  dq = scale dS k,  dk = scale dS^T q
    dsink = - sum over queries of exp(sink - lse) * D

Shapes: q (B, T, H, D), k and v (B, S, Hkv, D), out as q, lse (B, H, T) float32, sinks (H,). Packed: q (total_q, H, D),
k and v (total_k, Hkv, D), cu_seqlens int32 (B + 1,): sequence b is rows cu[b] to cu[b + 1]; lse (H, total_q).
Rounding: scores, softmax and sums in float32 (float64 for float64); a kernel may round p (and dS backward) to the
inputs' dtype before it is multiplied; outputs are rounded once.
Source: Vaswani et al. 2017, arXiv:1706.03762; GQA: Ainslie et al. 2023, arXiv:2305.13245; backward: Dao 2023,
arXiv:2307.08691; window: Beltagy et al. 2020, arXiv:2004.05150; sinks: Xiao et al. 2023, arXiv:2309.17453, and gpt-oss.

`attention` here is written for reading, and autograd gives its gradient. The eager backend (`eager.py`) works the same
formulas by blocks of queries.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..spec import Cost, draw

Window = int | tuple[int, int] | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: Window = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out, or (out, lse), by the formula above; arguments as the public function's, unchecked."""
    packed = cu_seqlens_q is not None
    left, right = bounds(causal, window)
    where = positions(q.shape[-3], k.shape[-3], cu_seqlens_q, cu_seqlens_k, q.device)
    if packed:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    with full_precision(q.device.type):
        out, lse = _dense(q, k, v, scale_of(softmax_scale, q), softcap, sinks, visible(*where, left, right))
    if packed:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    rounded: bool = False,
) -> Tensor:
    """Causal attention of the newest T tokens of every sequence to its first cache_seqlens[b] keys."""
    if block_table is not None:
        k_cache, v_cache = gathered(k_cache, block_table), gathered(v_cache, block_table)
    # A value beyond the length may be NaN, which a probability of 0 doesn't cancel. Keys are masked as scores.
    beyond = torch.arange(v_cache.shape[1], device=q.device) >= cache_seqlens[:, None]
    if q.device.type != "cpu" or bool(beyond.any()):  # on CPUs it can be asked whether there is any
        v_cache = v_cache.masked_fill(beyond[..., None, None], 0.0)
    with full_precision(q.device.type):
        mask = decode_mask(q.shape[1], k_cache.shape[1], cache_seqlens, -1 if window is None else window - 1)
        return _dense(q, k_cache, v_cache, scale_of(softmax_scale, q), softcap, None, mask, rounded)[0]


def gathered(cache: Tensor, block_table: Tensor) -> Tensor:
    """(B, max_blocks * block_size, Hkv, D): the sequences of a paged cache in one piece each, copied.

    Entries of the table that aren't block numbers give another block's keys, which nobody sees.
    """
    if cache.shape[0] == 0:
        return cache.new_zeros((block_table.shape[0], 0, *cache.shape[2:]))
    blocks = block_table.reshape(-1).clamp(0, cache.shape[0] - 1)
    return cache.index_select(0, blocks).view(block_table.shape[0], -1, *cache.shape[2:])


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    mask: Tensor | None,
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """The formula over all pairs at once. mask is True where query and key meet: (T, S) or (B, 1, 1, T, S)."""
    (B, T, H, D), Hkv = q.shape, k.shape[2]
    acc = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(acc).view(B, T, Hkv, H // Hkv, D)
    s = torch.einsum("bthgd,bshd->bhgts", grouped * scale, k.to(acc))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    # The maximum only keeps exp in range: it cancels, so no gradient goes through it. 0 where there is nothing to see.
    m = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros((*s.shape[:-1], 1))
    sink = None
    if sinks is not None:
        sink = sinks.to(acc).view(Hkv, H // Hkv, 1, 1)
        m = torch.maximum(m, sink.detach())
    m = m.masked_fill(m == -math.inf, 0.0)
    p = torch.exp(s - m)
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - m)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    if rounded:  # as a kernel may
        p = p.to(q.dtype).to(acc)
    out = torch.einsum("bhgts,bshd->bthgd", p / total, v.to(acc)).reshape(B, T, H, D)
    lse = (m + torch.log(total)).masked_fill(nothing, -math.inf).reshape(B, H, T)
    return out.to(q.dtype), lse


def scale_of(softmax_scale: float | None, q: Tensor) -> float:
    """1 / sqrt(D) unless said otherwise."""
    return softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(max(1, q.shape[-1]))


def bounds(causal: bool, window: Window) -> tuple[int, int]:
    """(left, right): how many keys before and after its own a query sees; -1 for all of them."""
    left, right = (-1, -1) if window is None else (window - 1, window - 1) if isinstance(window, int) else window
    return left, 0 if causal else right


def positions(
    T: int, S: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Positions of queries (T,) and keys (S,) on one scale, and their sequences when packed. No host sync."""
    i, j = torch.arange(T, device=device), torch.arange(S, device=device)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return i + (S - T), j, None, None
    # right=True puts row cu[b] into sequence b and steps over empty sequences. Queries past the last sequence get a
    # number that no key has.
    B = cu_seqlens_q.shape[0] - 1
    q_seq = torch.searchsorted(cu_seqlens_q, i.to(cu_seqlens_q.dtype), right=True) - 1
    k_seq = torch.searchsorted(cu_seqlens_k, j.to(cu_seqlens_k.dtype), right=True) - 1
    end = (q_seq + 1).clamp(max=B)
    return i - cu_seqlens_q[end] + cu_seqlens_k[end], j, q_seq.masked_fill(q_seq == B, -1), k_seq


def visible(
    q_pos: Tensor, k_pos: Tensor, q_seq: Tensor | None, k_seq: Tensor | None, left: int, right: int
) -> Tensor | None:
    """(T, S), True where a query sees a key; None when it is True everywhere."""
    mask = None
    if q_seq is not None and k_seq is not None:
        mask = q_seq[:, None] == k_seq
    if left >= 0:
        near = k_pos >= q_pos[:, None] - left
        mask = near if mask is None else mask & near
    if right >= 0:
        near = k_pos <= q_pos[:, None] + right
        mask = near if mask is None else mask & near
    return mask


def decode_mask(T: int, S: int, cache_seqlens: Tensor, left: int) -> Tensor:
    """(B, 1, 1, T, S), True where a query sees a key of its cache: the last query sits on the last valid key."""
    keys = torch.arange(S, device=cache_seqlens.device)
    queries = cache_seqlens[:, None] - T + torch.arange(T, device=cache_seqlens.device)
    mask = keys <= queries[..., None]
    if left >= 0:
        mask = mask & (keys >= queries[..., None] - left)
    return mask[:, None, None]


def full_precision(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off, under which float32 products would silently be taken in half precision."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# For tests and benchmarks.
CASES: Mapping[str, Mapping[str, Any]] = {
    "mha-2x16": dict(B=2, T=16, S=16, H=2, Hkv=2, D=16),
    "gqa-causal-2x33": dict(B=2, T=33, S=33, H=4, Hkv=2, D=32, causal=True),
    "mqa-causal-130": dict(B=1, T=130, S=130, H=4, Hkv=1, D=64, causal=True),
    "causal-T5-S70": dict(B=2, T=5, S=70, H=4, Hkv=2, D=32, causal=True),
    "causal-T9-S4-empty-rows": dict(B=1, T=9, S=4, H=2, Hkv=1, D=16, causal=True),
    "window7-causal-40": dict(B=1, T=40, S=40, H=2, Hkv=1, D=32, causal=True, window=7),
    "window5-2-29x35": dict(B=1, T=29, S=35, H=2, Hkv=2, D=24, window=(5, 2)),
    "softcap-causal-21": dict(B=2, T=21, S=21, H=2, Hkv=1, D=32, causal=True, softcap=5.0),
    "sinks-causal-window-34": dict(B=1, T=34, S=34, H=4, Hkv=2, D=16, causal=True, window=9, sinks=True),
    "packed-causal": dict(lengths=(5, 0, 17, 1, 30), H=4, Hkv=2, D=32, causal=True),
    "packed-T-S": dict(lengths=(3, 9, 1), key_lengths=(8, 4, 0), H=2, Hkv=1, D=16, causal=True, sinks=True),
}
DECODE_CASES: Mapping[str, Mapping[str, Any]] = {
    "3x1-S40": dict(B=3, T=1, S=40, H=4, Hkv=2, D=32),
    "2x3-S33-mqa": dict(B=2, T=3, S=33, H=4, Hkv=1, D=16),
    "1x1-S130-window-softcap": dict(B=1, T=1, S=130, H=2, Hkv=2, D=64, window=20, softcap=8.0),
    "4x1-S90-gqa8-empty-D24": dict(B=4, T=1, S=90, H=8, Hkv=1, D=24, empty=True),
    "2x1-S600-splits": dict(B=2, T=1, S=600, H=4, Hkv=1, D=16),
    "1x40-S130-prefill": dict(B=1, T=40, S=130, H=4, Hkv=2, D=16),
    "3x2-S140-blocks128": dict(B=3, T=2, S=140, H=4, Hkv=2, D=32, block_size=128),
    "3x5-S100-blocks16": dict(B=3, T=5, S=100, H=2, Hkv=2, D=16, block_size=16),
    "3x3-S600-blocks7-window": dict(B=3, T=3, S=600, H=4, Hkv=1, D=16, block_size=7, window=300, empty=True),
}


def cu_seqlens(lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """int32 (B + 1,): the running sum of the lengths, from 0."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def attention_inputs(
    H: int,
    Hkv: int,
    D: int,
    B: int = 1,
    T: int = 0,
    S: int = 0,
    lengths: tuple[int, ...] | None = None,
    key_lengths: tuple[int, ...] | None = None,
    sinks: bool = False,
    causal: bool = False,
    window: Window = None,
    softcap: float = 0.0,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    variant: str = "plain",
) -> dict[str, Any]:
    """Keyword arguments of `attention`; lengths make the packed form."""
    how: dict[str, Any] = dict(dtype=dtype, device=device, generator=generator, variant=variant)
    inputs: dict[str, Any] = dict(causal=causal, window=window, softcap=softcap)
    lead: tuple[int, ...] = (B, T)
    key_lead: tuple[int, ...] = (B, S)
    if lengths is not None:
        key_lengths = key_lengths or lengths
        lead, key_lead = (sum(lengths),), (sum(key_lengths),)
        inputs.update(cu_seqlens_q=cu_seqlens(lengths, device), cu_seqlens_k=cu_seqlens(key_lengths, device))
    inputs.update(q=draw(*lead, H, D, **how), k=draw(*key_lead, Hkv, D, **how), v=draw(*key_lead, Hkv, D, **how))
    if sinks:
        inputs["sinks"] = draw(H, dtype=torch.float32, device=device, generator=generator)
    return inputs


def decode_inputs(
    B: int,
    T: int,
    S: int,
    H: int,
    Hkv: int,
    D: int,
    window: int | None = None,
    softcap: float = 0.0,
    block_size: int | None = None,
    empty: bool = False,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    variant: str = "plain",
) -> dict[str, Any]:
    """Keyword arguments of `attention_decode`; the caches are filled to various lengths, the first to the brim.

    empty: the last sequence has no key, the one before it fewer than T. With a block_size the cache is paged.
    """
    how: dict[str, Any] = dict(dtype=dtype, device=device, generator=generator, variant=variant)
    lengths = torch.randint(min(T, S), S + 1, (B,), generator=generator, dtype=torch.int32)
    lengths[:1] = S
    if empty:
        lengths[-2:] = torch.tensor([max(1, T - 1), 0], dtype=torch.int32)
    inputs: dict[str, Any] = dict(
        q=draw(B, T, H, D, **how),
        k_cache=draw(B, S, Hkv, D, **how),
        v_cache=draw(B, S, Hkv, D, **how),
        cache_seqlens=lengths.to(device),
        window=window,
        softcap=softcap,
    )
    if block_size is not None:
        for name in ("k_cache", "v_cache"):
            inputs[name], inputs["block_table"] = paged(inputs[name], lengths, block_size)
    return inputs


def paged(cache: Tensor, lengths: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The same sequences in shuffled blocks, and their block table. What belongs to nobody is NaN, or block -1."""
    B, S = cache.shape[:2]
    per_row = -(-S // block_size)
    order = torch.randperm(B * per_row + 2, generator=torch.Generator().manual_seed(B + S))
    blocks = cache.new_full((B * per_row + 2, block_size, *cache.shape[2:]), math.nan)
    table = torch.full((B, per_row), -1, dtype=torch.int32)
    for b, n in enumerate(lengths.tolist()):
        for i in range(-(-n // block_size)):
            table[b, i] = block = int(order[b * per_row + i])
            rows = cache[b, i * block_size : min(n, (i + 1) * block_size)]
            blocks[block, : len(rows)] = rows
    return blocks, table.to(cache.device)


def attention_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """q, k, v read and out and lse written; backward reads these and dout, and writes three gradients.

    4 D operations for each head and each pair of query and key that meet; 2.5 times that backward.
    """
    q, k = inputs["q"], inputs["k"]
    H, D = q.shape[-2:]
    B = q.shape[0] if q.dim() == 4 else 1
    left, right = bounds(inputs.get("causal", False), inputs.get("window"))
    cu_q, cu_k = inputs.get("cu_seqlens_q"), inputs.get("cu_seqlens_k")
    if cu_q is None:
        spans = [(q.shape[1], k.shape[1])] * B
    else:
        spans = list(zip(cu_q.diff().tolist(), (cu_q if cu_k is None else cu_k).diff().tolist(), strict=True))
    pairs = sum(met(T, S, left, right) for T, S in spans)
    rows = q.numel() // max(1, D)
    moved = (2 * q.numel() + 2 * k.numel()) * q.element_size()
    lse = rows * 4
    if backward:
        return Cost(2 * moved + lse, int(10 * D * H * pairs))
    return Cost(moved + lse, 4 * D * H * pairs)


def met(T: int, S: int, left: int, right: int) -> int:
    """Pairs of query and key that meet, in one sequence."""
    shift = torch.arange(T) + (S - T)
    first = (shift - left).clamp(0, S) if left >= 0 else torch.zeros_like(shift)
    end = (shift + right + 1).clamp(0, S) if right >= 0 else torch.full_like(shift, S)
    return int((end - first).clamp(min=0).sum())


def decode_cost(inputs: dict[str, Any], backward: bool) -> Cost:
    """Keys and values that a query sees are read, q and their blocks' entries of the table too, and out is written."""
    q, k, window, table = inputs["q"], inputs["k_cache"], inputs.get("window"), inputs.get("block_table")
    _, T, H, D = q.shape
    lengths = inputs["cache_seqlens"].tolist()
    seen = [min(n, n if window is None else window + T - 1) for n in lengths]
    pairs = sum(met(T, n, -1 if window is None else window - 1, 0) for n in lengths)
    entries = 0
    if table is not None:
        block_size = k.shape[1]
        entries = sum(-(-n // block_size) - (n - s) // block_size for n, s in zip(lengths, seen, strict=True))
    moved = (2 * sum(seen) * k.shape[2] * D + 2 * q.numel()) * q.element_size() + entries * 4
    return Cost(moved, 4 * D * H * pairs)


def keys(inputs: dict[str, Any]) -> int:
    """Terms of the longest sum: keys of a query, or elements of a head in a score."""
    k = inputs["k"] if "k" in inputs else inputs["k_cache"]
    blocks = 1 if inputs.get("block_table") is None else int(inputs["block_table"].shape[1])
    return max(int(k.shape[-3]) * blocks, int(k.shape[-1]))


def queries(inputs: dict[str, Any]) -> int:
    """Terms of a gradient of k or v: the queries of the group's heads."""
    q, k = inputs["q"], inputs["k"]
    return int(q.shape[-3] * q.shape[-2] // max(1, k.shape[-2]))


def rows(inputs: dict[str, Any]) -> int:
    """Terms of a sink's gradient: every query."""
    q = inputs["q"]
    return int(q.numel() // max(1, q.shape[-1] * q.shape[-2]))
