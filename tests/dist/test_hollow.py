"""A model that is split before it has weights: the bits that one process would begin with, in a part of the memory."""

from __future__ import annotations

import pytest
import torch
from dist.ranks import ROOT, launch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.mark.parametrize(
    ("world", "parallel", "tensor"),
    [
        (2, "fsdp", 1),
        pytest.param(2, "auto", 2, marks=pytest.mark.slow),
        pytest.param(4, "fsdp", 2, marks=pytest.mark.slow),
    ],
)
def test_filled_a_module_at_a_time(world, parallel, tensor, tmp_path):
    launch(world, [ROOT / "tests/dist/hollow_worker.py", parallel, str(tensor), tmp_path / "model"])
