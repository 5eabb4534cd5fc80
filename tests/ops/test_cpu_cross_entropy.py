"""Cross-entropy's C++ kernels called directly, in every instruction set: vector tails, options, what is not finite."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from harness.cpu_kernels import CODE, DTYPES, ISAS, Out, acc, assert_rounded, load, ptrs, rows
from torch import Tensor

NAN, INF = float("nan"), float("inf")
IGNORE = -100
CLASSES = (1, 7, 16, 33, 2049, 4200)  # a tile has 2048, a share 4096
PLAIN: dict[str, Any] = {}
EVERYTHING = dict(label_smoothing=0.1, z_loss=1e-2, softcap=3.0)
OPTIONS = {"plain": PLAIN, "smooth": dict(label_smoothing=0.2), "zloss": dict(z_loss=0.1), "softcap": dict(softcap=2.0),
           "everything": EVERYTHING}  # fmt: skip


@pytest.fixture(scope="module", params=ISAS)
def cpu(request: pytest.FixtureRequest) -> ModuleType:
    try:
        module = load(request.param)
    except ImportError:
        pytest.skip(f"this CPU has no {request.param}")
    return module


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def call(
    function: Any, x: Tensor, target: Tensor, weight: Tensor | None = None, dloss: Tensor | None = None,
    loss: Tensor | None = None, lse: Tensor | None = None, predictions: Tensor | None = None,
    dlogits: Tensor | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0,
) -> int:  # fmt: skip
    n, V = x.shape
    total = float(V) if weight is None else float(weight.sum())
    stride = 0 if dloss is None or dloss.numel() == 1 else dloss.stride(0)  # one number: for all rows
    options = (IGNORE, label_smoothing, z_loss, softcap, total)
    pointers = ptrs(x, target, weight, dloss, loss, lse, predictions, dlogits)
    return function(*pointers, n, V, x.stride(0), stride, *options, CODE[x.dtype])


def truth(
    x: Tensor, target: Tensor, weight: Tensor | None, dloss: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, lse, dlogits) by autograd in float64, of torch's own cross-entropy."""
    x = x.double().requires_grad_()
    capped = softcap * torch.tanh(x / softcap) if softcap else x
    weight = None if weight is None else weight.double()
    loss = torch.nn.functional.cross_entropy(
        capped, target, weight, ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing
    )
    lse = capped.logsumexp(-1)
    loss = loss + (z_loss * lse.square()).masked_fill(target == IGNORE, 0.0)
    (dlogits,) = torch.autograd.grad(loss, x, dloss.double())
    return loss.detach(), lse.detach(), dlogits


