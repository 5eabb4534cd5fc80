"""Cross-entropy and linear cross-entropy: row kernels at every tile, the fused forward at every GPU's configuration."""

from __future__ import annotations

from collections.abc import Iterator

from pyllm.kernels.cross_entropy import triton_cross_entropy as rows
from pyllm.kernels.cross_entropy import triton_linear_forward as fused

from .compiler import Config, Target

FLOATS = dict.fromkeys(("LOSS", "LSE", "PART", "DLOSS", "WSUM", "B", "W"), "*fp32")
SCALARS = {
    **FLOATS,
    **dict.fromkeys(("smoothing", "z_loss", "softcap"), "fp32"),
    **dict.fromkeys(("V", "C", "cols", "x_stride", "dx_stride", "m_stride", "share"), "i32/16"),
    **dict.fromkeys(("N", "splits", "tiles", "plane", "ignore_index"), "i32"),
    **dict(T="*i64", PREDICTED="*i64", BEST="*i32", first="i32/16"),
}
ONE = dict(t_stride=1, dloss_stride=0, m_step=1)  # integers that Triton sees as constants at an ordinary call
FLAGS = dict(BIAS=False, WEIGHTED=False, SMOOTH=False, Z=False, CAP=False, PREDICT=False)
# What an option changes is seen at one width in one dtype.
OPTIONS = {
    "plain": {},
    "smooth z": dict(SMOOTH=True, Z=True),
    "weighted smooth": dict(WEIGHTED=True, SMOOTH=True),
    "softcap": dict(CAP=True),
    "bias predict": dict(BIAS=True, PREDICT=True),
    "everything": dict.fromkeys(FLAGS, True),
}
WIDTHS = (512, 4096, 128256)


def configurations(target: Target) -> Iterator[Config]:
    for dtype in ("bf16", "fp32", "fp16"):
        types = {**SCALARS, "X": f"*{dtype}", "DX": f"*{dtype}", "M": f"*{dtype}"}
        for name, chosen in OPTIONS.items() if dtype == "bf16" else [("plain", {})]:
            yield from row_kernels(target, f"{dtype} {name}", types, {**FLAGS, **chosen}, name != "plain")
    # The backward of the linear form: float32 logits, dlogits in the inputs' dtype, some of the classes.
    block, warps, stages = rows.config(8192, target.lanes)
    constants = {**{k: v for k, v in FLAGS.items() if k != "PREDICT"}, "t_stride": 1, "dloss_stride": 0}
    for dtype in ("bf16", "fp16"):
        types = {**SCALARS, "X": "*fp32", "DX": f"*{dtype}"}
        tile = dict(BLOCK_V=block, STAGES=stages)
        yield Config(f"bwd panel {dtype} 8192", rows._cross_entropy_bwd_kernel, types, constants | tile, warps, stages)
    for name, chosen in OPTIONS.items():
        flags = {**FLAGS, **chosen}
        constants = {k: flags[k] for k in ("WEIGHTED", "SMOOTH", "Z", "PREDICT")}
        constants |= dict(BLOCK_N=rows.COMBINE_ROWS, t_stride=1)
        warps = rows.COMBINE_ROWS // target.lanes
        yield Config(f"combine {name}", rows._combine_kernel, SCALARS, constants, warps)
    for dtype, itemsize in (("bf16", 2), ("fp16", 2)):
        types = {**SCALARS, "X": f"*{dtype}", "M": f"*{dtype}"}
        for name, chosen in OPTIONS.items() if dtype == "bf16" else [("plain", {})]:
            for even in (True, False) if name == "plain" else (True,):
                busy = any(chosen.get(option) for option in ("SMOOTH", "CAP", "PREDICT"))
                block_n, block_v, block_c, warps, stages = fused.config(target.arch, itemsize, busy, target.lanes)
                flags = {k: v for k, v in {**FLAGS, **chosen}.items() if k != "Z"}
                tile = dict(
                    EVEN_C=even, GROUP=fused.GROUP, BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_C=block_c, STAGES=stages
                )
                constants = {**flags, **tile, "t_stride": 1, "m_step": 1}
                title = f"linear {dtype} {name}{'' if even else ' ragged C'}"
                yield Config(title, fused._linear_fwd_kernel, types, constants, warps, stages)


def row_kernels(target: Target, title: str, types: dict, flags: dict, one: bool) -> Iterator[Config]:
    for cols in (128256,) if one else WIDTHS:
        block, warps, stages = rows.config(cols, target.lanes)
        constants = {**flags, "BLOCK_V": block, "STAGES": stages, "t_stride": 1}
        parts = (False, True) if cols == 128256 else (False,)
        for split in parts:
            given = {**constants, "SPLIT": split} | ({} if split else {"splits": 1})
            name = f"fwd {title} {cols}{' split' if split else ''}"
            yield Config(name, rows._cross_entropy_fwd_kernel, types, given, warps, stages)
        given = {**constants, "dloss_stride": 0, "first": 0}
        given = {k: v for k, v in given.items() if k != "PREDICT"}
        yield Config(f"bwd {title} {cols}", rows._cross_entropy_bwd_kernel, types, given, warps, stages)
