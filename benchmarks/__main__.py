"""python -m benchmarks run --out DIR --budget SECONDS: all that a machine has to say, in one command.

run      correctness first, then the throughput of every op, backend and rival and of the model, the most wanted first,
         until the budget is used up. Always leaves results.json, report.md, report.html and plots, also when it is
         stopped half-way or a benchmark takes its process down. On a GPU it builds for the card and launches every
         kernel once under a timeout before anything else.
cpu      the table that the C++ kernels are held to (`cpu_lines.py`): --isa avx2 --threads 1,2
report   the same report again, of a run's folder (finished or not) or of a results.json.
compare  two runs: what became slower, beyond the noise. Exit code 1 if anything did.
publish  docs/results.md and the README's table, of the result files in benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import compare, cpu, publish, report, results, runner


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="correctness, then throughput, of everything on this machine")
    running.add_argument("--out", type=Path, required=True, help="folder for results, report and logs")
    running.add_argument("--budget", type=float, default=450, help="seconds for everything")
    running.add_argument(
        "--only", default="", help="an expression as pytest's -k takes: rms_norm, or 'attention and D128'"
    )
    running.add_argument(
        "--no-build", action="store_true", help="on a GPU: the compiled modules are what they should be"
    )
    table = commands.add_parser("cpu", help="the CPU kernels against eager, torch.compile and transformers")
    cpu.add_arguments(table)
    table.add_argument("--isa", choices=cpu.ISAS, default="native", help="instruction set, for all contenders")
    table.add_argument(
        "--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1], help="1, or several: 1,2"
    )
    reporting = commands.add_parser("report", help="report.md, report.html and plots of a run")
    reporting.add_argument("path", type=Path, help="folder of a run, or a results.json")
    reporting.add_argument("--out", type=Path, help="folder for the report; where the results are by default")
    comparing = commands.add_parser("compare", help="what became slower from A to B")
    comparing.add_argument("a", type=Path, help="results.json or folder of the run before")
    comparing.add_argument("b", type=Path, help="and of the run after")
    commands.add_parser("publish", help="docs/results.md and the README's table from benchmarks/results")
    args = parser.parse_args(arguments)
    try:
        if args.command == "cpu":
            return cpu.command(args)
        if args.command == "run":
            return runner.run(args.out, args.budget, args.only, not args.no_build)
        if args.command == "report":
            out = args.out or (args.path if args.path.is_dir() else args.path.parent)
            print("\n".join(map(str, report.write(out, results.load(args.path)))))
            return 0
        if args.command == "publish":
            print("\n".join(map(str, publish.publish())))
            return 0
        a, b = results.load(args.a), results.load(args.b)
        changes = compare.compare(a, b)
        print("\n".join(compare.lines(a, b, changes)))
        return int(any(change.verdict == "SLOWER" for change in changes))
    except ValueError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
