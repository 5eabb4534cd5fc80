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
    """(out, lse). rounded: p is rounded to q's dtype before it meets v, as half-precision matrix units want it, and
    scores are as far off as another order of their sums may put them."""
    acc = torch.promote_types(q.dtype, torch.float32)
    low = torch.finfo(acc).min
    out = q.new_zeros(q.shape)
    lse = q.new_full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -math.inf, dtype=acc)
    with full_precision(q.device.type):
        if sinks is not None:  # rows past the last sequence of a packed batch see nothing, but their sink
            lse.copy_(sinks[:, None])
        for rows, cols, mask in _pieces(q, k, cu_seqlens_q, cu_seqlens_k, left, right):
            Q, K, Out, L = _heads(q, rows), _heads(k, cols), _heads(out, rows), _lse_heads(lse, rows)
            (B, H, _, C), Hkv = Q.shape, K.shape[1]
            scores = _Scores(Q, K, acc, scale, left, right, softcap, mask)
            Vb = _flat(_heads(v, cols), Hkv, acc)
            for i, e, lo, hi in scores.blocks():
                p, slope, Qb = scores(i, e, lo, hi)
                if rounded:
                    p.add_(_other_order(p, slope, Qb, scores.K[:, lo:hi]))
                m = p.amax(-1, keepdim=True) if hi > lo else p.new_full((*p.shape[:-1], 1), -math.inf)
                if sinks is not None:
                    sink = _flat((sinks.to(acc) * LOG2_E).view(1, H, 1, 1).expand(B, H, e - i, 1), Hkv, acc)
                    m = torch.maximum(m, sink)
                m.clamp_(min=low)  # a row that sees nothing: -inf - low is still -inf, and exp2 of it 0
                p.sub_(m).exp2_()
                total = p.sum(-1, keepdim=True)
                if sinks is not None:
                    total += torch.exp2(sink - m)
                if rounded:
                    p = p.to(q.dtype).to(acc)
                # The maximum itself adds 1 to the total, wherever there is one.
                Out[:, :, i:e] = torch.bmm(p, Vb[:, lo:hi]).div_(total.clamp(min=1.0)).view(B, H, e - i, C)
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
    with full_precision(q.device.type):
        base2 = (lse * LOG2_E).clamp_(min=torch.finfo(acc).min)  # where nothing is seen: -inf - this is still -inf
        delta = (dout.to(acc) * out.to(acc)).sum(-1).transpose(-1, -2).contiguous()  # D of the formulas, as lse
        if dlse is not None:
            delta -= dlse
        for rows, cols, mask in _pieces(q, k, cu_seqlens_q, cu_seqlens_k, left, right):
            Q, K, Out = _heads(q, rows), _heads(k, cols), _heads(out, rows)
            dO, dQ = _heads(dout, rows), _heads(dq, rows)
            L, Delta = _lse_heads(base2, rows), _lse_heads(delta, rows)
            dL = None if dlse is None else _lse_heads(dlse, rows)
            (B, H, _, C), Hkv = Q.shape, K.shape[1]
            scores = _Scores(Q, K, acc, scale, left, right, softcap, mask)
            Kb, Vb = scores.K, _flat(_heads(v, cols), Hkv, acc)
            dKb, dVb = torch.zeros_like(Kb), torch.zeros_like(Vb)
            for i, e, lo, hi in scores.blocks():
                p, slope, Qb = scores(i, e, lo, hi)
                p.sub_(_flat(L[:, :, i:e, None], Hkv, acc)).exp2_()
                dOb = _flat(dO[:, :, i:e], Hkv, acc)
                dS = torch.bmm(dOb, Vb[:, lo:hi].transpose(1, 2))
                D = _flat(Delta[:, :, i:e, None], Hkv, acc)
                if rounded or out.dtype != acc:  # out was rounded, but the row is all here and its sum is the same
                    terms = p * dS
                    exact = terms.sum(-1, keepdim=True)
                    if sinks is None:
                        exact /= p.sum(-1, keepdim=True).clamp(min=torch.finfo(acc).tiny)
                    if dL is not None:
                        exact -= _flat(dL[:, :, i:e, None], Hkv, acc)
                    D = (
                        _off_by_luck(D, exact, terms, dOb, _flat(Out[:, :, i:e], Hkv, acc), q.dtype)
                        if rounded
                        else exact
                    )
                    Delta[:, :, i:e] = D.view(B, H, e - i)
                dS.sub_(D).mul_(p)
                if slope is not None:
                    dS.mul_(slope)
                if rounded:
                    p, dS = p.to(q.dtype).to(acc), dS.to(q.dtype).to(acc)
                dVb[:, lo:hi].baddbmm_(p.transpose(1, 2), dOb)
                dKb[:, lo:hi].baddbmm_(dS.transpose(1, 2), Qb, alpha=1 / scores.unit)
                dQ[:, :, i:e] = torch.bmm(dS, Kb[:, lo:hi]).mul_(scale).view(B, H, e - i, C)
            _heads(dk, cols).copy_(dKb.view(K.shape))
            _heads(dv, cols).copy_(dVb.view(K.shape))
        if sinks is None:
            return dq, dk, dv, lse.new_empty(0)
        share = torch.exp2(sinks.to(acc)[:, None] * LOG2_E - base2)
        dsinks = -(share * delta).transpose(-1, -2).flatten(0, -2).sum(0)
        return dq, dk, dv, dsinks.to(sinks.dtype)


