"""The cross-entropy references against torch's own: values, reductions, errors, memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from harness.reference import CLOSE, assert_same_grads, randn
from torch.utils._python_dispatch import TorchDispatchMode

from pyllm.kernels import use_backend
from pyllm.kernels.cross_entropy import cross_entropy, linear_cross_entropy
from pyllm.kernels.cross_entropy import reference as ce_reference


@pytest.fixture(autouse=True)
def _eager():
    with use_backend("eager"):
        yield


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_cross_entropy_equals_torch(reduction, label_smoothing, weighted, ignored):
    logits = randn(7, 11, grad=True)
    target = torch.randint(11, (7,)).masked_fill(torch.rand(7) < ignored, 3)  # class 3 is ignored
    weight = torch.rand(11) if weighted else None
    options = dict(ignore_index=3, reduction=reduction, label_smoothing=label_smoothing)
    theirs = F.cross_entropy(logits, target, weight, **options)
    mine = cross_entropy(logits, target, weight, **options)
    assert_same_grads(mine, theirs, [logits], **CLOSE, equal_nan=True)
    # the linear form, through the identity
    eye = torch.eye(11)
    linear = linear_cross_entropy(logits, eye, target, weight=weight, **options)
    assert_same_grads(linear, theirs, [logits], **CLOSE, equal_nan=True)


def test_cross_entropy_of_infinities_equals_torch():
    logits = randn(5, 6)
    logits[0, 2] = logits[1, 0] = -math.inf
    logits[2] = -math.inf
    logits[3, 1] = math.inf
    logits.requires_grad_()
    target = torch.tensor([2, 1, 0, 0, -100])
    for smoothing in (0.0, 0.1):
        options = dict(reduction="none", label_smoothing=smoothing)
        theirs = F.cross_entropy(logits, target, **options)
        mine = cross_entropy(logits, target, **options)
        assert_same_grads(mine, theirs, [logits], equal_nan=True, **CLOSE)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_cross_entropy_of_shifted_logits(shift):
    """Multiples of 1/64 survive the shift exactly, so the loss and its gradient must not change at all."""
    logits = (randn(6, 40) * 64).round() / 64
    target = torch.randint(40, (6,))
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(cross_entropy(logits + shift, target, reduction="none"), expected)


def test_z_loss_and_softcap():
    x = randn(6, 9, dtype=torch.float64, grad=True)
    target = torch.tensor([0, 4, -100, 8, 2, -100])
    weight = torch.rand(9, dtype=torch.float64)
    capped = 3 * torch.tanh(x / 3)
    rows = F.cross_entropy(capped, target, weight, reduction="none")
    kept = target != -100
    rows = rows + torch.where(kept, 0.01 * torch.logsumexp(capped, -1) ** 2, 0.0)
    for reduction, expected in {
        "none": rows,
        "sum": rows.sum(),
        "mean": rows.sum() / weight[target[kept]].sum(),
    }.items():
        options = dict(reduction=reduction, z_loss=0.01, softcap=3.0)
        assert_same_grads(cross_entropy(x, target, weight, **options), expected, [x])
        eye = torch.eye(9, dtype=torch.float64)
        assert_same_grads(linear_cross_entropy(x, eye, target, weight=weight, **options), expected, [x])


@pytest.mark.parametrize("bad", [-1, 5])
def test_target_out_of_range(bad):
    logits, target = randn(4, 5, grad=True), torch.tensor([0, 1, bad, 2])
    with pytest.raises(IndexError, match=str(bad)):
        cross_entropy(logits, target)
    with pytest.raises(IndexError, match=str(bad)):
        linear_cross_entropy(logits, torch.eye(5), target)
    # a GPU's way: no question to the device, the row is NaN and no other is touched
    for weight in (None, torch.rand(5)):
        logp = torch.log_softmax(logits, -1)
        rows = ce_reference._nll_unchecked(logp, target, weight, -100)
        expected = ce_reference._nll(logp, target.clamp(0, 4), weight, -100)
        assert rows.isnan().tolist() == [False, False, True, False]
        grad = torch.autograd.grad(rows.nansum(), logits, retain_graph=True)[0]
        mine, theirs = rows[[0, 1, 3]], expected[[0, 1, 3]]
        assert torch.equal(mine, theirs)
        assert torch.equal(grad[[0, 1, 3]], torch.autograd.grad(theirs.sum(), logits)[0][[0, 1, 3]])


@pytest.mark.parametrize("path", ["autograd", "op"])
def test_linear_cross_entropy_in_chunks(monkeypatch, path):
    """Many chunks: the same numbers, and no tensor larger than a chunk's logits, forward or backward."""
    N, C, V = 60, 8, 40
    h, w, b = randn(N, C, grad=True), randn(V, C, grad=True), randn(V, grad=True)
    target = torch.randint(V, (N,)).masked_fill(torch.rand(N) < 0.3, -100)
    expected = F.cross_entropy(F.linear(h, w, b), target)
    monkeypatch.setattr(ce_reference, "LOGITS_BYTES", 4 * V * 16)
    assert len(ce_reference.chunks(N, V)) == 4

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    with Largest() as seen:
        if path == "autograd":
            got, predictions = linear_cross_entropy(h, w, target, linear_bias=b, return_predictions=True)
            grads = torch.autograd.grad(got, (h, w, b))
        else:
            options = (-100, 0.0, 0.0, 0.0)
            rows, lse, predictions = ce_reference.linear_cross_entropy_fwd(
                h.detach(), w.detach(), target, b.detach(), None, *options, True
            )
            got = ce_reference.reduce(rows, target, None, -100, "mean")
            share = torch.where(target == -100, 0.0, 1 / (target != -100).sum())
            grads = ce_reference.linear_cross_entropy_bwd(share, h, w, lse, target, b, None, *options)
    assert seen.numel <= max(15 * V, V * C, N * C)
    torch.testing.assert_close(got.detach(), expected.detach(), **CLOSE)
    assert torch.equal(predictions, F.linear(h, w, b).argmax(-1))
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (h, w, b)), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_linear_weight_gradient_is_summed_in_float32(monkeypatch):
    """In bfloat16 a sum over chunks stops growing once it is 256 times a chunk's share."""
    N, V = 2048, 2
    h, w = torch.ones(N, 1, dtype=torch.bfloat16), torch.zeros(V, 1, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setattr(ce_reference, "LOGITS_BYTES", 4 * V)
    loss = linear_cross_entropy(h, w, torch.zeros(N, dtype=torch.long), reduction="sum")
    (dw,) = torch.autograd.grad(loss, w)
    assert dw.flatten().tolist() == [-N / 2, N / 2]


def test_shifted_logits_and_1d():
    logits = randn(2, 5, 7)
    target = torch.randint(7, (2, 5))
    got = cross_entropy(logits[:, :-1], target[:, 1:])
    torch.testing.assert_close(got, F.cross_entropy(logits[:, :-1].reshape(-1, 7), target[:, 1:].reshape(-1)))
    one = cross_entropy(logits[0, 0], target[0, 0])
    torch.testing.assert_close(one, F.cross_entropy(logits[0, 0], target[0, 0]))
    assert cross_entropy(logits.bfloat16(), target).dtype == torch.float32
    assert torch.equal(cross_entropy(logits, target.int()), cross_entropy(logits, target))


def test_empty_batches_of_losses():
    for target, shape in ((torch.zeros(0, dtype=torch.long), (0, 5)), (torch.zeros(2, 0, dtype=torch.long), (2, 0, 5))):
        logits = torch.zeros(shape, requires_grad=True)
        for function in (cross_entropy, lambda x, t, **o: linear_cross_entropy(x, torch.eye(5), t, **o)):
            assert function(logits, target).isnan()  # as torch's
            total = function(logits, target, reduction="sum")
            assert total == 0
            assert torch.autograd.grad(total, logits)[0].shape == shape
            assert function(logits, target, reduction="none").shape == target.shape


def test_no_mean_through_the_op_is_nan_without_nan_gradients():
    """As torch: the loss of an all-ignored batch is NaN, its gradient zero, though the mean divides by nothing."""
    logits, target = randn(3, 4), torch.full((3,), -100)
    loss, lse = ce_reference.cross_entropy_fwd(logits, target, None, -100, 0.1, 0.5, 0.0)
    assert ce_reference.reduce(loss, target, None, -100, "mean").isnan()
    grad = ce_reference.cross_entropy_bwd(torch.full((3,), math.inf), logits, lse, target, None, -100, 0.1, 0.5, 0.0)
    assert torch.equal(grad, torch.zeros(3, 4))


@pytest.mark.parametrize("function", [cross_entropy, linear_cross_entropy])
@pytest.mark.parametrize("ignored", [0.4, 1.0])
def test_compiled_with_ignored_rows(function, ignored, monkeypatch):
    """In one graph, several chunks, an output for every row: ignored ones too."""
    monkeypatch.setattr(ce_reference, "LOGITS_BYTES", 4 * 13 * 4)
    torch._dynamo.reset()
    args = [randn(10, 13, grad=True)]
    if function is linear_cross_entropy:
        args.append(randn(13, 13, grad=True))
    target = torch.randint(13, (10,)).masked_fill(torch.rand(10) < ignored, -100)
    for reduction in ("mean", "none"):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        mine, theirs = compiled(*args, target, reduction=reduction), function(*args, target, reduction=reduction)
        assert_same_grads(mine, theirs, args, equal_nan=True, **CLOSE)
