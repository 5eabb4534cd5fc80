"""python -m benchmarks cpu: the whole table of `cpu_lines.py`, measured on this machine, with its roofline.

The command starts itself again for every thread count, with the environment that holds torch, its libraries and our
kernels to one instruction set. Contenders take turns, round by round, in one process, so that whatever else the machine
does falls on all of them. Ratios are of medians and, behind the stroke, of minima. A contender whose one call takes
more than its part of the line's time is timed less often than the others: `n` says how often. One thread is timed in
processor time, which leaves out the time that other programs take away; several in wall time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_lines import LINES, Contest, Line

ROOT = Path(__file__).parents[1]
ISAS = {
    "native": {},
    "avx512": {"PYLLM_CPU_ISA": "avx512"},
    "avx2": {"PYLLM_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
             "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "base": {"PYLLM_CPU_ISA": "base", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
             "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}  # fmt: skip
ROUNDS = 31  # at most; a line's time ends it earlier
WANTED = 15  # rounds that a figure should have; with fewer it is marked
TURN = (
    0.1  # seconds that a turn takes at least: several calls, for the first finds caches and heap as a rival left them
)


def seconds(call: Callable[[], Any], calls: int = 1) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def measure(contest: Contest, budget: float) -> dict[str, list[float]]:
    """Seconds per call of each contender, round by round; "" is ours. `budget` is wall time."""
    end = time.monotonic() + budget
    calls = {"": contest.ours, **contest.rivals}
    contenders = {who: call for who, call in calls.items() if callable(call)}
    # glibc gives memory back to the system after every call until the process has freed something large, as any
    # training has: without this, page faults are timed, of which eager has more.
    large = torch.ones(31 << 20, dtype=torch.uint8)
    del large
    cost: dict[str, float] = {}  # of a call, in wall time
    taken: dict[str, list[float]] = {who: [] for who in contenders}
    used = dict.fromkeys(contenders, 0.0)
    for who, call in contenders.items():  # the first call of all compiles, too; one that is short is made again
        for _ in range(2):
            began = time.monotonic()
            took = seconds(call)
            cost[who] = time.monotonic() - began
            if who != "compile" and cost[who] > budget / 8:
                break
        if who and cost[who] > budget / 4:  # a rival that would take the whole line: this call has to do
            taken[who], used[who] = [took], cost[who]
    turn = {who: max(1, math.ceil(TURN / max(cost[who], 1e-9))) for who in contenders}
    for _ in range(ROUNDS):
        for who, call in contenders.items():
            left = end - time.monotonic()
            part = (left + sum(used.values())) / len(contenders)
            if taken[who] and used[who] + cost[who] * turn[who] > part:
                continue
            began = time.monotonic()
            taken[who].append(seconds(call, turn[who]))
            used[who] += time.monotonic() - began
            cost[who] = used[who] / len(taken[who]) / turn[who]
        if time.monotonic() > end:
            break
    return taken


def roofline(quick: bool) -> dict[str, float]:
    """Bytes/s of a read and of a triad a = b + s c (three transfers an element), FLOP/s of a float32 product."""
    n, size = (1 << 22, 512) if quick else (1 << 25, 2048)
    a, b, c = torch.empty(n), torch.randn(n), torch.randn(n)
    x, y = torch.randn(size, size), torch.randn(size, size)

    def best(call: Callable[[], Any]) -> float:
        seconds(call)
        return min(seconds(call) for _ in range(10))

    return {
        "read": 2 * b.nbytes / best(lambda: torch.dot(b, c)),
        "triad": 3 * a.nbytes / best(lambda: torch.add(b, c, alpha=0.5, out=a)),
        "sgemm": 2 * size**3 / best(lambda: x @ y),
    }


def peak(call: Callable[[], Any]) -> int | None:
    """Bytes that a call needs at most beyond what was there before it; None where the system does not tell."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    call()  # what is kept for later calls is there before

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what calls before have left in the heap is none of this call's
    reset.write_text("5")  # VmHWM, the largest VmRSS, begins anew
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def row(line: Line, contest: Contest, taken: dict[str, list[float]], roof: dict[str, float]) -> dict[str, Any]:
    """What was found about a line, for JSON and for the table."""
    found: dict[str, Any] = dict(
        line=line.name, dtype=str(line.dtype)[6:], backend=contest.backend, targets=dict(line.targets), rivals={},
        missing={who: why for who, why in contest.rivals.items() if isinstance(why, str)},
    )  # fmt: skip
    if isinstance(contest.ours, str):
        return found | dict(why=contest.ours)
    ours = taken[""]
    found["seconds"], found["n"] = statistics.median(ours) / contest.unit, len(ours)
    if contest.bytes:
        found["bandwidth"] = contest.bytes / statistics.median(ours)
        found["floor"] = contest.bytes / roof["triad"] / statistics.median(ours)
    for who, times in taken.items():
        if who:
            found["rivals"][who] = dict(
                seconds=statistics.median(times) / contest.unit, n=len(times),
                ratio=statistics.median(times) / statistics.median(ours), of_minima=min(times) / min(ours),
            )  # fmt: skip
    if contest.memory is not None:
        rival = contest.rivals[contest.memory]
        assert callable(rival)
        theirs, mine = peak(rival), peak(contest.ours)
        if theirs is not None and mine is not None:
            found["peak"] = dict(ours=mine, rival=theirs, ratio=theirs / max(mine, 1))
    return found


