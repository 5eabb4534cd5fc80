"""One step's gradient, however its rows are spread over time, threads and processes.

The loss of a step is the mean over its targets: the sum of every micro-batch's losses, divided by the number of targets
in the whole step, on all ranks together. Dividing each micro-batch by its own number instead, as is often done, weighs
tokens unequally as soon as micro-batches differ in how many targets they have.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .distributed import Cluster
from .model import LlamaForCausalLM
from .packing import Batch, PackedRows
from .train import Workers


def micro_batches(rows: PackedRows, first: int, count: int, size: int) -> list[Batch]:
    """Rows first, ..., first + count - 1, so many at a time."""
    return [rows.batch(first + i, min(size, count - i)) for i in range(0, count, size)]


def gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    cluster: Cluster,
    workers: Workers,
    autocast: torch.dtype | None = None,
) -> tuple[float, int]:
    """Leaves the gradient of the step's mean loss in every parameter's `.grad`.

    Args:
        model: what `Cluster.wrap` returned.
        batches: this rank's micro-batches; every rank has equally many.
        workers: threads that compute micro-batches at the same time, in a single process.
    Returns:
        The mean loss over all ranks, in nats per target, and the number of targets.
    """
    count = int(cluster.sum(torch.tensor(sum(batch.count for batch in batches), dtype=torch.float64)))
    run = functools.partial(_loss, model, count=count, device=cluster.device, autocast=autocast)
    if workers.threads_each is not None:
        torch.set_num_threads(workers.threads_each)
    if workers.count > 1 and cluster.mesh is None:
        return _threaded(model, batches, run, workers), count
    total = torch.zeros((), dtype=torch.float64)
    for i, batch in enumerate(batches):
        with cluster.accumulating(model, i == len(batches) - 1):
            loss = run(batch)
            # ddp and fsdp take the mean over ranks; what is wanted is the sum, as count is everybody's.
            (loss * cluster.data_world).backward()
        total = total + loss.detach().to(torch.float64)  # stays on the device: nothing waits inside a step
    return float(cluster.sum(total.cpu())), count


def _loss(model: nn.Module, batch: Batch, count: int, device: torch.device, autocast: torch.dtype | None) -> Tensor:
    batch = batch.to(device)
    with torch.autocast(device.type, autocast) if autocast is not None else contextlib.nullcontext():
        return model(
            batch.inputs,
            shift_labels=batch.targets,
            cu_seqlens=batch.cu_seqlens,
            num_items_in_batch=max(count, 1),
            use_cache=False,
            return_logits=False,
        ).loss


def _threaded(model: nn.Module, batches: Sequence[Batch], run: Any, workers: Workers) -> float:
    """Micro-batches by several threads, added up in order: the same bits as one after the other."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def share(batch: Batch) -> tuple[float, tuple[Tensor | None, ...]]:
        loss = run(batch)
        # Not backward(): that would add to .grad, which the threads share.
        return float(loss.detach()), torch.autograd.grad(loss, parameters, allow_unused=True)

    total = 0.0
    for first in range(0, len(batches), workers.count):  # no more finished gradients in memory than there are threads
        for value, parts in workers.map(share, batches[first : first + workers.count]):
            total += value
            for p, part in zip(parameters, parts, strict=True):
                if part is not None:
                    p.grad = part if p.grad is None else p.grad.add_(part)
    return total


@torch.no_grad()
def surprise(
    model: nn.Module,
    rows: PackedRows,
    count: int,
    size: int,
    cluster: Cluster,
    workers: Workers,
    autocast: torch.dtype | None = None,
) -> tuple[float, int]:
    """-ln p of every target in the first `count` rows, summed over all ranks, and how many targets these are."""
    shared = cluster.data_world > 1 and count % cluster.data_world == 0
    mine = count // cluster.data_world if shared else count
    first = cluster.data_rank * mine if shared else 0
    batches = micro_batches(rows, first, mine, size)
    was_training = model.training
    model.eval()
    run = functools.partial(_loss, model, count=1, device=cluster.device, autocast=autocast)
    with cluster.accumulating(model, True):
        apply: Any = workers.map if cluster.mesh is None else map
        sums = torch.tensor(
            [sum(float(loss) for loss in apply(run, batches)), float(sum(batch.count for batch in batches))],
            dtype=torch.float64,
        )
    model.train(was_training)
    sums = cluster.sum(sums) if shared else sums
    return float(sums[0]), int(sums[1])


# What selective checkpointing keeps: everything that is expensive to compute again. The rest, norms, rotations, the
# SwiGLU gate and copies, costs a pass over memory, and makes up more than half of what a layer would otherwise keep.
KEPT = ("aten.mm", "aten.addmm", "aten.bmm", "aten.linear", "pyllm.attention", "pyllm.linear_cross_entropy")


def checkpoint_activations(model: LlamaForCausalLM, how: str) -> None:
    """Compute activations again in the backward pass instead of keeping them: "none", "selective" or "full" of them.

    Source: Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198 (selective).
    """
    if how == "none":
        model.gradient_checkpointing_disable()
    elif how == "full":
        model.gradient_checkpointing_enable()
    else:
        context = functools.partial(create_selective_checkpoint_contexts, _policy)
        model.gradient_checkpointing_enable({"context_fn": context})


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = str(op).rpartition(".")[0] in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compile_layers(model: LlamaForCausalLM) -> None:
    """torch.compile every layer in place. They are alike, so one compilation serves all; names stay as they are."""
    for layer in model.model.layers:
        layer.compile()


def mean_targets(batches: Iterable[Batch]) -> float:
    """Mean number of keys that a query sees, over some batches: what attention's cost follows from."""
    pairs = tokens = 0
    for batch in batches:
        pairs += batch.pairs
        tokens += batch.inputs.numel()
    return pairs / max(1, tokens)
