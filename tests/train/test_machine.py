"""Cores are counted as a container sees them, and rivals are timed in turns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pyllm import machine


@pytest.mark.parametrize(
    ("limit", "affinity", "expected"),
    [
        ("max 100000", 6, 6),
        ("200000 100000", 6, 2),
        ("150000 100000", 6, 2),
        ("50000 100000", 6, 1),
        ("900000 100000", 6, 6),
    ],
)
def test_a_containers_quota_counts(monkeypatch, limit, affinity, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path, *args, **kwargs: limit)
    assert machine.cores() == expected


def test_without_a_control_group(monkeypatch):
    def missing(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    assert machine.cores() == 3
    assert machine.cpu_name()


def test_medians_take_turns():
    order = []
    found = machine.medians({1: lambda: order.append(1), 2: lambda: order.append(2)}, rounds=3)
    assert order == [1, 2, 1, 2, 1, 2, 1, 2]  # once to warm up, then three rounds
    assert set(found) == {1, 2}
    assert all(seconds >= 0 for seconds in found.values())


def test_description_names_the_processor():
    text = machine.describe()
    assert machine.cpu_name() in text
    assert f"{machine.cores()} core" in text


def test_peak_memory_is_what_was_there_at_a_time():
    def call():
        a = torch.empty(1 << 20)  # 4 MB
        del a
        b = torch.empty(1 << 20)
        c = b.exp()
        return c[0] + 1

    assert machine.peak_allocated(call) == pytest.approx(8 << 20, rel=0.01)


def test_measured_rates():
    assert 1e8 < machine.matmul_peak(seconds=0.01) < 1e15
    assert 1e7 < machine.copy_peak(seconds=0.01) < 1e14
    calls = []
    assert machine.best(lambda: calls.append(1), rounds=3) >= 0
    assert len(calls) == 4
    assert machine.memory() > 1 << 20
