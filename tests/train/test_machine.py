"""Cores are counted as a container sees them, and rivals are timed in turns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
