"""A report's pictures: speed-ups with their noise, kernels under the roofline, and the two comparisons of ideas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import base, groups, matrix_rate, noise
from benchmarks.rivals import NAMES

GREY, COLOURS = "#c9ced6", ("#2f6fb5", "#c1452f", "#3c8d5a", "#e3b23c", "#7d5ba6", "#4a4a4a")
RIVALS = (*NAMES, "transformers")
KINDS = ("recurrence", "kv heads")  # these have pictures of their own


def draw(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Writes what the results suffice for, and returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    found = []
    for picture in PICTURES:
        figure = picture(results)
        if figure is not None:
            file = folder / f"{picture.__name__}.png"
            figure.savefig(file, dpi=110, bbox_inches="tight")
            found.append(file)
    return found


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, columns)
    for axis in axes if columns > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def speedup(results: dict[str, Any]) -> Any:
    """A dot per contender and case: eager's time over its own. Bars around 1: eager against itself."""
    cases = [
        (key, m)
        for key, m in sorted(groups(results["rows"]).items())
        if base(m) is not None and len(m) > 1 and key[0] not in KINDS
    ]
    if not cases:
        return None
    figure, axis = _axes(9, 1.2 + 0.22 * len(cases))
    names = sorted(
        {who for _, m in cases for who in m if who != base(m) and not who.endswith(" again")},
        key=lambda who: (who in RIVALS, who),
    )
    for i, who in enumerate(names):
        at = [
            (place, m[base(m)]["seconds"] / m[who]["seconds"])
            for place, (_, m) in enumerate(cases)
            if who in m and who != base(m)
        ]
        style: dict[str, Any] = dict(ls="", marker="D" if who in RIVALS else "o", ms=5, label=who)
        axis.plot([y for _, y in at], [x for x, _ in at], color=COLOURS[i % len(COLOURS)], **style)
    for place, (_, m) in enumerate(cases):
        band = noise(m)
        axis.barh(place, 2 * band, left=1 - band, color=GREY, height=0.8, zorder=0)
    axis.axvline(1, color="black", lw=0.8)
    axis.set_xscale("log")
    ticks = [t for t in (0.25, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axis.minorticks_off()
    labels = [
        f"{op} {passed}, {case}, {dtype}" + (f", {threads} thr." if threads else "")
        for (op, passed, case, dtype, threads), _ in cases
    ]
    axis.set_yticks(range(len(cases)), labels, fontsize=7.5)
    axis.invert_yaxis()
    axis.set_xlabel("time of eager (of whole models: transformers) / time")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def roofline(results: dict[str, Any]) -> Any:
    """Operations per second over operations per byte, for ours, under the ceilings."""
    ceilings = results["ceilings"]
    if any(isinstance(v, dict) for v in ceilings.values()):  # a CPU: its one-thread set
        ceilings = ceilings.get("1") or next(iter(ceilings.values()))
        kept = {1}
    else:
        kept = {0}
    dots = [
        (key, who, row) for key, m in groups(results["rows"]).items() for who, row in m.items()
        if row.get("bytes") and row.get("flops") and who not in (*RIVALS, "eager", "eager again") and key[4] in kept
    ]  # fmt: skip
    if not dots or not ceilings.get("copy"):
        return None
    figure, axis = _axes(8, 4.6)
    low = min(row["flops"] / row["bytes"] for _, _, row in dots) / 2
    high = max(row["flops"] / row["bytes"] for _, _, row in dots) * 4
    for k, name in (("matmul", "bfloat16 product"), ("matmul32", "float32 product")):
        rate = ceilings.get(k)
        if rate and rate >= ceilings.get("matmul32", 0.0):  # a slower one than float32's is nobody's ceiling
            knee = rate / ceilings["copy"]
            xs = [low, knee, max(high, 2 * knee)]
            axis.plot(
                xs,
                [min(x * ceilings["copy"], rate) / 1e9 for x in xs],
                color="black" if k == "matmul" else GREY,
                lw=1,
                label=name,
            )
    ops = sorted({key[0] for key, _, _ in dots})
    for i, op in enumerate(ops):
        mine = [row for key, _, row in dots if key[0] == op]
        style: dict[str, Any] = dict(ls="", ms=5, color=COLOURS[i % len(COLOURS)], label=op)
        xs, ys = [r["flops"] / r["bytes"] for r in mine], [r["flops"] / r["seconds"] / 1e9 for r in mine]
        axis.plot(xs, ys, marker="os^Dv<>ph*"[i // len(COLOURS)], **style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("useful operations per byte that must move")
    axis.set_ylabel("GFLOP/s")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def recurrence(results: dict[str, Any]) -> Any:
    """Tokens per second and share of the machine's matrix rate over the length of the texts."""
    rows = [row for row in results["rows"] if row["op"] == "recurrence"]
    if not rows:
        return None
    figure, (left, right) = _axes(10, 3.6, 2)
    for i, who in enumerate(sorted({row["who"] for row in rows}, key=lambda w: w != "transformer")):
        mine = sorted((row for row in rows if row["who"] == who), key=lambda row: row["length"])
        style: dict[str, Any] = dict(
            marker="o", color=COLOURS[i], label=f"{who}, {mine[0]['weights'] / 1e6:.1f} M weights"
        )
        left.plot([r["length"] for r in mine], [r["tokens"] / r["seconds"] for r in mine], **style)
        ceilings = results["ceilings"]
        ceilings = ceilings.get(str(mine[0].get("threads")), ceilings)
        rate = matrix_rate(ceilings, mine[0]["dtype"])
        if rate:
            right.plot([r["length"] for r in mine], [r["flops"] / r["seconds"] / rate for r in mine], **style)
    for axis, title in ((left, "tokens per second of training"), (right, "share of the machine's matrix rate")):
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, None)
        lengths = sorted({row["length"] for row in rows})
        axis.set_xticks(lengths, map(str, lengths))
        axis.set_xlabel("tokens in a text")
        axis.set_title(title, fontsize=10, loc="left")
    left.legend(frameon=False, fontsize=8)
    return figure


def kv_heads(results: dict[str, Any]) -> Any:
    """The cache, the prompt and each new token by number of key-value heads."""
    rows = sorted((row for row in results["rows"] if row["op"] == "kv heads"), key=lambda row: row["kv_heads"])
    if not rows:
        return None
    figure, axes = _axes(10, 3.2, 3)
    places = range(len(rows))
    shown = {
        "cache, MiB": [r["cache"] / 2**20 for r in rows],
        "reading the prompt, s": [r["prefill"] for r in rows],
        "tokens per second after it": [r["tokens"] / r["seconds"] for r in rows],
    }
    for axis, (title, values) in zip(axes, shown.items(), strict=True):
        bars = axis.bar(places, values, color=COLOURS[0], width=0.65)
        axis.bar_label(bars, [f"{v:.3g}" for v in values], fontsize=8)
        axis.set_xticks(places, [str(r["kv_heads"]) for r in rows])
        axis.set_xlabel("key-value heads")
        axis.set_title(title, fontsize=10, loc="left")
    return figure


PICTURES = (speedup, roofline, recurrence, kv_heads)
