"""Runs, reports and comparisons of benchmarks: nothing measured is lost, whatever stops a run, and losses are seen."""

from __future__ import annotations

import copy
import html.parser
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import __main__, compare, report, results, runner
from benchmarks.journal import Journal, begun, read
from pyllm.kernels import OPS

ROOT = Path(__file__).parents[2]


def row(op="rms_norm", who="triton", seconds=1e-3, **more):
    return dict(
        op=op, case="8192x4096", passed="forward", dtype="bfloat16", who=who, seconds=seconds, spread=2e-7,
        bytes=134_217_728, flops=1e8, peak=1 << 26,
    ) | more  # fmt: skip


def run(*rows, gpu="NVIDIA H200"):
    entries = [{"machine": {"gpu": gpu, "torch": "2.11"}}, {"ceilings": {"copy": 4e12, "read": 4e12, "matmul": 8e14}}]
    entries += [{"row": r} for r in rows]
    return results.collect(entries, command="python -m benchmarks run", date="2026-11-26", commit="abc")


GOOD = run(
    row(who="eager", seconds=4e-4),
    row(who="triton", seconds=5e-5),
    row(who="cuda", seconds=4e-5),
    row(who="eager again", seconds=4.04e-4),
    row("swiglu", "eager", 3e-4),
    row("swiglu", "triton", 2.99e-4),
    row("swiglu", "eager again", 3.03e-4),
)


def test_a_journal_survives_what_cut_it_off(tmp_path):
    file = tmp_path / "journal.jsonl"
    journal = Journal(file)
    journal.write(begin="a")
    journal.row(row(spread=float("nan")))
    journal.write(end="a", outcome="passed", why="")
    journal.write(begin="b")
    with file.open("a") as out:
        out.write('{"end": "b", "outc')
    entries = read(file)
    assert len(entries) == 4 and entries[1]["row"]["spread"] is None
    assert begun(file) == {"a", "b"}
    found = results.collect(entries)
    assert found["crashed"] == ["b"] and len(found["rows"]) == 1
    assert read(tmp_path / "none") == []


def test_how_a_test_ended_is_told_apart():
    ends = [
        ("a", "skipped", results.SHED),
        ("a2", "skipped", "shed: a round takes some 9 s"),
        ("b", "skipped", "liger-kernel is not installed"),
        ("c", "failed", "wrong"),
    ]
    entries = [
        e for name, outcome, why in ends for e in ({"begin": name}, {"end": name, "outcome": outcome, "why": why})
    ]
    found = results.collect([*entries, {"begin": "d"}, {"begin": "e"}, {"end": "e", "outcome": "passed", "why": ""}])
    assert found["shed"] == ["a", "a2"] and found["missing"] == {"liger-kernel is not installed": ["b"]}
    assert found["failed"] == {"c": "wrong"} and found["crashed"] == ["d"]


def test_results_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        results.load(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        results.load(tmp_path)
    (tmp_path / "results.json").write_text('{"version": 0}')
    with pytest.raises(ValueError, match="version 1"):
        results.load(tmp_path)
    assert __main__.main(["report", str(tmp_path)]) == 2


class Page(html.parser.HTMLParser):
    """Collects what a browser would show, and complains of tags left open."""

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
        elif tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_a_report_has_every_time_and_needs_no_other_file(tmp_path):
    files = report.write(tmp_path, GOOD)
    assert {f.name for f in files} == {"report.md", "report.html", "speedup.png", "roofline.png"}
    assert all(f.stat().st_size > 500 for f in files)
    text = (tmp_path / "report.md").read_text()
    assert "| 8192x4096 | forward | bfloat16 | cuda | 40.0 us | 0.20 us | 3355 | 2,500 |" in text
    assert "| 10.00 |" in text and "| 84% |" in text  # eager / cuda; 134 MB at 4 TB/s over 40 us
    assert re.search(r"swiglu.*\n\n.*\n.*\n.*\n.*triton.*\| ≈ 1.00 \|", text)  # within what eager differs by
    page = Page()
    source = (tmp_path / "report.html").read_text()
    page.feed(source)
    assert page.open == [] and "40.0 us" in page.cells
    assert len(page.sources) == 2 and all(src.startswith("data:image/png;base64,") for src in page.sources)
    assert not re.search(r'(?:src|href)="(?!data:)', source)


def test_what_is_written_is_text_not_markup(tmp_path):
    found = results.collect([{"begin": "x"}, {"end": "x", "outcome": "failed", "why": "<script>alert(1)</script> a|b"}])
    report.write(tmp_path, found)
    assert "<script>alert" not in (tmp_path / "report.html").read_text()
    assert "a\\|b" in (tmp_path / "report.md").read_text()


def test_an_empty_run_has_a_report(tmp_path):
    report.write(tmp_path, results.collect([]))
    assert "Nothing was measured." in (tmp_path / "report.md").read_text()


def test_figures_of_the_two_comparisons(tmp_path):
    rows = [
        row(
            "recurrence",
            who,
            0.1 * length / 64,
            case=f"T {length}",
            length=length,
            tokens=4096,
            weights=10**6,
            threads=2,
        )
        for who in ("transformer", "LSTM")
        for length in (64, 256)
    ]
    rows += [
        row("kv heads", f"{n} kv heads", 0.01 * n, kv_heads=n, tokens=2, cache=n << 20, prefill=1.0) for n in (1, 8)
    ]
    files = report.write(tmp_path, results.collect([{"row": r} for r in rows]))
    assert {"recurrence.png", "kv_heads.png"} <= {f.name for f in files}


# Comparing


def test_first_launches_run_side_by_side_and_are_judged_one_by_one(tmp_path, monkeypatch, capsys):
    scripts = {"good": "print('fine')", "bad": "raise SystemExit('wrong')", "hung": "import time; time.sleep(60)"}
    monkeypatch.setattr(runner, "launches", lambda *_: [(k, [v], f"tests of {k}") for k, v in scripts.items()])
    monkeypatch.setattr(runner, "FIRST_LAUNCH", [sys.executable, "-c"])
    monkeypatch.setattr(runner, "LAUNCHING", 0.0)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 16)
    work = runner.Run(tmp_path / "out", 60)
    began = time.monotonic()
    assert set(runner.first_launches(work, 5.0, hopper=True)) == {"tests of bad", "tests of hung"}
    assert time.monotonic() - began < 20
    said = capsys.readouterr().out
    assert re.search(r"good: exit 0, \d s\n   fine", said)
    assert re.search(r"bad: exit 1, \d s\n   wrong", said)
    assert "hung: exit 124" in said
    monkeypatch.setattr(runner, "LAUNCHING", 5.0)
    assert len(runner.first_launches(work, 1.0, hopper=True)) == 3
    assert "no time was left" in capsys.readouterr().out


