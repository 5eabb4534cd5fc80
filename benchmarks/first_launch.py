"""python -m benchmarks.first_launch OP BACKEND [VARIABLE]: the cases of an op once each, the small ones first, as many
as begin within SECONDS: a compiler may take minutes for all, and what is left the tests launch.

A first launch on a card may hang it or end the process. So each op and backend gets a process and a timeout of its own,
before anything that matters is timed. VARIABLE is set to 1 for kernels that have to be asked for: PYLLM_HOPPER,
PYLLM_GLUON.
"""

from __future__ import annotations

import os
import sys
import time

import torch

from pyllm.kernels import OPS

SECONDS = 30.0


def main(op: str, backend: str, variable: str = "") -> None:
    if variable:
        os.environ[variable] = "1"
    spec = OPS[op]
    cases = sorted(spec.cases.items(), key=lambda case: sum(_numbers(case[1])))
    end = time.perf_counter() + SECONDS
    for name, case in cases:
        for dtype in (torch.float32, torch.bfloat16):
            if time.perf_counter() > end:
                print(f"{name} {dtype} and what follows: left to the tests")
                return
            inputs = spec.inputs(**case, dtype=dtype, device="cuda", generator=torch.Generator().manual_seed(3))
            args = [inputs.get(a.name) for a in spec.op.fwd._schema.arguments[:-1]]
            if reasons := spec.op.why_not(backend, *args):
                print(f"{name} {dtype}: not served: {'; '.join(reasons)}")
                continue
            leaves = [inputs[g].requires_grad_() for g in spec.grads if inputs.get(g) is not None]
            began = time.perf_counter()
            outputs = spec.function(**inputs, backend=backend)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            differentiable = [out for out in outputs if out.requires_grad]
            if differentiable:
                torch.autograd.grad([out.sum() for out in differentiable], leaves, allow_unused=True)
            torch.cuda.synchronize()
            print(f"{name} {dtype}: {time.perf_counter() - began:.2f} s", flush=True)


def _numbers(case: dict) -> list[int]:
    found: list[int] = []
    for value in case.values():
        found += [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, int)]
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
