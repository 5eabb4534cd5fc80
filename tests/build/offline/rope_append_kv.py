"""Rotary embedding and entry into the cache: head dims, dtypes, cache layouts, both pairings, partial rotation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from pyllm.kernels.rope import triton_append as append

from .compiler import Config, Target

TENSORS = ("q", "k", "v", "kc", "vc")
SCALARS = {
    **dict.fromkeys(("T", "capacity", "n_blocks", "table_rows", "table_stride"), "i32"),
    **{f"{x}_stride_{i}": "i32/16" for x in TENSORS for i in "btsh"},
    **dict.fromkeys(("cos_stride_p", "sin_stride_p"), "i32/16"),
    **dict.fromkeys(("COS", "SIN"), "*fp32"),
    **dict.fromkeys(("SEQLENS", "TABLE"), "*i32"),
}
DENSE = {f"{x}_stride_d": 1 for x in (*TENSORS, "cos", "sin")}
H, HKV = 32, 8
GRID = [
    *itertools.product(("bf16", "fp32"), (64, 128, 256), (1.0,), (0,), (False,)),
    *itertools.product(("bf16", "fp16"), (128,), (1.0,), (16,), (False,)),
    *itertools.product(("bf16", "fp32"), (128,), (1.0, 0.5), (0,), (True,)),
    *itertools.product(("bf16",), (80, 128), (0.5,), (0,), (False,)),
]


def configurations(target: Target) -> Iterator[Config]:
    for dtype, D, share, page, interleaved in GRID:
        R = int(D * share)
        block_h, half, rest, block_d, warps = append.config(H, HKV, D, R, target.lanes)
        types = SCALARS | dict.fromkeys(("Q", "K", "V", "K_CACHE", "V_CACHE", "OUT"), f"*{dtype}")
        constants = DENSE | dict(H=H, HKV=HKV, D=D, HALF=R // 2, INTERLEAVED=interleaved, PAGE=page)
        constants |= dict(BLOCK_H=block_h, BLOCK_HALF=half, BLOCK_REST=rest, BLOCK_D=block_d)
        title = f"{dtype} {D}{f' of which {R}' if R < D else ''}{f' blocks {page}' if page else ''}"
        title += " interleaved" if interleaved else ""
        yield Config(title, append._rope_append_kv_kernel, types, constants, warps)
