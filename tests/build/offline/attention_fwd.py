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
CAUSAL = dict(HAS_LEFT=False, HAS_RIGHT=True, SOFTCAP=False)
ALL = dict(HAS_LEFT=True, HAS_RIGHT=True, SOFTCAP=True, sinks=True, packed=True)
FEATURES: dict[str, dict[str, Any]] = {
    "causal": CAUSAL,
    "full": CAUSAL | dict(HAS_RIGHT=False),
    "packed window": CAUSAL | dict(HAS_LEFT=True, packed=True),
    "packed window softcap sinks": ALL,
}
EXTREMES = ("causal", "packed window softcap sinks")
# Widths of heads, and what is compiled of each: every feature for the tiles of long sequences, else the extremes.
BY_DESCRIPTOR = {16: ("causal",), 32: EXTREMES, 64: FEATURES, 128: FEATURES, 256: FEATURES}
BY_POINTER = {64: EXTREMES, 80: EXTREMES, 128: EXTREMES, 160: EXTREMES}


def configurations(target: Target) -> Iterator[Config]:
    if 90 <= target.arch < 120:
        for D, features in BY_DESCRIPTOR.items():
            for feature in features:
                yield configuration(target, "bf16", D, feature, descriptors=True)
            for feature in EXTREMES[: len(features)]:
                yield configuration(target, "bf16", D, feature, descriptors=True, small=True)
        yield configuration(target, "fp16", 128, "causal", descriptors=True)
    for D, features in BY_POINTER.items():
        for feature in features:
            yield configuration(target, "bf16", D, feature, descriptors=False)
    for D in (64, 128):
        yield configuration(target, "fp32", D, "packed window softcap sinks", descriptors=False)


def configuration(
    target: Target, dtype: str, D: int, feature: str, *, descriptors: bool, small: bool = False
) -> Config:
    tile = triton_fwd.config(target.arch, D, 4 if dtype == "fp32" else 2, descriptors=descriptors, small=small)
    overlap = triton_fwd.overlapped(target.arch, descriptors)
    how = f"{'tma' if descriptors else 'pointers'}{' overlap' if overlap else ''}{' small' if small else ''}"
    constants: dict[str, Any] = dict(FEATURES[feature])
    types = TYPES | dict.fromkeys(("Q", "K", "V", "OUT"), f"*{dtype}")
    if not constants.pop("packed", False):
        constants |= dict(CU_Q=None, CU_K=None)
    if not constants.pop("sinks", False):
        constants |= dict(SINKS=None)
    for x, rows in zip("QKV", (tile.block_m, tile.block_n, tile.block_n), strict=True):
        if descriptors:
            types |= {f"{x}_ROWS": f"tensordesc<{dtype}[{rows}, {D}]>"}
        else:
            constants |= {f"{x}_ROWS": None}
    block_d = 1 << max(4, (D - 1).bit_length())
    constants |= dict(D=D, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=block_d, OVERLAP=overlap)
    name = f"fwd {dtype} {D} {how} {feature}"
    return Config(name, triton_fwd._attention_fwd_kernel, types, constants, tile.warps, tile.stages)
