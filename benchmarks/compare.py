"""python -m benchmarks compare A.json B.json: is B slower than A, beyond what their noise explains?

Two runs of one machine compare by seconds. Runs of different machines (or of one that was busier) compare by what is
left when the machine is taken out: on a GPU the share of the roofline measured in the same run, on a CPU the ratio to
eager measured in the same rounds. A loss counts when it is larger than 3%, than three times the spread of the rounds,
and than what eager differs from itself by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.results import Key, base, groups, noise, of_roofline
from benchmarks.rivals import NAMES

LEAST = 0.03


@dataclass(frozen=True)
class Change:
    """One contender of one case in two runs.

    Attributes:
        measure: "% of roofline", "x eager" or "seconds": what was compared.
        before, after: in that measure.
        gain: after over before, above 1 for faster.
        band: gains within 1 -+ band mean nothing.
    """

    key: Key
    who: str
    measure: str
    before: float
    after: float
    gain: float
    band: float

    @property
    def verdict(self) -> str:
        if self.gain < 1 - self.band:
            return "SLOWER"
        return "faster" if self.gain > 1 + self.band else "about equal"


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """Every contender that both runs have, but the rivals: they are the measure, not the measured."""
    found = []
    after = groups(b["rows"])
    for key, members in groups(a["rows"]).items():
        for who, row in members.items():
            other = after.get(key, {}).get(who)
            if other is None or is_rival(who):
                continue
            measure, x, y = measured(members, after[key], who, a["ceilings"], b["ceilings"], same_machine(a, b))
            spread = max(r["spread"] / r["seconds"] for r in (row, other))
            band = max(LEAST, 3 * spread, noise(members), noise(after[key]))
            gain = x / y if measure == "seconds" else y / x
            found.append(Change(key, who, measure, x, y, gain, min(band, 0.9)))
    return found


def is_rival(who: str) -> bool:
    return who in NAMES or who.startswith(("eager", "transformers"))


def measured(
    before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], who: str, a: dict[str, float],
    b: dict[str, float], same: bool,
) -> tuple[str, float, float]:  # fmt: skip
    """What two runs have in common."""
    first = base(before)
    if before[who].get("threads") and first is not None and first in after:  # a CPU: the rounds were interleaved
        x, y = (m[first]["seconds"] / m[who]["seconds"] for m in (before, after))
        return f"x {first}", x, y
    x_share, y_share = of_roofline(before[who], a), of_roofline(after[who], b)
    if not same and x_share and y_share:
        return "% of roofline", x_share, y_share
    return "seconds", before[who]["seconds"], after[who]["seconds"]


def same_machine(a: dict[str, Any], b: dict[str, Any]) -> bool:
    names = [(run["machine"].get("gpu"), run["machine"].get("processor")) for run in (a, b)]
    return names[0] == names[1]


def lines(a: dict[str, Any], b: dict[str, Any], changes: list[Change]) -> Iterator[str]:
    """The table, losses first."""
    for name, run in (("A", a), ("B", b)):
        machine = run["machine"].get("gpu") or run["machine"].get("processor", "?")
        yield f"{name}: {machine}, {run.get('commit', '')[:10]} {run.get('date', '')}"
    order = {"SLOWER": 0, "faster": 1, "about equal": 2}
    for change in sorted(changes, key=lambda c: (order[c.verdict], c.key)):
        op, passed, case, dtype, threads = change.key
        where = f"{op} {passed}, {case}, {dtype}" + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")
        yield (
            f"{change.verdict:<12}{change.gain:>6.2f}x (band {change.band:.0%})  {change.who}: {where}"
            f"  [{change.measure} {change.before:.4g} -> {change.after:.4g}]"
        )
    only_a = sum(who not in groups(b["rows"]).get(key, {}) for key, m in groups(a["rows"]).items() for who in m)
    slower = sum(change.verdict == "SLOWER" for change in changes)
    yield f"{len(changes)} compared, {slower} slower, {only_a} of A not in B"
