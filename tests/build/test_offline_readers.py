"""What the offline programs read out of compiled text: overlap of exp2 and wgmma, bytes of TMA copies."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from offline import tma
from offline.overlap import overlap, overlap_by_role

WGMMA, EXP2, WAIT, ROLE = (
    "  HGMMA.64x128x16 R0 ;",
    "  MUFU.EX2 R1, R2 ;",
    "  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;",
    "  USETMAXREG.{} 0xf0 ;",
)


def loop(number: int, *body: str) -> list[str]:
    return [f".L_x_{number}:", *body, f"  @P0 BRA `(.L_x_{number}) ;"]


GOOD = (WGMMA, EXP2, EXP2, EXP2, WGMMA, WAIT)
BAD = (EXP2, EXP2, EXP2, WGMMA, WAIT)


def test_overlap_is_that_of_the_best_loop():
    assert overlap("\n".join(loop(1, *BAD) + loop(2, *GOOD))) == 1.0
    assert overlap("\n".join(loop(1, *BAD))) == 0.0
    assert overlap("\n".join(loop(1, EXP2, WGMMA, EXP2, WAIT))) == 0.5
    assert overlap("") == 1.0


def test_every_role_of_warps_must_overlap():
    """Each consumer has loops of its own, and one that lost its overlap doesn't hide behind the other."""
    consumers = [[ROLE.format("DEALLOC"), *loop(1, *BAD), *loop(2, *GOOD)], [ROLE.format("TRY_ALLOC"), *loop(3, *GOOD)]]
    assert overlap_by_role("\n".join(itertools.chain(*consumers))) == 1.0
    consumers.append([ROLE.format("TRY_ALLOC"), *loop(4, *BAD)])
    assert overlap_by_role("\n".join(itertools.chain(*consumers))) == 0.0
    assert overlap("\n".join(itertools.chain(*consumers))) == 1.0


def ttgir(expected: int = 16384, box: str = "1x64x1x128xbf16", target: str = "1x64x1x128xbf16", copies: int = 1) -> str:
    copy = (
        f"      ttng.async_tma_copy_global_to_local %arg1[%b, %r, %h, %c0] %slot, %bar, %true : "
        f"!tt.tensordesc<tensor<{box}, #shared>>, !ttg.memdesc<1xi64, #shared1, #smem, mutable> -> "
        f"!ttg.memdesc<{target}, #shared, #smem, mutable>\n"
    )
    return (
        "  tt.func public @k(%q_desc: !tt.tensordesc<tensor<1x64x1x128xbf16, #shared>>, %n: i32) {\n"
        f"      ttng.barrier_expect %bar, {expected}, %true : !ttg.memdesc<1xi64, #shared1, #smem, mutable>\n"
        + copy
        * copies
    )


ENCODED = [{"block_size": [1, 64, 1, 64]}]


@pytest.mark.parametrize("descriptors", (ENCODED, None))
def test_bytes_that_agree(descriptors):
    assert tma.mismatches(ttgir(), descriptors) == 0
    assert tma.mismatches(ttgir(expected=2 * 16384, copies=2), descriptors) == 0


@pytest.mark.parametrize(
    ("text", "descriptors"),
    [
        (ttgir(expected=8192), ENCODED),
        (ttgir(copies=2), ENCODED),
        (ttgir(copies=0), ENCODED),
        (ttgir(box="1x32x1x128xbf16", target="1x32x1x128xbf16", expected=8192), ENCODED),  # not an argument's box
        (ttgir(target="1x32x1x128xbf16"), ENCODED),
        (ttgir(), [{"block_size": [1, 128, 1, 64]}]),
        (ttgir(), [{"block_size": [1, 64, 1, 48]}]),
    ],
)
def test_bytes_that_disagree(text, descriptors):
    assert tma.mismatches(text, descriptors) > 0
