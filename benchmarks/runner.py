"""What `python -m benchmarks run` does: phases in processes of their own, each with a bound, and a report whatever
happens. On a GPU a kernel's first launch comes first, since a kernel that hangs or dies would take all others with it.
"""

from __future__ import annotations

import datetime
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report, results
from benchmarks.journal import Journal, read

ROOT = Path(__file__).parents[1]
SILENT = 180.0  # seconds without a word in the journal after which a benchmark is taken for hung
CRASHES = 8  # after so many the machine, not a case, is at fault
REPORTING = 12.0  # seconds kept for the last report
FIRST_LAUNCH = [sys.executable, "-m", "benchmarks.first_launch"]
HUNG, LAUNCHING = 60.0, 5.0  # seconds without a word: a first launch is taken for hung; without which none begins


class Run:
    """One run: where it writes and when it must end.

    Args:
        out: folder, made when it is not there.
        budget: seconds for everything.
        only: an expression as pytest's -k takes, or "".
        build: whether a GPU's run begins with a native build.
    Raises:
        ValueError: the folder holds another run, or the budget is too small to measure anything.
    """

    def __init__(self, out: Path, budget: float, only: str = "", build: bool = True):
        if budget < 20:
            raise ValueError(f"--budget must be at least 20 seconds, got {budget:g}")
        if (out / "journal.jsonl").exists():
            raise ValueError(f"{out} holds the results of another run; give another folder, or remove it")
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.budget, self.only, self.build = out.resolve(), budget, only, build
        self.end = time.monotonic() + budget
        self.file = self.out / "journal.jsonl"
        self.journal = Journal(self.file)
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        options = [f"--budget={budget:g}", *[f"--only={only}"] * bool(only), *["--no-build"] * (not build)]
        self.about = {
            "command": "python -m benchmarks run --out DIR " + shlex.join(options),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": git.stdout.strip(),
        }
        self.suite = "benchmarks"  # what pytest is given
        self.process: subprocess.Popen | None = None
        self.report()

    @property
    def left(self) -> float:
        """Seconds for phases."""
        return self.end - time.monotonic() - REPORTING

    def report(self) -> dict[str, Any]:
        """results.json, report.md, report.html and the plots, of all that is known by now."""
        found = results.collect(read(self.file), **self.about)
        results.write(self.out / "results.json", found)
        report.write(self.out, found)
        return found

    def phase(self, title: str, seconds: float, log: str, command: list[str], lines: int = 15) -> int:
        """Runs a command with its output to a file, whose last lines are printed. 124: it took longer than `seconds`,
        or nothing was heard of it for SILENT seconds."""
        print(f"== {title} (at most {seconds:.0f} s)", flush=True)
        began = time.monotonic()
        path = self.out / log
        with path.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = self._wait(began, seconds)
            finally:  # also when this process is told to stop
                stop(self.process)
        took = time.monotonic() - began
        self.journal.write(phase=title, exit=code, seconds=round(took, 1))
        print("\n".join(path.read_text(errors="replace").splitlines()[-lines:]), flush=True)
        print(f"== {title}: exit {code}, {took:.0f} s, {path}", flush=True)
        return code

    def _wait(self, began: float, seconds: float) -> int:
        assert self.process is not None
        while True:
            try:
                return self.process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                heard = time.time() - self.file.stat().st_mtime if self.file.exists() else 0.0
                if now - began > seconds or min(heard, now - began) > SILENT:
                    return 124

    def benchmarks(self, chosen: str) -> int:
        """pytest over the benchmarks, started again behind a case during which it died."""
        pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", self.suite, "-q", "-rsf"]
        pytest += ["--benchmark-only", "-k", chosen, f"--journal={self.file}"]
        code = 0
        for attempt in range(CRASHES + 1):
            if self.left < 5:
                break
            budget = f"--budget={max(1.0, self.left - 10):.0f}"  # what a case begun at the last moment takes
            title = "benchmarks" + (f", started again ({attempt})" if attempt else "")
            code = self.phase(title, self.left, "benchmarks.txt", [*pytest, budget], lines=150)
            crashed = results.collect(read(self.file))["crashed"]
            if code == 124 and self.left < 1 and crashed:  # it was still at work when the time was up
                self.journal.write(end=crashed.pop(), outcome="skipped", why="shed: cut short when the time was up")
                code = 0
            self.report()
            if code in (0, 1, 2, 3, 4, 5) or len(crashed) <= attempt:  # pytest's own ends
                break
            print(f"== the process died in {crashed[-1]}", flush=True)
        return 0 if code == 5 else code


def stop(process: subprocess.Popen) -> None:
    """A process and what it started: as Ctrl-C would (pytest then says what had failed), asked, then killed."""
    for number, patience in ((signal.SIGINT, 8.0), (signal.SIGTERM, 4.0), (signal.SIGKILL, 10.0)):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=patience)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: the report is still written."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(out: Path, budget: float, only: str = "", build: bool = True) -> int:
    """Everything this machine has to say within the budget; the exit code of the worst phase."""
    import torch

    work = Run(out, budget, only, build)
    code = 0
    try:
        with interruptible():
            code = on_gpu(work) if torch.cuda.is_available() else on_cpu(work)
    except KeyboardInterrupt:
        print("== stopped; what was measured is reported", flush=True)
        code = 130
    found = work.report()
    print(f"{len(found['rows'])} times measured, {len(found['shed'])} benchmarks shed, {len(found['failed'])} failed, "
          f"{len(found['crashed'])} crashed: {work.out / 'report.html'}", flush=True)  # fmt: skip
    return code or int(bool(found["failed"] or found["crashed"]))


