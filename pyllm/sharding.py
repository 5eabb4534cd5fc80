"""How every op splits over ranks: rules for torch.distributed's DTensor, forward and backward.

A DTensor is a tensor of which every rank holds a part (`Shard(dim)`), the whole (`Replicate()`) or a term of a sum
(`Partial()`). When an op meets DTensors, torch asks which combinations the op can work on without talking, picks the
cheapest to bring about, and runs the op on each rank's part. For our ops the rules are simple, and the same for every
backend: rows, sequences and heads are independent, and the gradient of a weight that all rows share is a sum over them.

Without rules are the ops of generation; `linear`, which the model calls for plain parameters only; and the loss that
computes gradients in its forward pass, for which a rank would have to know how many rows count on the others.

A backward op needs a rule of its own. A wrong one is silent: with `Replicate` in place of `Partial`, each rank would
keep the gradient of its own rows and call it the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

Rule = tuple[list[Any], list[Any]]  # placements of the outputs, of the arguments (None for what is no tensor)

R = Replicate()
SUM = Partial()
_registered = False


def register_rules() -> None:
    """Tell torch the rules below; once is enough."""
    global _registered
    if _registered:
        return
    ops = torch.ops.pyllm
    for name, rule in RULES.items():
        register_sharding(getattr(ops, name).default)(rule)
    _registered = True


def _maybe(argument: Any, placement: Any) -> Any:
    """An optional tensor's placement: there is none where it wasn't given."""
    return None if argument is None else placement


def rms_norm(x: Any, weight: Any, *rest: Any) -> list[Rule]:
    """(y, rstd): each row by itself."""
    options = [None] * len(rest)
    return [([p, p], [p, R, *options]) for p in _rows(x)]


def rms_norm_bwd(dy: Any, x: Any, weight: Any, rstd: Any, *rest: Any) -> list[Rule]:
    """(dx, dweight): the weight's gradient is summed over rows."""
    options = [None] * len(rest)
    return [([p, _total(p)], [p, p, R, p, *options]) for p in _rows(x)]


def add_rms_norm(x: Any, residual: Any, weight: Any, *rest: Any) -> list[Rule]:
    options = [None] * len(rest)
    return [([p, p, p], [p, p, R, *options]) for p in _rows(x)]


def add_rms_norm_bwd(dy: Any, dh: Any, h: Any, weight: Any, rstd: Any, *rest: Any) -> list[Rule]:
    options = [None] * len(rest)
    return [([p, _total(p)], [p, _maybe(dh, p), p, R, p, *options]) for p in _rows(h)]


def rope(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any, *rest: Any) -> list[Rule]:
    """(q, k), forward and backward: by head, or by sequence. The angles belong to tokens, and are everywhere."""
    options = [None] * len(rest)
    rules = []
    for p in _heads_and_sequences(q, k):
        batched = isinstance(p, Shard) and p.dim == 0
        table = p if batched and cos.ndim == 3 and cos.shape[0] > 1 else R
        where = p if batched and position_ids is not None and position_ids.ndim == 2 else R
        where = R if position_ids is not None and position_ids.shape[0] == 1 else where
        rules.append(([p, p], [p, p, table, table, _maybe(position_ids, where), *options]))
    return rules


def qk_norm_rope(
    q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any, position_ids: Any, *rest: Any
) -> list[Rule]:
    """(q, k, rstd_q, rstd_k): by head only, as that is what tensor parallelism needs."""
    options = [None] * len(rest)
    tail = [R, R, R, R, _maybe(position_ids, R), *options]
    return [([p] * 4, [p, p, *tail]) for p in _heads_and_sequences(q, k, sequences=False)]


def qk_norm_rope_bwd(
    dq: Any, dk: Any, q: Any, k: Any, q_weight: Any, k_weight: Any, rstd_q: Any, rstd_k: Any, cos: Any, sin: Any,
    position_ids: Any, *rest: Any,
) -> list[Rule]:  # fmt: skip
    """(dq, dk, dq_weight, dk_weight): the weights are shared by all heads."""
    options = [None] * len(rest)
    tail = [R, R, _maybe(position_ids, R), *options]
    return [
        ([p, p, _total(p), _total(p)], [p, p, p, p, R, R, p, p, *tail])
        for p in _heads_and_sequences(q, k, sequences=False)
    ]


def attention(q: Any, k: Any, v: Any, sinks: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, *rest: Any) -> list[Rule]:
    """(out, lse): by head, in whole groups of those that share keys and values; by sequence unless packed."""
    options = [None] * len(rest)
    rules = []
    for p in _heads_and_sequences(q, k):
        packed = [_maybe(cu_seqlens_q, R), _maybe(cu_seqlens_k, R)]
        rules.append(([p, _of_lse(p)], [p, p, p, _maybe(sinks, _of_heads(p)), *packed, *options]))
    return rules


