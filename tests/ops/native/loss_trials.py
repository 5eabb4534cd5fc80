"""All that is checked of the loss's C++ kernels, on a module given by its path: prints what is found.

python tests/ops/native/loss_trials.py path/to/_loss.so
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

import torch
from harness.accuracy import check
from harness.layouts import far_apart
from harness.mutants import caught

from pyllm.kernels import OPS, cross_entropy, linear, linear_cross_entropy
from pyllm.kernels.cross_entropy import bindings, step
from pyllm.kernels.extension import cpu

HALF = torch.bfloat16
CASES = {
    "cross_entropy": {
        "plain-3x4200": dict(shape=(3, 4200)),
        "plain-66x2100": dict(shape=(66, 2100), ignored=0.2),
        "all-3x4200": dict(shape=(3, 4200), weighted=True, label_smoothing=0.1, z_loss=0.1, softcap=5.0, scale=8.0),
        "all-66x300": dict(shape=(66, 300), label_smoothing=0.1, z_loss=0.1, softcap=5.0, scale=8.0, reduction="sum"),
        "2x40-far-apart": dict(shape=(9, 40), scale=60.0),
    },
    "linear_cross_entropy": {"60x9-70-bias": dict(shape=(60, 9), V=70, bias=True, ignored=0.2, reduction="none")},
    "linear": {
        "30x800-20-bias": dict(shape=(30, 800), outputs=20, bias=True),
        "45x40-1050": dict(shape=(45, 40), outputs=1050),
        "31x24-20-bias": dict(shape=(31, 24), outputs=20, bias=True),
    },
}


def ridges(spec: Any) -> None:
    """Rows that rise and fall by more than float32 holds as an exponential, over tiles of 2048 and pieces of 4096."""
    hole = torch.full((4200,), -200.0)
    hole[:2048] = -torch.inf
    steep, late = torch.linspace(0.0, 300.0, 4200), torch.zeros(4200)
    late[4096:] = 120.0
    for x, y, options in (
        (torch.stack([steep, steep.flip(0), late, late.flip(0)]), [4096, 0, 4199, 7], {}),
        (torch.stack([steep, steep.flip(0), late, late.flip(0)]), [5, 4099, 4096, 0], dict(label_smoothing=0.1)),
        (torch.stack([hole, hole.flip(0)]), [4000, 9], {}),
    ):
        given = dict(logits=x, target=torch.tensor(y), reduction="none", **options)
        check(spec, functools.partial(spec.function, backend="cpu"), given)


def more() -> None:
    torch.set_num_threads(3)
    rows = [
        torch.arange(4200.0).flip(0),
        torch.arange(4200.0),
        torch.tensor([1.0, 2.0]).repeat(2100),
        torch.zeros(4200),
    ]
    x, target = torch.stack(rows), torch.tensor([5, 4199, 1, -100])
    ridges(OPS["cross_entropy"])
    assert torch.equal(cross_entropy(x, target, reduction="none", backend="cpu")[3], torch.tensor(0.0))
    same = torch.ones(3, 4)
    _, best = linear_cross_entropy(
        same, torch.ones(5000, 4), torch.tensor([0, 1, 2]), return_predictions=True, backend="cpu"
    )
    assert not best.any(), "the first of equals"
    deep = torch.tensor([[0.0, -200.0, -1e5, 3.0]])
    torch.testing.assert_close(
        cross_entropy(deep, torch.tensor([0]), backend="cpu"),
        torch.nn.functional.cross_entropy(deep, torch.tensor([0])),
    )
    few = torch.randn(5, 64)
    assert torch.equal(
        cross_entropy(far_apart(few), torch.arange(5), backend="cpu"),
        cross_entropy(few, torch.arange(5), backend="cpu"),
    )
    spec = OPS["linear"]
    for shape, outputs in (((50, 30), 900), ((1300, 12), 20), ((700, 500), 33)):  # every thread has its part
        check(spec, functools.partial(linear, backend="cpu"), spec.inputs(shape, outputs, dtype=HALF))
    step.LEAST_LOGITS = bindings.CHUNK_BYTES = 0
    bindings.CHUNK_ROWS = 1
    spec = OPS["linear_cross_entropy"]
    for dtype in (torch.float32, HALF):
        given = spec.inputs((40, 20), 70, bias=True, ignored=0.2, reduction="sum", dtype=dtype)
        check(spec, functools.partial(linear_cross_entropy, backend="cpu"), given)


def trial() -> str:
    for op, cases in CASES.items():
        if found := caught(op, "cpu", OPS[op].op.impls["cpu"], dtypes=(torch.float32, HALF), cases=cases):
            return found
    try:
        more()
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return ""


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("_loss", sys.argv[1])
    assert spec is not None and spec.loader is not None
    cpu.module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cpu.module)
    print("loaded", flush=True)  # what fails before is no find
    said = trial()
    print(f"CAUGHT {said}" if said else "NOTHING NOTICED")