def drawn(n: int, V: int, dtype: torch.dtype, ignored: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits in padded rows, target, class weights, dloss)"""
    x = rows(n, V, dtype).mul_(3)
    target = torch.randint(V, (n,))
    if ignored:
        target[1::5] = IGNORE
    return x, target, torch.rand(V, dtype=acc(dtype)) + 0.5, torch.randn(n, dtype=acc(dtype))


@pytest.mark.parametrize(
    "options, weighted",
    [("plain", False), ("plain", True), ("smooth", False), ("zloss", False), ("softcap", False), ("everything", True)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(cpu: ModuleType, dtype: torch.dtype, options: str, weighted: bool):
    """Few and many rows (which are divided differently), every number of classes."""
    for n, V in itertools.chain(itertools.product((3,), CLASSES), ((70, 129), (65, 2100))):
        x, target, weight, dloss = drawn(n, V, dtype)
        given = weight if weighted else None
        loss, lse, grad = Out(n, dtype=acc(dtype)), Out(n, dtype=acc(dtype)), Out(n, V, dtype=dtype)
        assert call(cpu.cross_entropy_fwd, x, target, given, loss=loss.tensor, lse=lse.tensor, **OPTIONS[options]) == -1
        true_loss, true_lse, true_grad = truth(x, target, given, dloss, **OPTIONS[options])
        kept = target != IGNORE
        size = true_loss.abs() + x.double().abs().amax(1) + math.log(V)
        # float64 adds 2000 terms one by one where float32 has lanes
        chain = 8 + (V**0.5 if dtype == torch.float64 else 0)
        assert_rounded(loss.checked(), true_loss, ulps=chain, scale=size)
        assert_rounded(lse.checked()[kept], true_lse[kept], ulps=chain, scale=size[kept])
        call(
            cpu.cross_entropy_bwd,
            x,
            target,
            given,
            dloss=dloss,
            lse=lse.tensor,
            dlogits=grad.tensor,
            **OPTIONS[options],
        )
        # the exponent's error is that of the lse
        scale = dloss.double().abs()[:, None] * (1 + size[:, None]) * (weight.max() if weighted else 1) * 2
        cap = OPTIONS[options].get("softcap")
        capped = cap * torch.tanh(x.double() / cap) if cap else x.double()
        p = torch.softmax(capped, -1) + 1e-3 / V + torch.nn.functional.one_hot(target.clamp(0), V)
        assert_rounded(grad.checked(), true_grad, ulps=chain, scale=scale * p.clamp(max=1))
        assert not grad.tensor[~kept].any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("n", (3, 70))
def test_predictions(cpu: ModuleType, dtype: torch.dtype, n: int):
    """torch's argmax: the first of equals, a NaN before all; also of ignored rows."""
    x = torch.randint(-9, 9, (n, 9000)).to(dtype)
    x[0, [4500, 8200]] = 50.0
    x[1] = -INF
    x[2, [77, 8999]] = NAN
    target = torch.full((n,), IGNORE)
    loss, predictions = torch.empty(n, dtype=acc(dtype)), torch.full((n,), -1)
    for softcap in (0.0, 5.0):
        call(cpu.cross_entropy_fwd, x, target, loss=loss, lse=loss.clone(), predictions=predictions, softcap=softcap)
        assert torch.equal(predictions, x.argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", (8, 70))
def test_what_is_not_finite(cpu: ModuleType, dtype: torch.dtype, n: int):
    """-inf is a class that cannot be; rows of nothing else, infinity and NaN make NaN, as torch does."""
    V = 4200
    x, target = torch.randn(n, V).to(dtype), torch.randint(V, (n,))
    x[0, : V - 1], target[0] = -INF, V - 1
    x[1], x[2, 5], x[3, 4199], x[4, 4000:] = -INF, INF, NAN, -INF
    target[4] = 1
    x[5], target[5] = -30000.0, 3
    loss, lse, grad = torch.empty(n, dtype=acc(dtype)), torch.empty(n, dtype=acc(dtype)), torch.empty_like(x)
    dloss = torch.ones(n, dtype=acc(dtype))
    call(cpu.cross_entropy_fwd, x, target, loss=loss, lse=lse)
    call(cpu.cross_entropy_bwd, x, target, dloss=dloss, lse=lse, dlogits=grad)
    true_loss, _, true_grad = truth(x, target, None, dloss)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-2, atol=1e-4, equal_nan=True)
    assert loss[:6].isfinite().tolist() == [True, False, False, False, True, True]


