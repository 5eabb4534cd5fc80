"""Checks of attention's C++ that take a compiled module: the one in use, another instruction set's, one with a bug."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyllm.kernels import OPS, attention, attention_decode, extension
from pyllm.kernels.attention import reference

from .accuracy import check
from .layouts import far_apart

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# A block has 48 or 96 rows and 64 or 128 keys, a strip 6 or 12 rows, a panel 8 to 32 keys; 768 rows make a task.
CASES: dict[str, dict[str, Any]] = {
    "two tasks": dict(T=270, S=270, H=3, Hkv=1, D=64, causal=True),
    "window": dict(T=210, S=300, H=2, Hkv=1, D=40, window=(150, 20)),
    "narrow window": dict(T=300, S=300, H=1, Hkv=1, D=16, causal=True, window=9),
    "softcap, T < S": dict(T=70, S=400, H=4, Hkv=2, D=72, causal=True, softcap=8.0),
    "all pairs": dict(B=2, T=50, S=333, H=2, Hkv=2, D=130),
    "D 7": dict(T=37, S=37, H=2, Hkv=1, D=7, causal=True),
    "D 256, sinks": dict(T=30, S=150, H=2, Hkv=1, D=256, causal=True, sinks=True),
    "packed": dict(lengths=(130, 0, 1, 75), H=8, Hkv=2, D=20, causal=True, window=100),
    "more queries than keys": dict(T=140, S=90, H=2, Hkv=1, D=24, causal=True, sinks=True),
    "few queries": dict(T=2, S=700, H=8, Hkv=2, D=64, causal=True),
    "few, splits, sinks": dict(B=2, T=1, S=1500, H=8, Hkv=2, D=64, causal=True, sinks=True),
    "few, D 9, sinks": dict(B=2, T=1, S=600, H=7, Hkv=1, D=9, window=(300, -1), sinks=True),
}
DECODE: dict[str, dict[str, Any]] = {
    "splits": dict(B=2, T=1, S=1500, H=8, Hkv=4, D=64),
    "splits, window": dict(B=2, T=3, S=1500, H=2, Hkv=1, D=32, window=1100, softcap=5.0),
    "paged": dict(B=3, T=1, S=700, H=4, Hkv=2, D=64, block_size=16, empty=True),
    "paged prompt": dict(B=2, T=40, S=300, H=4, Hkv=2, D=24, block_size=7, window=200),
}


@contextlib.contextmanager
def serving(module: Any) -> Iterator[None]:
    """Inside the block a compiled module serves the backend "cpu"."""
    before, extension.cpu.module = extension.cpu.module, module
    try:
        yield
    finally:
        extension.cpu.module = before


def check_accuracy(module: Any, name: str, dtype: torch.dtype) -> None:
    """Forward and backward, lse and its gradient, judged against float64."""
    inputs = reference.attention_inputs(**CASES[name], dtype=dtype, generator=torch.Generator().manual_seed(3))
    with serving(module):
        check(OPS["attention"], functools.partial(attention, backend="cpu"), inputs | dict(return_lse=True))


def check_decode(module: Any, name: str, dtype: torch.dtype) -> None:
    inputs = reference.decode_inputs(**DECODE[name], dtype=dtype, generator=torch.Generator().manual_seed(3))
    with serving(module):
        check(OPS["attention_decode"], functools.partial(attention_decode, backend="cpu"), inputs)


def check_exp(module: Any) -> None:
    """Two keys with scores 0 and x, values 0 and 1: the probability is e^x / (1 + e^x), to a few units for every x."""
    x = torch.cat((torch.linspace(-87, 20, 3001), torch.tensor([-1e-30, -200.0, -3e38])))
    k = torch.zeros(len(x), 2, 1, 1)
    k[:, 1] = x[:, None, None]
    v = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(len(x), 2, 1, 1)
    with serving(module):
        got = attention(torch.ones(len(x), 9, 1, 1), k, v, softmax_scale=1.0, backend="cpu")  # 9 rows: the tiles
        few = attention(torch.ones(len(x), 1, 1, 1), k, v, softmax_scale=1.0, backend="cpu")
    true = torch.sigmoid(x.double())
    # q times log2(e) is rounded, and its product with x: |x| units in all, which nobody can avoid in float32
    allowed = (4e-7 + 1.2e-7 * x.double().abs().clamp(max=88)) * true + 2e-38
    for out in (got[:, 0, 0, 0], got[:, 8, 0, 0], few[:, 0, 0, 0]):
        assert ((out.double() - true).abs() <= allowed).all()


def check_tanh(module: Any) -> None:
    """One key: lse is the score, softcap * tanh(x / softcap), accurate for small x too."""
    x = torch.cat((torch.linspace(-12, 12, 2401), torch.logspace(-20, 0, 200), torch.tensor([1e4, -1e4])))
    with serving(module):
        q, k = x.view(-1, 1, 1, 1).expand(-1, 9, 1, 1), torch.ones(len(x), 1, 1, 1)
        for T in (1, 9):
            lse = attention(q[:, :T], k, k, softmax_scale=1.0, softcap=1.5, return_lse=True, backend="cpu")[1]
            true = 1.5 * torch.tanh(x.double() / 1.5)
            assert ((lse[:, 0, T - 1].double() - true).abs() <= 5e-7 * true.abs()).all()


def check_waves(module: Any) -> None:
    """More heads than fit the packed keys' budget of 64 MiB, against the same heads a sequence at a time."""
    q, k, v = (torch.randn(12, T, heads, 64) for T, heads in ((3, 64), (2100, 8), (2100, 8)))
    dout = torch.randn_like(q)
    options = (None, None, None, 0.125, -1, -1, 0.0)
    with serving(module):
        impl = OPS["attention"].op.impls["cpu"]
        out, lse = impl.fwd(q, k, v, *options)
        grads = impl.bwd(dout, None, q, k, v, out, lse, *options)
        assert impl.bwd is not None
        for b in (0, 5, 6, 11):
            one = slice(b, b + 1)
            torch.testing.assert_close(impl.fwd(q[one], k[one], v[one], *options)[0], out[one], rtol=1e-5, atol=1e-6)
            alone = impl.bwd(dout[one], None, q[one], k[one], v[one], out[one], lse[one], *options)
            for got, expected in zip(alone[:3], grads, strict=False):
                torch.testing.assert_close(got, expected[one], rtol=1e-4, atol=1e-5)
    if hasattr(module, "largest_scratch"):  # the trials' module counts; all heads at once would need 103 MB
        assert module.largest_scratch() < 90e6


