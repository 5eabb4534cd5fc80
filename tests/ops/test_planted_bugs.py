"""Tests of the tests: bugs planted in the Triton kernels (tests/ops/bugs), each of which the checks must notice."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from harness.machines import DEVICE
from harness.mutants import Bug, caught, in_a_process, plant

from pyllm.kernels import OPS, triton_support

if not triton_support.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

# A module may further have DTYPES to try, CASES (op to cases, instead of the op's own) and ALSO (op to a check of its
# own, called with the backend's name). TABLE: op to (forward, backward), by name or as a function
# of the module, None for what is in another module. A
# module of what kernels share has no TABLE but a `trial` of its own.
HERE = Path(__file__).parent / "bugs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bugs_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TABLES = {path.stem: load(path.stem) for path in sorted(HERE.glob("[!_]*.py"))}
BUGS = [
    pytest.param(table, bug, id=f"{name}-{bug.name}", marks=[] if bug.quick else [pytest.mark.slow])
    for name, table in TABLES.items()
    for bug in table.BUGS
]


def trial(table: ModuleType, module: ModuleType) -> str:
    """What the checks say of a module of kernels."""
    if hasattr(table, "trial"):
        return table.trial(module)
    for op, (fwd, bwd) in table.TABLE.items():
        impls = OPS[op].op.impls
        planted = {
            n: f(module) if callable(f) else getattr(module, f)
            for n, f in (("fwd", fwd), ("bwd", bwd))
            if f is not None
        }
        impl = impls["triton"]._replace(**planted)
        dtypes = getattr(table, "DTYPES", (torch.float32, torch.float16))
        cases, also = getattr(table, "CASES", {}).get(op), getattr(table, "ALSO", {}).get(op)
        if found := caught(op, "triton", impl, DEVICE, dtypes, cases, also):
            return found
    return ""


@pytest.mark.parametrize("name", TABLES)
def test_no_false_alarm(name):
    table = TABLES[name]
    assert trial(table, importlib.import_module(table.MODULE)) == ""


@pytest.mark.parametrize(("table", "bug"), BUGS)
def test_planted_bug_is_noticed(table: ModuleType, bug: Bug, tmp_path: Path):
    mutant = plant(importlib.import_module(table.MODULE), bug, tmp_path)
    assert in_a_process(lambda: trial(table, mutant)), "nobody noticed"