def test_first_launches_are_of_every_kernel():
    plain, on_hopper = runner.launches(False), runner.launches(True)
    assert {tuple(arguments) for _, arguments, _ in plain} == {
        (op, b) for op, spec in OPS.items() for b in ("triton", "cuda") if b in spec.op.impls
    }
    more = [launch for launch in on_hopper if launch not in plain]
    assert [arguments[-1] for _, arguments, _ in more] == ["PYLLM_HOPPER", "PYLLM_GLUON"]
    assert {arguments[0] for _, arguments, _ in runner.launches(True, "swiglu")} == {"swiglu", "swiglu_packed"}


def slowed(by, who="triton", gpu="NVIDIA H200"):
    changed = copy.deepcopy(GOOD)
    changed["machine"]["gpu"] = gpu
    for r in changed["rows"]:
        if r["who"] == who and r["op"] == "rms_norm":
            r["seconds"] *= by
    return changed


def test_a_slower_kernel_is_flagged_and_nothing_else():
    changes = compare.compare(GOOD, slowed(1.06))
    assert [(c.key[0], c.who) for c in changes if c.verdict == "SLOWER"] == [("rms_norm", "triton")]
    assert all(c.verdict == "about equal" for c in compare.compare(GOOD, slowed(1.02)))
    assert [c.verdict for c in compare.compare(GOOD, slowed(0.8)) if c.who == "triton" and c.key[0] == "rms_norm"] == [
        "faster"
    ]
    assert {c.measure for c in changes} == {"seconds"}


def test_noise_widens_the_band():
    noisy = slowed(1.2)
    for r in noisy["rows"]:
        if r["who"] == "triton":
            r["spread"] = 0.1 * r["seconds"]
    assert not any(c.verdict == "SLOWER" for c in compare.compare(GOOD, noisy))


def test_other_machines_compare_by_their_rooflines():
    other = slowed(0.5, gpu="another card")  # twice as fast, on a card with four times the bandwidth
    other["ceilings"] = {k: 4 * v for k, v in other["ceilings"].items()}
    change = next(c for c in compare.compare(GOOD, other) if c.who == "triton" and c.key[0] == "rms_norm")
    assert change.measure == "% of roofline" and change.gain == pytest.approx(0.5) and change.verdict == "SLOWER"


def test_a_cpu_compares_by_its_ratio_to_eager():
    def cpu(eager, ours):
        return run(row(who="eager", seconds=eager, threads=1), row(who="cpu", seconds=ours, threads=1), gpu=None)

    (change,) = compare.compare(cpu(4e-3, 1e-3), cpu(8e-3, 2e-3))  # a busier machine, the same kernel
    assert change.measure == "x eager" and change.verdict == "about equal"
    (change,) = compare.compare(cpu(4e-3, 1e-3), cpu(4e-3, 1.5e-3))
    assert change.verdict == "SLOWER"


