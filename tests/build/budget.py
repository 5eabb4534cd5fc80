"""Budgets: regular expressions of a kernel's name to limits on what a compiler made of it.

A number is a maximum, ">=9" a minimum, and every pattern that matches holds, but for the one that says `instead` of
another: {"^sm_90 x": {"instead": ["stack"], "stack": 8}} replaces the limits that other patterns set on stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Budget = Mapping[str, Mapping[str, Any]]


def read(path: Path) -> Budget:
    return json.loads(path.read_text())


def broken(budget: Budget, measured: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What is over its limits, a line each."""
    found = []
    for name, have in measured.items():
        matching = {p: limits for p, limits in budget.items() if re.search(p, name)}
        replaced = {what: p for p, limits in matching.items() for what in limits.get("instead", ())}
        for pattern, limits in matching.items():
            for what, limit in limits.items():
                if what == "instead" or replaced.get(what, pattern) != pattern:
                    continue
                value, text = have.get(what, 0), str(limit)
                kept = value >= float(text[2:]) if text.startswith(">=") else value <= float(text.removeprefix("<="))
                if not kept:
                    found.append(f"{name}: {what} is {value:g}, the budget says {limit}")
    return found


def unused(budget: Budget, names: list[str]) -> list[str]:
    """Patterns that match no name, which would let everything through."""
    return [p for p in budget if not any(re.search(p, name) for name in names)]
