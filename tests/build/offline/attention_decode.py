"""Decoding attention: every head dim class, dtype, cache layout and tile of rows, and the merge of splits."""

from __future__ import annotations

from collections.abc import Iterator

from pyllm.kernels.attention import triton_decode as decode

from .compiler import Config, Target

SCALARS = {
    **dict.fromkeys(("T", "S", "Hkv", "n_blocks", "tiles", "splits", "left"), "i32"),
    **dict.fromkeys((f"{x}_stride_{i}" for x, i in zip("q" * 3 + "kv" * 3, "bthbbsshh", strict=True)), "i32/16"),
    **dict(SEQLENS="*i32", TABLE="*i32", PARTIAL="*fp32", LSE="*fp32", table_stride="i32", scale="fp32", cap="fp32"),
}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
GROUP = 4


def configurations(target: Target) -> Iterator[Config]:
    for dtype, size in SIZES.items():
        types = SCALARS | dict.fromkeys(("Q", "K", "V", "OUT"), f"*{dtype}")
        for head_dim in (64, 128, 256):
            for rows in (4, 256):
                for page in (0, 16, 256):
                    for extra in (False, True):
                        for whole in (False, True):
                            m, n, d, warps, stages = decode.config(rows, head_dim, size, page > 0, target.amd)
                            constants = dict(GROUP=GROUP, D=head_dim, PAGE=page, WINDOW=extra, SOFTCAP=extra, WHOLE=whole)
                            constants |= dict(BLOCK_M=m, BLOCK_N=n, BLOCK_D=d)
                            constants |= dict(q_stride_d=1, k_stride_d=1, v_stride_d=1)
                            name = f"{dtype} D{head_dim} rows{rows} page{page}{' extra' if extra else ''}{' whole' if whole else ''}"
                            yield Config(name, decode._attention_decode_kernel, types, constants, warps, stages)
