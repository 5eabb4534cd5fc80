"""Attention's backward in Triton: every feature at the edges of its tiles, and the laws its gradients obey."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from harness.accuracy import check
from harness.machines import DEVICE, DTYPES
from torch import Tensor

from pyllm.kernels import OPS, triton_support
from pyllm.kernels.attention import attention, eager, reference

if not triton_support.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

from pyllm.kernels.attention import triton_bwd, triton_common

TILE = 16
SPEC = OPS["attention"]
CASES = {
    # Sizes: a tile, one more and one less, fewer queries than keys and more, one of each.
    "exact": dict(T=32, S=48, H=2, Hkv=2, D=16),
    "one-more": dict(T=17, S=33, H=2, Hkv=1, D=16),
    "one-less": dict(T=31, S=15, H=2, Hkv=1, D=16),
    "one-query": dict(B=2, T=1, S=21, H=2, Hkv=1, D=16, causal=True),
    "one-key": dict(B=2, T=21, S=1, H=2, Hkv=1, D=16),
    "causal-ragged": dict(B=2, T=20, S=20, H=2, Hkv=1, D=16, causal=True),
    "causal-T<S": dict(T=20, S=45, H=2, Hkv=2, D=16, causal=True),
    "causal-T>S": dict(T=45, S=20, H=2, Hkv=2, D=16, causal=True),  # 25 queries see nothing
    # Heads: groups of 1, 2, 4, 8; dimensions that fill no tile.
    "group-4": dict(T=18, S=18, H=8, Hkv=2, D=16, causal=True),
    "group-8": dict(T=9, S=18, H=8, Hkv=1, D=32, causal=True),
    "D-24": dict(T=18, S=20, H=2, Hkv=1, D=24, causal=True),
    "D-5": dict(T=18, S=20, H=2, Hkv=1, D=5),
    "D-256": dict(T=9, S=9, H=1, Hkv=1, D=256),
    # Windows that end on a tile's edge, beside it, and before the first key or after the last.
    "window-16": dict(T=50, S=50, H=2, Hkv=1, D=16, causal=True, window=16),
    "window-17": dict(T=50, S=50, H=2, Hkv=1, D=16, causal=True, window=17),
    "window-1": dict(T=35, S=35, H=2, Hkv=1, D=16, causal=True, window=1),
    "window-both": dict(T=40, S=52, H=2, Hkv=1, D=16, window=(15, 16)),
    "window-left": dict(T=52, S=40, H=2, Hkv=1, D=16, window=(3, -1)),
    "window-right": dict(T=40, S=52, H=2, Hkv=1, D=16, window=(-1, 20)),
    "window-T>S": dict(T=60, S=20, H=2, Hkv=1, D=16, window=(2, 18)),
    "softcap": dict(T=20, S=35, H=2, Hkv=1, D=16, causal=True, softcap=1.5),
    "sinks": dict(B=2, T=24, S=20, H=2, Hkv=1, D=16, causal=True, sinks=True),
    # Packed: empty sequences first, last and between, one row, whole tiles, more keys than queries and fewer.
    "packed": dict(lengths=(0, 16, 1, 0, 35, 15, 0), H=2, Hkv=1, D=16, causal=True),
    "packed-T-S": dict(lengths=(20, 3, 0, 17), key_lengths=(5, 33, 7, 0), H=2, Hkv=1, D=16, causal=True, sinks=True),
    "packed-window": dict(lengths=(40, 9, 20), H=1, Hkv=1, D=16, causal=True, window=12),
    "packed-full": dict(lengths=(18, 30), key_lengths=(31, 4), H=2, Hkv=1, D=16, softcap=2.0),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, so that a few dozen rows are several of them, on the path that Hopper takes."""
    tiles = triton_bwd.Tiles(TILE, TILE, 4, 2)
    monkeypatch.setattr(triton_bwd, "config", lambda *_: (tiles, tiles))


def make(dtype: torch.dtype = torch.float32, seed: int = 5, **case) -> dict:
    return SPEC.inputs(**case, dtype=dtype, device=DEVICE, generator=torch.Generator().manual_seed(seed))


