"""Every bad input to an op: a ValueError that names the tensor, the rule and the value, before anything is computed."""

from __future__ import annotations

import re

import pytest
import torch

from pyllm.kernels import (
    OPS,
    add_rms_norm,
    apply_rope,
    attention,
    attention_decode,
    cross_entropy,
    linear,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    rope_append_kv,
    sample,
    swiglu,
    swiglu_packed,
)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def ints(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


INT = torch.int64
X, W = ones(2, 8), ones(8)
Q, K = ones(2, 3, 4, 8), ones(2, 5, 2, 8)
TABLE = ones(3, 4)
QP, KP = ones(6, 4, 8), ones(6, 2, 8)
CU = ints(0, 2, 6, dtype=torch.int32)
BLOCKS = ints(1, 2, 3, 4, 5, 6, 7, 8, dtype=torch.int32).view(2, 4)
NEW = ones(2, 3, 2, 8)
LOGITS, TARGET = ones(4, 10), ints(0, 1, 2, 3)
H, HW = ones(4, 8), ones(10, 8)


def decode_paged(block_table, cache=None):
    cache = ones(9, 5, 2, 8) if cache is None else cache
    return attention_decode(Q, cache, cache, ints(3, 3), block_table=block_table)


def append(**given):
    """A call with nothing wrong but what is given."""
    right = dict(q=Q, k=NEW, v=NEW, cos=ones(5, 4), sin=ones(5, 4), k_cache=K.clone(), v_cache=K.clone())
    return rope_append_kv(**{**right, "cache_seqlens": ints(3, 5), **given})


# (what is wrong, call, words that the message must have: the tensor, the rule, the value)
BAD = [
    ("integers", lambda: rms_norm(ones(2, 8, dtype=INT), W), "rms_norm: x .*floating point.*int64"),
    ("scalar", lambda: rms_norm(torch.tensor(1.0), W), "rms_norm: x .*dimension.*scalar"),
    ("weight's size", lambda: rms_norm(X, ones(7)), r"rms_norm: weight .*\(8,\).*\(7,\)"),
    ("weight's rank", lambda: rms_norm(X, ones(1, 8)), r"rms_norm: weight .*\(8,\).*\(1, 8\)"),
    ("weight's device", lambda: rms_norm(X, W.to("meta")), "rms_norm: weight .*cpu.*meta"),
    ("residual's shape", lambda: add_rms_norm(X, ones(3, 8), W), r"add_rms_norm: residual .*\(2, 8\).*\(3, 8\)"),
    ("residual's dtype", lambda: add_rms_norm(X, ones(2, 8, dtype=INT), W), "add_rms_norm: residual .*float.*int64"),
    ("residual's device", lambda: add_rms_norm(X, X.to("meta"), W), "add_rms_norm: residual .*cpu.*meta"),
    ("q's rank", lambda: apply_rope(ones(8), K, TABLE, TABLE), r"apply_rope: q .*\(8,\)"),
    ("odd head", lambda: apply_rope(ones(2, 3, 4, 7), ones(2, 3, 2, 7), ones(3, 7), ones(3, 7)), "apply_rope: .*7"),
    ("k's tokens", lambda: apply_rope(Q, K, TABLE, TABLE), r"apply_rope: k .*\(2, 5, 2, 8\)"),
    ("k's head", lambda: apply_rope(Q, ones(2, 3, 2, 6), TABLE, TABLE), r"apply_rope: k .*\(2, 3, 2, 6\)"),
    ("tables differ", lambda: apply_rope(Q, ones(2, 3, 2, 8), TABLE, ones(3, 8)), r"apply_rope: .*\(3, 8\)"),
    ("tables too wide", lambda: apply_rope(Q, ones(2, 3, 2, 8), ones(3, 10), ones(3, 10)), "apply_rope: .*10"),
    ("tables too short", lambda: apply_rope(Q, ones(2, 3, 2, 8), ones(2, 4), ones(2, 4)), "apply_rope: .*2"),
    ("rotary_dim", lambda: apply_rope(Q, ones(2, 3, 2, 8), TABLE, TABLE, rotary_dim=6), "apply_rope: .*rotary_dim.*6"),
    (
        "position out of the table",
        lambda: apply_rope(Q, ones(2, 3, 2, 8), TABLE, TABLE, position_ids=ints(0, 1, 3)),
        "apply_rope: position_ids .*3",
    ),
    (
        "positions as floats",
        lambda: apply_rope(Q, ones(2, 3, 2, 8), TABLE, TABLE, position_ids=ones(3)),
        "apply_rope: position_ids .*float32",
    ),
    (
        "no rows for positions",
        lambda: apply_rope(Q, ones(2, 3, 2, 8), ones(0, 4), ones(0, 4), position_ids=ints(0, 1, 2)),
        r"apply_rope: cos .*\(0, 4\)",
    ),
    ("k's head", lambda: qk_norm_rope(Q, ones(2, 3, 2, 6), W, W, TABLE, TABLE), r"qk_norm_rope: k .*\(2, 3, 2, 6\)"),
    ("weight's size", lambda: qk_norm_rope(Q, Q, ones(7), W, TABLE, TABLE), r"qk_norm_rope: q_weight .*\(8,\).*\(7,\)"),
    (
        "weight's dtype",
        lambda: qk_norm_rope(Q, Q, W, W.long(), TABLE, TABLE),
        "qk_norm_rope: k_weight .*floating point.*int64",
    ),
    (
        "weight's device",
        lambda: qk_norm_rope(Q, Q, W, W.to("meta"), TABLE, TABLE),
        "qk_norm_rope: k_weight .*cpu.*meta",
    ),
    (
        "position out of the table",
        lambda: qk_norm_rope(Q, Q, W, W, TABLE, TABLE, position_ids=ints(0, 1, 3)),
        "qk_norm_rope: position_ids .*3",
    ),
    ("shapes differ", lambda: swiglu(X, ones(2, 7)), r"swiglu: up .*\(2, 8\).*\(2, 7\)"),
    ("dtypes differ", lambda: swiglu(X, X.bfloat16()), "swiglu: up .*float32.*bfloat16"),
    ("integers", lambda: swiglu(X.long(), X.long()), "swiglu: gate .*floating point.*int64"),
    ("odd width", lambda: swiglu_packed(ones(2, 7)), r"swiglu_packed: gate_up .*(even|2F).*7"),
    ("heads don't divide", lambda: attention(Q, ones(2, 5, 3, 8), ones(2, 5, 3, 8)), r"attention: .*4.*3"),
    ("head sizes differ", lambda: attention(Q, ones(2, 5, 2, 6), ones(2, 5, 2, 6)), "attention: k .*8.*6"),
    ("batches differ", lambda: attention(Q, ones(3, 5, 2, 8), ones(3, 5, 2, 8)), r"attention: k .*\(3, 5, 2, 8\)"),
    ("k and v differ", lambda: attention(Q, K, ones(2, 6, 2, 8)), r"attention: v .*\(2, 6, 2, 8\)"),
    ("dtypes differ", lambda: attention(Q, K.half(), K.half()), "attention: k .*float32.*float16"),
    ("rank", lambda: attention(QP, KP, KP), r"attention: q .*\(6, 4, 8\)"),
    ("window of none", lambda: attention(Q, K, K, window=0), "attention: window .*0"),
    ("softcap below zero", lambda: attention(Q, K, K, softcap=-1.0), "attention: softcap .*-1"),
    ("sinks' size", lambda: attention(Q, K, K, sinks=ones(3)), r"attention: sinks .*4.*\(3,\)"),
    ("cu_seqlens_k alone", lambda: attention(Q, K, K, cu_seqlens_k=CU), "attention: .*cu_seqlens_q"),
    ("cu_seqlens' dtype", lambda: attention(QP, KP, KP, cu_seqlens_q=CU.float()), "attention: cu_seqlens_q .*float32"),
    (
        "cu_seqlens too long",
        lambda: attention(QP, KP, KP, cu_seqlens_q=ints(0, 2, 9, dtype=torch.int32)),
        "attention: cu_seqlens_q .*9",
    ),
    ("lengths' shape", lambda: attention_decode(Q, K, K, ints(1)), r"attention_decode: cache_seqlens .*2.*\(1,\)"),
    ("lengths' dtype", lambda: attention_decode(Q, K, K, ones(2)), "attention_decode: cache_seqlens .*float32"),
    ("cache too short", lambda: attention_decode(Q, K, K, ints(3, 6)), "attention_decode: cache_seqlens .*6"),
    ("blocks' shape", lambda: decode_paged(ones(3, 4).int()), r"attention_decode: block_table .*2.*\(3, 4\)"),
    ("blocks' dtype", lambda: decode_paged(ones(2, 4)), "attention_decode: block_table .*int32.*float32"),
    (
        "blocks of nothing",
        lambda: decode_paged(BLOCKS, ones(9, 0, 2, 8)),
        r"attention_decode: k_cache .*\(9, 0, 2, 8\)",
    ),
    ("blocks' heads", lambda: decode_paged(BLOCKS, ones(9, 5, 2, 6)), r"attention_decode: k_cache .*\(9, 5, 2, 6\)"),
    ("too few blocks", lambda: decode_paged(BLOCKS[:, :0]), "attention_decode: cache_seqlens .*0 keys.*3"),
    ("no such block", lambda: decode_paged(BLOCKS + 9), r"attention_decode: block_table .*\[0, 9\).*10"),
    (
        "gradient of decode",
        lambda: attention_decode(Q.clone().requires_grad_(), K, K, ints(3, 5)),
        "attention_decode: .*gradient",
    ),
    ("rank", lambda: append(q=QP), r"rope_append_kv: q .*\(6, 4, 8\)"),
    ("integers", lambda: append(q=Q.long()), "rope_append_kv: q .*floating point.*int64"),
    ("tokens differ", lambda: append(k=K), r"rope_append_kv: k .*\(2, 5, 2, 8\)"),
    ("k and v differ", lambda: append(v=ones(2, 3, 1, 8)), r"rope_append_kv: v .*\(2, 3, 1, 8\)"),
    ("dtypes differ", lambda: append(v=NEW.half()), "rope_append_kv: v .*float32.*float16"),
    ("table's rank", lambda: append(cos=ones(2, 5, 8)), r"rope_append_kv: cos .*\(2, 5, 8\)"),
    ("tables differ", lambda: append(sin=ones(5, 3)), r"rope_append_kv: sin .*\(5, 4\).*\(5, 3\)"),
    ("tables too wide", lambda: append(cos=ones(5, 9), sin=ones(5, 9)), "rope_append_kv: cos .*head_dim 8.*9"),
    ("tables as integers", lambda: append(cos=ones(5, 4).int()), "rope_append_kv: cos and sin .*int32"),
    ("cache's heads", lambda: append(k_cache=ones(2, 5, 1, 8)), r"rope_append_kv: k_cache .*\(2, 5, 1, 8\)"),
    ("cache's batch", lambda: append(k_cache=ones(3, 5, 2, 8)), r"rope_append_kv: k_cache .*\(3, 5, 2, 8\)"),
    ("caches differ", lambda: append(v_cache=ones(2, 6, 2, 8)), r"rope_append_kv: v_cache .*\(2, 6, 2, 8\)"),
    ("cache's dtype", lambda: append(k_cache=K.half()), "rope_append_kv: k_cache .*float32.*float16"),
    ("cache's device", lambda: append(v_cache=K.to("meta")), "rope_append_kv: v_cache .*cpu.*meta"),
    ("lengths' shape", lambda: append(cache_seqlens=ints(1)), r"rope_append_kv: cache_seqlens .*2.*\(1,\)"),
    ("cache too short", lambda: append(cache_seqlens=ints(3, 6)), "rope_append_kv: cache_seqlens .*5 places.*6"),
    ("tables too short", lambda: append(cos=ones(4, 4), sin=ones(4, 4)), "rope_append_kv: cache_seqlens .*4 rows.*5"),
    ("blocks' shape", lambda: append(block_table=BLOCKS[0]), r"rope_append_kv: block_table .*2.*\(4,\)"),
    ("no such block", lambda: append(block_table=BLOCKS + 9), r"rope_append_kv: block_table .*\[0, 2\).*10"),
    ("gradient", lambda: append(q=Q.clone().requires_grad_()), "rope_append_kv: .*gradient"),
    ("targets' shape", lambda: cross_entropy(LOGITS, ints(0, 1)), r"cross_entropy: target .*\(4,\).*\(2,\)"),
    ("targets as floats", lambda: cross_entropy(LOGITS, ones(4)), "cross_entropy: target .*int64.*float32"),
    ("no classes", lambda: cross_entropy(ones(4, 0), TARGET), r"cross_entropy: logits .*\(4, 0\)"),
    ("integers", lambda: cross_entropy(LOGITS.long(), TARGET), "cross_entropy: logits .*floating point.*int64"),
    ("weights' size", lambda: cross_entropy(LOGITS, TARGET, ones(9)), r"cross_entropy: weight .*\(10,\).*\(9,\)"),
    ("reduction", lambda: cross_entropy(LOGITS, TARGET, reduction="avg"), "cross_entropy: reduction .*'avg'"),
    ("smoothing", lambda: cross_entropy(LOGITS, TARGET, label_smoothing=1.5), "cross_entropy: label_smoothing .*1.5"),
    ("z-loss", lambda: cross_entropy(LOGITS, TARGET, z_loss=-1.0), "cross_entropy: z_loss .*-1"),
    ("hidden sizes", lambda: linear_cross_entropy(H, ones(10, 7), TARGET), r"linear_cross_entropy: linear_weight .*7"),
    ("dtypes", lambda: linear_cross_entropy(H, HW.half(), TARGET), "linear_cross_entropy: linear_weight .*float16"),
    (
        "bias",
        lambda: linear_cross_entropy(H, HW, TARGET, linear_bias=ones(9)),
        r"linear_cross_entropy: linear_bias .*\(10,\).*\(9,\)",
    ),
    ("targets' shape", lambda: linear_cross_entropy(H, HW, ints(0)), r"linear_cross_entropy: target .*\(4,\).*\(1,\)"),
    ("integers", lambda: linear(X.long(), HW), "linear: x .*floating point.*int64"),
    ("scalar", lambda: linear(torch.tensor(1.0), HW), "linear: x .*scalar"),
    ("weight's shape", lambda: linear(X, ones(10, 7)), r"linear: weight .*8.*\(10, 7\)"),
    ("weight's dtype", lambda: linear(X, HW.half()), "linear: weight .*float32.*float16"),
    ("weight's device", lambda: linear(X, HW.to("meta")), "linear: weight .*cpu.*meta"),
    ("bias's shape", lambda: linear(X, HW, ones(9)), r"linear: bias .*\(10,\).*\(9,\)"),
    ("rank", lambda: sample(ones(3)), r"sample: logits .*\(B, V\).*\(3,\)"),
    ("no vocabulary", lambda: sample(ones(3, 0)), r"sample: logits .*at least 1.*\(3, 0\)"),
    ("integers", lambda: sample(ones(3, 4).int()), "sample: logits .*floating point.*int32"),
    ("numbers' shape", lambda: sample(ones(3, 4), ones(2).double()), r"sample: uniform .*\(3,\) float64.*\(2,\)"),
    ("numbers' dtype", lambda: sample(ones(3, 4), ones(3)), "sample: uniform .*float64.*float32"),
    ("numbers' device", lambda: sample(ones(3, 4), ones(3).double().to("meta")), "sample: uniform .*cpu.*meta"),
    ("no temperature", lambda: sample(ones(3, 4), temperature=0.0), "sample: temperature .*above 0.*argmax"),
    ("temperature", lambda: sample(ones(3, 4), temperature=float("nan")), "sample: temperature .*nan"),
    ("top-k", lambda: sample(ones(3, 4), top_k=-1), "sample: top_k .*-1"),
    ("half a top-k", lambda: sample(ones(3, 4), top_k=2.5), r"sample: top_k .*2\.5"),
    ("top-p", lambda: sample(ones(3, 4), top_p=1.5), r"sample: top_p .*between 0 and 1.*1\.5"),
    ("min-p", lambda: sample(ones(3, 4), min_p=-0.1), r"sample: min_p .*between 0 and 1.*-0\.1"),
]


@pytest.mark.parametrize(("wrong", "call", "words"), BAD, ids=[f"{b[2].split(':')[0]}: {b[0]}" for b in BAD])
def test_bad_input(wrong, call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_every_op_is_listed():
    listed = {re.match(r"\w+", words)[0] for _, _, words in BAD}
    assert listed == set(OPS)


@pytest.mark.parametrize("op", [cross_entropy, lambda x, t: linear_cross_entropy(H, HW, t)])
@pytest.mark.parametrize("bad", [10, -1])
def test_target_out_of_range_raises_as_torch_does(op, bad):
    target = ints(0, bad, 2, 3)
    with pytest.raises(IndexError):
        torch.nn.functional.cross_entropy(LOGITS, target)
    with pytest.raises(IndexError) as error:
        op(LOGITS, target)
    assert isinstance(error.value, ValueError)  # as every other bad input
    assert re.search(rf"target .*\[0, 10\).*-100.*got {bad}$", str(error.value))


@pytest.mark.parametrize("name", OPS)
def test_unknown_backend_is_named(name):
    spec = OPS[name]
    inputs = spec.inputs(**next(iter(spec.cases.values())), dtype=torch.float32)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        spec.function(**inputs, backend="gpu")
