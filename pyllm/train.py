"""The training loop: one function, one step at a time, and nothing that a reader could not see through.

`train` is a generator. Whoever iterates over it decides when to evaluate, print, sample or save, and stops it by not
asking for another step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .optim import Together, cosine


@dataclass(frozen=True)
class Step:
    """What one step of training did."""

    step: int  # steps done, this one included
    tokens: int  # targets seen so far
    loss: float  # mean nats per token of this step's batch, before the update
    fraction: float  # of the budget
    seconds: float  # since the start of training
    scale: float  # the schedule's factor on the learning rates


class Budget:
    """How long to train: a time, a number of steps, or whichever ends first.

    The learning rate falls with `fraction`, so a run stopped by the clock has come to rest on a slow machine as well as
    on a fast one. (A run bounded by time alone cannot be repeated bit for bit: give steps for that.)
    """

    def __init__(self, seconds: float | None = None, steps: int | None = None):
        if seconds is None and steps is None:
            raise ValueError("Budget: give seconds, steps or both")
        if seconds is not None and not seconds > 0:
            raise ValueError(f"Budget: seconds must be positive, got {seconds}")
        if steps is not None and steps < 1:
            raise ValueError(f"Budget: steps must be at least 1, got {steps}")
        self.limit, self.steps = seconds, steps
        self.start = time.perf_counter()

    def restart(self) -> None:
        """Start the clock now."""
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self.start

    def fraction(self, steps_done: int) -> float:
        """How much is used up: 0 at the start, 1 when it is time to stop."""
        used = 0.0 if self.limit is None else self.seconds / self.limit
        if self.steps is not None:
            used = max(used, steps_done / self.steps)
        return min(1.0, used)


def train(
    model: nn.Module,
    batches: Iterable[Tensor],
    optimizer: Together,
    budget: Budget,
    *,
    schedule: Callable[[float], float] = cosine,
    clip: float = 1.0,
    autocast: torch.dtype | None = None,
) -> Iterator[Step]:
    """Train until the budget is used up; yields after every step.

    Args:
        model: called as `model(inputs, shift_labels=targets, use_cache=False).loss`.
        batches: (B, T + 1) ids each; see `pyllm.data.Batches`.
        schedule: fraction of the budget to the factor on the learning rates.
        clip: largest norm of the gradient over all parameters; larger ones are scaled down to it. 0: never.
        autocast: run the forward pass in this dtype where that is safe (bfloat16 on GPUs); weights stay float32.
    Raises:
        FloatingPointError: the loss is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    model.train()
    budget.restart()
    tokens = 0
    for step, x in enumerate(batches, 1):
        scale = schedule(budget.fraction(step - 1))
        x = x.to(device, non_blocking=True)
        with torch.autocast(device.type, autocast) if autocast is not None else contextlib.nullcontext():
            loss = model(x[:, :-1], shift_labels=x[:, 1:], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        value = float(loss.detach())  # waits for a GPU, which keeps the clock honest
        if not math.isfinite(value):
            raise FloatingPointError(
                f"train: the loss is {value} at step {step} (learning rates at {scale:.3f} of their peak); "
                "try a lower learning rate, or --backend eager to see whether a kernel is at fault"
            )
        optimizer.step(scale)
        tokens += x.shape[0] * (x.shape[1] - 1)
        fraction = budget.fraction(step)
        yield Step(step, tokens, value, fraction, budget.seconds, scale)
        if fraction >= 1.0:
            return