def backward(dout: Tensor, dlse: Tensor | None = None, bwd=triton_bwd.attention_bwd, **inputs) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dsinks) of the kernels, after eager's forward, on the CPU, where each sequence goes by itself."""
    left, right = reference.bounds(inputs.get("causal", False), inputs.get("window"))
    scale = reference.scale_of(inputs.get("softmax_scale"), inputs["q"])
    tensors = [inputs.get(n) for n in ("sinks", "cu_seqlens_q", "cu_seqlens_k")]
    q, k, v, options = inputs["q"], inputs["k"], inputs["v"], (scale, left, right, inputs.get("softcap", 0.0))
    on_cpu = [None if t is None else t.cpu() for t in (q, k, v, *tensors)]
    out, lse = (t.to(q.device) for t in eager.attention_fwd(*on_cpu, *options))
    return bwd(dout, dlse, q, k, v, out, lse, *tensors, *options)


eager_backward = functools.partial(backward, bwd=eager.attention_bwd)


# Quick: most cases in one dtype each. Those that are much like others, and the other dtypes, are slow.
SLOW = ("one-less", "group-4", "window-16", "window-left", "window-T>S", "packed-full", "D-5")
GRID = [
    pytest.param(
        case, dtype, id=f"{case}-{str(dtype)[6:]}",
        marks=[] if dtype == DTYPES[i % 3] and case not in SLOW else [pytest.mark.slow],
    )
    for (i, case), dtype in itertools.product(enumerate(CASES), DTYPES)
]  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), GRID)
def test_against_float64(case, dtype):
    """With a gradient for lse too, in every other case."""
    inputs = make(dtype, **CASES[case]) | dict(return_lse=list(CASES).index(case) % 2 == 1)
    check(SPEC, functools.partial(attention, backend="triton"), inputs)


