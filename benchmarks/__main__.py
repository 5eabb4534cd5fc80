"""python -m benchmarks run --out DIR --budget SECONDS: everything a machine's GPU has to say, in one command.

A native build; every kernel's first launch in a process of its own, under a timeout; the correctness tier (a wrong
kernel must not be timed, nor trusted); then the benchmarks, the most wanted first, until the budget is used up. Each
phase has its own bound and writes what it has when it is stopped. What fails its first launch is left out later, and
said. Needs a GPU.

python -m benchmarks cpu --isa avx2 --threads 1,2: the table that the CPU kernels are held to (`cpu_lines.py`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import cpu

ROOT = Path(__file__).parents[1]


def phase(title: str, seconds: float, log: Path, command: list[str], lines: int = 15) -> int:
    """Runs a command with its output to a file, whose last lines are printed; 124: it took longer than `seconds`."""
    print(f"== {title} (at most {seconds:.0f} s)", flush=True)
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
            code = 124
    print("\n".join(log.read_text(errors="replace").splitlines()[-lines:]), flush=True)
    print(f"== {title}: exit {code}, {time.monotonic() - began:.0f} s, {log}", flush=True)
    return code


def first_launches(out: Path, seconds: float, only: str) -> list[str]:
    """ "op and backend" of those that hang, die or fail."""
    from pyllm.kernels import OPS

    failed = []
    end = time.monotonic() + seconds
    for op, spec in OPS.items():
        for backend in ("triton", "cuda"):
            if backend not in spec.op.impls or (only and only not in op):
                continue
            left = min(90.0, end - time.monotonic())
            log = out / f"first_launch_{op}_{backend}.txt"
            command = [sys.executable, "-m", "benchmarks.first_launch", op, backend]
            if left < 5 or phase(f"first launch of {op} {backend}", left, log, command, lines=2):
                failed.append(f"({op} and {backend})")
    return failed


def run(out: Path, budget: float, only: str) -> int:
    import torch

    if not torch.cuda.is_available():
        print("python -m benchmarks run needs a GPU; on CPU: python -m benchmarks cpu")
        return 2
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    native = "".join(map(str, torch.cuda.get_device_capability()))
    os.environ["PYLLM_CUDA_ARCHS"] = native
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    phase(f"build for sm_{native}", 0.25 * budget, out / "build.txt", build)
    phase("kernels", 60, out / "kernels.txt", [sys.executable, "-m", "pyllm", "kernels"], lines=40)
    failed = first_launches(out, 0.25 * budget, only)
    chosen = " and ".join([f"({only})"] * bool(only) + [f"not {name}" for name in failed])
    tests = [
        *pytest,
        "tests/ops",
        "-q",
        "-n",
        "4",
        "-m",
        "not slow and not packaging",
        *(["-k", chosen] if chosen else []),
    ]
    code = phase("correctness", 0.35 * budget, out / "tests.txt", [*tests, f"--junitxml={out / 'tests.xml'}"])
    left = max(30.0, end - time.monotonic() - 15)
    bench = [*pytest, "benchmarks", "-q", "--benchmark-only", f"--budget={left - 20:.0f}", "-rsf"]
    bench += ["-k", f"gpu and {chosen}" if chosen else "gpu", f"--benchmark-json={out / 'results.json'}"]
    code |= phase("benchmarks", left, out / "benchmarks.txt", bench, lines=150)
    if failed:
        print(f"left out, because their first launch failed: {', '.join(failed)}")
    return code or int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="correctness, then throughput, of everything on this machine's GPU")
    runner.add_argument("--out", type=Path, required=True, help="folder for results.json, tests.xml and logs")
    runner.add_argument("--budget", type=float, default=450, help="seconds")
    runner.add_argument(
        "--only", default="", help="an expression as pytest's -k takes: rms_norm, or 'attention and D128'"
    )
    table = commands.add_parser("cpu", help="the CPU kernels against eager, torch.compile and transformers")
    cpu.add_arguments(table)
    table.add_argument("--isa", choices=cpu.ISAS, default="native", help="instruction set, for all contenders")
    table.add_argument(
        "--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1], help="1, or several: 1,2"
    )
    args = parser.parse_args()
    if args.command == "cpu":
        return cpu.command(args)
    return run(args.out, args.budget, args.only)


if __name__ == "__main__":
    sys.exit(main())
