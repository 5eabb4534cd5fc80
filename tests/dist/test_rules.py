"""Every op on parts of its tensors equals the op on the whole ones, by every rule that DTensor may choose."""

from __future__ import annotations

import pytest
import torch
from dist.ranks import ROOT, launch

from pyllm.kernels import OPS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]


@pytest.mark.parametrize("world", [2, 3])
def test_every_rule(world):
    """On three ranks hardly anything divides evenly."""
    launch(world, [ROOT / "tests/dist/rules_worker.py"])


def test_a_sum_that_calls_itself_whole_is_caught():
    """`Replicate` for a gradient that is a sum over rows: wrong on every rank, and no error anywhere but here."""
    launch(2, [ROOT / "tests/dist/rules_worker.py", "planted"])


def test_every_op_has_rules():
    from pyllm.sharding import RULES

    for name, spec in OPS.items():
        if name not in ("attention_decode", "rope_append_kv", "linear", "sample"):
            assert {spec.op.name, f"{spec.op.name}_bwd"} <= set(RULES), name
