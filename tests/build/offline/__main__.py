"""python -m offline TARGET [op ...]: compiles every configuration of the ops for a target, prints measurements as JSON."""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import os
import sys

from . import OPS
from .compiler import Target, compiled


def measure(target: str, op: str, index: int) -> tuple[str, dict[str, float]]:
    where = Target(target)
    config = list(importlib.import_module(f"offline.{op}").configurations(where))[index]
    return f"{target} {op} {config.name}", compiled(config, where)


def main(target: str, *ops: str) -> None:
    jobs = []
    for op in ops or OPS:
        count = sum(1 for _ in importlib.import_module(f"offline.{op}").configurations(Target(target)))
        jobs += [(target, op, i) for i in range(count)]
    with concurrent.futures.ProcessPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        results = dict(pool.map(measure, *zip(*jobs, strict=True), chunksize=8))
    if len(results) != len(jobs):
        raise SystemExit("two configurations have one name")
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