@pytest.mark.parametrize("parts", [2, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [dict(T=40, S=10), dict(lengths=(20, 0, 9))], ids=str)
def test_parts_of_the_queries_add_up(case, parts, monkeypatch):
    """Too few blocks of keys to fill a GPU: several programs share one."""
    inputs = make(**case, H=2, Hkv=1, D=16, causal=True)
    dout = torch.randn_like(inputs["q"])
    monkeypatch.setattr(triton_bwd, "parts_of", lambda *_: 1)
    whole = backward(dout, **inputs)
    monkeypatch.setattr(triton_bwd, "parts_of", lambda *_: parts)
    got, again = backward(dout, **inputs), backward(dout, **inputs)
    for a, b, c in zip(got, again, whole, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


def test_parts_fill_a_gpu():
    """Two waves where there would be less than one, four steps each at least."""
    few = triton_support.multiprocessors(torch.device(DEVICE))
    parts = functools.partial(triton_bwd.parts_of, device=torch.device(DEVICE))
    assert parts(1, 10_000) == parts(0, 10_000) == 2 * few
    assert parts(few, 10_000) == 2
    assert parts(2 * few + 1, 10_000) == parts(1, 7) == 1
    assert parts(1, 8) == 2


@pytest.mark.parametrize(
    "case", ["causal-ragged", "packed-window", pytest.param("window-both", marks=pytest.mark.slow)]
)
def test_descriptors_and_pointers_give_the_same_bits(case, monkeypatch):
    inputs = make(torch.float16, **CASES[case])
    dout = torch.randn_like(inputs["q"])
    made = []
    monkeypatch.setattr(
        triton_bwd, "descriptors", lambda *args, f=triton_bwd.descriptors: made.append(f(*args)) or made[-1]
    )
    by_descriptor = backward(dout, **inputs)
    assert made
    assert all(d is not None for four in made for d in four)
    monkeypatch.setattr(triton_common, "architecture", lambda _: 80)
    for a, b in zip(backward(dout, **inputs), by_descriptor, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["causal-ragged", "packed-T-S"])
def test_the_same_bits_every_run(case):
    inputs = make(torch.float16, **CASES[case])
    dout = torch.randn_like(inputs["q"])
    for a, b in zip(backward(dout, **inputs), backward(dout, **inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("group", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_of_repeated_keys_add_up_to_the_groups(group):
    inputs = make(T=21, S=33, H=4, Hkv=4 // group, D=16, causal=True)
    dout = torch.randn_like(inputs["q"])
    dq, dk, dv, _ = backward(dout, **inputs)
    repeated = {n: inputs[n].repeat_interleave(group, 2) for n in ("k", "v")}
    dq_, dk_, dv_, _ = backward(dout, **{**inputs, **repeated})
    torch.testing.assert_close(dq_, dq)
    for many, one in ((dk_, dk), (dv_, dv)):
        torch.testing.assert_close(many.unflatten(2, (-1, group)).sum(3), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 10])
def test_keys_that_nobody_saw_get_no_gradient(window):
    """A gradient for one query alone: nothing after it, or beyond its window, or of another head, has one."""
    T, i, h = 40, 23, 1
    inputs = make(T=T, S=T, H=3, Hkv=3, D=16, causal=True, window=window)
    dout = torch.zeros_like(inputs["q"])
    dout[:, i, h] = torch.randn(16, device=DEVICE)
    dq, dk, dv, _ = backward(dout, **inputs)
    seen = torch.zeros(1, T, 3, dtype=torch.bool, device=DEVICE)
    seen[:, 0 if window is None else i - window + 1 : i + 1, h] = True
    for g in (dk, dv):
        assert torch.equal(g.ne(0).any(-1), seen)
    dq[:, i, h] = 0
    assert not dq.any()


@pytest.mark.parametrize(
    "options",
    [
        dict(causal=True),
        pytest.param(dict(), marks=pytest.mark.slow),
        pytest.param(dict(causal=True, window=5, softcap=3.0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_packed_equals_one_sequence_at_a_time(options):
    lengths, key_lengths = (18, 0, 5, 1, 16), (20, 3, 9, 0, 16)
    inputs = make(lengths=lengths, key_lengths=key_lengths, H=2, Hkv=1, D=16, sinks=True, **options)
    dout, dlse = torch.randn_like(inputs["q"]), torch.randn(2, sum(lengths), device=DEVICE)
    dq, dk, dv, dsinks = backward(dout, dlse, **inputs)
    total = torch.zeros_like(dsinks)
    for b in range(len(lengths)):
        rows, cols = (slice(*inputs[f"cu_seqlens_{x}"][b : b + 2].tolist()) for x in "qk")
        one = {n: inputs[n][None, r] for n, r in (("q", rows), ("k", cols), ("v", cols))}
        dq_, dk_, dv_, ds = backward(dout[None, rows], dlse[None, :, rows], sinks=inputs["sinks"], **one, **options)
        for got, expected in ((dq[rows], dq_[0]), (dk[cols], dk_[0]), (dv[cols], dv_[0])):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        total += ds
    torch.testing.assert_close(dsinks, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=["float16", "float32"]
)
@pytest.mark.parametrize("lengths", [(21, 3, 0, 18), (5,), ()], ids=str)
def test_nothing_comes_from_rows_past_the_last_sequence(lengths, dtype):
    """They may hold anything, NaN too, and get zeros."""
    tail, n = 7, sum(lengths)
    inputs = make(dtype, lengths=(*lengths, tail), H=2, Hkv=1, D=16, causal=True)
    cu = reference.cu_seqlens(lengths, DEVICE)
    whole = inputs | dict(cu_seqlens_q=cu, cu_seqlens_k=cu)
    dout = torch.randn_like(inputs["q"])
    cut = {k: v[:n] if k in "qkv" else v for k, v in whole.items()}
    expected = backward(dout[:n], **cut)
    for x in (whole["q"], whole["k"], whole["v"], dout):
        x[n:] = math.nan
    left, right = reference.bounds(True, None)
    out, lse = eager.attention_fwd(*(cut[x] for x in "qkv"), None, cu, cu, 0.25, left, right, 0.0)
    out, lse = torch.cat((out, out.new_zeros(tail, 2, 16))), torch.cat((lse, lse.new_full((2, tail), -math.inf)), 1)
    got = triton_bwd.attention_bwd(
        dout, None, *(whole[x] for x in "qkv"), out, lse, None, cu, cu, 0.25, left, right, 0.0
    )
    for g, e in zip(got[:3], expected[:3], strict=True):
        assert torch.equal(g[:n], e)
        assert torch.equal(g[n:], torch.zeros_like(g[n:]))


def test_a_sequence_keeps_its_nan():
    """NaN in one sequence of a batch, packed or not, reaches no other one, though tiles reach into it."""
    for lengths in (None, (21, 21, 21)):
        case = dict(B=3, T=21, S=21) if lengths is None else dict(lengths=lengths)
        inputs = make(torch.float16, **case, H=1, Hkv=1, D=16, causal=True)
        dout = torch.randn_like(inputs["q"])
        for x in (inputs["q"], inputs["k"], inputs["v"], dout):
            (x[1] if lengths is None else x[21:42]).fill_(math.nan)
        for g in backward(dout, **inputs)[:3]:
            rows = g if lengths is None else g.unflatten(0, (3, 21))
            assert rows[0].isfinite().all()
            assert rows[1].isnan().any()
            assert rows[2].isfinite().all()


def test_queries_that_see_nothing():
    """Zeros, whatever is asked of their lse: -inf has no gradient."""
    inputs = make(**CASES["causal-T>S"])
    dout, dlse = torch.randn_like(inputs["q"]), torch.randn(1, 2, 45, device=DEVICE)
    expected = backward(dout, dlse, **inputs)
    dlse[..., :25] = math.nan
    got = backward(dout, dlse, **inputs)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert not got[0][:, :25].any()


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-35])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_any_scale(scale, dtype):
    inputs = make(dtype, T=20, S=20, H=1, Hkv=1, D=16, causal=True) | dict(softmax_scale=scale)
    check(SPEC, functools.partial(attention, backend="triton"), inputs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the rows of such keys in dk and dv, which aren't stored
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_scores_far_below_zero(dtype):
    """Near -256: a key that isn't there, with a score of 0, has e^256 as its probability and may not count in dq."""
    inputs = make(dtype, T=5, S=20, H=1, Hkv=1, D=16)
    inputs["q"] += 8
    inputs["k"] -= 8
    for a, b in zip(backward(inputs["q"], **inputs), eager_backward(inputs["q"], **inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0), (1, 1, 1)], ids=lambda n: str(n))
def test_sizes_of_0_and_1(B, T, S):
    inputs = make(B=B, T=T, S=S, H=2, Hkv=1, D=16, sinks=True) | dict(return_lse=True)
    check(SPEC, functools.partial(attention, backend="triton"), inputs)


def test_rows_before_the_first_sequence_get_zeros():
    """cu_seqlens that don't begin at 0 are no batch, and an error on CPUs; a GPU can't look at them."""
    inputs = make(lengths=(5, 30, 4), H=2, Hkv=1, D=16, causal=True)
    dout = torch.randn_like(inputs["q"])
    cu = reference.cu_seqlens((5, 30), DEVICE)
    late = cu[1:]
    args = (0.25, -1, 0, 0.0)
    out, lse = eager.attention_fwd(*(inputs[x] for x in "qkv"), None, cu, cu, *args)
    expected = triton_bwd.attention_bwd(dout, None, *(inputs[x] for x in "qkv"), out, lse, None, cu, cu, *args)
    got = triton_bwd.attention_bwd(dout, None, *(inputs[x] for x in "qkv"), out, lse, None, late, late, *args)
    for g, e in zip(got[:3], expected[:3], strict=True):
        assert torch.equal(g[5:], e[5:])
        assert not g[:5].any()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_packed_batches_of_nothing(lengths):
    inputs = make(lengths=(*lengths, 5), H=2, Hkv=1, D=16)
    cu = reference.cu_seqlens(lengths, DEVICE)
    grads = backward(torch.randn_like(inputs["q"]), **{**inputs, "cu_seqlens_q": cu, "cu_seqlens_k": cu})
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("case", ["causal-T>S", "packed-T-S"])
def test_inputs_stay_and_every_element_is_written(case, monkeypatch):
    inputs = make(**CASES[case])
    dout = torch.randn_like(inputs["q"])
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    new_empty = Tensor.new_empty

    def poisoned(self, *args, **options):
        made = new_empty(self, *args, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    grads = backward(dout, **inputs)
    assert all(g.isfinite().all() for g in grads)
    assert all(torch.equal(inputs[k], v) for k, v in before.items())


@pytest.mark.parametrize("which", ["q", *(pytest.param(x, marks=pytest.mark.slow) for x in ("k", "v", "dout", "out"))])
def test_strides_beyond_32_bits(which):
    """The second batch element lies 2^31 elements after the first one; the memory between is never touched."""
    inputs = make(torch.float16, B=2, T=8, S=8, H=1, Hkv=1, D=16, causal=True)
    dout = torch.randn_like(inputs["q"])
    left, right = reference.bounds(True, None)
    out, lse = eager.attention_fwd(*(inputs[x] for x in "qkv"), None, None, None, 0.25, left, right, 0.0)
    rest = (lse, None, None, None, 0.25, left, right, 0.0)
    expected = triton_bwd.attention_bwd(dout, None, *(inputs[x] for x in "qkv"), out, *rest)
    tensors = {x: inputs[x] for x in "qkv"} | dict(dout=dout, out=out)
    x = tensors[which]
    far = torch.empty((1 << 31) + x[0].numel(), dtype=x.dtype, device=x.device)
    far = far.as_strided(x.shape, (1 << 31, *x.stride()[1:]))
    tensors[which] = far.copy_(x)
    q, k, v, dout, out = tensors.values()
    got = triton_bwd.attention_bwd(dout, None, q, k, v, out, *rest)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
