"""Rotary embedding, and its fusion with QK-norm: heads of every usual width, both pairings, partial rotation."""

from __future__ import annotations

from collections.abc import Iterator

from pyllm.kernels.rope import triton_qk_norm_rope as qk_norm_rope
from pyllm.kernels.rope import triton_rope as rope
from pyllm.kernels.rope.triton_pairs import Tiles

from .compiler import Config, Target

# Strides are multiples of a head's width; half tables have rows of R/2 columns, which is one of 8 at the least here.
ROUND = [f"{x}_stride_{axis}" for x in ("q", "k", "dq", "dk") for axis in "bth"]
SCALARS = {
    **dict.fromkeys(ROUND, "i32/16"),
    **dict.fromkeys(("c_stride_b", "c_stride_t", "p_stride_b"), "i32"),
    **dict.fromkeys(("T", "blocks", "all_blocks", "blocks_per_program", "table_rows"), "i32"),
    **dict.fromkeys(("eps", "offset"), "fp32"),
    **dict.fromkeys(("RSTD_Q", "RSTD_K", "PARTIAL"), "*fp32"),
    "P": "*i64",
    "C": "i32/16",
}
X = ("Q", "K", "DQ", "DK", "Q_OUT", "K_OUT", "DQ_OUT", "DK_OUT", "QW", "KW", "OUT", "OUT2")
# (name, T, H, Hkv, D, R, interleaved, positions): what models have, and what they might
SHAPES = [
    *((f"D{D}{' interleaved' * i}", 4096, 32, 8, D, D, bool(i), False) for D in (64, 80, 128, 256) for i in (0, 1)),
    ("D128 MQA positions", 4096, 32, 1, 128, 128, False, True),
    ("D128 partial", 4096, 32, 8, 128, 64, False, False),
    ("D128 one token", 1, 32, 8, 128, 128, False, True),
]


def blocks(tiles: Tiles) -> dict[str, int]:
    """Constants that a tiling sets."""
    return dict(
        BLOCK_T=tiles.tokens, BLOCK_Q=tiles.q_heads, BLOCK_K=tiles.k_heads,
        BLOCK_HALF=tiles.half, BLOCK_REST=tiles.rest,
    )  # fmt: skip


def configurations(target: Target) -> Iterator[Config]:
    for dtype in ("bf16", "fp32"):
        types = SCALARS | dict.fromkeys(X, f"*{dtype}") | dict.fromkeys(("COS", "SIN"), "*fp32")
        for name, T, H, Hkv, D, R, interleaved, has_p in SHAPES:
            head = dict(HAS_P=has_p, H=H, HKV=Hkv, D=D, R=R, INTERLEAVED=interleaved, c_stride_d=1, p_stride_t=1)
            if T == 1:  # Triton takes integers that are 1 for constants
                head |= dict(T=1, blocks=1, table_rows=1)
            tiles = rope.tiles_of(T, H, Hkv, D, R, target.lanes)
            constants = head | blocks(tiles)
            for conjugate in (False, True) if dtype == "bf16" else (False,):  # a sign
                title = f"{'bwd' if conjugate else 'fwd'} {dtype} {name}"
                yield Config(title, rope._rope_kernel, types, constants | dict(CONJUGATE=conjugate), tiles.warps)
            tiles = qk_norm_rope.config(T, H, Hkv, D, R, target.lanes)
            constants = head | blocks(tiles)
            title = f"qk_norm fwd {dtype} {name}"
            yield Config(title, qk_norm_rope._qk_norm_rope_fwd_kernel, types, constants, tiles.warps)
            title = f"qk_norm bwd {dtype} {name}"
            yield Config(title, qk_norm_rope._qk_norm_rope_bwd_kernel, types, constants, tiles.warps)
