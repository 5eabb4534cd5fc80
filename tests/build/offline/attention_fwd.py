"""Attention forward: every tile of the table, by descriptors and by pointers, with every feature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyllm.kernels.attention import triton_fwd

from .compiler import Config, Target

TYPES = {
    **dict.fromkeys(("LSE", "SINKS"), "*fp32"),
    **dict.fromkeys(("CU_Q", "CU_K"), "*i32"),
    **dict.fromkeys(("T", "S", "H", "group", "heads", "sequences", "tiles", "section", "left", "right"), "i32"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
    **{f"{x}_{what}": "i32/16" for x in "qkv" for what in ("batch", "row", "head")},
}
PLAIN = dict(HAS_LEFT=False, HAS_RIGHT=True, SOFTCAP=False)
FEATURES: dict[str, dict[str, Any]] = {
    "causal": PLAIN,
    "full": PLAIN | dict(HAS_RIGHT=False),
    "packed causal": PLAIN | dict(packed=True),
    "window": PLAIN | dict(HAS_LEFT=True),
    "window softcap sinks": PLAIN | dict(HAS_LEFT=True, SOFTCAP=True, sinks=True),
    "packed window softcap sinks": PLAIN | dict(HAS_LEFT=True, SOFTCAP=True, sinks=True, packed=True),
}


def configuration(
    name: str, dtype: str, D: int, tile: triton_fwd.Tile, descriptors: bool, overlap: bool, feature: dict[str, Any]
) -> Config:
    feature = dict(feature)
    block_d = 1 << max(4, (D - 1).bit_length())
    types = TYPES | dict.fromkeys(("Q", "K", "V", "OUT"), f"*{dtype}")
    constants = dict(D=D, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=block_d, OVERLAP=overlap)
    if not feature.pop("packed", False):
        constants |= dict(CU_Q=None, CU_K=None)
    if not feature.pop("sinks", False):
        constants |= dict(SINKS=None)
    for x, rows in zip("QKV", (tile.block_m, tile.block_n, tile.block_n), strict=True):
        if descriptors:
            types |= {f"{x}_ROWS": f"tensordesc<{dtype}[{rows}, {D}]>"}
        else:
            constants |= {f"{x}_ROWS": None}
    return Config(name, triton_fwd._attention_fwd_kernel, types, constants | feature, tile.warps, tile.stages)
