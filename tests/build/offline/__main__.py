"""python -m offline TARGET [op ...] [--match REGEX]: compiles for a target, prints measurements as JSON."""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import os
import re
import sys

from . import OPS
from .compiler import Target, compiled


def measure(target: str, op: str, index: int) -> tuple[str, dict[str, float]]:
    where = Target(target)
    config = list(importlib.import_module(f"offline.{op}").configurations(where))[index]
    return f"{target} {op} {config.name}", compiled(config, where)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m offline")
    parser.add_argument("target", help="sm_80, sm_90, sm_100 or gfx942")
    parser.add_argument("ops", nargs="*", default=OPS, help="modules of this folder (default: all)")
    parser.add_argument("--match", default="", metavar="REGEX", help="only configurations whose name has it")
    args = parser.parse_args()
    jobs = []
    for op in args.ops:
        configs = importlib.import_module(f"offline.{op}").configurations(Target(args.target))
        jobs += [(args.target, op, i) for i, config in enumerate(configs) if re.search(args.match, config.name)]
    if not jobs:
        raise SystemExit("nothing matches")
    with concurrent.futures.ProcessPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        results = dict(pool.map(measure, *zip(*jobs, strict=True), chunksize=4))
    if len(results) != len(jobs):
        raise SystemExit("two configurations have one name")
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
