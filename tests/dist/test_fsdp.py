"""The ops inside FSDP2, on two processes: gradients equal one process's on both batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_two_ranks_equal_one_process(precision, tmp_path):
    """Every layer sharded, activations checkpointed; mixed: bfloat16 parameters, float32 reduction."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests/dist/fsdp_worker.py", str(rank), "2", tmp_path / "store", precision],
            stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        _, errors = rank.communicate(timeout=240)
        assert rank.returncode == 0, errors[-3000:]