def attention_bwd(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, sinks: Any, cu_seqlens_q: Any,
    cu_seqlens_k: Any, *rest: Any,
) -> list[Rule]:  # fmt: skip
    """(dq, dk, dv, dsinks), the last one empty without sinks."""
    options = [None] * len(rest)
    rules = []
    for p in _heads_and_sequences(q, k):
        packed = [_maybe(cu_seqlens_q, R), _maybe(cu_seqlens_k, R)]
        whole_batch = not (isinstance(p, Shard) and p.dim == 0)
        dsinks = R if sinks is None else _of_heads(p) if whole_batch else SUM
        inputs = [p, _maybe(dlse, _of_lse(p)), p, p, p, p, _of_lse(p), _maybe(sinks, _of_heads(p)), *packed, *options]
        rules.append(([p, p, p, dsinks], inputs))
    return rules


def swiglu(gate: Any, up: Any, *rest: Any) -> list[Rule]:
    """Element by element: any dimension."""
    return [([p], [p, p, *[None] * len(rest)]) for p in _dims(gate.ndim)]


def swiglu_bwd(dy: Any, gate: Any, up: Any, *rest: Any) -> list[Rule]:
    return [([p, p], [p, p, p, *[None] * len(rest)]) for p in _dims(gate.ndim)]


def swiglu_packed(gate_up: Any, *rest: Any) -> list[Rule]:
    """Not the last dimension: a part of it would be gates without their ups."""
    return [([p], [p, *[None] * len(rest)]) for p in _rows(gate_up)]


def swiglu_packed_bwd(dy: Any, gate_up: Any, *rest: Any) -> list[Rule]:
    return [([p], [p, p, *[None] * len(rest)]) for p in _rows(gate_up)]


def cross_entropy(logits: Any, target: Any, weight: Any, *rest: Any) -> list[Rule]:
    """(loss, lse), one a row."""
    options = [None] * len(rest)
    return [([p, p], [p, p, _maybe(weight, R), *options]) for p in _rows(logits)]


def cross_entropy_bwd(dloss: Any, logits: Any, lse: Any, target: Any, weight: Any, *rest: Any) -> list[Rule]:
    options = [None] * len(rest)
    return [([p], [p, p, p, p, _maybe(weight, R), *options]) for p in _rows(logits)]


def linear_cross_entropy(
    input: Any, linear_weight: Any, target: Any, linear_bias: Any, weight: Any, *rest: Any
) -> list[Rule]:
    """(loss, lse, predictions): rows apart, each against the whole vocabulary."""
    options, predicts = [None] * len(rest), rest[4]
    tail = [_maybe(linear_bias, R), _maybe(weight, R), *options]
    return [([p, p, p if predicts else R], [p, R, p, *tail]) for p in _rows(input)]


def linear_cross_entropy_bwd(
    dloss: Any, input: Any, linear_weight: Any, lse: Any, target: Any, linear_bias: Any, weight: Any, *rest: Any
) -> list[Rule]:
    """(dinput, dlinear_weight, dlinear_bias), empty where not needed; the last two are sums over rows."""
    options = [None] * len(rest)
    needs_input, needs_weight, needs_bias = rest[4:7]
    needs_bias = needs_bias and linear_bias is not None
    rules = []
    for p in _rows(input):
        outputs = [p if needs_input else R, _total(p) if needs_weight else R, _total(p) if needs_bias else R]
        rules.append((outputs, [p, p, R, p, p, _maybe(linear_bias, R), _maybe(weight, R), *options]))
    return rules


RULES = {
    "rms_norm": rms_norm,
    "rms_norm_bwd": rms_norm_bwd,
    "add_rms_norm": add_rms_norm,
    "add_rms_norm_bwd": add_rms_norm_bwd,
    "rope": rope,
    "rope_bwd": rope,
    "qk_norm_rope": qk_norm_rope,
    "qk_norm_rope_bwd": qk_norm_rope_bwd,
    "attention": attention,
    "attention_bwd": attention_bwd,
    "swiglu": swiglu,
    "swiglu_bwd": swiglu_bwd,
    "swiglu_packed": swiglu_packed,
    "swiglu_packed_bwd": swiglu_packed_bwd,
    "cross_entropy": cross_entropy,
    "cross_entropy_bwd": cross_entropy_bwd,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy_bwd": linear_cross_entropy_bwd,
}


def _dims(ndim: int) -> list[Any]:
    return [R, *(Shard(d) for d in range(ndim))]


def _rows(x: Any) -> list[Any]:
    """Everything whole, or split along any dimension but the last."""
    return _dims(x.ndim - 1)


def _total(p: Any) -> Any:
    """Of what is summed over rows: a term of the sum where the rows are split."""
    return SUM if isinstance(p, Shard) else R


def _heads_and_sequences(q: Any, k: Any, sequences: bool = True) -> list[Any]:
    """Whole; by head where no group of query heads would be torn from its keys; by sequence in (B, T, H, D)."""
    found: list[Any] = [R]
    if k.shape[-2] % q.mesh.size() == 0:
        found.append(Shard(q.ndim - 2))
    if sequences and q.ndim == 4:
        found.append(Shard(0))
    return found


def _of_lse(p: Any) -> Any:
    """lse is (B, H, T), or (H, T) packed: heads stand one dimension earlier than in q."""
    return Shard(p.dim - 1) if isinstance(p, Shard) and p.dim > 0 else p


def _of_heads(p: Any) -> Any:
    """Of one number per query head: split with the heads, whole for split sequences."""
    return Shard(0) if isinstance(p, Shard) and p.dim > 0 else R
