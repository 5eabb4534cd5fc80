"""RMSNorm: every row width class, dtype pair and variant.

On AMD the loops over wide rows keep some scalar registers (masks) in lanes of vector registers, which count as spills;
their budget says so, and that the stack stays empty: no memory is touched.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyllm.kernels.rms_norm import triton_rms_norm as rms_norm

from .compiler import Config, Target

SCALARS = {
    **dict.fromkeys(("x_stride", "r_stride", "dy_stride", "dh_stride", "C"), "i32/16"),
    **dict.fromkeys(("N", "P", "rows_per_program"), "i32"),
    **dict.fromkeys(("eps", "offset"), "fp32"),
    **dict.fromkeys(("RSTD", "PARTIAL"), "*fp32"),
}
WIDTHS = (64, 1024, 2048, 4096, 8192, 16384, 32768)
# Every tile and number of warps in two dtypes; what another dtype of x or weight changes is seen at two widths.
PAIRS = {("bf16", "bf16"): WIDTHS, ("fp32", "fp32"): WIDTHS, ("bf16", "fp32"): (1024, 4096), ("fp16", "fp16"): (1024,)}


def configurations(target: Target) -> Iterator[Config]:
    loop_warps = rms_norm.LOOP_THREADS // target.lanes
    for (x, w), widths in PAIRS.items():
        size = 4 if x == "fp32" else 2
        types = SCALARS | dict.fromkeys(("X", "R", "Y", "H", "DY", "DH", "DX"), f"*{x}") | dict(W=f"*{w}", OUT=f"*{w}")
        for extra in (False, True):
            title = f"{x} {w}{' residual' if extra else ''}"
            forward, backward = dict(HAS_RESIDUAL=extra), dict(HAS_DH=extra)
            for cols in widths:
                block_n, block_c, warps = rms_norm.config(cols, rms_norm.FWD_TILE, target.lanes)
                tile = dict(BLOCK_N=block_n, BLOCK_C=block_c)
                yield Config(f"fwd {title} {cols}", rms_norm._rms_norm_fwd_kernel, types, forward | tile, warps)
                if cols <= rms_norm.BWD_TILE:
                    block_n, block_c, warps = rms_norm.config(cols, rms_norm.BWD_TILE, target.lanes)
                    tile = dict(BLOCK_N=block_n, BLOCK_C=block_c, STAGES=rms_norm.stages(size, block_c, 2 + extra))
                    yield Config(f"bwd {title} {cols}", rms_norm._rms_norm_bwd_kernel, types, backward | tile, warps)
            tile = dict(BLOCK_C=rms_norm.LOOP_TILE)
            yield Config(f"fwd loop {title}", rms_norm._rms_norm_fwd_loop_kernel, types, forward | tile, loop_warps)
            block_n, block_c, warps = rms_norm.bwd_loop_config(size, target.lanes)
            tile = dict(BLOCK_N=block_n, BLOCK_C=block_c)
            yield Config(f"bwd loop {title}", rms_norm._rms_norm_bwd_loop_kernel, types, backward | tile, warps)
            # A width and strides of no round number: 4097 columns, one by one. An address for each of 16 elements
            # of every tensor is more than registers hold in the backward: the budget allows these some spills.
            ragged = {k: t.removesuffix("/16") for k, t in types.items()}
            block_n, block_c, warps = rms_norm.config(4097, rms_norm.FWD_TILE, target.lanes)
            tile = dict(BLOCK_N=block_n, BLOCK_C=block_c)
            yield Config(f"ragged fwd {title}", rms_norm._rms_norm_fwd_kernel, ragged, forward | tile, warps)
            block_n, block_c, warps = rms_norm.config(4097, rms_norm.BWD_TILE, target.lanes)
            tile = dict(BLOCK_N=block_n, BLOCK_C=block_c, STAGES=rms_norm.stages(size, block_c, 2 + extra))
            yield Config(f"ragged bwd {title}", rms_norm._rms_norm_bwd_kernel, ragged, backward | tile, warps)