@pytest.mark.parametrize("softcap", (0.0, 2.0))
def test_exp_and_tanh_on_the_whole_line(cpu: ModuleType, softcap: float):
    """p = e^(x - lse) and the softcap's slope for two classes, x far below to far above."""
    d = torch.cat((torch.linspace(-110, 110, 20001), torch.randn(5000) * 1e-3, torch.tensor([0.0, 1e-30, -1e-30])))
    x = torch.stack((d, torch.zeros_like(d)), 1)
    n = len(d)
    target, dloss = torch.ones(n, dtype=torch.int64), torch.ones(n)
    loss, lse, grad = torch.empty(n), torch.empty(n), torch.empty_like(x)
    call(cpu.cross_entropy_fwd, x, target, loss=loss, lse=lse, softcap=softcap)
    call(cpu.cross_entropy_bwd, x, target, dloss=dloss, lse=lse, dlogits=grad, softcap=softcap)
    true_loss, _, true_grad = truth(x, target, None, dloss, softcap=softcap)
    assert_rounded(loss, true_loss, ulps=4, scale=true_loss.abs() + 1)
    capped = (softcap * torch.tanh(x.double() / softcap)).abs() if softcap else x.double().abs()
    size = torch.softmax(x.double(), -1) * (2 + capped.amax(1, keepdim=True)) + 1e-38
    least = torch.finfo(torch.float32).smallest_normal  # below it, p may be 0
    seen = true_grad[:, 0].abs() > least
    assert_rounded(grad[seen, 0], true_grad[seen, 0], ulps=4, scale=size[seen, 0] + (1 if softcap else 0))
    assert (grad[~seen, 0].abs() <= least).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_one_step_is_forward_and_backward_in_place(cpu: ModuleType, dtype: torch.dtype, options: str):
    n, V = 70, 2100
    _, target, weight, _ = drawn(n, V, dtype)
    x, scale = torch.randn(n, V, dtype=dtype), torch.tensor(0.25, dtype=dtype)
    loss, lse, best = (torch.empty(n, dtype=d) for d in (dtype, dtype, torch.int64))
    grad, kept = torch.empty_like(x), OPTIONS[options]
    call(cpu.cross_entropy_fwd, x, target, weight, loss=loss, lse=lse, predictions=best, **kept)
    call(cpu.cross_entropy_bwd, x, target, weight, dloss=scale, lse=lse, dlogits=grad, **kept)
    mine, mine_lse, mine_best = torch.empty_like(loss), torch.empty_like(lse), torch.empty_like(best)
    call(cpu.cross_entropy_step, x, target, weight, scale, mine, mine_lse, mine_best, x, **kept)
    for got, expected in ((mine, loss), (mine_lse, lse), (mine_best, best), (x, grad)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("n, V", ((3, 20000), (66, 1000)))
def test_the_same_bits_for_any_number_of_threads(cpu: ModuleType, dtype: torch.dtype, n: int, V: int):
    x, target, weight, dloss = drawn(n, V, dtype)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            loss, lse, grad = torch.empty(n), torch.empty(n), torch.empty(n, V, dtype=dtype)
            call(cpu.cross_entropy_fwd, x, target, weight, loss=loss, lse=lse, **EVERYTHING)
            call(cpu.cross_entropy_bwd, x, target, weight, dloss=dloss, lse=lse, dlogits=grad, **EVERYTHING)
            results.append((loss, lse, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_stores_past_the_cache_write_the_same(cpu: ModuleType):
    """A gradient of 8 MiB and more that begins at a vector's boundary, against the same one element off."""
    n, V = 80, 32000
    x, target = torch.randn(n, V), torch.randint(V, (n,))
    target[3] = IGNORE
    loss, lse = torch.empty(n), torch.empty(n)
    call(cpu.cross_entropy_fwd, x, target, loss=loss, lse=lse)
    grads = [torch.full((n * V + 1,), NAN)[off:][: n * V].view(n, V) for off in (0, 1)]
    for grad in grads:
        call(cpu.cross_entropy_bwd, x, target, dloss=torch.ones(1), lse=lse, dlogits=grad)
    assert grads[0].data_ptr() % 64 == 0 and grads[1].data_ptr() % 64 == 4
    assert torch.equal(*grads)
    torch.testing.assert_close(grads[0].sum(1), torch.zeros(n), atol=1e-4, rtol=0)


def test_bad_arguments():
    best = load("")
    memory, target = torch.zeros(16), torch.zeros(2, dtype=torch.int64)
    names = ["logits", "target", "weight", "dloss", "loss", "lse", "predictions", "dlogits"]
    good: dict[str, Any] = dict.fromkeys(names, memory.data_ptr()) | dict(target=target.data_ptr(), predictions=0)
    good |= dict(rows=2, cols=3, x_stride=3, dloss_stride=0, ignore_index=-100, label_smoothing=0.0, z_loss=0.0)
    good |= dict(softcap=0.0, weight_sum=3.0, dtype=0)
    needed = {"fwd": {"loss", "lse"}, "bwd": {"dloss", "lse", "dlogits"}, "step": {"loss", "lse", "dloss", "dlogits"}}
    for name, own in needed.items():
        function = getattr(best, f"cross_entropy_{name}")
        assert function(**good) == -1
        for key in {"logits", "target"} | own:
            with pytest.raises(ValueError, match=f"^{key} is a null pointer"):
                function(**good | {key: 0})
        for key in ("rows", "cols"):
            with pytest.raises(ValueError, match=f"^{key} must not be negative, got -2"):
                function(**good | {key: -2})
        for code in (-1, 4):
            with pytest.raises(ValueError, match=f"^dtype must be a dtype code from 0 to 3, got {code}"):
                function(**good | {"dtype": code})
        for bad in (3, -1):
            target[1] = bad
            assert function(**good) == 1  # the row; nothing is read there
        target[1] = 0
        assert function(**good | dict.fromkeys(names, 0) | {"rows": 0}) == -1
    with pytest.raises(ValueError, match="dtype must be float32 or float64 in one step, got code 1"):
        best.cross_entropy_step(**good | {"dtype": 1})
