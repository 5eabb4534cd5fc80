"""Matrix products in C++ in every instruction set, when they are chosen, and what the model makes of them."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness.cpu_kernels import CODE, ISAS, Out, assert_rounded, load, ptrs, rows
from torch import Tensor, nn

from pyllm import PRESETS, LlamaForCausalLM
from pyllm.kernels import linear, products
from pyllm.kernels.linear import LINEAR
from pyllm.projection import project

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


@pytest.fixture(scope="module", params=ISAS)
def cpu(request: pytest.FixtureRequest) -> ModuleType:
    try:
        return load(request.param)
    except ImportError:
        pytest.skip(f"this CPU has no {request.param}")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def slow_torch(monkeypatch):
    """A CPU on which torch's half precision is a trap, as the automatic choice sees it."""
    monkeypatch.setattr(products, "FAST", {torch.bfloat16: False, torch.float16: False})


def gemm(cpu: ModuleType, a: Tensor, b: Tensor, c: Tensor, bias: Tensor | None = None, add: bool = False) -> None:
    (M, K), N = a.shape, b.shape[1]
    dtypes = (CODE[a.dtype], CODE[b.dtype], CODE[c.dtype])
    cpu.gemm(*ptrs(a, b, bias, c), M, N, K, *a.stride(), *b.stride(), c.stride(0), add, *dtypes)


def laid(m: int, n: int, dtype: torch.dtype, transposed: bool) -> Tensor:
    """(m, n) with NaN around it, by rows or by columns."""
    return rows(n, m, dtype).t() if transposed else rows(m, n, dtype)


# A tile has 6 or 12 rows and 8, 16 or 32 columns, a piece 144 rows, 1024 columns and 512 of K.
SIZES = [(1, 1, 1), (5, 7, 3), (6, 16, 8), (13, 33, 17), (145, 50, 400), (7, 1030, 20), (30, 40, 800), (3, 5, 0)]


