"""Decoding attention: head dims, dtypes, cache layouts and tiles of rows, and the merge of splits.

Rows: 4 is a step of generation, 256 a chunk of a prompt. A block of 256 keys is looked up once a tile, one of 16 for
every key. "extra" is window and softcap; "whole" has a single split. Head dim 80 stands for those that aren't powers of
two: its rows are multiples of 16 bytes still.

What the budget allows to spill: on AMD scalar registers, which go to lanes of vector ones and never to memory (stack
stays 0); on NVIDIA 8 bytes in one float32 kernel, and 16 bytes in one of head dim 256 on sm_80.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from pyllm.kernels.attention import triton_decode as decode

from .compiler import Config, Target

STRIDES = [f"{x}_stride_{i}" for x, dims in (("q", "bth"), ("k", "bsh"), ("v", "bsh")) for i in dims]
SCALARS = {
    **dict.fromkeys(("T", "S", "Hkv", "n_blocks", "tiles", "splits", "left", "table_stride"), "i32"),
    **dict.fromkeys(STRIDES, "i32/16"),
    **dict.fromkeys(("scale", "cap"), "fp32"),
    **dict.fromkeys(("PARTIAL", "LSE"), "*fp32"),
    **dict.fromkeys(("SEQLENS", "TABLE"), "*i32"),
}
DENSE = dict(q_stride_d=1, k_stride_d=1, v_stride_d=1)
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
GROUP = 4
# dtypes, head dims, rows, block sizes (0: contiguous), extra, whole. Half precision differs by a conversion alone.
GRID = [
    *itertools.product(("bf16",), (64, 128, 256), (4, 256), (0, 16, 256), (False,), (False,)),
    *itertools.product(("bf16",), (128, 256), (4, 256), (0, 16), (True,), (True,)),
    *itertools.product(("fp32",), (64, 128, 256), (4, 256), (0,), (False,), (False,)),
    *itertools.product(("fp32",), (128, 256), (4, 256), (16,), (True,), (True,)),
    *itertools.product(("bf16", "fp16"), (80,), (4,), (0,), (False,), (False,)),
]
MERGES = (("bf16", 64), ("bf16", 80), ("bf16", 128), ("bf16", 256), ("fp16", 128), ("fp32", 128))


def configurations(target: Target) -> Iterator[Config]:
    for dtype, head_dim, rows, page, extra, whole in GRID:
        types = SCALARS | dict.fromkeys(("Q", "K", "V", "OUT"), f"*{dtype}")
        m, n, d, warps, stages = decode.config(rows, head_dim, SIZES[dtype], page > 0, target.amd)
        constants = DENSE | dict(GROUP=GROUP, D=head_dim, PAGE=page, WINDOW=extra, SOFTCAP=extra, WHOLE=whole)
        constants |= dict(BLOCK_M=m, BLOCK_N=n, BLOCK_D=d)
        title = f"{dtype} {head_dim} rows {rows}{f' blocks {page}' if page else ''}"
        title += f"{' extra' if extra else ''}{' whole' if whole else ''}"
        yield Config(title, decode._attention_decode_kernel, types, constants, warps, stages)
    for dtype, head_dim in MERGES:
        d = decode.config(4, head_dim, SIZES[dtype])[2]
        constants = dict(GROUP=GROUP, D=head_dim, BLOCK_S=decode.MERGED, BLOCK_D=d)
        types = SCALARS | dict(OUT=f"*{dtype}")
        yield Config(f"merge {dtype} {head_dim}", decode._merge_splits_kernel, types, constants, 4)
