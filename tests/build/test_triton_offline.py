"""The Triton kernels compiled for real GPUs without one: spills, shared memory, 16-byte accesses, by triton_budget.json."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyllm.kernels import triton_support

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
import budget  # noqa: E402
from offline import OPS  # noqa: E402

BUDGET = budget.read(HERE / "triton_budget.json")
TARGETS = (
    pytest.param("sm_80", marks=pytest.mark.slow),
    "sm_90",
    pytest.param("sm_100", marks=pytest.mark.slow),
    pytest.param("gfx942", marks=pytest.mark.slow),
)
ONLY = {"attention_gluon": ("sm_90",)}  # kernels for some GPUs
SLOW = ("attention_gluon",)  # a minute or two to compile for one GPU

pytestmark = pytest.mark.skipif(not triton_support.INSTALLED, reason="Triton is not installed")


def offline(target: str, *ops: str, **environment: str) -> dict[str, dict[str, float]]:
    """What the compiler made of every configuration. Compilations are kept under build/ by what they are made from."""
    environment = {
        **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
        "TRITON_CACHE_DIR": str(ROOT / "build/triton"),
        **environment,
    }
    command = [sys.executable, "-m", "offline", target, *ops]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", [pytest.param(op, marks=[pytest.mark.slow] if op in SLOW else []) for op in OPS])
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_keeps_its_budget(target, op):
    if target not in ONLY.get(op, (target,)):
        pytest.skip(f"{op} is for {', '.join(ONLY[op])} alone")
    measured = offline(target, op)
    assert measured
    over = budget.broken(BUDGET, measured)
    assert not over, "\n".join(over)
    about = {p: limits for p, limits in BUDGET.items() if f" {op} " in p or f" {op}\\b" in p}
    about = {p: limits for p, limits in about.items() if re.match(p.split(" ")[0], target)}  # of this target or of all
    unused = budget.unused(about, list(measured))
    assert not unused, f"patterns that match nothing: {unused}"


def test_a_planted_spill_breaks_the_budget():
    """A shipped kernel whose tile no warp can hold: the budget must see it, or it sees nothing."""
    (measured,) = offline("sm_90", "_planted").items()
    name, found = measured
    assert found["spills"] > 100
    over = budget.broken(BUDGET, {name: found})
    assert any("spills" in line for line in over), over
    assert any("stack" in line for line in over), over
