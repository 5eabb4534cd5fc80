"""The sum of partial weight gradients: narrow and wide, one sum and two."""

from __future__ import annotations

from collections.abc import Iterator

from pyllm.kernels import triton_reduce as reduce

from .compiler import Config, Target


def configurations(target: Target) -> Iterator[Config]:
    warps = reduce.THREADS // target.lanes
    for out in ("bf16", "fp32"):
        types = dict(PARTIAL="*fp32", OUT=f"*{out}", OUT2=f"*{out}", P="i32", C="i32/16")
        for cols in (128, 16384):
            block_p, block_c = reduce.tile(cols)
            for two in (False, True):
                constants = dict(TWO=two, BLOCK_P=block_p, BLOCK_C=block_c)
                name = f"{out} {cols}{' two' if two else ''}"
                yield Config(name, reduce._sum_partials_kernel, types, constants, warps)
