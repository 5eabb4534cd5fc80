"""Compiles every shipped configuration of the Triton kernels, with no GPU, and prints what the compiler made as JSON.

A program of its own, because Triton's interpreter (which the tests run under) and its compiler exclude each other in
one process: `python tests/build/triton_offline.py 90 [80 100]`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyllm.kernels.rms_norm import triton_rms_norm as rms_norm

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int, warps: int) -> dict[str, Any]:
    """Registers, stack and local memory (both are spills), shared memory and 16-byte accesses of one configuration.

    Pointers and whatever is typed "i32/16" are multiples of 16, as Triton itself sees them at a call with round sizes.
    """
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n].split("/")[0] for n in names}
    aligned = [i for i, n in enumerate(names) if n not in constants and (types[n][0] == "*" or "/16" in types[n])]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    ptx = made.asm["ptx"]
    return dict(
        registers=int(found[1]),
        stack=int(found[2]),
        local=int(found[3]),
        shared=made.metadata.shared,
        wide_loads=len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        wide_stores=len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
    )


def rms_norm_configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """(name, kernel, types, constants, warps) of every row width class, dtype pair and variant."""
    scalars = dict(N="i32", C="i32/16", P="i32", rows_per_program="i32", eps="fp32", offset="fp32", RSTD="*fp32")
    scalars |= dict.fromkeys(("x_stride", "r_stride", "dy_stride", "dh_stride"), "i32/16")
    scalars |= dict(PARTIAL="*fp32")
    for x, w in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")):
        types = scalars | dict.fromkeys(("X", "R", "Y", "H", "DY", "DH", "DX"), f"*{x}") | dict(W=f"*{w}", OUT=f"*{w}")
        for cols in (64, 128, 1024, 2048, 4096, 8192, 16384, 32768):
            for extra in (False, True):
                title = f"{x} {w} {cols}{' residual' if extra else ''}"
                block_n, block_c, warps = rms_norm.config(cols, rms_norm.FWD_TILE)
                tile = dict(BLOCK_N=block_n, BLOCK_C=block_c)
                yield f"fwd {title}", rms_norm._rms_norm_fwd_kernel, types, dict(HAS_RESIDUAL=extra, **tile), warps
                if cols <= rms_norm.BWD_TILE:
                    block_n, block_c, warps = rms_norm.config(cols, rms_norm.BWD_TILE)
                    tile = dict(BLOCK_N=block_n, BLOCK_C=block_c)
                    yield f"bwd {title}", rms_norm._rms_norm_bwd_kernel, types, dict(HAS_DH=extra, **tile), warps
        loop = dict(BLOCK_C=rms_norm.LOOP_TILE)
        for extra in (False, True):
            title = f"{x} {w}{' residual' if extra else ''}"
            yield f"fwd loop {title}", rms_norm._rms_norm_fwd_loop_kernel, types, dict(HAS_RESIDUAL=extra, **loop), 8
            yield f"bwd loop {title}", rms_norm._rms_norm_bwd_dx_loop_kernel, types, dict(HAS_DH=extra, **loop), 8
        tile = dict(BLOCK_N=8, BLOCK_C=256)
        yield f"bwd dweight {x} {w}", rms_norm._rms_norm_bwd_dweight_kernel, types, tile, 4
        tile = dict(BLOCK_P=16, BLOCK_C=128)
        yield f"sum partials {x} {w}", rms_norm._sum_partials_kernel, types, tile, 4


if __name__ == "__main__":
    results = {
        f"sm_{arch} rms_norm {name}": compiled(kernel, types, constants, arch, warps)
        for arch in map(int, sys.argv[1:])
        for name, kernel, types, constants, warps in rms_norm_configurations()
    }
    json.dump(results, sys.stdout)
