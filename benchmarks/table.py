"""What was measured on a GPU, as text: one block an op, pass and shape, one line a contender."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.roofline import Ceilings, score
from pyllm.kernels.spec import Cost

HEAD = f"{'':<14}{'us':>10}{'+-':>7}{'GB/s':>8}{'% copy':>8}{'TFLOP/s':>9}{'% floor':>9}{'x eager':>9}{'MiB':>9}"


def gpu_table(rows: list[dict[str, Any]], ceilings: Ceilings) -> Iterator[str]:
    """Lines to print. "=" behind a ratio: within what eager differs from itself."""
    yield (
        f"measured in this run: copy {ceilings.copy / 1e9:.0f} GB/s, read {ceilings.read / 1e9:.0f} GB/s, bf16 product "
        f"{ceilings.matmul / 1e12:.0f} TFLOP/s, float32 product {ceilings.matmul32 / 1e12:.0f} TFLOP/s"
    )
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["passed"], row["case"]), []).append(row)
    for (op, passed, case), members in sorted(groups.items()):
        yield ""
        yield f"{op} {passed}, {case}, {members[0]['dtype']}"
        yield HEAD
        times = {row["who"]: row["seconds"] for row in members}
        noise = abs(times["eager"] / times["eager again"] - 1) if {"eager", "eager again"} <= times.keys() else 0.0
        for row in members:
            if row["who"] != "eager again":
                yield line(row, times.get("eager"), noise, ceilings)


def line(row: dict[str, Any], eager: float | None, noise: float, ceilings: Ceilings) -> str:
    """One contender."""
    s = score(Cost(row["bytes"], row["flops"]), row["seconds"], ceilings, getattr(torch, row["dtype"]))
    ratio = (
        ""
        if eager is None
        else f"{eager / row['seconds']:.2f}"
        + ("=" if abs(eager / row["seconds"] - 1) <= noise and row["who"] != "eager" else " ")
    )
    return (
        f"{row['who']:<14}{row['seconds'] * 1e6:>10.1f}{row['spread'] * 1e6:>7.1f}{s.bandwidth / 1e9:>8.0f}"
        f"{s.of_copy:>8.1%}{s.rate / 1e12:>9.1f}{s.of_roofline:>9.1%}{ratio:>9}{row['peak'] / 2**20:>9.0f}"
    )
