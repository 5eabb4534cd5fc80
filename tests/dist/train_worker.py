"""One rank of test_train_ranks.py: runs of `pyllm train` one after the other, and the gradients of every step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pyllm import train_run
from pyllm.distributed import Cluster
from pyllm.parallel import local
from pyllm.train_config import TrainConfig


def record(config: TrainConfig) -> None:
    """Run, and save what every step's gradient was: {step: {parameter: gradient}}, whole whatever the sharding."""
    clip, found = train_run.clip_gradients, []

    class Recorder(train_run.Run):
        def train(self):
            def clip_gradients(parameters, limit):
                names = [name for name, p in self.model.named_parameters() if p.requires_grad]
                found.append({n: local(p.grad).clone() for n, p in zip(names, parameters, strict=True)})
                return clip(parameters, limit)

            train_run.clip_gradients = clip_gradients
            super().train()
            train_run.clip_gradients = clip

    one = Recorder(config)
    one.go()
    if one.cluster.main:
        torch.save(found, Path(config.out) / "gradients.pt")


def main(configs: list[str]) -> None:
    torch.set_num_threads(1)
    train_run.machine.matmul_peak = lambda *_: 1e11
    train_run.picture = lambda *_: ""
    leave, Cluster.leave = Cluster.leave, lambda self: None  # one process group for all runs
    for text in configs:
        record(TrainConfig(**json.loads(text)))
    leave(Cluster.join())


if __name__ == "__main__":
    main(sys.argv[1:])