def on_cpu(work: Run) -> int:
    """Correctness of the C++ kernels, then their speed, the model's, and the two comparisons of ideas."""
    work.phase("kernels", 60, "kernels.txt", [sys.executable, "-m", "pyllm", "kernels"], lines=40)
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/ops/test_numerics.py", "-q", "-x"]
    chosen = " and ".join(["cpu", *[f"({work.only})"] * bool(work.only)])
    code = work.phase("correctness", 0.25 * work.budget, "tests.txt", [*tests, "-m", "not slow", "-k", chosen])
    if code in (124, 5):
        print("== correctness was cut short; every kernel is checked once more before it is timed", flush=True)
        code = 0
    work.report()
    return code or work.benchmarks(f"not gpu and ({work.only})" if work.only else "not gpu")


class Launch(NamedTuple):
    """A first launch that is under way."""

    title: str
    tests: str
    path: Path
    process: subprocess.Popen
    began: float


def launches(hopper: bool, only: str = "") -> list[tuple[str, list[str], str]]:
    """First launches to make: title, arguments of benchmarks.first_launch, and what pytest's -k calls the tests of that
    kernel."""
    from pyllm.kernels import OPS

    found = []
    for op, spec in OPS.items():
        if only and only not in op:
            continue
        found += [(f"{op} {b}", [op, b], f"({op} and {b})") for b in ("triton", "cuda") if b in spec.op.impls]
        if op == "attention" and hopper:  # forwards that have to be asked for
            found.append(("attention cuda PYLLM_HOPPER", [op, "cuda", "PYLLM_HOPPER"], "Hopper"))
            found.append(("attention triton PYLLM_GLUON", [op, "triton", "PYLLM_GLUON"], "Gluon"))
    return sorted(found, key=lambda launch: "attention" not in launch[0])  # those that take longest first


def first_launches(work: Run, seconds: float, hopper: bool) -> list[str]:
    """What pytest's -k calls those that hang, die or fail. Several at a time: compilers do most of it."""
    waiting = launches(hopper, work.only)
    workers = max(1, min(16, (os.cpu_count() or 2) - 2))
    end = time.monotonic() + seconds
    failed: list[str] = []
    running: list[Launch] = []
    print(f"== {len(waiting)} first launches, {workers} at a time (at most {seconds:.0f} s)", flush=True)

    def note(title: str, tests: str, code: int, took: float, said: str) -> None:
        work.journal.write(phase=f"first launch of {title}", exit=code, seconds=round(took, 1))
        print(f"== first launch of {title}: exit {code}, {took:.0f} s{said}", flush=True)
        if code:
            failed.append(tests)

    try:
        while waiting or running:
            while waiting and len(running) < workers:
                title, arguments, tests = waiting.pop(0)
                if end - time.monotonic() < LAUNCHING:
                    note(title, tests, 124, 0.0, ": no time was left for it")
                    continue
                path = work.out / f"first_launch_{title.replace(' ', '_')}.txt"
                with path.open("w") as file:
                    command = [*FIRST_LAUNCH, *arguments]
                    process = subprocess.Popen(
                        command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                    )
                running.append(Launch(title, tests, path, process, time.monotonic()))
            time.sleep(0.1)
            for launch in list(running):
                now = time.monotonic()
                code = launch.process.poll()
                silent = min(now - launch.began, time.time() - launch.path.stat().st_mtime)
                if code is None and (silent > HUNG or now > end):
                    stop(launch.process)
                    code = 124
                if code is None:
                    continue
                running.remove(launch)
                last = launch.path.read_text(errors="replace").splitlines()[-15 if code else -1 :]
                note(launch.title, launch.tests, code, now - launch.began, "".join(f"\n   {line}" for line in last))
    finally:  # also when this process is told to stop
        for launch in running:
            stop(launch.process)
    return failed


def on_gpu(work: Run) -> int:
    """A native build, first launches, the correctness tier (a wrong kernel must not be timed), throughput."""
    import torch

    native = "".join(map(str, torch.cuda.get_device_capability()))
    os.environ["PYLLM_CUDA_ARCHS"] = native
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if work.build:
        work.phase(f"build for sm_{native}", 0.25 * work.budget, "build.txt", build)
    work.phase("kernels", 60, "kernels.txt", [sys.executable, "-m", "pyllm", "kernels"], lines=40)
    failed = first_launches(work, 0.3 * work.budget, hopper=native == "90")
    work.report()
    chosen = " and ".join([f"({work.only})"] * bool(work.only) + [f"not {name}" for name in failed])
    workers = max(4, min(15, (os.cpu_count() or 4) - 1))
    places = ["tests/simt/test_primitives.py", "tests/ops", "tests/gluon/test_gpu.py",
              "tests/model/test_generate_graph.py"]  # fmt: skip
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *places, "-q", "--tb=short"]
    tests += ["-n", str(workers), "-m", "not slow and not packaging", f"--junitxml={work.out / 'tests.xml'}"]
    on_card = " and ".join(["(triton or cuda or primitives or gpu)", *[chosen] * bool(chosen)])
    code = work.phase("correctness", 0.4 * work.budget, "tests.txt", [*tests, "-k", on_card])
    code |= work.benchmarks(f"not cpu and {chosen}" if chosen else "not cpu")
    if failed:
        print(f"left out, because their first launch failed: {', '.join(failed)}")
    return code or int(bool(failed))
