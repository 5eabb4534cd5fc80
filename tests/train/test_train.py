"""The loop trains, ends when it should, and repeats."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyllm import train as training
from pyllm.config import PRESETS
from pyllm.data import Batches
from pyllm.model import LlamaForCausalLM
from pyllm.optim import muon_and_adamw
from pyllm.train import Budget, Workers, train


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(PRESETS["tiny"], backend="eager")


def test_overfits_one_batch():
    model = tiny()
    x = torch.randint(PRESETS["tiny"].vocab_size, (2, 17))
    losses = [done.loss for done in train(model, itertools.repeat(x), muon_and_adamw(model), Budget(steps=60))]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(4.85, abs=0.3)  # ln 128: it knows nothing
    assert losses[-1] < 0.05


def test_runs_of_equal_steps_are_equal():
    def go():
        model = tiny()
        row = torch.randint(PRESETS["tiny"].vocab_size, (2000,), generator=torch.Generator().manual_seed(1))
        steps = train(model, Batches(row, 2, 16, seed=3), muon_and_adamw(model), Budget(steps=8))
        return [done.loss for done in steps], model.state_dict()

    (losses, weights), (again, weights_again) = go(), go()
    assert losses == again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_what_a_step_reports():
    model = tiny()
    x = torch.randint(128, (3, 9))
    done = list(train(model, itertools.repeat(x), muon_and_adamw(model), Budget(steps=4)))
    assert [d.step for d in done] == [1, 2, 3, 4]
    assert [d.tokens for d in done] == [24, 48, 72, 96]
    assert [d.fraction for d in done] == [0.25, 0.5, 0.75, 1.0]
    assert done[0].scale == 0.0  # the schedule starts its warm-up at zero
    assert done[1].scale > done[2].scale > done[3].scale > 0


def test_the_clock_ends_it(monkeypatch):
    """Ten seconds at one second a step: ten steps, and the learning rate has come down by then."""
    now = [50.0]

    class Clock:
        @staticmethod
        def perf_counter():
            return now[0]

    monkeypatch.setattr(training, "time", Clock)
    model, x = tiny(), torch.randint(128, (1, 9))
    budget = Budget(seconds=10)
    now[0] = 60.0  # what passes between making the budget and training doesn't count
    done = []
    for step in train(model, itertools.repeat(x), muon_and_adamw(model), budget):
        done.append(step)
        now[0] += 1.0
    assert len(done) == 11  # at 0, 1, ... 10 seconds
    assert done[-1].scale < 0.01


def test_whichever_ends_first():
    budget = Budget(seconds=1000, steps=4)
    assert [budget.fraction(n) for n in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]  # the clock has no say
    assert Budget(seconds=1e-9, steps=100).fraction(0) == 1.0
    with pytest.raises(ValueError, match="seconds, steps or both"):
        Budget()
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        Budget(seconds=0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Budget(steps=0)


def test_batches_that_end():
    model, x = tiny(), torch.randint(128, (1, 9))
    assert len(list(train(model, [x, x], muon_and_adamw(model), Budget(steps=50)))) == 2


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt():
    model, x = tiny(), torch.randint(128, (1, 9))
    with torch.no_grad():
        model.lm_head.weight[5, 3] = float("inf")
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 1 .*--backend eager"):
        next(train(model, [x], muon_and_adamw(model), Budget(steps=5)))
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_gradients_are_clipped():
    model, x = tiny(), torch.randint(128, (2, 17))
    next(train(model, [x], muon_and_adamw(model), Budget(steps=5), clip=1e-3))
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    next(train(model, [x], muon_and_adamw(model), Budget(steps=5), clip=0))
    assert torch.stack([p.grad.norm() for p in model.parameters()]).norm() > 0.1


def test_autocast_trains():
    model, x = tiny(), torch.randint(128, (2, 17))
    steps = train(model, itertools.repeat(x), muon_and_adamw(model), Budget(steps=30), autocast=torch.bfloat16)
    losses = [done.loss for done in steps]
    assert losses[-1] < 0.25 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_workers_find_the_gradient_of_the_whole_batch(threads):
    """Five rows over two or three workers: the shares are unequal, the mean must not be."""
    model, x = tiny(), torch.randint(128, (5, 17))
    loss = model(x[:, :-1], shift_labels=x[:, 1:]).loss
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    before = torch.get_num_threads()
    workers = Workers(threads)
    try:
        assert 1 <= workers.count * workers.threads_each <= threads
        found = workers.gradients(model, x)
        again = [p.grad.clone() for p in model.parameters()]
        workers.gradients(model, x)
    finally:
        workers.close()
        torch.set_num_threads(before)
    assert found == pytest.approx(float(loss.detach()), rel=1e-6)
    for p, e, a in zip(model.parameters(), expected, again, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-5, atol=1e-7)
        assert torch.equal(p.grad, a)  # nothing was added up, and the order of summation is fixed


def test_more_workers_than_rows():
    model, x = tiny(), torch.randint(128, (1, 17))
    workers = Workers(3)
    losses = [done.loss for done in train(model, [x, x], muon_and_adamw(model), Budget(steps=9), workers=workers)]
    workers.close()
    assert len(losses) == 2
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        Workers(0)
