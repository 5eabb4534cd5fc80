"""python -m benchmarks cpu: one line of its table, small; and how a line is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cpu
from benchmarks.cpu_lines import LINES, Contest, Line
from pyllm.kernels import extension

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(extension.cpu.module is None, reason=extension.cpu.reason or "built")
def test_one_line_of_the_table(tmp_path):
    out = tmp_path / "table.json"
    isa = extension.cpu.module.isa
    command = ["-m", "benchmarks", "cpu", "--quick", "--only", "swiglu float32", "--budget", "3", "--json", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYLLM_CPU_ISA", None)
    done = subprocess.run(
        [sys.executable, *command, "--isa", "avx2" if isa != "base" else "base", "--threads", "1"],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "swiglu 2048x5632" in done.stdout
    assert "roofline of this run: read" in done.stdout
    (result,) = json.loads(out.read_text())
    assert result["isa"] == ("avx2" if isa != "base" else "base")
    assert result["threads"] == 1
    assert all(result["roofline"][what] > 0 for what in ("read", "triad", "sgemm"))
    (line,) = result["lines"]
    assert line["backend"] == "cpu"
    assert line["rivals"]["eager"]["ratio"] > 0
    assert line["targets"] == {"eager": 2.3, "compile": 1.6}
    assert line["missing"] == {"compile": "left out by --quick"}


def test_every_promise_has_a_line():
    words = ["rms_norm", "apply_rope", "swiglu", "cross_entropy", "attention", "linear_cross_entropy"]
    words += ["train", "decode", "beam"]
    for word in words:
        assert any(line.targets for line in LINES if word in line.name.split()[0]), word
    assert {"float32", "bfloat16"} == {str(line.dtype)[6:] for line in LINES}


def judged(ours: float, rival: float, n: int = 15, **more) -> str:
    line = Line("work", torch.float32, lambda dtype, quick: Contest("", {}), {"eager": 2.0, "memory": 4.0})
    contest = Contest(lambda: None, {"eager": lambda: None}, bytes=10**9, **more)
    times = {"": [ours] * n, "eager": [rival] * n}
    return "\n".join(cpu.texts(cpu.row(line, contest, times, {"triad": 2e9}), False))


def test_a_line_is_kept_or_missed():
    assert ">= 2: kept" in judged(1.0, 2.0)
    assert ">= 2: MISSED" in judged(1.0, 1.99)
    assert "1.0 GB/s (50%)" in judged(1.0, 2.0)
    assert "n=15" in judged(1.0, 2.0)
    assert "n=14!" in judged(1.0, 2.0, n=14)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak")
def test_peak_memory_is_seen():
    def takes(mebibytes):
        return lambda: torch.ones(mebibytes << 20, dtype=torch.uint8).any()

    small, large = cpu.peak(takes(64)), cpu.peak(takes(256))
    assert 60 << 20 < small < 80 << 20
    assert 250 << 20 < large < 280 << 20


def test_slow_contenders_take_no_more_than_their_part():
    import time

    contest = Contest(lambda: None, {"slow": lambda: time.sleep(0.2), "quick": lambda: time.sleep(0.001)})
    began = time.monotonic()
    taken = cpu.measure(contest, 2.0)
    assert time.monotonic() - began < 6
    assert len(taken["slow"]) >= 1
    assert len(taken["slow"]) < len(taken["quick"])


def test_a_rival_that_takes_the_whole_line_is_called_once():
    import time

    calls = []
    contest = Contest(lambda: None, {"endless": lambda: calls.append(0) or time.sleep(0.4)})
    taken = cpu.measure(contest, 1.0)
    assert len(calls) == len(taken["endless"]) == 1
    assert len(taken[""]) >= cpu.WANTED
