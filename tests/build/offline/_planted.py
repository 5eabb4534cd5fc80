"""Not shipped: SwiGLU's backward in a tile too large for its one warp, which must break the budget by its spills."""

from __future__ import annotations

from collections.abc import Iterator

from .compiler import Config, Target
from .swiglu import swiglu, types


def configurations(target: Target) -> Iterator[Config]:
    tile = dict(N=1, BLOCK_N=1, BLOCK_F=4096)
    yield Config("bwd bf16", swiglu._swiglu_bwd_kernel, types("bf16"), tile, 1)
