"""Bit for bit the same numbers for a row, whatever stands around it: `with pyllm.batch_invariant():`, float32 on CPUs.

Sums of floating point numbers depend on their order, and libraries choose the order by the shape: BLAS has other
kernels for one row than for many, a reduction over 30 keys groups them otherwise than one over 41. Here every sum is
taken in an order that the row alone decides:

- Products of matrices are taken in blocks of ROWS rows, the last one filled up with zeros: one shape, one kernel.
- Attention goes over keys in blocks of KEYS, counted from the first, the last one filled up with zeros, and the
  softmax's denominator is one more column of the product with v. `generate` makes no rings, which hold keys in another
  order.

So a prompt's logits are the same alone and in any batch, padded or not, in one pass, in chunks, or token by token. That
this holds for the BLAS at hand is what tests/model/test_generate_invariance.py is for. It costs speed (a single row is
computed as sixteen), so it is for comparisons and for tracking down differences, not the default.

Names: B batch, T queries, S keys, H query heads, Hkv key-value heads, G = H / Hkv, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import kernels  # noqa: F401  (registers the ops named below)

ROWS, KEYS = 16, 128


class batch_invariant(TorchDispatchMode):  # noqa: N801  (used as a function, like torch.no_grad)
    """Within it the model's forward and `generate` (not beams) compute each row as if it were alone. No gradients.

    Raises:
        ValueError: inside, for a product or attention that is not float32 on a CPU.
    """

    active = 0  # how many are entered

    def __enter__(self) -> Any:
        batch_invariant.active += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        batch_invariant.active -= 1
        return super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, ops = torch.ops.aten, torch.ops.pyllm
        if func is aten.mm.default:
            return _by_blocks(args[0], lambda rows: aten.mm(rows, args[1]))
        if func is aten.addmm.default and not kwargs:
            return _by_blocks(args[1], lambda rows: aten.addmm(args[0], rows, args[2]))
        if func is ops.linear.default:  # what takes the place of mm in half precision
            _checked(args[0])
        if func in (ops.attention.default, ops.attention_decode.default):
            names = [argument.name for argument in func._schema.arguments]
            return _attention(dict(zip(names, args, strict=False)), func is ops.attention_decode.default)
        return func(*args, **(kwargs or {}))


def _checked(x: Tensor) -> None:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"batch_invariant: for float32 on a CPU only, got {x.dtype} on {x.device.type}")


def _by_blocks(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """product(x) of x (M, K), ROWS rows at a time."""
    _checked(x)
    M = x.shape[0]
    parts = F.pad(x, (0, 0, 0, -M % ROWS)).split(ROWS)
    return torch.cat([product(part) for part in parts])[:M] if M else product(x)


def _attention(given: dict[str, Any], decode: bool) -> Any:
    """The op's result; given: its arguments by name."""
    barred = [name for name in ("sinks", "cu_seqlens_q", "block_table") if given.get(name) is not None]
    barred += ["softcap"] if given["softcap"] else []
    if barred or given.get("right", 0) != 0:
        raise ValueError(f"batch_invariant: for causal attention without extras, got {barred or 'no causality'}")
    q = given["q"]
    if decode:
        return _decode(q, given["k_cache"], given["v_cache"], given["cache_seqlens"], given["scale"], given["left"])
    lengths = torch.full((q.shape[0],), given["k"].shape[1])
    out = _decode(q, given["k"], given["v"], lengths, given["scale"], given["left"])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1])  # nobody looks at lse without a gradient


def _decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, left: int) -> Tensor:
    """Causal attention of the last T of lengths[b] tokens, (B, T, H, D); k, v (B, S, Hkv, D)."""
    _checked(q)
    (B, T, H, D), Hkv = q.shape, k.shape[2]
    G, S = H // Hkv, int(lengths.max())
    blocks = -(-S // KEYS)
    query = (lengths[:, None] - T + torch.arange(T))[:, :, None]  # (B, T, 1) its place among the keys
    key = torch.arange(blocks * KEYS)
    seen = (key <= query) & ((key > query - left - 1) if left >= 0 else True)  # (B, T, keys)
    out = q.new_zeros(B, T, H, D)
    for b in range(B):  # a row at a time: what a batched product does with its rows is not ours to know
        for h in range(Hkv):
            rows = q[b, :, h * G : (h + 1) * G].reshape(T * G, D) * scale
            keys = F.pad(k[b, :S, h], (0, 0, 0, blocks * KEYS - S)).view(blocks, KEYS, D)
            values = F.pad(v[b, :S, h], (0, 1, 0, blocks * KEYS - S)).view(blocks, KEYS, D + 1)
            values[..., D] = 1.0
            hidden = ~seen[b].repeat_interleave(G, 0).view(T * G, blocks, KEYS)
            scores = torch.stack([_by_blocks(rows, block.T.__rmatmul__) for block in keys], 1)
            scores.masked_fill_(hidden, -torch.inf)
            top = scores.amax((1, 2), keepdim=True).clamp(min=torch.finfo(q.dtype).min)
            weights = (scores - top).exp()
            total = q.new_zeros(T * G, D + 1)
            for i, block in enumerate(values):
                total += _by_blocks(weights[:, i], block.__rmatmul__)
            out[b, :, h * G : (h + 1) * G] = (total[:, :D] / total[:, D:].clamp(min=1.0)).view(T, G, D)
    return out
