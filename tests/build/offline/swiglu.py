"""SwiGLU: one long row and many rows, large and small tensors, two dtypes; halves of one buffer or two tensors."""

from __future__ import annotations

from collections.abc import Iterator

from pyllm.kernels.swiglu import triton_swiglu as swiglu

from .compiler import Config, Target

PROCESSORS = 132
# Rows and columns: 1 row is what contiguous tensors become; 8192 x 14336 is Llama 3 8B's, packed; narrow rows share.
SHAPES = ((1, 8192 * 14336), (8192, 14336), (1, 14336), (8192, 64))


def types(dtype: str) -> dict[str, str]:
    return {
        **dict.fromkeys(("gate_stride", "up_stride", "dy_stride", "grad_stride", "half", "F"), "i32/16"),
        **dict.fromkeys(("N", "blocks"), "i32"),
        **dict.fromkeys(("GATE", "UP", "Y", "DY", "DGATE", "DUP"), f"*{dtype}"),
    }


def configurations(target: Target) -> Iterator[Config]:
    for dtype in ("bf16", "fp16", "fp32"):
        for rows, cols in SHAPES:
            block_n, block_f, warps = swiglu.config(rows, cols, PROCESSORS, target.lanes)
            constants = dict(BLOCK_N=block_n, BLOCK_F=block_f)
            constants |= dict(N=1) if rows == 1 else {}  # Triton makes a constant of an argument that is 1
            constants |= dict(blocks=1) if cols <= block_f else {}
            name = f"{dtype} {rows}x{cols}"
            yield Config(f"fwd {name}", swiglu._swiglu_fwd_kernel, types(dtype), constants, warps)
            yield Config(f"bwd {name}", swiglu._swiglu_bwd_kernel, types(dtype), constants, warps)
        # A width and strides of no round number
        block_n, block_f, warps = swiglu.config(8192, 14337, PROCESSORS, target.lanes)
        ragged = {k: t.removesuffix("/16") for k, t in types(dtype).items()}
        tile = dict(BLOCK_N=block_n, BLOCK_F=block_f)
        yield Config(f"ragged fwd {dtype}", swiglu._swiglu_fwd_kernel, ragged, tile, warps)
        yield Config(f"ragged bwd {dtype}", swiglu._swiglu_bwd_kernel, ragged, tile, warps)
