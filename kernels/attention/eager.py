"""Attention in eager PyTorch that is worth training with: the formulas of `reference.py`, by blocks of queries.

A block of scores stays in the cache from the first product to the last, and blocks that a mask hides whole are never
computed. Scores are kept in units of log 2: torch's exp2 is 2 to 20 times as fast as its exp on CPUs (with MKL, exp
crawls over results near zero, which is what masked scores and distant keys give).

Backward needs the forward's out and lse, and computes the probabilities again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from .reference import attention_decode, bounds, full_precision, positions, scale_of, visible

QUERIES = 64  # per block, on CPUs: 64 x 512 float32 scores of a head are 128 KB
SCORES = 1 << 26  # per block elsewhere, where launches cost more than memory does
LOG2_E = math.log2(math.e)

Piece = tuple[
    slice, slice, Tensor | None
]  # batch x tokens of queries, of keys; True where they meet, if positions don't say


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    *,
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse). rounded: p is rounded to q's dtype before it meets v, as half-precision matrix units want it."""
    acc = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape)
    lse = q.new_full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -math.inf, dtype=acc)
    low = torch.finfo(acc).min
    with full_precision(q.device.type):
        for rows, cols, mask in _pieces(q, k, cu_seqlens_q, cu_seqlens_k, left, right):
            Q, K, V, Out = _heads(q, rows), _heads(k, cols), _heads(v, cols), _heads(out, rows)
            L = _lse_heads(lse, rows)
            (B, H, _, C), Hkv = Q.shape, K.shape[1]
            Kb, Vb = _flat(K, Hkv, acc), _flat(V, Hkv, acc)
            for i, e, lo, hi in _blocks(Q, K, left, right, mask):
                s, _ = _scores(Q, Kb, i, e, lo, hi, scale, left, right, softcap, mask)
                m = s.amax(-1, keepdim=True) if hi > lo else s.new_full((*s.shape[:-1], 1), -math.inf)
                if sinks is not None:
                    sink = _per_row(sinks.to(acc) * LOG2_E, B, Hkv, e - i)
                    m = torch.maximum(m, sink)
                m.clamp_(min=low)  # a row that sees nothing: -inf - low is still -inf, and exp2 of it 0
                p = s.sub_(m).exp2_()
                total = p.sum(-1, keepdim=True)
                if sinks is not None:
                    total += torch.exp2(sink - m)
                if rounded:
                    p = p.to(q.dtype).to(acc)
                o = torch.bmm(p, Vb[:, lo:hi]).div_(
                    total.clamp(min=1.0)
                )  # the maximum itself adds 1 where there is one
                Out[:, :, i:e] = o.view(B, H, e - i, C)
                L[:, :, i:e] = total.log2_().add_(m).mul_(1 / LOG2_E).view(B, H, e - i)
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    *,
    rounded: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dsinks), the last one empty without sinks. rounded: p and dS are rounded to q's dtype."""
    acc = lse.dtype
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    low = torch.finfo(acc).min
    with full_precision(q.device.type):
        delta = (dout.to(acc) * out.to(acc)).sum(-1).transpose(-1, -2)  # (B, H, T), or packed (H, T)
        if dlse is not None:
            delta = delta - dlse
        dsinks = q.new_empty(0, dtype=acc)
        if sinks is not None:
            dsinks = (
                -(torch.exp(sinks.to(acc)[:, None] - lse.clamp(min=low)) * delta)
                .transpose(-1, -2)
                .flatten(0, -2)
                .sum(0)
            )
        for rows, cols, mask in _pieces(q, k, cu_seqlens_q, cu_seqlens_k, left, right):
            Q, K, V = _heads(q, rows), _heads(k, cols), _heads(v, cols)
            Out, dO, dQ = _heads(out, rows), _heads(dout, rows), _heads(dq, rows)
            L, Delta = _lse_heads(lse, rows), _lse_heads(delta, rows)
            dL = None if dlse is None else _lse_heads(dlse, rows)
            (B, H, _, C), Hkv = Q.shape, K.shape[1]
            Kb, Vb = _flat(K, Hkv, acc), _flat(V, Hkv, acc)
            dKb, dVb = torch.zeros_like(Kb), torch.zeros_like(Vb)
            for i, e, lo, hi in _blocks(Q, K, left, right, mask):
                p, slope = _scores(Q, Kb, i, e, lo, hi, scale, left, right, softcap, mask)
                p.sub_(_flat(L[:, :, i:e, None] * LOG2_E, Hkv, acc).clamp_(min=low)).exp2_()
                dOb = _flat(dO[:, :, i:e], Hkv, acc)
                dS = torch.bmm(dOb, Vb[:, lo:hi].transpose(1, 2))
                Outb = _flat(Out[:, :, i:e], Hkv, acc)
                D = (dOb * Outb).sum(-1, keepdim=True)
                if out.dtype != acc:  # out was rounded, but the row is all here and its sum is the same
                    terms = p * dS
                    exact = terms.sum(-1, keepdim=True)
                    if sinks is None:
                        exact /= p.sum(-1, keepdim=True).clamp(min=torch.finfo(acc).tiny)
                    D = _off_by_luck(D, exact, terms, dOb, Outb, q.dtype) if rounded else exact
                if dL is not None:
                    D = D - _flat(dL[:, :, i:e, None], Hkv, acc)
                dS.sub_(D).mul_(p)
                Delta[:, :, i:e] = D.view(B, H, e - i)
                if slope is not None:
                    dS.mul_(slope)
                if rounded:
                    p, dS = p.to(q.dtype).to(acc), dS.to(q.dtype).to(acc)
                Qb = _flat(Q[:, :, i:e], Hkv, acc)
                dVb[:, lo:hi].baddbmm_(p.transpose(1, 2), dOb)
                dKb[:, lo:hi].baddbmm_(dS.transpose(1, 2), Qb, alpha=scale)
                dQ[:, :, i:e] = torch.bmm(dS, Kb[:, lo:hi]).mul_(scale).view(B, H, e - i, C)
            _heads(dk, cols).copy_(dKb.view(K.shape))
            _heads(dv, cols).copy_(dVb.view(V.shape))
        if sinks is None:
            return dq, dk, dv, lse.new_empty(0)
        share = torch.exp(sinks.to(acc)[:, None] - lse.clamp(min=low))
        dsinks = -(share * delta).transpose(-1, -2).flatten(0, -2).sum(0)
        return dq, dk, dv, dsinks.to(sinks.dtype)


