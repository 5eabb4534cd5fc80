"""A step's gradient: the same for every way to split its rows, and for every way to keep or recompute activations."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyllm.compare import _saved_bytes
from pyllm.config import PRESETS
from pyllm.distributed import Cluster, clip_gradients
from pyllm.inputs import IGNORE
from pyllm.model import LlamaForCausalLM
from pyllm.packing import Batch
from pyllm.train import Workers
from pyllm.train_step import _loss, checkpoint_activations, compile_layers, gradients

ALONE = Cluster(torch.device("cpu"))
ROWS, LENGTH = 8, 24


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(PRESETS["tiny"]).train()


def rows():
    """Eight rows that differ widely in how many targets count, some with several documents."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randint(128, (ROWS, LENGTH), generator=generator) for _ in range(2))
    for row in range(ROWS):
        targets[row, 3 * row + 1 :] = IGNORE
    return inputs, targets


def split(size):
    inputs, targets = rows()
    batches = []
    for first in range(0, ROWS, size):
        some = slice(first, first + size)
        count = len(inputs[some])
        starts = sorted({*range(0, count * LENGTH + 1, LENGTH), *range(5, count * LENGTH, LENGTH)})
        cu = torch.tensor(starts, dtype=torch.int32)
        batches.append(Batch(inputs[some], targets[some], cu, int((targets[some] != IGNORE).sum())))
    return batches


def found(size, threads=None, change=None):
    one, workers = model(), Workers(threads)
    before = torch.get_num_threads()
    if change is not None:
        change(one)
    try:
        loss, count = gradients(one, split(size), ALONE, workers)
    finally:
        workers.close()
        torch.set_num_threads(before)
    assert count == sum(3 * row + 1 for row in range(ROWS))
    return loss, [p.grad for p in one.parameters()]


@pytest.fixture(scope="module")
def whole():
    return found(ROWS)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("threads", [None, 2])
def test_any_split_gives_the_same_gradient(whole, size, threads):
    loss, grads = found(size, threads)
    assert loss == pytest.approx(whole[0], rel=1e-6)
    for got, want in zip(grads, whole[1], strict=True):
        assert float((got - want).norm()) <= 1e-6 * float(want.norm())


def test_threads_change_no_bit():
    """Micro-batches are added up in order, whoever computed them."""
    (loss, grads), (again, others) = found(2), found(2, threads=2)
    assert loss == again
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_the_mean_of_means_would_show(whole):
    """What a token-exact gradient is there to avoid is far outside the tolerance above."""
    one = model()
    for batch in split(1):
        loss = one(batch.inputs, shift_labels=batch.targets, cu_seqlens=batch.cu_seqlens).loss
        (loss / ROWS).backward()
    errors = [float((p.grad - w).norm() / w.norm()) for p, w in zip(one.parameters(), whole[1], strict=True)]
    assert min(errors) > 0.01


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradient(how):
    """To the bit: what is computed twice is computed alike."""
    (loss, grads), (same, wanted) = found(4, change=lambda one: checkpoint_activations(one, how)), found(4)
    assert loss == same
    assert all(torch.equal(got, want) for got, want in zip(grads, wanted, strict=True))


class Products(TorchDispatchMode):
    """Counts the matrix products that really run: those that selective checkpointing answers from memory end above."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_recomputing_keeps_less():
    """Selective keeps less than everything and more than full; products run once, everything else twice."""
    kept, products = {}, {}
    for how in ("none", "selective", "full"):
        one = model()
        checkpoint_activations(one, how)
        batch = split(ROWS)[0]

        def forward(one=one, batch=batch):
            return _loss(one, batch, batch.count, ALONE.device, None)

        kept[how] = _saved_bytes(forward, list(one.parameters()))
        with Products() as counter:
            forward().backward()
        products[how] = counter.count
    assert kept["full"] < 0.5 * kept["none"]
    assert products["selective"] == products["none"] < products["full"]


def test_gradients_are_clipped_and_measured():
    one = model()
    gradients(one, split(4), ALONE, Workers())
    parameters = list(one.parameters())
    norm = float(torch.stack([p.grad.norm() for p in parameters]).norm())
    assert clip_gradients(parameters, 0.0) == pytest.approx(norm, rel=1e-6)
    assert clip_gradients(parameters, norm / 2) == pytest.approx(norm, rel=1e-6)
    assert clip_gradients(parameters, 0.0) == pytest.approx(norm / 2, rel=1e-4)
    parameters[0].grad[0, 0] = float("nan")
    assert clip_gradients(parameters, 1.0) != clip_gradients(parameters, 1.0)  # NaN, which a run looks out for


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it while it traces
@pytest.mark.parametrize("how", ["none", "full"])
def test_compiled_layers_give_the_same_gradient(whole, how):
    def change(one):
        checkpoint_activations(one, how)
        compile_layers(one)

    loss, grads = found(4, change=change)
    assert loss == pytest.approx(whole[0], rel=1e-6)
    for got, want in zip(grads, whole[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
