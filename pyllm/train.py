"""The training loop: one function, one step at a time, and nothing that a reader could not see through.

`train` is a generator. Whoever iterates over it decides when to evaluate, print, sample or save, and stops it by not
asking for another step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

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
    """How long to train: a time, or a number of steps and a time that ends it if they take too long.

    The learning rate falls with `fraction`, so a run measured by the clock has come to rest on a slow machine as well
    as on a fast one. It cannot be repeated bit for bit, though: with steps, the clock has no say in the learning rate.
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
        used = 0.0 if self.limit is None else min(1.0, self.seconds / self.limit)
        if self.steps is not None and used < 1:
            used = min(1.0, steps_done / self.steps)
        return used


class Workers:
    """Data parallelism within one process: every worker takes some rows of the batch, and the gradients are averaged.

    PyTorch's own way to use several cores is to split each single operation. A small model has a thousand small ones
    a step, and after each of them the threads must meet: that costs a quarter of two idle cores, and nearly everything
    on busy ones, where a thread often waits for one that is not running. Workers meet once a step. They are threads,
    not processes: PyTorch lets go of Python's lock inside its operations, and the weights are shared as they are.

    Args:
        threads: cores to use: up to 4 workers, and within each of them PyTorch's way for what is left. None: no
            workers but the calling thread, with as many threads as PyTorch is set to.
    """

    def __init__(self, threads: int | None = None):
        if threads is not None and threads < 1:
            raise ValueError(f"Workers: threads must be at least 1, got {threads}")
        self.count = 1 if threads is None else min(threads, 4)
        self.threads_each = None if threads is None else max(1, threads // self.count)
        self.pool = None
        if self.count > 1:  # a new thread would otherwise start with as many threads of its own as there are cores
            each = self.threads_each or 1
            self.pool = ThreadPoolExecutor(self.count, "pyllm", lambda: torch.set_num_threads(each))

    def map(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        """Like the built-in map, with the calls spread over the workers."""
        return map(function, *arguments) if self.pool is None else self.pool.map(function, *arguments)

    def gradients(self, model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> float:
        """Mean loss of a batch (B, T + 1) of ids; leaves its gradient in every parameter's `.grad`."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.threads_each is not None:
            torch.set_num_threads(self.threads_each)

        def share(rows: Tensor) -> tuple[float, tuple[Tensor | None, ...]]:
            with torch.autocast(x.device.type, autocast) if autocast is not None else contextlib.nullcontext():
                loss = model(rows[:, :-1], shift_labels=rows[:, 1:], use_cache=False).loss
            # Not backward(): that would add to .grad, which the workers share.
            return float(loss.detach()), torch.autograd.grad(loss, parameters, allow_unused=True)

        shares = [rows for rows in x.tensor_split(self.count) if len(rows)]
        weights = [len(rows) / len(x) for rows in shares]  # by size, so that the mean is the whole batch's
        losses, gradients = zip(*self.map(share, shares), strict=True)
        for p, *parts in zip(parameters, *gradients, strict=True):
            p.grad = None if parts[0] is None else sum(part * w for part, w in zip(parts, weights, strict=True))
        return sum(loss * w for loss, w in zip(losses, weights, strict=True))

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()


def train(
    model: nn.Module,
    batches: Iterable[Tensor],
    optimizer: Together,
    budget: Budget,
    *,
    schedule: Callable[[float], float] = cosine,
    clip: float = 1.0,
    autocast: torch.dtype | None = None,
    workers: Workers | None = None,
) -> Iterator[Step]:
    """Train until the budget is used up; yields after every step.

    Args:
        model: called as `model(inputs, shift_labels=targets, use_cache=False).loss`.
        batches: (B, T + 1) ids each; see `pyllm.data.Batches`.
        schedule: fraction of the budget to the factor on the learning rates.
        clip: largest norm of the gradient over all parameters; larger ones are scaled down to it. 0: never.
        autocast: run the forward pass in this dtype where that is safe (bfloat16 on GPUs); weights stay float32.
        workers: who computes the gradients; by default this thread.
    Raises:
        FloatingPointError: the loss is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    workers = workers or Workers()
    model.train()
    budget.restart()
    tokens = 0
    for step, x in enumerate(batches, 1):
        scale = schedule(budget.fraction(step - 1))
        value = workers.gradients(model, x.to(device, non_blocking=True), autocast)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"train: the loss is {value} at step {step} (learning rates at {scale:.3f} of their peak); "
                "try a lower learning rate, or --backend eager to see whether a kernel is at fault"
            )
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step(scale)
        tokens += x.shape[0] * (x.shape[1] - 1)
        fraction = budget.fraction(step)
        yield Step(step, tokens, value, fraction, budget.seconds, scale)
        if fraction >= 1.0:
            return