def test_the_command_says_it_by_its_exit_code(tmp_path, capsys):
    for name, found in (("a", GOOD), ("b", slowed(1.5))):
        results.write(tmp_path / f"{name}.json", found)
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    assert __main__.main(["compare", *paths]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert __main__.main(["compare", paths[0], paths[0]]) == 0


# Running


def test_a_run_is_never_written_over(tmp_path):
    runner.Run(tmp_path, 60)
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(ValueError, match="another run"):
        runner.Run(tmp_path, 60)
    with pytest.raises(ValueError, match="at least 20"):
        runner.Run(tmp_path / "new", 5)


CONFTEST = """
from benchmarks import roofline
from benchmarks.conftest import *

roofline.measure_cpu = lambda: roofline.Ceilings(1, 1, 1, 1)
"""
SUITE = """
import os, time

ROW = dict(case="c", passed="", dtype="float32", who="cpu", seconds=1.0, spread=0.0)

def test_first(benchmark, journal):
    benchmark.pedantic(int)
    journal.row(dict(ROW, op="a"))

def test_dies(benchmark):
    benchmark.pedantic(os.abort)

def test_wrong(benchmark):
    raise AssertionError("not timed, because it is wrong")

def test_last(benchmark, journal):
    journal.row(dict(ROW, op="b"))
    benchmark.pedantic(time.sleep, (float(os.environ.get("LAST_SLEEPS", 0)),))
"""
STARTED = """
import sys
from benchmarks import runner
runner.on_cpu = lambda work: setattr(work, "suite", sys.argv[2]) or work.benchmarks("test")
sys.exit(runner.run(runner.Path(sys.argv[1]), 60))
"""


@pytest.fixture
def suite(tmp_path):
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_suite.py").write_text(SUITE)
    return folder


def started(out, suite, **environment):
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # xdist would switch timing off
    return subprocess.Popen(
        [sys.executable, "-c", STARTED, str(out), str(suite)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**outside, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def test_a_run_goes_on_behind_a_crash(tmp_path, suite):
    out = tmp_path / "out"
    process = started(out, suite)
    printed = process.communicate(timeout=100)[0]
    assert process.returncode != 0
    found = json.loads((out / "results.json").read_text())
    assert [r["op"] for r in found["rows"]] == ["a", "b"], printed
    assert [report.short(name) for name in found["crashed"]] == ["test_dies"]
    assert [report.short(name) for name in found["failed"]] == ["test_wrong"]
    assert "test_dies" in (out / "report.md").read_text()


def test_no_kernel_is_measured_against_a_ceiling_below_it():
    """On a CPU that has no instructions for bfloat16 its products run at a hundredth of float32's rate."""
    slow = {"1": {"copy": 1e10, "matmul": 1e9, "matmul32": 1e11}}
    given = dict(dtype="bfloat16", threads=1, bytes=1e8, flops=1e8, seconds=0.02)
    assert results.of_roofline(given, slow) == pytest.approx(0.5)
    assert results.of_roofline(given | {"dtype": "float32"}, slow) == pytest.approx(0.5)
    card = {"copy": 1e12, "matmul": 8e14, "matmul32": 5e13}
    given = dict(dtype="bfloat16", bytes=1e6, flops=8e12, seconds=0.02)
    assert results.of_roofline(given, card) == pytest.approx(0.5)
    assert results.of_roofline(given | {"dtype": "float32", "flops": 5e11}, card) == pytest.approx(0.5)


def test_what_the_end_of_the_budget_cuts_short_is_shed(tmp_path, monkeypatch):
    work = runner.Run(tmp_path / "out", 60)

    def phase(*_, **__):
        work.journal.write(begin="test_slow")
        work.end = time.monotonic()
        return 124

    monkeypatch.setattr(work, "phase", phase)
    assert work.benchmarks("test") == 0
    found = results.load(tmp_path / "out")
    assert (found["shed"], found["crashed"]) == (["test_slow"], [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_run_that_is_killed_leaves_a_report(tmp_path, suite, number):
    (suite / "test_suite.py").write_text(SUITE.replace("os.abort", "int"))
    out = tmp_path / "out"
    process = started(out, suite, LAST_SLEEPS="60")
    end = time.monotonic() + 60
    while '"op": "b"' not in (out / "journal.jsonl").read_text() if (out / "journal.jsonl").exists() else True:
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=40)
    assert json.loads((out / "results.json").read_text())["version"] == results.VERSION
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert len(json.loads((out / "results.json").read_text())["rows"]) == 2
    else:  # what it could not report itself can be reported from its journal
        os.system(f"pkill -KILL -f {suite}")
    assert __main__.main(["report", str(out)]) == 0
    assert "| c | float32 |" in (out / "report.md").read_text()
    assert [report.short(name) for name in results.load(out)["crashed"]] == ["test_last"]