def attention_decode_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, scale: float, left: int, softcap: float
) -> Tensor:
    if q.device.type == "cpu" and cache_seqlens.numel():  # here the lengths can be read without stalling anything
        filled = slice(0, int(cache_seqlens.max()))
        k_cache, v_cache = k_cache[:, filled], v_cache[:, filled]
    window = None if left < 0 else left + 1
    return attention_decode(
        q, k_cache, v_cache, cache_seqlens, softmax_scale=scale, window=window, softcap=softcap
    ).contiguous()


def _heads(x: Tensor, rows: slice) -> Tensor:
    """(B, H, T, D) view of (B, T, H, D), or of the rows of one sequence of a packed (T, H, D)."""
    return x.transpose(1, 2) if x.dim() == 4 else x[rows].transpose(0, 1).unsqueeze(0)


def _flat(x: Tensor, Hkv: int, dtype: torch.dtype) -> Tensor:
    """(B * Hkv, heads of a group * rows, D) of (B, H, rows, D): what bmm takes. A view where strides allow."""
    B, H, T, D = x.shape
    return x.to(dtype).reshape(B * Hkv, H // Hkv * T, D)


def _lse_heads(x: Tensor, rows: slice) -> Tensor:
    """(B, H, T) view of (B, H, T), or of the columns of one sequence of a packed (H, T)."""
    return x if x.dim() == 3 else x[:, rows].unsqueeze(0)


def _pieces(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, left: int, right: int
) -> Iterator[Piece]:
    """What is computed at one go: everything, or on CPUs each sequence of a packed batch."""
    whole = slice(None)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        yield whole, whole, None
    elif q.device.type == "cpu":
        starts, key_starts = _sequences("q", cu_seqlens_q, q), _sequences("k", cu_seqlens_k, k)
        for b in range(len(starts) - 1):
            yield slice(starts[b], starts[b + 1]), slice(key_starts[b], key_starts[b + 1]), None
    else:  # the lengths are on the device, and asking for them would stall it
        where = positions(q.shape[0], k.shape[0], cu_seqlens_q, cu_seqlens_k, q.device)
        yield whole, whole, visible(*where, left, right)


def _sequences(name: str, cu_seqlens: Tensor, x: Tensor) -> list[int]:
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] > x.shape[0] or any(b < a for a, b in itertools.pairwise(starts)):
        raise ValueError(
            f"attention: cu_seqlens_{name} must rise from 0 to at most the {x.shape[0]} rows of {name}, got {starts}"
        )
    return starts


