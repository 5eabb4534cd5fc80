"""linear_cross_entropy's Triton backend: panels, the forward without logits, what is skipped, memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from harness.machines import DEVICE
from harness.reference import CLOSE, assert_same_grads, randn

from pyllm.kernels import linear_cross_entropy, triton_support
from pyllm.kernels.cross_entropy import panels as shared
from pyllm.kernels.cross_entropy import reference

if not triton_support.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

from pyllm.kernels.cross_entropy import triton_linear_cross_entropy as kernels
from pyllm.kernels.cross_entropy import triton_linear_forward as fused

MB = 1 << 20


def triton(*args, **options):
    return linear_cross_entropy(*args, backend="triton", **options)


def drawn(N: int, C: int, V: int, dtype: torch.dtype = torch.float32, bias: bool = False):
    h, w = (randn(*shape).to(DEVICE, dtype).requires_grad_() for shape in ((N, C), (V, C)))
    target = torch.randint(V, (N,)).masked_fill(torch.rand(N) < 0.3, -100).to(DEVICE)
    return h, w, target, randn(V).to(DEVICE).requires_grad_() if bias else None


@pytest.fixture(params=["fused", "chunks"])
def forward(request, monkeypatch):
    """Either forward for every dtype, whichever the backend would choose."""
    monkeypatch.setattr(kernels, "uses_fused_forward", lambda dtype: request.param == "fused")
    return request.param


def panels_of(monkeypatch, rows: int, cols: int) -> None:
    monkeypatch.setattr(reference, "LOGITS_BYTES", 4 * rows * cols)
    monkeypatch.setattr(shared, "SIDE", rows)


@pytest.mark.parametrize("N", [1, 16, 50])
@pytest.mark.parametrize("V", [1, 64, 150])
def test_many_panels(forward, N, V, monkeypatch):
    """Several panels of classes and of rows, several programs a row, the last of each ragged; every option at once."""
    panels_of(monkeypatch, 16, 64)
    assert shared.panels(50, 150) == (13, 64)
    h, w, target, bias = drawn(N, 24, V, bias=True)
    target[0] = V - 1
    weight = torch.rand(V).to(DEVICE) + 0.1
    logits = F.linear(h, w, bias)
    options = dict(weight=weight, label_smoothing=0.1)
    for reduction in ("mean", "none"):
        theirs = F.cross_entropy(5 * torch.tanh(logits / 5), target, reduction=reduction, **options)
        mine, predictions = triton(
            h, w, target, linear_bias=bias, reduction=reduction, softcap=5.0, return_predictions=True, **options
        )
        assert_same_grads(mine, theirs, [h, w, bias], rtol=1e-4, atol=1e-5)
        assert torch.equal(predictions, logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_not_rounded(forward, dtype):
    """In half precision logits are float32 from the inputs as they are: no rounding to the inputs' dtype between."""
    h, w, target, _ = drawn(20, 64, 90, dtype)
    expected = F.cross_entropy(F.linear(h.double(), w.double()), target, reduction="none")
    rounded = F.cross_entropy(F.linear(h, w).double(), target, reduction="none")
    got = triton(h, w, target, reduction="none").double()
    assert got.dtype == torch.float64
    assert (got - expected).abs().max() < 1e-2 * (rounded - expected).abs().max()


