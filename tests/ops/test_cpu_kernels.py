"""The compiled CPU kernels called directly, raw pointers and all, in every instruction set that this CPU has.

The generic tests judge the ops through their public functions, in the instruction set that the CPU picks. Here are the
things they can't see: the other instruction sets, vector tails, memory around the outputs, the bindings' checks.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from harness.cpu_kernels import CODE, DTYPES, HALVES, ISAS, SIZES, Out, acc, assert_rounded, load, ptrs, rows
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


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


def rms_norm_truth(x: Tensor, w: Tensor, offset: float, eps: float) -> tuple[Tensor, Tensor]:
    x = x.double()
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * rstd * (offset + w.double()), rstd[:, 0]


def assert_rms_norm_bwd(
    cpu: ModuleType, dy: Tensor, dh: Tensor | None, x: Tensor, w: Tensor, offset: float, rstd: Tensor,
    true_rstd: Tensor, ulps: float,
) -> None:  # fmt: skip
    n, cols = x.shape
    dx, dw = Out(n, cols, dtype=x.dtype), Out(cols, dtype=w.dtype)
    add, dh_stride = (torch.zeros(n, cols), 0) if dh is None else (dh.double(), dh.stride(0))
    tail = (n, cols, dy.stride(0), dh_stride, x.stride(0), offset, CODE[dy.dtype], CODE[x.dtype])
    cpu.rms_norm_bwd(*ptrs(dy, dh, x, w, rstd, dx.tensor, dw.tensor), *tail)
    g, xhat = dy.double() * (offset + w.double()), x.double() * true_rstd[:, None]
    norm = true_rstd[:, None] * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    size = add.abs() + true_rstd[:, None] * (g.abs() + xhat.abs() * (g * xhat).abs().mean(-1, keepdim=True))
    assert_rounded(dx.checked(), norm + add, ulps=ulps, scale=size)
    assert_rounded(dw.checked(), (dy.double() * xhat).sum(0), ulps=ulps, scale=(dy.double() * xhat).abs().sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", SIZES)
def test_rms_norm(cpu: ModuleType, dtype: torch.dtype, cols: int):
    n, offset, eps = 37, 0.5, 1e-5
    x, dy, w = rows(n, cols, dtype), rows(n, cols, dtype, pad=5), torch.randn(cols, dtype=acc(dtype))
    y, rstd = Out(n, cols, dtype=dtype), Out(n, dtype=acc(dtype))
    pointers = ptrs(x, None, w, y.tensor, None, rstd.tensor)
    cpu.rms_norm_fwd(*pointers, n, cols, x.stride(0), 0, eps, offset, CODE[dtype], CODE[dtype])
    true, true_rstd = rms_norm_truth(x, w, offset, eps)
    # float64 has one lane only: its sums are longer chains of additions, as are those of the truth.
    chain = 8 + (cols**0.5 if dtype == torch.float64 else 0)
    assert_rounded(y.checked(), true, ulps=chain)
    assert_rounded(rstd.checked(), true_rstd, ulps=chain)
    assert_rms_norm_bwd(cpu, dy, None, x, w, offset, rstd.tensor, true_rstd, ulps=chain)


@pytest.mark.parametrize("residual_dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("cols", (5, 16, 50, 135))
def test_add_rms_norm(cpu: ModuleType, dtype: torch.dtype, residual_dtype: torch.dtype, cols: int):
    n = 6
    x, residual, w = rows(n, cols, dtype), rows(n, cols, residual_dtype), torch.randn(cols)
    y, h, rstd = Out(n, cols, dtype=dtype), Out(n, cols, dtype=residual_dtype), Out(n, dtype=torch.float32)
    pointers = ptrs(x, residual, w, y.tensor, h.tensor, rstd.tensor)
    strides = (x.stride(0), residual.stride(0))
    cpu.rms_norm_fwd(*pointers, n, cols, *strides, 1e-6, 0.0, CODE[dtype], CODE[residual_dtype])
    assert torch.equal(h.checked(), (x.float() + residual.float()).to(residual_dtype))
    true, true_rstd = rms_norm_truth(h.tensor, w, 0.0, 1e-6)  # of the rounded sum
    assert_rounded(y.checked(), true, ulps=8)
    dy, dh = rows(n, cols, dtype), rows(n, cols, residual_dtype)
    assert_rms_norm_bwd(cpu, dy, dh, h.tensor, w, 0.0, rstd.tensor, true_rstd, ulps=8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_rms_norm_does_not_depend_on_threads(cpu: ModuleType, dtype: torch.dtype):
    n, cols, code = 1003, 103, CODE[dtype]
    x, dy, w, rstd = torch.randn(n, cols).to(dtype), torch.randn(n, cols).to(dtype), torch.randn(cols), torch.rand(n)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            dx, dw = torch.full_like(x, float("nan")), torch.full_like(w, float("nan"))
            cpu.rms_norm_bwd(*ptrs(dy, None, x, w, rstd, dx, dw), n, cols, cols, 0, cols, 0.0, code, code)
            results.append((dx, dw))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_rms_norm_without_rows_gives_zero_dweight(cpu: ModuleType):
    for code in (0, 1):
        dw = Out(33, dtype=torch.float32)
        cpu.rms_norm_bwd(*(0,) * 6, *ptrs(dw.tensor), 0, 33, 33, 0, 33, 1.0, code, code)
        assert torch.equal(dw.checked(), torch.zeros(33))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_large_outputs_past_the_cache(cpu: ModuleType, dtype: torch.dtype):
    """Beyond 8 MiB float outputs take other stores, beyond 32 MiB other pages; an aligned buffer is one condition."""
    n, cols = 4100, 2064
    gate, up = (torch.randn(n, cols).to(dtype) for _ in range(2))
    y = torch.full((n, cols), float("nan"), dtype=dtype)
    cpu.swiglu_fwd(*ptrs(gate, up, y), n, cols, cols, cols, CODE[dtype])
    part = slice(None, None, 41)
    assert_rounded(y[part], torch.nn.functional.silu(gate[part].double()) * up[part].double(), ulps=4)
    assert not y.isnan().any()
    w, rstd = torch.ones(cols, dtype=acc(dtype)), torch.empty(n, dtype=acc(dtype))
    pointers = ptrs(gate, None, w, y.fill_(float("nan")), None, rstd)
    cpu.rms_norm_fwd(*pointers, n, cols, cols, 0, 1e-6, 0.0, CODE[dtype], CODE[dtype])
    assert_rounded(y[part], rms_norm_truth(gate[part], w, 0.0, 1e-6)[0], ulps=8)
    assert not y.isnan().any()


def test_stores_past_the_cache_write_the_same(cpu: ModuleType):
    """Outputs of 8 MiB and more that begin at a vector's boundary, against the same ones one element off."""
    n, cols, T = 1100, 2064, 1024
    x, dy, up = (torch.randn(n, cols) for _ in range(3))
    w, rstd, dw = torch.randn(cols), torch.rand(n), torch.empty(cols)
    q, k, cos, sin = torch.randn(T, 32, 64), torch.randn(T, 8, 64), torch.rand(T, 32), torch.rand(T, 32)
    strides = ((0, 2048, 64, 1), (0, 512, 64, 1), (0, 32), (0, 32), 1, T)
    results = []
    for off in (0, 1):
        outs = [torch.full((size + 1,), float("nan"))[off:][:size] for size in (x.numel(),) * 3 + (q.numel(),) * 4]
        dx, dgate, dup, *turned = outs
        cpu.rms_norm_bwd(*ptrs(dy, None, x, w, rstd, dx, dw), n, cols, cols, 0, cols, 0.0, 0, 0)
        cpu.swiglu_bwd(*ptrs(dy, x, up, dgate, dup), n, cols, *(cols,) * 5, 0)
        for interleaved, (q_out, k_out) in enumerate((turned[:2], turned[2:])):
            cpu.rope(*ptrs(q, k, q_out, k_out, cos, sin), 0, 1, T, 32, 8, 64, 64, *strides, bool(interleaved), False, 0)
            k_out[k.numel() :] = 0
        results.append(outs)
    for aligned, unaligned in zip(*results, strict=True):
        assert aligned.data_ptr() % 64 == 0 and unaligned.data_ptr() % 64 == 4
        assert torch.equal(aligned, unaligned)  # which no NaN is


