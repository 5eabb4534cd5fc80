"""Many processes that train one model: who they are, and what each holds of it.

    ddp   every rank has the whole model and some rows of the batch; gradients are averaged (Li et al. 2020)
    fsdp  the same, but parameters, gradients and optimiser states are sharded, and a layer's parameters are gathered
          only while it computes (FSDP2, `fully_shard` per layer; Rajbhandari et al. 2020, arXiv:1910.02054; Zhao et al.
          2023, arXiv:2304.11277)
    tensor parallelism, by `parallel.py`, alone or within fsdp

`torchrun -m pyllm train` starts the processes and tells each its rank by environment variables; without them there is
one process, and nothing here costs anything. gloo connects CPUs, NCCL GPUs.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .model import LlamaForCausalLM


@dataclass
class Cluster:
    """This process's place among those that train together.

    Attributes:
        rank, world: number of this process, and how many there are.
        data_rank, data_world: the same among those that differ in their rows of the batch.
        parallel: "none", "ddp" or "fsdp".
        tensor: ranks that share each matrix.
        mesh: the ranks as a (data, tensor) grid; None in a single process.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    local_world: int = 1
    data_rank: int = 0
    data_world: int = 1
    parallel: str = "none"
    tensor: int = 1
    mesh: Any = None

    @classmethod
    def join(cls, parallel: str = "auto", tensor: int = 1) -> Cluster:
        """Take this process's place, as torchrun's environment says.

        Raises:
            ValueError: tensor parallelism that the ranks don't allow.
        """
        world = int(os.environ.get("WORLD_SIZE", 1))
        gpu = torch.cuda.is_available()
        if "RANK" not in os.environ:
            if tensor > 1:
                raise ValueError(
                    f"--tensor-parallel {tensor} needs as many processes: torchrun --nproc-per-node N -m pyllm ..."
                )
            if parallel != "auto":
                raise ValueError(
                    f"--parallel {parallel} needs torchrun: torchrun --nproc-per-node N -m pyllm train ..."
                )
            return cls(torch.device("cuda" if gpu else "cpu"))
        if world % tensor:
            raise ValueError(f"--tensor-parallel {tensor} must divide the {world} ranks")
        if tensor > 1 and world > tensor and parallel == "ddp":
            raise ValueError("--tensor-parallel with more ranks than it needs goes with --parallel fsdp, not ddp")
        if parallel == "auto":
            parallel = "fsdp" if tensor > 1 else "ddp"
        if parallel == "fsdp" and world == tensor > 1:
            parallel = "none"  # one copy of the model: nothing to shard further
        rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        mesh = dist.init_device_mesh(device.type, (world // tensor, tensor), mesh_dim_names=("data", "tensor"))
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        data_rank = mesh.get_local_rank("data")
        return cls(device, rank, world, local_world, data_rank, world // tensor, parallel, tensor, mesh)

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def wrap(self, model: LlamaForCausalLM, half: bool = False) -> nn.Module:
        """The model as it is to be called in training. It is changed in place, whichever way it is split.

        Args:
            half: under fsdp, gather and compute in bfloat16, and reduce gradients in float32.
        """
        if self.tensor > 1:
            from .parallel import tensor_parallel

            tensor_parallel(model, self.mesh["tensor"])
        if self.parallel == "fsdp":
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
            for layer in model.model.layers:
                fully_shard(layer, mesh=self.mesh["data"], mp_policy=policy)
            fully_shard(model, mesh=self.mesh["data"], mp_policy=policy)
        elif self.parallel == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            # The only buffers are RoPE's frequencies, alike everywhere. Newer torch has another name for it.
            known = inspect.signature(DistributedDataParallel).parameters
            unsynced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            how: dict[str, Any] = {unsynced: False, "gradient_as_bucket_view": True}
            ids = [self.device.index] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids, **how)
        return model

    @contextlib.contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """A forward and backward pass whose gradients are reduced over ranks only when it is the step's last.

        fsdp reduces every time: what waited would be the whole gradient on each rank, which sharding is to avoid.
        """
        with contextlib.ExitStack() as stack:
            if self.tensor > 1:
                from torch.distributed.tensor.experimental import implicit_replication

                stack.enter_context(implicit_replication())  # what is no DTensor is the same on every rank
            if self.parallel == "ddp" and not last:
                stack.enter_context(model.no_sync())  # type: ignore[operator]
            yield

    def sum(self, values: Tensor) -> Tensor:
        """Element by element over all data ranks; float64 on the CPU travels best."""
        if self.mesh is not None and self.data_world > 1:
            values = values.to(self.device) if self.device.type == "cuda" else values
            dist.all_reduce(values, group=self.mesh.get_group("data"))
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.mesh is not None:
            dist.barrier()

    def share(self, value: Any) -> Any:
        """What rank 0 gives, on every rank."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def failure(self, message: str | None) -> str | None:
        """The first rank's error, if any rank has one: all of them must fail together, or the rest wait for ever."""
        if self.mesh is None:
            return message
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, message)
        return next((text for text in found if text is not None), None)

    def leave(self) -> None:
        if self.mesh is not None and dist.is_initialized():
            dist.destroy_process_group()


def clip_gradients(parameters: list[Tensor], limit: float) -> float:
    """The gradient's norm over all parameters and ranks; a larger one than `limit` is scaled down to it (0: never)."""
    norm: Any = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)
