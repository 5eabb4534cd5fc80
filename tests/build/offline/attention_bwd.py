"""Attention's backward: head dimensions, dtypes, masks, packed batches; with descriptors where a launcher has them.

Spills that the budget allows: dk and dv at head dimension 128 under a window with two bounds keep one or two registers
in 8 bytes of stack; half the queries a tile would have none, and half the products per load of a key's registers. AMD
moves scalar registers into lanes of vector registers, which is no memory at all. dq in float32 at 128 on sm_80: 16
bytes, on sm_100 8 in small tiles (640 in large ones); tiles of half the size would load twice as much.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from pyllm.kernels.attention import triton_bwd as bwd

from .compiler import Config, Target

SCALARS = {
    **dict.fromkeys(("B", "T", "S", "H", "Hkv", "tiles", "parts", "part_stride", "P", "left", "right"), "i32"),
    **dict.fromkeys(("T_pad", "C"), "i32/16"),
    **{f"{x}_{s}": "i32/16" for x in ("q", "k", "v", "do", "out") for s in "bth"},
    **dict.fromkeys(("scale", "unit", "cap"), "fp32"),
    **dict.fromkeys(("NEG_LSE", "NEG_DELTA", "LSE", "DLSE", "SINKS", "PARTIAL"), "*fp32"),
    **dict.fromkeys(("CU_Q", "CU_K"), "*i32"),
}
KERNELS = (bwd._dkdv_kernel, bwd._dq_kernel)
TENSORS = ("Q", "K", "V", "DO", "OUT", "DQ", "DK", "DV")
FEATURES: dict[str, dict[str, Any]] = {
    "full": dict(),
    "causal": dict(HAS_RIGHT=True),
    "window": dict(HAS_LEFT=True, HAS_RIGHT=True),
    "softcap": dict(HAS_RIGHT=True, SOFTCAP=True),
}


def of(D: int, dtype: str, feature: str, packed: bool, tma: bool, target: Target) -> Iterator[Config]:
    """The two large kernels. A packed batch's dk and dv are never by descriptor."""
    half = dtype != "fp32"
    features = dict(HAS_LEFT=False, HAS_RIGHT=False, SOFTCAP=False) | FEATURES[feature]
    constants = features | dict(GROUP=4, D=D, FOLD_LSE=half and not features["SOFTCAP"], HALF=half)
    constants |= dict(BLOCK_D=bwd.block_d(D)) | ({} if packed else dict(CU_Q=None, CU_K=None))
    tiles = bwd.config(target.arch, D, half, features["SOFTCAP"])
    for name, kernel, (m, n, warps, stages) in zip(("dkdv", "dq"), KERNELS, tiles, strict=True):
        types = SCALARS | dict.fromkeys(TENSORS, f"*{dtype}")
        extra = constants | dict(BLOCK_M=m, BLOCK_N=n, STAGES=stages)
        described = tma and not (packed and name == "dkdv")
        for x, rows in zip(("Q", "K", "V", "DO"), (m, n, n, m), strict=True):
            if described:
                types |= {f"{x}_TMA": f"tensordesc<{dtype}[{rows}, {D}]>"}
            else:
                extra |= {f"{x}_TMA": None}
        title = f"{name} {dtype} {D} {feature}{' packed' if packed else ''}{' tma' if described else ''}"
        yield Config(title, kernel, types, extra, warps, stages)


def configurations(target: Target) -> Iterator[Config]:
    tma = target.arch // 10 in (9, 10)
    for D, feature in itertools.product((64, 128, 256), FEATURES):
        yield from of(D, "bf16", feature, False, tma, target)
    for D in (16, 32, 96, 192):
        yield from of(D, "bf16", "causal", False, tma and D < 96, target)
    for D in (64, 128, 256):
        yield from of(D, "bf16", "causal", True, tma, target)
        yield from of(D, "fp32", "causal", False, False, target)
    yield from of(128, "fp16", "window", True, tma, target)
    yield from of(128, "bf16", "softcap", True, tma, target)
    for D, dtype in itertools.product((64, 128, 256), ("bf16", "fp32")):
        types = SCALARS | dict.fromkeys(TENSORS, f"*{dtype}")
        extra = dict(D=D, BLOCK_M=bwd.delta_rows(D), BLOCK_D=bwd.block_d(D))
        yield Config(f"delta {dtype} {D}", bwd._delta_kernel, types, extra | dict(CU_Q=None), 4)
        yield Config(f"delta {dtype} {D} packed", bwd._delta_kernel, types, extra, 4)
    for dtype, p, c in (("fp32", 64, 32), ("bf16", 4, 1024)):
        yield Config(
            f"sum {dtype}", bwd._sum_partials_kernel, SCALARS | dict(OUT=f"*{dtype}"), dict(BLOCK_P=p, BLOCK_C=c), 4
        )
