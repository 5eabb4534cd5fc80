"""The Triton kernels compiled for GPUs without one: spills, shared memory, 16-byte accesses, by triton_budget.json."""

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
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ONLY = {"attention_gluon": ("sm_90",)}  # kernels for some GPUs
# The whole table takes two cores a quarter of an hour and more, so it is `slow`; these are what Llama 3 8B trains with.
QUICK = (
    r"bf16 bf16 (residual )?4096$|bf16 D128$|bf16 8192x14336$|bf16 plain 128256$|linear bf16 plain$|^bf16 128( two)?$"
    r"|bf16 128 (causal tma|tma overlap causal)$|delta bf16 128$|^bf16 128 rows 4( blocks 16)?$|merge bf16 128$"
)

pytestmark = pytest.mark.skipif(not triton_support.INSTALLED, reason="Triton is not installed")


def offline(target: str, *arguments: str, **environment: str) -> dict[str, dict[str, float]]:
    """What the compiler made of the configurations. Compilations are kept under build/ by what they are made from."""
    environment = {
        **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
        "TRITON_CACHE_DIR": str(ROOT / "build/triton"),
        **environment,
    }
    command = [sys.executable, "-m", "offline", target, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_what_a_llama_trains_with_keeps_its_budget():
    measured = offline("sm_90", "--match", QUICK)
    assert {name.split()[1] for name in measured} == {*OPS} - {"attention_gluon"}
    over = budget.broken(BUDGET, measured)
    assert not over, "\n".join(over)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
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