@pytest.mark.parametrize("to_half", (False, True), ids=("float32 out", "own dtype out"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products(cpu: ModuleType, dtype: torch.dtype, to_half: bool):
    """Every layout of both operands, with a bias, added to what is there, nothing written beside the result."""
    for (M, N, K), a_lies, b_lies in itertools.product(SIZES, (False, True), (False, True)):
        a, b, bias = laid(M, K, dtype, a_lies), laid(K, N, dtype, b_lies), torch.randn(N)
        c = Out(M, N, dtype=dtype if to_half else torch.float32)
        gemm(cpu, a, b, c.tensor, bias)
        size = a.double().abs() @ b.double().abs() + bias.double().abs()
        assert_rounded(c.checked(), a.double() @ b.double() + bias.double(), ulps=K**0.5 + 2, scale=size)
        if not to_half:
            before = torch.randn(M, N)
            c.tensor.copy_(before)
            gemm(cpu, a, b, c.tensor, add=True)
            size = a.double().abs() @ b.double().abs() + before.double().abs()
            assert_rounded(c.checked(), before.double() + a.double() @ b.double(), ulps=K**0.5 + 2, scale=size)


def test_a_wide_result_in_half_precision_and_padded_rows(cpu: ModuleType):
    """More rows than are staged at a time, rows of the result farther apart than they are long, mixed dtypes."""
    a, b = torch.randn(1300, 9).bfloat16(), torch.randn(9, 1050)
    memory = torch.full((1300, 1060), NAN, dtype=torch.bfloat16)
    gemm(cpu, a, b, memory[:, :1050])
    assert_rounded(memory[:, :1050], a.double() @ b.double(), ulps=5, scale=a.double().abs() @ b.double().abs())
    assert memory[:, 1050:].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("M, N", ((0, 3), (1, 1), (2, 17), (9, 70), (1000, 33)))
def test_column_sums(cpu: ModuleType, dtype: torch.dtype, M: int, N: int):
    x, sums = rows(M, N, dtype), Out(N, dtype=torch.float32)
    cpu.column_sums(*ptrs(x, sums.tensor), M, N, N + 3, False, CODE[dtype])
    assert_rounded(sums.checked(), x.double().sum(0), ulps=M**0.5 + 1, scale=x.double().abs().sum(0))
    cpu.column_sums(*ptrs(x, sums.tensor), M, N, N + 3, True, CODE[dtype])
    assert_rounded(sums.checked(), 2 * x.double().sum(0), ulps=2 * M**0.5 + 2, scale=2 * x.double().abs().sum(0))


@pytest.mark.parametrize("M, N, K", ((300, 200, 500), (12, 3000, 70), (900, 20, 100)))
def test_the_same_bits_for_any_number_of_threads(cpu: ModuleType, M: int, N: int, K: int):
    a, b, x = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16().t(), torch.randn(M, N)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            c, half, sums = torch.empty(M, N), torch.empty(M, N, dtype=torch.bfloat16), torch.empty(N)
            gemm(cpu, a, b, c)
            gemm(cpu, a, b, half)
            cpu.column_sums(*ptrs(x, sums), M, N, N, False, 0)
            results.append((c, half, sums))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(p, q) for r in results[1:] for p, q in zip(results[0], r, strict=True))


def test_bad_arguments():
    best, memory = load(""), torch.zeros(16)
    good: dict[str, Any] = dict.fromkeys("abc", memory.data_ptr()) | dict(bias=0, M=2, N=3, K=2, accumulate=False)
    good |= dict(a_row=2, a_col=1, b_row=3, b_col=1, c_row=3, a_dtype=0, b_dtype=0, c_dtype=0)
    best.gemm(**good)
    for key in "abc":
        with pytest.raises(ValueError, match=f"^{key} is a null pointer"):
            best.gemm(**good | {key: 0})
    for key in "MNK":
        with pytest.raises(ValueError, match=f"^{key} must not be negative, got -2"):
            best.gemm(**good | {key: -2})
        best.gemm(**good | {key: 0})
    for key in ("a_dtype", "b_dtype", "c_dtype"):
        with pytest.raises(ValueError, match=f"^{key} must be a dtype code from 0 to 2, got 3"):
            best.gemm(**good | {key: 3})
    with pytest.raises(ValueError, match="c must be float32 to accumulate, got code 1"):
        best.gemm(**good | dict(accumulate=True, c_dtype=1))
    with pytest.raises(ValueError, match="bias must be null to accumulate"):
        best.gemm(**good | dict(accumulate=True, bias=memory.data_ptr()))
    sums: dict[str, Any] = dict(
        x=memory.data_ptr(), sums=memory.data_ptr(), M=2, N=3, x_row=3, accumulate=False, dtype=0
    )
    for key in ("x", "sums"):
        with pytest.raises(ValueError, match=f"^{key} is a null pointer"):
            best.column_sums(**sums | {key: 0})


# ---- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, outputs", (((0, 4), 3), ((2, 0), 3), ((2, 4), 0), ((2, 0, 4), 3), ((4,), 3)), ids=str)
def test_any_size(shape: tuple[int, ...], outputs: int):
    x, weight = torch.randn(shape).requires_grad_(), torch.randn(outputs, shape[-1]).requires_grad_()
    bias = torch.randn(outputs).requires_grad_()
    mine, theirs = linear(x, weight, bias, backend="cpu"), F.linear(x, weight, bias)
    torch.testing.assert_close(mine, theirs)
    got, expected = (torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (mine, theirs))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def chosen(x: Tensor, weight: Tensor) -> str:
    return LINEAR.select(None, x.device, x, weight, None)


def test_the_automatic_choice(slow_torch, monkeypatch):
    """Half precision where torch is slow at it; never float32, float64 or a single row without a gradient."""
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    assert chosen(x.bfloat16(), w.bfloat16()) == chosen(x.half(), w.half()) == "cpu"
    assert chosen(x, w) == chosen(x.double(), w.double()) == chosen(x[:1].half(), w.half()) == "eager"
    assert chosen(x[:1].half(), w.half().requires_grad_()) == "cpu"
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(x, w) == "cpu"
    monkeypatch.setattr(products, "FAST", {torch.bfloat16: True, torch.float16: True})
    assert chosen(x.bfloat16(), w.bfloat16()) == "eager"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_computes_in_its_dtype(slow_torch, dtype: torch.dtype):
    x, w, b = torch.randn(9, 40).requires_grad_(), torch.randn(7, 40).requires_grad_(), torch.randn(7).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = linear(x, w, b)
    assert y.dtype == dtype
    torch.testing.assert_close(y, (x.to(dtype).float() @ w.to(dtype).float().t() + b.to(dtype).float()).to(dtype))
    for grad, leaf in zip(torch.autograd.grad(y.float().sum(), (x, w, b)), (x, w, b), strict=True):
        assert grad.dtype == leaf.dtype == torch.float32


# ---- the model -------------------------------------------------------------------------------------------------------


class Noted(nn.Linear):
    """What adapters and wrappers are: an nn.Linear and something more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_only_plain_modules_are_bypassed(slow_torch, monkeypatch):
    seen: list[str] = []

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        seen.append("kernel")
        return linear(x, weight, bias)

    monkeypatch.setattr("pyllm.projection.linear", noted)
    x = torch.randn(4, 8).bfloat16()
    plain = nn.Linear(8, 6).bfloat16()
    torch.testing.assert_close(project(plain, x), plain(x))
    assert seen == ["kernel"]

    for what in ("hook", "pre-hook", "backward hook", "global hook", "forward replaced", "subclass", "parametrised"):
        module = (Noted if what == "subclass" else nn.Linear)(8, 6).bfloat16()
        handle: Any = None
        if what == "hook":
            module.register_forward_hook(lambda m, args, y: y + 1)
        elif what == "pre-hook":
            module.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        elif what == "backward hook":
            module.register_full_backward_hook(lambda m, a, b: None)
        elif what == "global hook":
            handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: y + 1)
        elif what == "forward replaced":
            module.forward = lambda x, own=module.forward: own(x) + 1  # type: ignore[method-assign]
        elif what == "parametrised":
            nn.utils.parametrizations.weight_norm(module)
        got, expected = project(module, x), module(x)
        if handle is not None:
            handle.remove()
        assert torch.equal(got, expected), what
    assert seen == ["kernel"]


@pytest.mark.parametrize("how", ("eager", "compiled", "checkpointed", "autocast"))
def test_model_in_bfloat16(slow_torch, how: str):
    """Loss and gradients of a small model: as near to float32's as those of torch's own products."""
    config = PRESETS["tiny"]
    exact = LlamaForCausalLM(config)
    ids = torch.randint(config.vocab_size, (2, 24))
    exact(ids, labels=ids).loss.backward()
    results = []
    for fast in (True, False):
        products.FAST[torch.bfloat16] = fast  # the fixture's own dictionary
        model: Any = LlamaForCausalLM(config)
        model.load_state_dict(exact.state_dict())
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, labels=ids).loss
        else:
            model = model.bfloat16()
            if how == "checkpointed":
                model.gradient_checkpointing_enable()
                model.train()
            torch._dynamo.reset()
            call = torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compiled" else model
            loss = call(ids, labels=ids).loss
        loss.backward()
        error = [
            float((p.grad.float() - q.grad).norm() / q.grad.norm())
            for p, q in zip(model.parameters(), exact.parameters(), strict=True)
        ]
        results.append((float(loss.detach()), error))
    (theirs, their_error), (mine, my_error) = results
    assert mine == pytest.approx(theirs, rel=2e-3)
    assert max(a / (b + 1e-3) for a, b in zip(my_error, their_error, strict=True)) < 1.5