def check_unseen_values(module: Any) -> None:
    """What lies before the window and behind the length may be NaN; so may the rows of a packed neighbour."""
    for T, block_size in ((1, None), (1, 16), (40, None), (40, 16)):
        given = dict(B=2, T=T, S=150, H=4, Hkv=2, D=16, window=50)
        inputs = reference.decode_inputs(**given, dtype=F32, generator=torch.Generator().manual_seed(1))
        with serving(module):
            clean = attention_decode(**inputs, backend="cpu")
            for b, n in enumerate(inputs["cache_seqlens"].tolist()):
                for cache in (inputs["k_cache"], inputs["v_cache"]):
                    cache[b, : n - T - 49] = float("nan")
                    cache[b, n:] = float("nan")
            if block_size is not None:
                lengths = inputs["cache_seqlens"]
                inputs["k_cache"], inputs["block_table"] = reference.paged(inputs["k_cache"], lengths, block_size)
                inputs["v_cache"] = reference.paged(inputs["v_cache"], lengths, block_size)[0]
            torch.testing.assert_close(attention_decode(**inputs, backend="cpu"), clean)
    q, cu = torch.randn(40, 2, 16), torch.tensor([0, 20, 33], dtype=torch.int32)
    q[20:] = float("nan")
    with serving(module):
        out = attention(q, q[:, :1], q[:, :1], cu_seqlens_q=cu, backend="cpu")
    assert out[:20].isfinite().all()
    assert out[20:33].isnan().all()
    assert not out[33:].any()


def check_offsets(module: Any) -> None:
    """Sequences, tokens and heads more than 2^31 elements apart."""
    impl, few = OPS["attention"].op.impls["cpu"], OPS["attention_decode"].op.impls["cpu"]
    q, k, v = (torch.randn(3, 9, heads, 16, dtype=F16) for heads in (4, 4, 4))
    options = (None, None, None, 0.25, -1, 0, 0.0)
    with serving(module):
        out, lse = impl.fwd(q, k, v, *options)
        assert impl.bwd is not None
        expected = impl.bwd(q, None, q, k, v, out, lse, *options)
        lengths = torch.full((3,), 9)
        decoded = few.fwd(q[:, :1], k, v, lengths, None, 0.25, -1, 0.0)
        for dim in range(3):
            Q, K, V, far_out = (far_apart(t, dim) for t in (q, k, v, out))
            assert torch.equal(impl.fwd(Q, K, V, *options)[0], out)
            for got, true in zip(impl.bwd(Q, None, Q, K, V, far_out, lse, *options), expected, strict=True):
                assert torch.equal(got, true)
            assert torch.equal(few.fwd(q[:, :1], K, V, lengths, None, 0.25, -1, 0.0), decoded)


def check_threads(module: Any, dtype: torch.dtype) -> None:
    """1, 2, 3 and 4 threads give the same bits."""

    def everything() -> list[Tensor]:
        torch.manual_seed(1)
        found: list[Tensor] = []
        for case in ("two tasks", "packed", "D 256, sinks"):
            inputs = reference.attention_inputs(**CASES[case], dtype=dtype)
            leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "sinks") if name in inputs]
            out, lse = attention(**inputs, return_lse=True, backend="cpu")
            found += [out, lse, *torch.autograd.grad(out.float().square().sum() + lse[lse > -1e9].sum(), leaves)]
        for case in ("splits", "paged prompt"):
            found.append(attention_decode(**reference.decode_inputs(**DECODE[case], dtype=dtype), backend="cpu"))
        return found

    threads = torch.get_num_threads()
    try:
        with serving(module):
            results = []
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