def _blocks(Q: Tensor, K: Tensor, left: int, right: int, mask: Tensor | None) -> Iterator[tuple[int, int, int, int]]:
    """(i, e, lo, hi): blocks of queries i to e, and the keys lo to hi that any of them sees."""
    (B, H, T, _), S = Q.shape, K.shape[2]
    step = QUERIES if Q.device.type == "cpu" else max(QUERIES, SCORES // max(1, B * H * S))
    for i in range(0, T, step):
        e = min(i + step, T)
        lo, hi = 0, S
        if mask is None:
            if left >= 0:
                lo = max(0, i + S - T - left)
            if right >= 0:
                hi = min(S, e + S - T + right)
        hi = max(hi, 0)
        yield i, e, min(lo, hi), hi


def _scores(
    Q: Tensor,
    Kb: Tensor,
    i: int,
    e: int,
    lo: int,
    hi: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Scores of a block times log2(e), -inf where masked, (B * Hkv, H / Hkv * rows, keys); and softcap's derivative."""
    (B, H, T, _), S = Q.shape, Kb.shape[1]
    unit = 1.0 if softcap else LOG2_E
    Qb = _flat(Q[:, :, i:e], Kb.shape[0] // max(1, B), Kb.dtype).mul(scale * unit)
    s = torch.bmm(Qb, Kb[:, lo:hi].transpose(1, 2))
    slope = None
    if softcap:
        s.div_(softcap).tanh_()
        slope = 1 - s * s
        s.mul_(softcap * LOG2_E)
    tile = s.view(B, H, e - i, hi - lo)
    if mask is not None:
        tile.masked_fill_(~mask[i:e], -math.inf)
        return s, slope
    # Row r is the query at key position i + r + S - T. Only the corners of the tile need a mask, and to add one is
    # several times faster than masked_fill.
    first = i + S - T - lo
    if right >= 0:
        clear = max(0, min(hi - lo, first + right + 1))
        tile[..., clear:].add_(_corner(tile, clear, hi - lo).triu_(first + right + 1 - clear))
    if left >= 0:
        end = max(0, min(hi - lo, first + (e - i) - 1 - left))
        tile[..., :end].add_(_corner(tile, 0, end).tril_(first - left - 1))
    return s, slope


def _corner(tile: Tensor, start: int, end: int) -> Tensor:
    return tile.new_full((tile.shape[-2], end - start), -math.inf)


def _per_row(sinks: Tensor, B: int, Hkv: int, rows: int) -> Tensor:
    """(B * Hkv, H / Hkv * rows, 1) of (H,)."""
    return _flat(sinks.view(1, -1, 1, 1).expand(B, -1, rows, 1), Hkv, sinks.dtype)


def why_not(*_: Any) -> list[str]:
    return []


EAGER = Impl(attention_fwd, attention_bwd, why_not)
EAGER_DECODE = Impl(attention_decode_fwd, None, why_not)


def _off_by_luck(D: Tensor, exact: Tensor, terms: Tensor, dO: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """D as a kernel may have it, that takes it as do . out from a rounded out, which itself came of rounded p.

    How far that is off is a row's luck, and the same for all its keys. Two standard deviations stand for it here, on
    the side where the row fell, or a lucky row would be a yardstick that nobody else can meet.
    """
    unit = torch.finfo(dtype).eps / math.sqrt(12)  # standard deviation of rounding to a spacing of eps
    spacing = torch.exp2(torch.floor(torch.log2(out.abs().clamp(min=torch.finfo(out.dtype).tiny))))
    spread = 2 * unit * ((dO * spacing).square().sum(-1, keepdim=True) + terms.square().sum(-1, keepdim=True)).sqrt()
    off = D - exact
    return exact + torch.where(off < 0, -1.0, 1.0) * torch.maximum(off.abs(), spread)


class _Yardstick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention_fwd(*args, rounded=True)
        ctx.save_for_backward(*args[:3], out, lse, *args[3:6])
        ctx.rest = args[6:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dout = torch.zeros_like(saved[3]) if dout is None else dout
        grads = attention_bwd(dout, dlse, *saved, *ctx.rest, rounded=True)
        return *grads[:3], grads[3] if saved[5] is not None else None, *[None] * 6


def yardstick(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.attention` that rounds p and dS to q's dtype, as the contract lets a kernel do, and nothing else."""
    left, right = bounds(options.get("causal", False), options.get("window"))
    cu_seqlens_q, cu_seqlens_k = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
    scale = scale_of(options.get("softmax_scale"), q)
    result: tuple[Tensor, Tensor] = _Yardstick.apply(
        q, k, v, options.get("sinks"), cu_seqlens_q, cu_seqlens_k, scale, left, right, options.get("softcap", 0.0)
    )
    return result if return_lse else result[0]
