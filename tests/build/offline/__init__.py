"""Every shipped configuration of the Triton kernels, compiled with no GPU: one module an op, `configurations(target)`.

`python -m offline sm_90 [op ...]`, with tests/build on the path, prints what the compiler made as JSON. It is a program
of its own because Triton's interpreter, which the tests run under, and its compiler exclude each other in a process.
"""

from pathlib import Path

OPS = sorted(
    path.stem for path in Path(__file__).parent.glob("[!_]*.py") if path.stem not in ("compiler", "overlap", "tma")
)