def test_linear_weight_gradient_is_summed_in_float32(monkeypatch):
    """Defect 3: in bfloat16 a sum over panels of rows stops growing once it is 256 times a panel's share."""
    N = 600
    panels_of(monkeypatch, 1, 64)
    h, w = torch.ones(N, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(N, dtype=torch.long)
    h, target = h.to(DEVICE), target.to(DEVICE)
    lse = torch.full((N,), math.log(2.0), device=DEVICE)
    dloss = torch.ones(N, device=DEVICE)
    _, dw, db = kernels.linear_cross_entropy_bwd(
        dloss, h, w.to(DEVICE), lse, target, bias.to(DEVICE), None, -100, 0.0, 0.0, 0.0, False, True, True
    )
    assert dw.flatten().tolist() == [-N / 2, N / 2]
    assert db.tolist() == [-N / 2, N / 2]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_gradients_nobody_wants_are_not_computed(wanted, monkeypatch):
    """No product for them, no memory: with one of three wanted two products, the logits and the gradient, or one."""
    h, w, target, bias = drawn(9, 16, 33, bias=True)
    leaves = [h, w, bias]
    expected = torch.autograd.grad(F.cross_entropy(F.linear(h, w, bias), target), [leaves[i] for i in wanted])
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    loss = triton(h, w, target, linear_bias=bias)
    products = []
    product = shared.product
    monkeypatch.setattr(shared, "product", lambda *args, **how: products.append(1) or product(*args, **how))
    for mine, theirs in zip(torch.autograd.grad(loss, [leaves[i] for i in wanted]), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert len(products) == 1 + (0 in wanted) + (1 in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_the_layer(dtype):
    """Defect 6: a transposed weight, a sliced one, padded and expanded input; no copy of the weight is needed."""
    h, w, target, _ = drawn(12, 24, 40, dtype)
    expected = triton(h, w, target, reduction="none")
    for matrix in (w.detach().t().contiguous().t(), F.pad(w.detach(), (3, 5))[:, 3:-5]):
        for hidden in (h.detach(), F.pad(h.detach(), (1, 2))[:, 1:-2], h.detach().t().contiguous().t()):
            leaves = hidden.requires_grad_(), matrix.requires_grad_()
            tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=8e-3, atol=1e-2)
            mine = triton(*leaves, target, reduction="none")
            torch.testing.assert_close(mine, expected, **CLOSE)
            got = torch.autograd.grad(mine.sum(), leaves)
            again = triton(h, w, target, reduction="none").sum()
            for a, b in zip(got, torch.autograd.grad(again, (h, w)), strict=True):
                torch.testing.assert_close(a, b, **tolerance)
    once = h.detach()[:1].expand(12, 24)
    torch.testing.assert_close(triton(once, w, target), triton(once.contiguous(), w, target), **CLOSE)


def test_mixed_dtypes_and_autocast():
    """Defect 10: bias and class weights have dtypes of their own; autocast casts the layer and nothing else."""
    h, w, target, bias = drawn(9, 16, 33, torch.bfloat16, bias=True)
    weight = torch.rand(33).to(DEVICE, torch.float16)
    theirs = F.cross_entropy(F.linear(h.float(), w.float(), bias), target, weight.float())
    mine = triton(h, w, target, linear_bias=bias, weight=weight)
    assert_same_grads(mine, theirs, [h, w, bias], rtol=2e-2, atol=1e-3)
    full = [t.detach().float().requires_grad_() for t in (h, w, bias)]
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = triton(*full[:2], target, linear_bias=full[2], weight=weight)
    assert cast.dtype == torch.float32
    grads = torch.autograd.grad(cast, full)  # outside of autocast, as a training loop has it
    assert [g.dtype for g in grads] == [torch.float32] * 3
    rounded = triton(h, w, target, linear_bias=bias.detach().bfloat16(), weight=weight)
    torch.testing.assert_close(cast, rounded, rtol=0, atol=0)


def test_inside_autocast_a_named_backend_computes_in_float32():
    """Backward under autocast, which checkpointing has: products of float32 stay float32."""
    h, w, target, _ = drawn(9, 16, 33)
    expected = torch.autograd.grad(triton(h, w, target), (h, w))
    lse = torch.logsumexp(F.linear(h, w).detach(), -1)
    share = torch.where(target == -100, 0.0, 1 / (target != -100).sum())
    with torch.autocast(DEVICE, torch.bfloat16):
        got = kernels.linear_cross_entropy_bwd(
            share, h.detach(), w.detach(), lse, target, None, None, -100, 0.0, 0.0, 0.0, True, True, False
        )
    for a, b in zip(got, expected, strict=False):
        torch.testing.assert_close(a, b, **CLOSE)


def test_empty_batches():
    w = randn(5, 8).to(DEVICE).requires_grad_()
    for shape in ((0,), (2, 0)):
        for dtype in (torch.float32, torch.bfloat16):
            h, matrix = torch.zeros(*shape, 8, dtype=dtype, device=DEVICE, requires_grad=True), w.to(dtype)
            target = torch.zeros(shape, dtype=torch.long, device=DEVICE)
            assert triton(h, matrix, target).isnan()
            total, predictions = triton(h, matrix, target, reduction="sum", return_predictions=True)
            assert total == 0
            assert predictions.shape == shape
            dh, dw = torch.autograd.grad(total, (h, w))
            assert dh.shape == h.shape
            assert not dw.any()


@pytest.mark.parametrize("bad", [-1, 33, 2**40])
def test_target_out_of_range(forward, bad, monkeypatch):
    h, w, target, _ = drawn(9, 16, 33)
    target[4] = bad
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match=str(bad)):
            triton(h, w, target)
    monkeypatch.setattr(reference, "check_targets", lambda *_: None)
    loss = triton(h, w, target, reduction="none")
    assert loss.isnan().tolist() == [i == 4 for i in range(9)]
    (dh,) = torch.autograd.grad(loss.sum(), h)
    assert dh.isnan().any(1).tolist() == [i == 4 for i in range(9)]


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_logits_far_below_zero_and_infinite(forward):
    """Defect 15: a row of logits about -1000, one of -inf, one with +inf."""
    h = torch.tensor([[1.0, 0.0], [-1000.0, 0.0], [-math.inf, 0.0], [math.inf, 0.0]]).to(DEVICE)
    w = torch.cat((torch.rand(70, 1) + 0.5, torch.ones(70, 1)), 1).to(DEVICE)
    target = torch.tensor([0, 1, 2, 3], device=DEVICE)
    theirs = F.cross_entropy(F.linear(h, w), target, reduction="none")
    torch.testing.assert_close(triton(h, w, target, reduction="none"), theirs, equal_nan=True, **CLOSE)


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning", "ignore:.*encountered:RuntimeWarning")
def test_a_block_of_ignored_rows_is_not_computed():
    """NaN in the prompt's rows, all of them ignored, reaches nothing; with predictions every row has one."""
    h, w, target, _ = drawn(40, 16, 70)
    target[:16] = -100
    target[16:] = 3
    with torch.no_grad():
        h[:16] = math.nan
    loss, lse, _ = fused.linear_cross_entropy_fwd(h, w, target, None, None, -100, 0.1, 0.1, 0.0, False)
    assert not loss[:16].any()
    assert not lse[:16].any()
    assert loss[16:].isfinite().all()
    _, _, predictions = fused.linear_cross_entropy_fwd(h, w, target, None, None, -100, 0.0, 0.0, 0.0, True)
    assert torch.equal(predictions[16:], F.linear(h, w)[16:].argmax(-1))
    assert ((predictions >= 0) & (predictions < 70)).all()


def test_panels_keep_the_gemms_busy():
    """Defect 4, Llama 3's head: panels near squares of 8192, where rows by peers' formula are 32 and 256."""
    V, C = 128256, 4096
    for N, peers in ((1024, 32), (8192, 256)):
        assert 1 << (N // math.ceil(V / C) - 1).bit_length() == peers
    assert shared.panels(1024, V) == (1024, 64128)
    assert shared.panels(8192, V) == (8192, 8064)
    assert shared.panels(131072, V) == (8192, 8064)
    assert shared.panels(8192, 32000) == (8192, 8000)
    assert shared.panels(10**6, 1000) == (66667, 1000)
    for N in (1, 7, 100, 5000, 10**5):
        for V in (1, 63, 1000, 32000, 128256, 10**6):
            rows, cols = shared.panels(N, V)
            assert 1 <= rows <= N
            assert 1 <= cols <= V
            assert 4 * rows * cols <= 256 * MB
            assert cols == V or cols % 64 == 0


def eager_peak(N: int, V: int, C: int, itemsize: int) -> int:
    """Bytes that logits.float() and cross_entropy hold in backward: logits, log p, its gradient, theirs, and dW, dh."""
    wide = 0 if itemsize == 4 else itemsize
    return N * V * (3 * 4 + wide) + (V + N) * C * itemsize


def our_peak(N: int, V: int, C: int, itemsize: int) -> int:
    return shared.workspace(N, V, C, itemsize) + (V + N) * C * itemsize


def test_peak_memory_on_a_gpu():
    """Llama 3 8B, 8192 tokens in bfloat16, gradients included: 1.76 GB, an eighth of eager's 15.8 GB; 0.65 without."""
    shape = (8192, 128256, 4096, 2)
    assert shared.workspace(*shape) == 8192 * 8064 * 6 + 4 * 4096 * (8192 + 8064)
    assert our_peak(*shape) == pytest.approx(1.78e9, rel=0.01)
    assert eager_peak(*shape) == pytest.approx(15.8e9, rel=0.01)
    assert our_peak(*shape) <= eager_peak(*shape) / 8


def peak(function) -> int:
    """The most bytes of CPU memory that function() holds beyond what was there, by the allocator's own record."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        most = max(most, live)
    return most


@pytest.mark.skipif(DEVICE != "cpu", reason="measures the CPU's allocator")
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_peak_memory_measured(backend, monkeypatch):
    """The real shape by 1/64 of each side, in float32, the budget by 1/4096: no more than an eighth of eager's."""
    N, V, C = 128, 2004, 64
    monkeypatch.setattr(reference, "LOGITS_BYTES", reference.LOGITS_BYTES // 4096)
    monkeypatch.setattr(shared, "SIDE", N)
    h, w, target, _ = drawn(N, C, V)
    layer = [h, w.detach()]  # the layer's own gradient is as large for all: without it

    def plain():
        torch.autograd.grad(F.cross_entropy(F.linear(*layer), target), h)

    def ours():
        torch.autograd.grad(linear_cross_entropy(*layer, target, backend=backend), h)

    whole, mine = peak(plain), peak(ours)
    assert whole == pytest.approx(eager_peak(N, V, C, 4) - V * C * 4, rel=0.02)
    if backend == "triton":
        layer[1] = w

        def both():
            torch.autograd.grad(linear_cross_entropy(h, w, target, backend=backend), (h, w))

        assert peak(both) == pytest.approx(our_peak(N, V, C, 4), rel=0.05)
    assert mine <= whole / 8