def verdict(ratio: float, target: float | None, quick: bool) -> str:
    """What is promised, and whether it is kept; small sizes are promised nothing."""
    if target is None or quick:
        return ""
    return f">= {target:g}: {'kept' if ratio >= target else 'MISSED'}"


def texts(found: dict[str, Any], quick: bool) -> list[str]:
    """A line of the table: one line of text per rival, and one for memory."""
    head = f"{found['line']:<36}{found['dtype']:<10}"
    if "why" in found:
        return [f"{head}not measured: {found['why']}"]
    head += f"{found['backend']:<8}{found['seconds'] * 1e3:>10.3f} ms"
    head += f"{found['bandwidth'] / 1e9:>7.1f} GB/s ({found['floor']:.0%})" if "bandwidth" in found else f"{'':18}"
    lines = []
    for who, rival in found["rivals"].items():
        n = min(rival["n"], found["n"])
        few = f"  n={n}" + ("" if n >= WANTED else "!")
        lines.append(
            f"{head:<86} {who:<18}{rival['seconds'] * 1e3:>10.3f} ms {rival['ratio']:>6.2f}/{rival['of_minima']:<6.2f}"
            f" {verdict(rival['ratio'], found['targets'].get(who), quick):<16}{few}"
        )
        head = ""
    for who, why in found["missing"].items():
        lines.append(f"{head:<86} {who:<18} {why}")
        head = ""
    if "peak" in found:
        p = found["peak"]
        said = verdict(p["ratio"], found["targets"].get("memory"), quick)
        sizes = f"{p['rival'] / 2**20:.0f} MiB over {p['ours'] / 2**20:.0f} MiB"
        lines.append(f"{'':<86} {'peak memory':<18}{sizes:>24} {p['ratio']:>6.2f} {said}")
    return lines


def chosen(only: list[str]) -> list[Line]:
    """The lines whose name or dtype has all words of one of the choices."""
    return [line for line in LINES if not only or any(
        all(word in f"{line.name} {line.dtype}" for word in choice.split()) for choice in only
    )]  # fmt: skip


def child(args: argparse.Namespace) -> int:
    """Measures in this process; prints the table, and writes JSON."""
    from pyllm.kernels.extension import cpu

    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    roof = roofline(args.quick)
    isa = "no C++ kernels" if cpu.module is None else cpu.module.isa
    print(f"{isa}, {args.threads} threads, torch {torch.__version__} as {torch.backends.cpu.get_cpu_capability()}")
    print(
        f"roofline of this run: read {roof['read'] / 1e9:.1f} GB/s, triad {roof['triad'] / 1e9:.1f} GB/s, "
        f"sgemm {roof['sgemm'] / 1e9:.0f} GFLOP/s; (x%): ours' bytes at the triad's rate over its time"
    )
    rows, lines = [], chosen(args.only)
    for i, line in enumerate(lines):
        left = args.budget - (time.monotonic() - began)
        share = line.share / sum(other.share for other in lines[i:])
        torch._dynamo.reset()
        contest = line.contest(line.dtype, args.quick)
        taken = {} if isinstance(contest.ours, str) else measure(contest, max(0.0, left * share))
        rows.append(row(line, contest, taken, roof))
        print("\n".join(texts(rows[-1], args.quick)), flush=True)
        del contest, taken
    again = roofline(args.quick)
    result = dict(
        isa=isa, threads=args.threads, torch=torch.__version__, machine=platform.processor() or platform.machine(),
        roofline=roof, roofline_after=again, seconds=time.monotonic() - began, lines=rows,
    )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    print(
        f"{result['seconds']:.0f} s; roofline afterwards: read {again['read'] / 1e9:.1f} GB/s, triad "
        f"{again['triad'] / 1e9:.1f} GB/s, sgemm {again['sgemm'] / 1e9:.0f} GFLOP/s; n < {WANTED} is marked !"
    )
    return 0


def command(args: argparse.Namespace) -> int:
    """Runs itself once per number of threads, and joins the results."""
    results, code = [], 0
    for threads in args.threads:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "result.json")
            options = ["--threads", str(threads), "--budget", str(args.budget), "--json", str(out)]
            options += ["--quick"] * args.quick + [word for only in args.only for word in ("--only", only)]
            environment = {**os.environ, **ISAS[args.isa], "OMP_NUM_THREADS": str(threads)}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            done = subprocess.run([sys.executable, "-m", "benchmarks.cpu", *options], env=environment, cwd=ROOT)
            code = code or done.returncode
            if out.exists():
                results.append(json.loads(out.read_text()))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="lines that have all these words")
    parser.add_argument("--quick", action="store_true", help="small sizes, no torch.compile: does it all run?")
    parser.add_argument("--budget", type=float, default=570, help="seconds per number of threads (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the results")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="one process of the command's")
    add_arguments(parser)
    parser.add_argument("--threads", type=int, default=1)
    return child(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
