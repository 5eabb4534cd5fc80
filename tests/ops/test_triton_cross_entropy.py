"""Cross-entropy's Triton kernels against torch's own, and a test for each defect that users of other kernels met."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from harness.machines import DEVICE, served
from harness.reference import CLOSE, assert_same_grads, randn
from torch.utils._python_dispatch import TorchDispatchMode

from pyllm.kernels import OPS, cross_entropy, triton_support
from pyllm.kernels.cross_entropy import reference

if not triton_support.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

from pyllm.kernels.cross_entropy import triton_cross_entropy as kernels

OPTIONS = (-100, 0.0, 0.0, 0.0)
LONG = (3, 9001)  # several programs a row, several tiles a program, the last one ragged
MANY = (26, 4099)  # a program a row, several tiles


def triton(*args, **options):
    return cross_entropy(*args, backend="triton", **options)


def targets(N: int, V: int, ignored: float = 0.0) -> torch.Tensor:
    return torch.randint(V, (N,)).masked_fill(torch.rand(N) < ignored, -100).to(DEVICE)


def test_shapes_of_these_tests_take_the_paths_they_name():
    programs = kernels.PROGRAMS * triton_support.multiprocessors(torch.device(DEVICE))
    block, _, stages = kernels.config(LONG[1])
    assert stages > 1
    if DEVICE == "cpu":  # there a GPU has three multiprocessors
        assert kernels.split(*LONG, block, programs) == (3, block)
        assert kernels.split(*MANY, block, programs) == (1, 2 * block)
    assert kernels.split(1, 128256, block, 8 * 132) == (32, block)
    assert kernels.split(600, 128256, block, 8 * 132) == (2, 16 * block)
    assert kernels.split(8192, 128256, block, 8 * 132) == (1, 32 * block)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7, 1), (7, 11), LONG, MANY], ids=str)
def test_equals_torch(reduction, label_smoothing, weighted, shape):
    logits = randn(*shape).to(DEVICE).requires_grad_()
    target = targets(*shape, 0.3)
    target[0] = -100
    weight = (torch.rand(shape[1]) + 0.1).to(DEVICE) if weighted else None
    options = dict(reduction=reduction, label_smoothing=label_smoothing)
    theirs = F.cross_entropy(logits, target, weight, **options)
    assert_same_grads(triton(logits, target, weight, **options), theirs, [logits], **CLOSE, equal_nan=True)


@pytest.mark.parametrize("V", [50257, 131071])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabularies_of_odd_size(V, dtype):
    """Rows that don't start at 16 bytes; a row more than 64K classes wide (defect 8: no ceiling)."""
    logits = (randn(2, V) * 3).to(DEVICE, dtype).requires_grad_()
    target = torch.tensor([V - 1, 0], device=DEVICE)
    theirs = F.cross_entropy(logits.float(), target, label_smoothing=0.1)
    tolerance = dict(rtol=1e-3 if dtype == torch.float32 else 8e-3, atol=1e-7)  # p - 1 / V cancels
    assert_same_grads(triton(logits, target, label_smoothing=0.1), theirs, [logits], **tolerance)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("V", [6, LONG[1]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinities_as_torch(smoothing, V):
    """-inf here and there, in a whole tile, at the target, everywhere; +inf; NaN; and next to rows that are sound."""
    logits = randn(9, V)
    logits[0, 2] = logits[1, 0] = -math.inf
    logits[2] = -math.inf
    logits[3, 1] = math.inf
    logits[4, 5] = math.nan
    logits[5, : V - 2] = -math.inf
    logits[6, 3:] = -math.inf
    logits[7, V - 1] = math.inf
    logits = logits.to(DEVICE).requires_grad_()
    target = torch.tensor([2, 1, 0, 0, 1, V - 1, 0, V - 1, V // 2], device=DEVICE)
    options = dict(reduction="none", label_smoothing=smoothing)
    theirs = F.cross_entropy(logits, target, **options)
    assert_same_grads(triton(logits, target, **options), theirs, [logits], equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("V", [40, LONG[1]])
def test_logits_far_from_zero(shift, V):
    """Defect 15: a maximum that starts at 0 makes log(0) of logits below -104."""
    logits = (randn(6, V) * 64).round() / 64
    target = targets(6, V)
    for smoothing in (0.0, 0.2):
        options = dict(reduction="none", label_smoothing=smoothing)
        expected = F.cross_entropy(logits.to(DEVICE), target, **options)
        torch.testing.assert_close(triton((logits + shift).to(DEVICE), target, **options), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("shape", [(7, 11), LONG], ids=str)
def test_ignored_rows_are_written_and_not_read(shape):
    """Defect 2: whatever lies in an ignored row, its loss and gradient are written, and are 0."""
    logits = randn(*shape)
    target = targets(*shape)
    target[[0, 2]] = -100
    logits[0], logits[2] = math.nan, math.inf
    logits = logits.to(DEVICE).requires_grad_()
    for options in (dict(), dict(label_smoothing=0.1, z_loss=0.1, softcap=20.0)):
        loss = triton(logits, target, reduction="none", **options)
        (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, math.inf).masked_fill(target >= 0, 2.0))
        assert loss[[0, 2]].tolist() == [0, 0]
        assert not grad[[0, 2]].any()
        assert loss[1].isfinite()
        assert grad[1].isfinite().all()


def test_all_ignored():
    logits = randn(5, 30).to(DEVICE).requires_grad_()
    target = torch.full((5,), -100, device=DEVICE)
    loss = triton(logits, target)
    assert loss.isnan()  # as torch's, and with its gradient of zeros
    assert not torch.autograd.grad(loss, logits)[0].any()
    total = triton(logits, target, reduction="sum", label_smoothing=0.1, z_loss=1.0)
    assert total == 0
    assert not torch.autograd.grad(total, logits)[0].any()


@pytest.mark.parametrize("bad", [-1, 11, 2**31, -(2**40)])
@pytest.mark.parametrize("weighted", [False, True])
def test_target_out_of_range(bad, weighted, monkeypatch):
    """On a CPU an IndexError; on a GPU the row is NaN, nothing is read out of bounds, no other row is touched."""
    logits, target = randn(4, 11).to(DEVICE), torch.tensor([0, 1, bad, 2], device=DEVICE)
    weight = torch.rand(11).to(DEVICE) if weighted else None
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match=str(bad)):
            triton(logits, target)
    monkeypatch.setattr(reference, "check_targets", lambda *_: None)
    safe = target.clamp(0, 10)
    dloss = torch.ones(4, device=DEVICE)
    for options in (OPTIONS, (-100, 0.1, 0.01, 5.0)):
        loss, lse = kernels.cross_entropy_fwd(logits, target, weight, *options)
        expected, expected_lse = kernels.cross_entropy_fwd(logits, safe, weight, *options)
        assert loss.isnan().tolist() == [False, False, True, False]
        assert torch.equal(loss[[0, 1, 3]], expected[[0, 1, 3]])
        assert torch.equal(lse, expected_lse)
        grad = kernels.cross_entropy_bwd(dloss, logits, lse, target, weight, *options)
        assert grad[2].isnan().all()
        expected = kernels.cross_entropy_bwd(dloss, logits, lse, safe, weight, *options)
        assert torch.equal(grad[[0, 1, 3]], expected[[0, 1, 3]])


def test_row_offsets_beyond_32_bits():
    """Defect 5. A row stride of 32 bits, twice which has more; only what is touched of the rows takes memory."""
    V, apart = 9001, 2**30 + 64
    wide = torch.empty(2 * apart + V, dtype=torch.float16, device=DEVICE)
    logits = wide.as_strided((3, V), (apart, 1))
    logits.copy_(randn(3, V))
    target = torch.tensor([5, V - 1, 0], device=DEVICE)
    packed = logits.clone().requires_grad_()
    loss = triton(packed, target, reduction="none")
    torch.testing.assert_close(triton(logits, target, reduction="none"), loss, rtol=1e-6, atol=0)  # other vectors
    (grad,) = torch.autograd.grad(loss.sum(), packed)
    lse = kernels.cross_entropy_fwd(packed.detach(), target, None, *OPTIONS)[1]
    dloss = torch.ones((), device=DEVICE).expand(3)
    assert torch.equal(kernels.cross_entropy_bwd(dloss, logits, lse, target, None, *OPTIONS), grad)


def test_layouts():
    """Defect 6: shifted, transposed and padded logits, strided targets, int32, weights in steps, expanded gradients."""
    wide = randn(2, 6, 40).to(DEVICE)
    target = targets(12, 33).view(2, 6)
    weight = torch.rand(66).to(DEVICE)[::2]
    for logits in (wide[:, :-1, :33], wide[:, 1:, 3:36], wide.transpose(1, 2).contiguous().transpose(1, 2)[:, 1:, :33]):
        leaf = logits.detach().requires_grad_()
        for labels in (target[:, 1:], target.t().contiguous().t()[:, 1:], target[:, 1:].int()):
            for reduction in ("mean", "sum", "none"):
                flat = leaf.reshape(-1, 33), labels.reshape(-1).long()
                theirs = F.cross_entropy(*flat, weight, reduction=reduction).view(
                    labels.shape if reduction == "none" else ()
                )
                assert_same_grads(triton(leaf, labels, weight, reduction=reduction), theirs, [leaf], **CLOSE)
    one = wide[0, 0].requires_grad_()
    assert_same_grads(triton(one, target[0, 0]), F.cross_entropy(one, target[0, 0]), [one], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(dtype, other):
    """Defect 10: the class weights' dtype is their own."""
    logits, target = (randn(5, 70) * 3).to(DEVICE, dtype).requires_grad_(), targets(5, 70)
    weight = torch.rand(70).to(DEVICE, other)
    theirs = F.cross_entropy(logits.float(), target, weight.float(), label_smoothing=0.1)
    mine = triton(logits, target, weight, label_smoothing=0.1)
    assert mine.dtype == torch.float32
    tolerance = CLOSE if dtype == torch.float32 else dict(rtol=8e-3, atol=1e-5)
    assert_same_grads(mine, theirs, [logits], **tolerance)


def test_two_backwards_see_the_same_logits():
    """Defect 1: nothing is written over the logits, so a graph can be walked twice and the logits used elsewhere."""
    logits, target = randn(5, 70).to(DEVICE).requires_grad_(), targets(5, 70)
    used = logits * 1.0
    loss = triton(used, target, z_loss=0.01) + used.square().sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0])
    assert torch.equal(used, logits)


def test_off_means_off():
    """Defect 15: a z-loss, a softcap, a smoothing of 0 changes not a bit; one that is on is not forgotten."""
    logits, target = (randn(5, 70) * 8).to(DEVICE), targets(5, 70)
    plain = triton(logits, target, reduction="none")
    assert torch.equal(triton(logits, target, reduction="none", z_loss=0, softcap=0, label_smoothing=0), plain)
    for option in ("z_loss", "label_smoothing", "softcap"):
        assert not torch.equal(triton(logits, target, reduction="none", **{option: 0.5}), plain)


class NoQuestions(TorchDispatchMode):
    """Refuses what makes a host wait for its GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.WAITS, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_nothing_waits_for_the_gpu(name, monkeypatch):
    """No value goes from the device to the host, for any reduction or option."""
    monkeypatch.setattr(reference, "check_targets", lambda *_: None)
    spec = OPS[name]
    served(name, "triton")
    for case in spec.cases.values():
        inputs = spec.inputs(**case, dtype=torch.float32, device=DEVICE)
        leaves = {k: inputs[k].requires_grad_() for k in spec.grads if k in inputs}
        with NoQuestions():
            loss = spec.function(**inputs, backend="triton")
            loss = loss[0] if isinstance(loss, tuple) else loss
            torch.autograd.grad(loss.sum(), list(leaves.values()))


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("ignored", [0.4, 1.0])
def test_compiled_in_one_graph_with_ignored_rows(name, ignored):
    """Defect 2: torch.compile(fullgraph=True) gives what eager gives, ignored rows included."""
    torch._dynamo.reset()
    spec = OPS[name]
    leaves = [randn(10, 13).to(DEVICE).requires_grad_()]
    if name == "linear_cross_entropy":
        leaves.append(randn(13, 13).to(DEVICE).requires_grad_())
    target = targets(10, 13, ignored)
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    for reduction in ("mean", "none"):
        options = dict(reduction=reduction, label_smoothing=0.1, backend="triton")
        mine, theirs = compiled(*leaves, target, **options), spec.function(*leaves, target, **options)
        assert_same_grads(mine, theirs, leaves, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_opcheck(name):
    """Schema, fakes and functionalisation of both ops on this backend, for every case."""
    spec = OPS[name]
    for case in spec.cases.values():
        inputs = spec.inputs(**case, dtype=torch.float32, device=DEVICE)
        defaults = dict(ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, return_predictions=False)
        arguments = [inputs.get(a.name, defaults.get(a.name)) for a in spec.op.fwd._schema.arguments[:-1]]
        torch.library.opcheck(spec.op.fwd.overload, (*arguments, "triton"))
        _, lse, *_ = spec.op.fwd(*arguments, "triton")
        dloss = torch.ones_like(lse)
        if name == "cross_entropy":
            logits, target, *rest = arguments
            torch.library.opcheck(spec.op.bwd.overload, (dloss, logits, lse, target, *rest, "triton"))
        else:
            hidden, matrix, target, *rest = arguments
            needs = (True, False, rest[0] is not None)
            torch.library.opcheck(
                spec.op.bwd.overload, (dloss, hidden, matrix, lse, target, *rest[:-1], *needs, "triton")
            )


def test_costs_by_hand():
    """Llama 3 8B, 8192 tokens: 2.1 GB of bfloat16 logits read forward, read and written backward."""
    spec = OPS["cross_entropy"]
    N, V = 8192, 128256
    with torch.device("meta"):
        inputs = dict(logits=torch.empty(N, V, dtype=torch.bfloat16), target=torch.empty(N, dtype=torch.int64))
        rows = N * (8 + 4 + 4)
        assert spec.cost(inputs, False) == (2_101_346_304 + rows, 4 * N * V)
        assert spec.cost(inputs, True) == (2 * 2_101_346_304 + rows, 5 * N * V)
        spec = OPS["linear_cross_entropy"]
        inputs = dict(
            input=torch.empty(N, 4096, dtype=torch.bfloat16),
            linear_weight=torch.empty(V, 4096, dtype=torch.bfloat16),
            target=inputs["target"],
        )
        both = 67_108_864 + 1_050_673_152  # bytes of input and of linear_weight
        assert spec.cost(inputs, False) == (both + rows, 8_607_114_461_184)
        assert spec.cost(inputs, True) == (2 * both + rows, 2 * 8_607_114_461_184)
