"""Fused kernels against eager PyTorch: the same weights, the same batch, one number after the other."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernels import use_backend
from .train import Workers


@dataclass(frozen=True)
class Comparison:
    """What a training step (forward and backward) costs, and how far two backends are apart."""

    fused: str  # the backends compared
    eager: str
    loss_difference: float  # absolute, of losses in nats per token
    gradient_difference: float  # largest over all parameters of max|a - b| / max|b|
    fused_speed: float  # tokens/s, medians of alternating rounds
    eager_speed: float
    fused_memory: int  # bytes
    eager_memory: int
    memory_is: str  # what these bytes are

    @property
    def speedup(self) -> float:
        return self.fused_speed / self.eager_speed

    def table(self) -> str:
        """As lines to print."""
        name = max(len(self.fused), len(self.eager), 6)
        return "\n".join(
            [
                f"{'':<34}{self.fused:>{name}}   {self.eager:>{name}}",
                f"{'tokens/s, forward and backward':<34}{self.fused_speed:>{name},.0f}   {self.eager_speed:>{name},.0f}"
                f"   {self.speedup:.2f} x",
                f"{self.memory_is:<34}{self.fused_memory / 2**20:>{name}.1f}   {self.eager_memory / 2**20:>{name}.1f}"
                f"   {self.fused_memory / max(1, self.eager_memory):.2f} x",
                f"largest difference of the loss: {self.loss_difference:.1e} nats per token",
                f"largest difference of a gradient: {self.gradient_difference:.1e} of its parameter's largest",
            ]
        )


def compare(
    model: Any,
    batch: Tensor,
    backend: str = "auto",
    rounds: int = 8,
    autocast: torch.dtype | None = None,
    workers: Workers | None = None,
) -> Comparison:
    """Run training steps without the update, in turns with `backend` and with "eager".

    Args:
        model: a LlamaForCausalLM; weights and gradients are left as they were.
        batch: (B, T + 1) ids.
        workers: as in `train`.
    """
    workers = workers or Workers()
    device = next(model.parameters()).device
    x = batch.to(device)
    before, was_training = model.backend, model.training
    model.backend = "auto"  # so that the context below decides
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p.grad for p in parameters]

    def once(name: str) -> tuple[float, list[Tensor], float]:
        """Loss, gradients and seconds."""
        with use_backend(name):
            _wait(device)
            start = time.perf_counter()
            loss = workers.gradients(model, x, autocast)
            _wait(device)
            seconds = time.perf_counter() - start
        return loss, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters], seconds

    def forward() -> Tensor:
        with torch.autocast(device.type, autocast) if autocast is not None else contextlib.nullcontext():
            return model(x[:, :-1], shift_labels=x[:, 1:], use_cache=False).loss

    def memory(name: str) -> int:
        for p in parameters:
            p.grad = None
        with use_backend(name):
            return _peak_memory(forward, device) if device.type == "cuda" else _saved_bytes(forward, parameters)

    try:
        fused_loss, fused_gradients, _ = once(backend)
        eager_loss, eager_gradients, _ = once("eager")
        gradient_difference = max(
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
            for a, b in zip(fused_gradients, eager_gradients, strict=True)
        )
        times: dict[str, list[float]] = {"fused": [], "eager": []}
        for i in range(rounds):
            # A B B A: whoever goes second finds a warmer machine, so both go second equally often.
            for which in ("fused", "eager") if i % 2 == 0 else ("eager", "fused"):
                times[which].append(once(backend if which == "fused" else "eager")[2])
        fused_memory, eager_memory = memory(backend), memory("eager")
    finally:
        model.backend = before
        model.train(was_training)
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad
    tokens = x.shape[0] * (x.shape[1] - 1)
    return Comparison(
        fused="fused" if backend == "auto" else backend,
        eager="eager",
        loss_difference=abs(fused_loss - eager_loss),
        gradient_difference=gradient_difference,
        fused_speed=tokens / statistics.median(times["fused"]),
        eager_speed=tokens / statistics.median(times["eager"]),
        fused_memory=fused_memory,
        eager_memory=eager_memory,
        memory_is="peak GPU memory, MiB" if device.type == "cuda" else "kept for the backward pass, MiB",
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(forward: Any, device: torch.device) -> int:
    """The most GPU memory in use during a step, beyond what was in use before it."""
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward().backward()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _saved_bytes(forward: Any, parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps between the forward and the backward pass, parameters not counted.

    This is what grows with batch and length and decides whether a model fits; it is counted exactly, as every tensor
    saved passes a hook, while a CPU allocator tells nothing about its peak. Views of one memory count once.
    """
    own = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}
    alive = []  # so that no address is freed and given out again while we count

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(storages.values())
    del loss
    return total
