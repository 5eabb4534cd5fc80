"""The budget of a benchmark run: what fits is measured, what doesn't is shed with a reason."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import budget, results
from benchmarks.cases import CPU_CASES


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)


def shed(*args, **kwargs) -> str:
    with pytest.raises(pytest.skip.Exception) as caught:
        budget.rounds(*args, **kwargs)
    assert str(caught.value).startswith("shed: ")
    return str(caught.value)


def test_as_many_rounds_as_fit():
    assert budget.rounds(1100.0, 1.0, 7) == 7
    assert budget.rounds(1100.0, 10.0, 7) == 5  # of half of 100 seconds
    assert budget.rounds(1100.0, 10.0, 7, share=0.25) == 2
    assert budget.rounds(1100.0, 10.0, 7, before=20.0) == 3
    assert budget.rounds(1100.0, 0.0, 7) == 7
    assert budget.rounds(float("inf"), 1e9, 7) == 7


def test_what_does_not_fit_says_how_long_it_would_take():
    assert shed(999.0, 1.0, 7) == results.SHED
    assert "a round takes some 30.0 s, and 100 s of the time budget are left" in shed(1100.0, 30.0, 7)
    assert shed(1100.0, 20.0, 7, before=20.0)


def test_slow_products_are_known_beforehand(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(budget, "torch_is_fast", lambda dtype: dtype is torch.float32)
    assert budget.expected(3e9, torch.float32) == 0.0
    assert budget.expected(6e9, torch.bfloat16) == 2.0


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: f"{c.op}-{c.title}")
def test_a_few_rows_of_a_case_are_of_its_kind(case):
    few = case.few().parameters
    assert few.keys() == case.parameters.keys()
    for name, value in case.parameters.items():
        if name == "shape":
            assert few[name][0] == min(value[0], 96) and few[name][1:] == value[1:]
        elif name in ("T", "S"):
            assert few[name] == 96
        else:
            assert few[name] == value