# ---- conversions -----------------------------------------------------------------------------------------------------


def converted(cpu: ModuleType, x: Tensor, to: torch.dtype) -> Tensor:
    """x + 0 as the residual's dtype: what the kernels' own conversions make of every element."""
    n = x.numel()
    zero, w, y, rstd = torch.zeros(n, dtype=to), torch.ones(n), torch.empty_like(x), torch.empty(1)
    h = Out(n, dtype=to)
    cpu.rms_norm_fwd(*ptrs(x, zero, w, y, h.tensor, rstd), 1, n, n, n, 1e-6, 0.0, CODE[x.dtype], CODE[to])
    return h.checked()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_reads_right(cpu: ModuleType, dtype: torch.dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    got, expected = converted(cpu, every, torch.float32), every.float()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_half(cpu: ModuleType, dtype: torch.dtype):
    """Random bit patterns, every half, the floats midway between two of them, and their neighbours."""
    random = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    middle = ((every[1:].double() + every[:-1].double()) / 2).float()
    ties = torch.cat((every, middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1)))
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32)
    x = torch.cat((random.view(torch.float32), ties, nans.view(torch.float32)))
    got, expected = converted(cpu, x, dtype), x.to(dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# ---- SwiGLU ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", SIZES)
def test_swiglu(cpu: ModuleType, dtype: torch.dtype, cols: int):
    n = 5
    packed, dy = rows(n, 2 * cols, dtype), rows(n, cols, dtype)
    packed *= 4
    gate, up = packed[:, :cols], packed[:, cols:]
    y, grad = Out(n, cols, dtype=dtype), Out(n, 2 * cols, dtype=dtype)
    dgate, dup = grad.tensor[:, :cols], grad.tensor[:, cols:]
    stride, code = packed.stride(0), CODE[dtype]
    cpu.swiglu_fwd(*ptrs(gate, up, y.tensor), n, cols, stride, stride, code)
    cpu.swiglu_bwd(*ptrs(dy, gate, up, dgate, dup), n, cols, dy.stride(0), stride, stride, 2 * cols, 2 * cols, code)
    grad.checked()
    g, u, d = gate.double(), up.double(), dy.double()
    s = g.sigmoid()
    assert_rounded(y.checked(), g * s * u)
    assert_rounded(dup, d * g * s)
    # s (1 + g (1 - s)): what 1 - s loses for large s is as large as the 1, and g times that counts. So it is in eager.
    assert_rounded(dgate, d * u * s * (1 + g * (1 - s)), scale=(d * u * s).abs() * (1 + g.abs()))


def test_silu_on_the_whole_line(cpu: ModuleType):
    """silu and its derivative for float32 from -inf to inf: accuracy, saturation, no invented NaN."""
    x = torch.cat((torch.linspace(-88.3, 100, 300_001), torch.randn(50_000) * 1e-3, torch.tensor([0.0, 1e-30])))
    far = torch.tensor([-89.0, -104.0, -1e3, -1e30, 1e3, 1e30, float("inf")])
    n, m = x.numel(), far.numel()
    x = torch.cat((x, far, torch.tensor([float("nan"), -float("inf")])))
    one, y, dx, dup = torch.ones_like(x), *(torch.empty_like(x) for _ in range(3))
    size = x.numel()
    cpu.swiglu_fwd(*ptrs(x, one, y), 1, size, size, size, 0)
    cpu.swiglu_bwd(*ptrs(one, x, one, dx, dup), 1, size, *(size,) * 5, 0)
    g = x[:n].double()
    assert_rounded(y[:n], g * g.sigmoid(), ulps=2)
    assert_rounded(dx[:n], g.sigmoid() * (1 + g * (1 - g.sigmoid())), ulps=3, scale=g.sigmoid() * (1 + g.abs()))
    assert torch.equal(y[n : n + m], torch.tensor([0.0, 0, 0, 0, 1e3, 1e30, float("inf")]))
    assert torch.equal(dx[n : n + m - 1], torch.tensor([0.0, 0, 0, 0, 1, 1]))
    assert y[-2:].isnan().all()  # NaN, and -inf * 0 as in eager PyTorch


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_stays_where_it_was(cpu: ModuleType, dtype: torch.dtype):
    n = 70
    for bad in (0x7FC0, -1, 0x7F81 if dtype == torch.bfloat16 else 0x7C01, float("inf")):
        for at in (0, 31, 32, 69):  # in a pair of vectors, in the tail
            gate, up, y = torch.ones(n, dtype=dtype), torch.ones(n, dtype=dtype), torch.empty(n, dtype=dtype)
            up[at] = torch.tensor(bad, dtype=torch.int16).view(dtype) if isinstance(bad, int) else bad
            cpu.swiglu_fwd(*ptrs(gate, up, y), 1, n, n, n, CODE[dtype])
            assert y.isfinite().sum() == n - 1
            assert torch.equal(y[at].isnan(), up[at].isnan()) and not y[at].isfinite()


@pytest.mark.parametrize("bits", (0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001))
def test_any_nan_in_float32_arguments_stays_nan(cpu: ModuleType, bits: int):
    """Rounding to bf16 must not carry a NaN's last bits into its sign, nor cut them off."""
    n, nan = 70, torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    x, y = torch.ones(1, n, dtype=torch.bfloat16), torch.empty(1, n, dtype=torch.bfloat16)
    for at in (0, 31, 32, 69):
        w, rstd, dw = torch.ones(n), torch.ones(1), torch.empty(n)
        w[at] = nan
        cpu.rms_norm_fwd(*ptrs(x, None, w, y, None, rstd), 1, n, n, 0, 1e-6, 0.0, 1, 1)
        assert y[0, at].isnan() and y.isnan().sum() == 1
    for scale, rstd in ((w, torch.ones(1)), (torch.ones(n), nan.view(1))):
        cpu.rms_norm_bwd(*ptrs(x, None, x, scale, rstd, y.fill_(0), dw), 1, n, n, 0, n, 0.0, 1, 1)
        assert y.isnan().all()


# ---- bindings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def best() -> ModuleType:
    return load("")


def calls() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every function: the names of its pointers, and good values for the rest."""
    strides = dict.fromkeys(("q_stride", "k_stride"), (0, 0, 0, 1))
    tables = dict(cos_stride=(0, 0), sin_stride=(0, 0), table_step=1, table_rows=1)
    sizes = dict(B=1, T=1, H=1, Hkv=1, D=2, R=2)
    matrix = dict(rows=1, cols=2)
    return {
        "rms_norm_fwd": ("x residual weight y h rstd", matrix | dict(x_stride=2, residual_stride=2, eps=1.0, offset=0.0,
                         x_dtype=0, residual_dtype=0)),
        "rms_norm_bwd": ("dy dh x weight rstd dx dweight", matrix | dict(dy_stride=2, dh_stride=2, x_stride=2,
                         offset=0.0, dy_dtype=0, x_dtype=0)),
        "rope": ("q k q_out k_out cos sin", dict(positions=0) | sizes | strides | tables | dict(interleaved=False,
                 conjugate=False, dtype=0)),
        "qk_norm_rope_fwd": ("q k q_weight k_weight q_out k_out rstd_q rstd_k cos sin", dict(positions=0) | sizes |
                             strides | tables | dict(interleaved=False, eps=1.0, offset=0.0, dtype=0)),
        "qk_norm_rope_bwd": ("dq dk q k q_weight k_weight rstd_q rstd_k cos sin q_grad k_grad dq_weight dk_weight",
                             dict(positions=0) | sizes | strides | tables | dict(interleaved=False, offset=0.0, dtype=0)
                             | dict.fromkeys(("dq_stride", "dk_stride"), (0, 0, 0, 1))),
        "rope_append": ("q k v q_out k_cache v_cache cos sin lengths", dict(blocks=0) | sizes | strides |
                        dict.fromkeys(("v_stride", "k_cache_stride", "v_cache_stride"), (0, 0, 0, 1)) |
                        dict(cache_shape=(1, 1, 1, 2), cos_stride=(0, 1), sin_stride=(0, 1), table_rows=1, columns=0,
                             block_stride=0, interleaved=False, dtype=0)),
        "swiglu_fwd": ("gate up y", matrix | dict(gate_stride=2, up_stride=2, dtype=0)),
        "swiglu_bwd": ("dy gate up dgate dup", matrix | dict(dy_stride=2, gate_stride=2, up_stride=2, dgate_stride=2,
                       dup_stride=2, dtype=0)),
    }  # fmt: skip


OPTIONAL = {("rms_norm_fwd", "residual"), ("rms_norm_bwd", "dh"), ("rope", "k")}  # 0 means absent


def good_call(name: str, memory: Tensor) -> tuple[list[str], dict[str, Any]]:
    """The names of the function's pointers, and arguments that it accepts."""
    pointers, rest = calls()[name]
    return pointers.split(), dict.fromkeys(pointers.split(), memory.data_ptr()) | rest


@pytest.mark.parametrize("name", calls())
def test_bad_arguments(best: ModuleType, name: str):
    memory = torch.zeros(16)
    pointers, good = good_call(name, memory)
    function = getattr(best, name)
    function(**good)
    for key in good:
        if key in pointers and (name, key) not in OPTIONAL:
            with pytest.raises(ValueError, match=f"^{key} is a null pointer"):
                function(**good | {key: 0})
        if key in ("rows", "cols", "B", "T", "H", "Hkv", "D", "R", "table_rows"):
            with pytest.raises(ValueError, match=f"^{key} must not be negative, got -2"):
                function(**good | {key: -2})
        if key.endswith("dtype"):
            for code in (-1, 4):
                with pytest.raises(ValueError, match=f"^{key} must be a dtype code from 0 to 3, got {code}"):
                    function(**good | {key: code})
    empty = {key: 0 for key in good if key in pointers or key in ("rows", "cols", "B", "T", "D", "R")}
    function(**good | empty)  # nothing to read or write: no pointer is needed


def test_bad_mixtures(best: ModuleType):
    memory = torch.zeros(16, dtype=torch.float64)
    mixtures = (("rms_norm_fwd", "x_dtype", "residual_dtype"), ("rms_norm_bwd", "dy_dtype", "x_dtype"))
    for name, first, second in mixtures:
        _, good = good_call(name, memory)
        with pytest.raises(ValueError, match=f"{first} and {second} must both be float64 or neither"):
            getattr(best, name)(**good | {first: 3})


def test_bad_positions(best: ModuleType):
    memory, ids = torch.zeros(16), torch.tensor([0])
    _, good = good_call("rope", memory)
    for bad in (-1, 1):
        ids[0] = bad
        with pytest.raises(IndexError, match=rf"positions must be in \[0, 1\), .* got {bad}"):
            best.rope(**good | {"positions": ids.data_ptr()})
    with pytest.raises(ValueError, match="T = 2 needs more than the table's 1 rows"):
        best.rope(**good | {"T": 2})
    for R in (1, 4):
        with pytest.raises(ValueError, match=f"R must be even and at most D = 2, got {R}"):
            best.rope(**good | {"R": R})


def test_unknown_instruction_set():
    match = "PYLLM_CPU_ISA='mmx' is unknown or not supported by this CPU, which has base"
    with pytest.raises(ImportError, match=match):
        load("mmx")
