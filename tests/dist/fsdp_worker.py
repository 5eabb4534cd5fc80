"""One rank of test_fsdp.py: a small model under FSDP2, its loss and gradients against the unsharded one's."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from pyllm import PRESETS, LlamaForCausalLM


def main(rank: int, world: int, store: str, mixed: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    whole = LlamaForCausalLM(PRESETS["tiny"])
    sharded = LlamaForCausalLM(PRESETS["tiny"])
    sharded.load_state_dict(whole.state_dict())
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    for layer in sharded.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(sharded, mp_policy=policy)
    sharded.gradient_checkpointing_enable()
    sharded.train()

    batches = [torch.randint(PRESETS["tiny"].vocab_size, (2, 24)) for _ in range(world)]
    sharded(batches[rank], labels=batches[rank]).loss.backward()
    expected = sum(whole(ids, labels=ids).loss for ids in batches) / world
    expected.backward()
    for (name, mine), (_, theirs) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        got, want = mine.grad.full_tensor(), theirs.grad
        error = float((got - want).norm() / want.norm())
        assert error < (0.05 if mixed else 1e-5), f"rank {rank}, {name}: gradient off by {error:.1e}"
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "mixed")
