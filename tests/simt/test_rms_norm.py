"""RMSNorm's CUDA kernels, run by the CPU's SIMT machine under its memory checker."""

from __future__ import annotations

from types import ModuleType

import pytest
import rms_norm_trials as trials
import torch
from rms_norm_trials import BF16, F16, F32, Case

SCHEDULES = {"in order": 0, "reversed": 1, "random": 2}

torch.set_num_threads(1)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("case", trials.CASES, ids=str)
def test_results_and_memory(simt: ModuleType, case: Case, schedule: int) -> None:
    simt.configure(schedule=schedule, seed=11, check=True)
    simt.stats()
    out = trials.run(simt, case)
    trials.check(case, out)
    if case.rows * case.cols:
        assert simt.stats()["accesses"] > case.rows * case.cols // 8, "the checker saw no accesses"


@pytest.mark.parametrize("case", [Case(37, 96), Case(3, 1032, BF16, F32), Case(2, 16640, F16)], ids=str)
def test_same_bits_on_every_schedule(simt: ModuleType, case: Case) -> None:
    results = []
    for schedule in SCHEDULES.values():
        simt.configure(schedule=schedule, seed=1)
        results.append(trials.run(simt, case))
    for name in ("y", "rstd", "dx", "dweight"):
        assert torch.equal(results[0][name], results[1][name]), name
        assert torch.equal(results[0][name], results[2][name]), name


def test_rows_beyond_32_bit_offsets(simt: ModuleType) -> None:
    simt.configure(check=True)
    trials.check_huge_stride(simt)


@pytest.mark.parametrize("case", trials.PROFILED, ids=str)
def test_no_bank_conflicts_and_whole_sectors(simt: ModuleType, case: Case) -> None:
    trials.check_access_patterns(simt, case)


@pytest.mark.parametrize("case", [Case(4, 4096, BF16, BF16), Case(8, 1024, F16), Case(4, 2048, F32)], ids=str)
def test_each_byte_is_moved_once(simt: ModuleType, case: Case) -> None:
    """Rows that fit into registers are read and written once: vectors of 16 bytes, as many as the floor says."""
    simt.configure(profile=True)
    simt.profiles()
    trials.run(simt, case)
    wide = [p for p in simt.profiles() if p["space"] == "global" and p["bytes"] == 16]
    size = case.rows * case.cols * torch.finfo(case.x).bits // 8
    written = 2 + (case.residual is not None)  # y and dx; h
    assert 32 * sum(p["actual"] for p in wide if p["write"]) == written * size


def call(simt: ModuleType, name: str, **changed: float) -> None:
    one = torch.ones(8).data_ptr()
    fwd = dict(x=one, residual=0, weight=one, y=one, h=0, rstd=one, rows=1, cols=8, x_stride=8, residual_stride=0)
    fwd |= dict(eps=1e-6, offset=0.0, x_dtype=0, residual_dtype=0, weight_dtype=0, stream=0)
    bwd = dict(dy=one, dh=0, x=one, weight=one, rstd=one, dx=one, dweight=one, partial=one, parts=1, rows=1, cols=8)
    bwd |= dict(dy_stride=8, dh_stride=8, x_stride=8, offset=0.0, dy_dtype=0, x_dtype=0, weight_dtype=0, stream=0)
    arguments = {"rms_norm_fwd": fwd, "rms_norm_bwd": bwd}[name]
    assert changed.keys() <= arguments.keys()
    getattr(simt, name)(*(arguments | changed).values())


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("rms_norm_fwd", dict(x=0), "x is a null pointer"),
        ("rms_norm_fwd", dict(weight=0), "weight is a null pointer"),
        ("rms_norm_fwd", dict(y=0), "y is a null pointer"),
        ("rms_norm_fwd", dict(rstd=0), "rstd is a null pointer"),
        ("rms_norm_fwd", dict(residual=64), "residual and h must be given together"),
        ("rms_norm_fwd", dict(rows=-1), "rows must be between 0 and .*, got -1"),
        ("rms_norm_fwd", dict(cols=2**31), "cols must be between 0 and .*, got 2147483648"),
        ("rms_norm_fwd", dict(x_stride=-8), "x_stride must be between 0"),
        ("rms_norm_fwd", dict(x_dtype=3), r"x_dtype must be 0 \(float32\), 1 \(bfloat16\) or 2 \(float16\), got 3"),
        ("rms_norm_fwd", dict(weight_dtype=2), r"weight_dtype must be x's \(0\) or float32 \(0\), got 2"),
        (
            "rms_norm_fwd",
            dict(x_dtype=1, residual=64, h=64, residual_dtype=2),
            r"residual_dtype must be x's \(1\) .*got 2",
        ),
        ("rms_norm_bwd", dict(dy=0), "dy is a null pointer"),
        ("rms_norm_bwd", dict(x=0), "x is a null pointer"),
        ("rms_norm_bwd", dict(rstd=0), "rstd is a null pointer"),
        ("rms_norm_bwd", dict(dx=0), "dx is a null pointer"),
        ("rms_norm_bwd", dict(dweight=0, rows=0), "dweight is a null pointer"),
        ("rms_norm_bwd", dict(partial=0), "partial is a null pointer"),
        ("rms_norm_bwd", dict(parts=0), "parts must be between 1 and"),
        ("rms_norm_bwd", dict(dy_stride=-1), "dy_stride must be between 0"),
        ("rms_norm_bwd", dict(x_dtype=1), r"x_dtype must be dy's \(0\) or float32 \(0\), got 1"),
        ("rms_norm_bwd", dict(dy_dtype=1, x_dtype=2), r"x_dtype must be dy's \(1\) or float32 \(0\), got 2"),
        ("rms_norm_bwd", dict(dy_dtype=7), r"dy_dtype must be 0 \(float32\)"),
    ],
)
def test_impossible_arguments_are_refused(simt: ModuleType, name: str, changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        call(simt, name, **changed)


def test_empty_tensors_need_no_memory(simt: ModuleType) -> None:
    call(simt, "rms_norm_fwd", x=0, y=0, rstd=0, rows=0)
    call(simt, "rms_norm_bwd", dy=0, x=0, weight=0, dx=0, dweight=0, partial=0, cols=0)


def test_parts_follow_rows_and_multiprocessors(simt: ModuleType) -> None:
    parts = simt.rms_norm_bwd_parts
    assert parts(0, 4096, 132) == 1
    assert parts(5, 4096, 132) == 5
    assert parts(100_000, 4096, 132) == 264
    assert parts(100_000, 128, 132) == 528
    assert parts(100, 128, 132) == 7
    assert parts(100, 0, 0) >= 1