def attention_decode_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> Tensor:
    if q.device.type == "cpu" and cache_seqlens.numel():  # here the lengths can be read without stalling anything
        longest = max(0, int(cache_seqlens.max()))
        if block_table is None:
            capacity = k_cache.shape[1]
            k_cache, v_cache = k_cache[:, :longest], v_cache[:, :longest]
        else:
            capacity = block_table.shape[1] * k_cache.shape[1]
            block_table = block_table[:, : -(-longest // k_cache.shape[1])]
        if longest > capacity:
            raise ValueError(
                f"attention_decode: cache_seqlens must be at most the cache's {capacity} keys, got {longest}"
            )
        if block_table is not None:
            check_blocks("attention_decode", block_table, cache_seqlens, *k_cache.shape[:2])
    window = None if left < 0 else left + 1
    options: dict[str, Any] = dict(block_table=block_table, softmax_scale=scale, window=window, softcap=softcap)
    return attention_decode(q, k_cache, v_cache, cache_seqlens, **options).contiguous()


def check_blocks(op: str, block_table: Tensor, cache_seqlens: Tensor, n_blocks: int, block_size: int) -> None:
    """Raises where an entry of the table that a length covers is no block of the cache. Reads the tensors: on CPUs."""
    used = torch.arange(block_table.shape[1]) * block_size < cache_seqlens[:, None]
    bad = used & ((block_table < 0) | (block_table >= n_blocks))
    if bool(bad.any()):
        raise ValueError(
            f"{op}: block_table must name blocks in [0, {n_blocks}) as far as cache_seqlens reaches, "
            f"got {int(block_table[bad][0])}"
        )


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


class _Scores:
    """Scores of one piece times log2(e), by blocks of queries; -inf where query and key don't meet."""

    def __init__(
        self,
        Q: Tensor,
        K: Tensor,
        acc: torch.dtype,
        scale: float,
        left: int,
        right: int,
        softcap: float,
        mask: Tensor | None,
    ):
        self.Q, self.Hkv, self.K = Q, K.shape[1], _flat(K, K.shape[1], acc)
        self.left, self.right, self.mask, self.softcap = left, right, mask, softcap
        self.shift = K.shape[2] - Q.shape[2]  # query i is at the position of key i + shift
        self.unit = 1.0 if softcap else LOG2_E
        self.factor = scale * self.unit

    def blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """(i, e, lo, hi): blocks of queries i to e, and the keys lo to hi that any of them sees."""
        (B, H, T, _), S = self.Q.shape, self.K.shape[1]
        step = QUERIES if self.Q.device.type == "cpu" else max(QUERIES, SCORES // max(1, B * H * S))
        for i in range(0, T if B * H else 0, step):
            e, lo, hi = min(i + step, T), 0, S
            if self.mask is None and self.left >= 0:
                lo = max(0, i + self.shift - self.left)
            if self.mask is None and self.right >= 0:
                hi = max(0, min(S, e + self.shift + self.right))
            yield i, e, min(lo, hi), hi

    def __call__(self, i: int, e: int, lo: int, hi: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """The scores (B * Hkv, H / Hkv * queries, keys), softcap's derivative there, and the queries times `factor`."""
        Qb = _flat(self.Q[:, :, i:e], self.Hkv, self.K.dtype).mul(self.factor)
        s = torch.bmm(Qb, self.K[:, lo:hi].transpose(1, 2))
        slope = None
        if self.softcap:
            s.div_(self.softcap).tanh_()
            slope = 1 - s * s
            s.mul_(self.softcap * LOG2_E)
        tile = s.view(*self.Q.shape[:2], e - i, hi - lo)
        if self.mask is not None:
            tile.masked_fill_(~self.mask[i:e], -math.inf)
            return s, slope, Qb
        # Only the corners of the tile need a mask, and to add one is several times faster than masked_fill.
        first = i + self.shift - lo  # the column of row 0's own key
        if self.right >= 0:
            clear = max(0, min(hi - lo, first + self.right + 1))
            corner = s.new_full((e - i, hi - lo - clear), -math.inf)
            tile[..., clear:].add_(corner.triu_(first + self.right + 1 - clear))
        if self.left >= 0:
            end = max(0, min(hi - lo, e - i - 1 + first - self.left))
            tile[..., :end].add_(s.new_full((e - i, end), -math.inf).tril_(first - self.left - 1))
        return s, slope, Qb


def why_not(*_: Any) -> list[str]:
    return []


EAGER = Impl(attention_fwd, attention_bwd, why_not)
EAGER_DECODE = Impl(attention_decode_fwd, None, why_not)


def _off_by_luck(D: Tensor, exact: Tensor, terms: Tensor, dO: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """D as a kernel may have it, that takes it as do . out from a rounded out, which itself came of rounded p.

    How far that is off is a row's luck, and the same for all its keys. Two standard deviations stand for it here, or a
    lucky row would be a yardstick that nobody else can meet. The side is drawn: a key's gradient sums over queries,
    whose errors add up or cancel, and another draw tells by how much.
    """
    unit = torch.finfo(dtype).eps / math.sqrt(12)  # standard deviation of rounding to a spacing of eps
    if dtype == out.dtype:  # float32, where the sums of products round as often as out did
        unit *= 4
    spacing = torch.exp2(torch.floor(torch.log2(out.abs().clamp(min=torch.finfo(out.dtype).tiny))))
    spread = 2 * unit * ((dO * spacing).square().sum(-1, keepdim=True) + terms.square().sum(-1, keepdim=True)).sqrt()
    off = D - exact
    side = torch.where(torch.rand_like(off) < 0.5, -1.0, 1.0)
    return exact + side * torch.maximum(off.abs(), spread)


def _other_order(s: Tensor, slope: Tensor | None, Qb: Tensor, Kb: Tensor) -> Tensor:
    """How far a kernel's scores may be from these: by eps |q| |k|, the usual error of a sum in some other order.

    Scores that are large and differ little (mean 8: 300 and 301) have p, out and, by do . out, every gradient of a row
    hang on these few last bits. Without this they would be one order's luck, and a backward would be measured with
    scores that agree to the bit with the forward's, which no other backend's do.
    """
    size = Qb.norm(dim=-1, keepdim=True) * Kb.norm(dim=-1).unsqueeze(-2)
    if slope is not None:
        size = size * slope * LOG2_E + s.abs().masked_fill(s == -math.inf, 0.0)  # the tanh has an error of its own
    return torch.randn_like(s).mul_(torch.finfo(s.dtype).eps).mul_(size)


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
