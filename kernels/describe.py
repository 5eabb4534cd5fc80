"""Op by backend: available, or why not, and which one the automatic choice takes here (`pyllm kernels`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .dispatch import BACKENDS, BackendError
from .extension import cpu, cuda
from .spec import Spec


class Row(NamedTuple):
    """One op on one kind of device."""

    op: str
    reasons: dict[str, list[str]]  # by backend; empty: available
    chosen: str  # by PYLLM_BACKEND, or automatically


def availability(ops: Mapping[str, Spec], device: str | None = None, dtype: torch.dtype = torch.float32) -> list[Row]:
    """What `select` would say of each op's smallest case on a device (the GPU, where there is one)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, spec in ops.items():
        inputs = spec.inputs(**next(iter(spec.cases.values())), dtype=dtype, device=device)
        args: list[Any] = [inputs.get(argument.name) for argument in spec.op.fwd._schema.arguments[:-1]]
        try:
            chosen = spec.op.select(None, torch.device(device), *args)
        except BackendError:
            chosen = "none"
        rows.append(Row(name, {b: spec.op.why_not(b, *args) for b in BACKENDS}, chosen))
    return rows


def describe(ops: Mapping[str, Spec], device: str | None = None) -> str:
    """The table as text, with each reason spelled out once below it."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = availability(ops, device)
    notes: list[str] = []
    width = max(len(row.op) for row in rows) + 2
    lines = [f"{'op':<{width}}" + "".join(f"{b:<12}" for b in BACKENDS) + f"runs on {device} as"]
    for row in rows:
        cells = []
        for backend in BACKENDS:
            reasons = "; ".join(row.reasons[backend])
            if not reasons:
                cells.append("yes")
            elif reasons.startswith(f"no {backend} kernel"):
                cells.append("-")
            else:
                if reasons not in notes:
                    notes.append(reasons)
                cells.append(f"no [{notes.index(reasons) + 1}]")
        lines.append(f"{row.op:<{width}}" + "".join(f"{cell:<12}" for cell in cells) + row.chosen)
    lines += ["", "-: that op has no kernel in that backend"]
    lines += [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
    if cpu.module is not None:
        lines.append(f"C++ kernels use {cpu.module.isa} instructions, {torch.get_num_threads()} threads")
    if cuda.module is not None:
        lines.append(f"CUDA kernels are built for {', '.join(cuda.module.arch_list)}")
    return "\n".join(lines)
