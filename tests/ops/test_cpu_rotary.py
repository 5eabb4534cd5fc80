"""The rotary kernels of the compiled CPU module called directly; see test_cpu_kernels.py."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from harness.cpu_kernels import CODE, DTYPES, ISAS, Out, acc, assert_rounded, load, ptrs
from torch import Tensor


@pytest.fixture(scope="module", params=ISAS)
def cpu(request: pytest.FixtureRequest) -> ModuleType:
    try:
        module = load(request.param)
    except ImportError:
        pytest.skip(f"this CPU has no {request.param}")
    assert module.isa == request.param
    return module


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- RoPE ------------------------------------------------------------------------------------------------------------


def rope_truth(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, T, H, D), cos and sin (B, T, R/2)."""
    x, cos, sin = x.double(), cos.double()[:, :, None], sin.double()[:, :, None]
    half = cos.shape[-1]
    even, odd = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    y = x.clone()
    y[..., even] = x[..., even] * cos - x[..., odd] * sin
    y[..., odd] = x[..., odd] * cos + x[..., even] * sin
    return y


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R, D", ((2, 2), (6, 7), (10, 16), (32, 32), (34, 40), (64, 64), (80, 96), (0, 5)))
def test_rope(cpu: ModuleType, dtype: torch.dtype, R: int, D: int, interleaved: bool):
    B, T, H, Hkv, table_rows = 2, 5, 3, 1, 11
    q = torch.randn(B, H, T, D + 1).to(dtype)[..., :D].transpose(1, 2)  # Hugging Face's layout
    k = torch.randn(B, T, Hkv, D).to(dtype)
    step = 2 if interleaved else 1  # the table of interleaved pairs has every value twice
    angles = torch.rand(B, table_rows, R // 2, dtype=acc(dtype)).repeat_interleave(step, -1)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(0, table_rows, (B, T))
    for ids in (None, positions):
        q_out, k_out, back = (Out(B, T, h, D, dtype=dtype) for h in (H, Hkv, H))
        tail = (cos.stride()[:2], sin.stride()[:2], step, table_rows, interleaved)
        # fmt: off
        cpu.rope(*ptrs(q, k, q_out.tensor, k_out.tensor, cos, sin, ids), B, T, H, Hkv, D, R,
                 q.stride(), k.stride(), *tail, False, CODE[dtype])
        cpu.rope(*ptrs(q, None, back.tensor, None, cos, sin, ids), B, T, H, 0, D, R,
                 q.stride(), (0, 0, 0, 0), *tail, True, CODE[dtype])
        # fmt: on
        row = torch.arange(T).expand(B, T) if ids is None else ids
        c, s = (t[torch.arange(B)[:, None], row][..., ::step] for t in (cos, sin))
        # Both products round: their size, not the difference's, bounds the error.
        for got, x, turn in ((q_out, q, 1), (k_out, k, 1), (back, q, -1)):
            true, size = rope_truth(x, c, turn * s, interleaved), x.double().abs().amax(-1, keepdim=True) * 2
            assert_rounded(got.checked(), true, ulps=1, scale=size)
            assert torch.equal(got.tensor[..., R:], x[..., R:])


# ---- QK-norm and RoPE ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R, D", ((2, 2), (6, 7), (34, 40), (64, 64), (80, 96), (128, 128), (100, 203)))
def test_qk_norm_rope(cpu: ModuleType, dtype: torch.dtype, R: int, D: int, interleaved: bool):
    B, T, H, Hkv, table_rows, eps, offset = 2, 21, 3, 1, 30, 1e-5, 0.5
    wide = acc(dtype)
    q = torch.randn(B, H, T, D + 1).to(dtype)[..., :D].transpose(1, 2)  # Hugging Face's layout
    k, dq, dk = (torch.randn(B, T, heads, D).to(dtype) for heads in (Hkv, H, Hkv))
    q_weight, k_weight = torch.randn(D, dtype=wide), torch.randn(D, dtype=wide)
    angles = torch.rand(B, table_rows, R // 2, dtype=wide)
    cos, sin = angles.cos(), angles.sin()
    sizes = (B, T, H, Hkv, D, R)
    tables = (cos.stride()[:2], sin.stride()[:2], 1, table_rows, interleaved)
    outs = [Out(B, T, h, *d, dtype=t) for d, t in (((D,), dtype), ((), wide)) for h in (H, Hkv)]
    q_out, k_out, rstd_q, rstd_k = outs
    # fmt: off
    cpu.qk_norm_rope_fwd(*ptrs(q, k, q_weight, k_weight, *(o.tensor for o in outs), cos, sin, None), *sizes,
                         q.stride(), k.stride(), *tables, eps, offset, CODE[dtype])
    grads = Out(B, T, H, D, dtype=dtype), Out(B, T, Hkv, D, dtype=dtype), Out(D, dtype=wide), Out(D, dtype=wide)
    cpu.qk_norm_rope_bwd(*ptrs(dq, dk, q, k, q_weight, k_weight, rstd_q.tensor, rstd_k.tensor, cos, sin, None,
                               *(g.tensor for g in grads)), *sizes,
                         dq.stride(), dk.stride(), q.stride(), k.stride(), *tables, offset, CODE[dtype])
    # fmt: on
    c, s = cos[:, :T], sin[:, :T]
    chain = 8 + (D**0.5 if dtype == torch.float64 else 0)
    for x, weight, dy, y, rstd, dx, dw in (
        (q, q_weight, dq, q_out, rstd_q, grads[0], grads[2]),
        (k, k_weight, dk, k_out, rstd_k, grads[1], grads[3]),
    ):
        w = offset + weight.double()
        r = (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
        xhat = x.double() * r
        size = (xhat * w).abs().amax(-1, keepdim=True) * 2
        assert_rounded(rstd.checked(), r[..., 0], ulps=chain)
        assert_rounded(y.checked(), rope_truth(xhat * w, c, s, interleaved), ulps=chain, scale=size)
        g = rope_truth(dy, c, -s, interleaved)
        true = r * (g * w - xhat * (g * w * xhat).mean(-1, keepdim=True))
        bound = r * ((g * w).abs() + xhat.abs() * (g * w * xhat).abs().mean(-1, keepdim=True))
        bound = bound + r * w.abs() * dy.double().abs().amax(-1, keepdim=True)  # of the rotation
        assert_rounded(dx.checked(), true, ulps=chain, scale=bound)
        terms = (dy.double().abs().amax(-1, keepdim=True) * 2 * xhat.abs()).sum((0, 1, 2))
        assert_rounded(dw.checked(), (g * xhat).sum((0, 1, 2)), ulps=chain, scale=terms)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_any_nan_in_tables_and_weights_stays_nan(cpu: ModuleType, dtype: torch.dtype):
    """Pairs of bf16 are rounded without regard to a NaN's last bits: float32 arguments must not bring such in."""
    D, code = 70, CODE[dtype]
    x = torch.ones(1, 1, 1, D, dtype=dtype)
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    y, spare, rstd = torch.empty_like(x), torch.empty_like(x), torch.empty(2)
    tail = (1, 1, 1, 1, D, D, x.stride(), x.stride(), (0, D // 2), (0, D // 2), 1, 1)
    for bad in nan:
        for at in (0, 30, 34):
            cos, sin, ones = torch.ones(D // 2), torch.zeros(D // 2), torch.ones(D)
            cos[at] = bad
            for interleaved in (False, True):
                cpu.rope(*ptrs(x, x, y, spare, cos, sin, None), *tail, interleaved, False, code)
                assert y.isnan().sum() == 2
            w, plain = ones.clone(), torch.ones(D // 2)
            w[at] = bad
            pointers = ptrs(x, x, w, ones, y, spare, rstd, rstd, plain, sin, None)
            cpu.qk_norm_rope_fwd(*pointers, *tail, False, 1e-6, 0.0, code)
            assert y.isnan().sum() == 2
            assert spare.isfinite().all()
