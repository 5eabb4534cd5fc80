"""The Triton forward of attention under small tiles, so that small inputs have several: every edge, and the laws.

Small tiles are 16 x 16 and 32 x 16; `path` walks both ways to load, by descriptors (as on sm_90) and by pointers.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from harness.accuracy import check
from harness.machines import DEVICE, DTYPES
from torch import Tensor

from pyllm.kernels import OPS, BackendError, attention, triton_support
from pyllm.kernels.attention import reference

if not triton_support.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

from pyllm.kernels.attention import triton_common, triton_fwd

SPEC = OPS["attention"]
# The interpreter takes 40 ms a tile: other dtypes than float32 are `slow` here, test_numerics.py has them as well.
QUICK = [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES if d != torch.float32)]
triton_attention = functools.partial(attention, backend="triton")


@pytest.fixture(params=["descriptors", "pointers"])
def path(request, monkeypatch):
    """Both ways to load, the overlapped steady loop with the first, the plain one with the second; tiles of 16."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_fwd, "architecture", lambda device: 90 if request.param == "descriptors" else 80)
    elif request.param == "pointers":
        monkeypatch.setattr(triton_common, "matrix_stride", lambda x: None)
    tiles(monkeypatch, 16, 16)
    return request.param


def tiles(monkeypatch, block_m: int, block_n: int) -> None:
    monkeypatch.setattr(triton_fwd, "config", lambda *_, **__: triton_fwd.Tile(block_m, block_n, 4, 2))


def inputs_of(dtype=torch.float32, variant="plain", seed=11, **case):
    generator = torch.Generator().manual_seed(seed)
    return SPEC.inputs(**case, dtype=dtype, device=DEVICE, generator=generator, variant=variant)


def judged(inputs) -> float:
    """out and lse against float64."""
    return check(SPEC, triton_attention, {**inputs, "return_lse": True}, wrt=())


@pytest.mark.parametrize("dtype", QUICK, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_grouped_heads(group, dtype, path):
    judged(inputs_of(dtype, B=1, T=13, S=35, H=8, Hkv=8 // group, D=16, causal=True))


# Around the tile, one query, one key, more of either.
LENGTHS = [(15, 15), (16, 16), (17, 17), (31, 33), (33, 31), (1, 40), (40, 1), (5, 70), (70, 5), (48, 64)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_lengths(T, S, causal, path):
    judged(inputs_of(B=1, T=T, S=S, H=1, Hkv=1, D=16, causal=causal))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32), (64, 32)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_every_length_around_the_tile(causal, tile, dtype, path, monkeypatch):
    tiles(monkeypatch, *tile)
    for T, S in itertools.product((1, 15, 17, 32, 33, 65), (1, 16, 31, 33, 64, 70)):
        judged(inputs_of(dtype, B=2, T=T, S=S, H=2, Hkv=2, D=16, causal=causal))


# (left, right) where a bound falls on a tile's edge, beside it, hides all, hides nothing, or cuts whole blocks off.
WINDOWS = [(0, 0), (15, 0), (16, 0), (17, 3), (5, -1), (-1, 4), (3, 20), (31, 31), (100, 0)]


@pytest.mark.parametrize("shape", [(35, 35), (20, 50), (50, 20)], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window, shape, path):
    judged(inputs_of(B=1, T=shape[0], S=shape[1], H=1, Hkv=1, D=16, window=window))


def test_window_edges_with_unequal_tiles(path, monkeypatch):
    for tile in ((32, 16), (16, 32)):
        tiles(monkeypatch, *tile)
        for window in ((7, 0), (33, 5)):
            judged(inputs_of(B=1, T=70, S=90, H=1, Hkv=1, D=16, window=window))


FEATURES = [
    dict(softcap=3.0),
    dict(causal=True, softcap=3.0, sinks=True),
    dict(window=(20, 3), sinks=True),
    dict(causal=True, window=18, softcap=8.0, sinks=True),
]


@pytest.mark.parametrize("dtype", QUICK, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_softcap_and_sinks(features, dtype, path):
    judged(inputs_of(dtype, B=1, T=37, S=50, H=1, Hkv=1, D=32, **features))
    judged(inputs_of(dtype, lengths=(19, 0, 3), key_lengths=(40, 5, 0), H=2, Hkv=1, D=32, **features))


PACKED = [
    dict(lengths=(1, 0, 17, 16, 33, 5)),
    dict(lengths=(0, 0, 3, 0)),
    dict(lengths=(40,), key_lengths=(7,)),
    dict(lengths=(3, 30, 1, 16), key_lengths=(20, 4, 0, 47)),
]


@pytest.mark.parametrize("dtype", QUICK, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.slow), True], ids=["full", "causal"])
@pytest.mark.parametrize("packed", PACKED, ids=str)
def test_packed(packed, causal, dtype, path):
    judged(inputs_of(dtype, H=2, Hkv=1, D=16, causal=causal, **packed))


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_of_no_sequence(sinks, path):
    """Before the first sequence, after the last one, and with no sequence at all: zeros, and -inf or the sink."""
    q, k, v = (torch.randn(36, 1, 16, device=DEVICE) for _ in range(3))
    extra = dict(sinks=torch.randn(1, device=DEVICE)) if sinks else {}
    empty = extra["sinks"][:, None] if sinks else torch.tensor(-math.inf, device=DEVICE)
    for starts in ([0, 5, 22], [19, 19, 30], [17, 36], [36, 36], [0]):
        cu = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        first, last = starts[0], starts[-1]
        for t in (q, k, v):
            t[:first] = t[last:] = math.nan  # whoever touches them shows it
        out, lse = triton_attention(q, k, v, cu_seqlens_q=cu, causal=True, return_lse=True, **extra)
        outside = torch.ones(36, dtype=torch.bool, device=DEVICE)
        outside[first:last] = False
        assert torch.equal(out[outside], torch.zeros_like(out[outside]))
        assert torch.equal(lse[:, outside], empty.expand(1, 36)[:, outside])
        for a, b in itertools.pairwise(starts):
            one, one_lse = triton_attention(
                q[None, a:b], k[None, a:b], v[None, a:b], causal=True, return_lse=True, **extra
            )
            assert torch.equal(out[a:b], one[0])
            assert torch.equal(lse[:, a:b], one_lse[0])
        q, k, v = (t.nan_to_num(0.5) for t in (q, k, v))


def test_packed_equals_separate_to_the_bit(path):
    """Random documents; a window as well, whose edges then fall anywhere."""
    generator = torch.Generator().manual_seed(2)
    for window in (None, (9, 4)):
        lengths = torch.randint(0, 40, (5,), generator=generator).tolist()
        key_lengths = torch.randint(0, 40, (5,), generator=generator).tolist()
        inputs = inputs_of(lengths=tuple(lengths), key_lengths=tuple(key_lengths), H=1, Hkv=1, D=16, window=window)
        out, lse = triton_attention(**inputs, return_lse=True)
        cu_q, cu_k = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()
        for b in range(5):
            rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            one, one_lse = triton_attention(
                inputs["q"][None, rows], inputs["k"][None, keys], inputs["v"][None, keys],
                window=window, return_lse=True,
            )  # fmt: skip
            assert torch.equal(out[rows], one[0])
            assert torch.equal(lse[:, rows], one_lse[0])


@pytest.mark.filterwarnings("ignore:All-NaN|invalid value")  # numpy about the neighbours themselves
@pytest.mark.parametrize("packed", [False, True])
def test_neighbours_do_not_leak(packed, path):
    """A descriptor's box reaches into the next sequence, whose NaN must not come through, not even times 0."""
    q, k, v = (torch.randn(3, 21, h, 16, device=DEVICE) for h in (2, 1, 1))
    expected = triton_attention(q[1:2], k[1:2], v[1:2])
    for t in (q, k, v):
        t[0] = t[2] = math.nan
    if packed:
        cu = torch.tensor([0, 21, 42, 63], dtype=torch.int32, device=DEVICE)
        got = triton_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=cu)[21:42]
    else:
        got = triton_attention(q, k, v)[1]
    assert torch.equal(got, expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("D", [1, 8, 24, 80, 96, 160, 256])
def test_head_dims(D, dtype, path):
    judged(inputs_of(dtype, B=1, T=18, S=18, H=2, Hkv=1, D=D, causal=True))


SIZES = [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (1, 1, 1, 1), (2, 1, 1, 1), (3, 1, 2, 1)]


@pytest.mark.parametrize(("B", "T", "S", "H"), SIZES)
def test_any_size(B, T, S, H, path):
    judged(inputs_of(B=B, T=T, S=S, H=H, Hkv=1, D=16, causal=True))
    judged(inputs_of(torch.float16, B=B, T=T, S=S, H=H, Hkv=1, D=16, sinks=True))


def test_scale_of_any_sign(path):
    inputs = inputs_of(B=1, T=8, S=33, H=1, Hkv=1, D=16)
    for softmax_scale, softcap in ((-0.3, 0.0), (0.0, 0.0), (3.0, 0.0), (-0.3, 2.0)):
        judged({**inputs, "softmax_scale": softmax_scale, "softcap": softcap})


def test_no_copy_of_what_has_a_dense_last_dimension(path, monkeypatch):
    """Head-major, expanded, sliced from one projection, padded: read where they lie."""
    B, T, H, D = 2, 17, 2, 16
    how = dict(dtype=torch.float16, device=DEVICE)
    q = torch.randn(B, H, T, D, **how).transpose(1, 2)
    k = torch.randn(B, 1, H, D, **how).expand(B, T, H, D)
    projected = torch.randn(B, T, 3, H, D, **how)
    padded = torch.full((B, T, H, D + 3), math.nan, **how)[..., :D]
    padded.copy_(projected[:, :, 0])
    for given in ((q, k, padded), tuple(projected.unbind(2)), (padded, q, k)):
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied"))
            got = triton_attention(*given, causal=True)
        torch.testing.assert_close(got, attention(*given, causal=True, backend="eager"), rtol=2e-3, atol=2e-3)


def test_descriptors_wherever_they_can_be():
    shape = (2, 5, 3, 16)
    dense = torch.randn(shape, dtype=torch.float16)
    assert triton_common.matrix_stride(dense) == 48
    assert triton_common.matrix_stride(dense[1]) == 48
    projected = torch.randn(2, 5, 3, 3, 16, dtype=torch.float16)
    assert triton_common.matrix_stride(projected[:, :, 1]) == 144
    assert triton_common.matrix_stride(dense[:, :1]) == 240  # T = 1: rows are one batch stride apart
    assert triton_common.matrix_stride(dense[:1, :1]) == 48
    for unfit in (
        dense.transpose(1, 2),  # heads aren't side by side
        dense[:, :4],  # a gap between batches
        dense.flatten()[1:][:240].view(1, 5, 3, 16),  # misaligned
        torch.randn(2, 5, 3, 20, dtype=torch.float16)[..., :16],
        dense[:1].expand(2, 5, 3, 16),
        dense[:0],
    ):
        assert triton_common.matrix_stride(unfit) is None


def test_any_order_of_sections(path, monkeypatch):
    """Heads in sections of one group, of two, and all together: the same bits, every tile computed once."""
    inputs = inputs_of(B=2, T=20, S=20, H=4, Hkv=2, D=16, causal=True)
    expected = triton_attention(**inputs)
    for groups in (0, 3):  # of 4: one at a time, and a last section that isn't full
        monkeypatch.setattr(triton_fwd, "L2_SECTION", groups * 2 * 20 * 16 * 4)
        assert torch.equal(triton_attention(**inputs), expected)


def test_grouped_heads_equal_repeated_ones_to_the_bit(path):
    inputs = inputs_of(torch.float16, B=1, T=17, S=20, H=4, Hkv=2, D=16, causal=True)
    repeated = {n: inputs[n].repeat_interleave(2, 2) for n in ("k", "v")}
    assert torch.equal(triton_attention(**inputs), triton_attention(**{**inputs, **repeated}))


def test_the_future_does_not_matter(path):
    inputs = inputs_of(B=1, T=40, S=50, H=1, Hkv=1, D=16, causal=True)
    out = triton_attention(**inputs)
    for t in (0, 15, 25):
        changed = {n: inputs[n].clone() for n in ("k", "v")}
        for x in changed.values():
            x[:, t + 11 :] = 100.0
        assert torch.equal(triton_attention(**{**inputs, **changed})[:, : t + 1], out[:, : t + 1])


def test_the_order_of_keys_does_not_matter(path):
    inputs = inputs_of(B=1, T=20, S=50, H=2, Hkv=1, D=16, sinks=True)
    order = torch.randperm(50, device=DEVICE)
    shuffled = {n: inputs[n][:, order] for n in ("k", "v")}
    torch.testing.assert_close(triton_attention(**{**inputs, **shuffled}), triton_attention(**inputs))


def test_bounds_that_hide_nothing_are_dropped():
    for T, S in itertools.product((1, 2, 5), (1, 3, 6)):
        for left, right in itertools.product(range(-1, 8), repeat=2):
            clamped = triton_common.clamped_bounds(left, right, T, S)
            where = reference.positions(T, S, None, None, torch.device("cpu"))
            masks = [reference.visible(*where, *bounds) for bounds in ((left, right), clamped)]
            full = torch.ones(T, S, dtype=torch.bool)
            assert torch.equal(*(full if m is None else m for m in masks))
    assert triton_common.clamped_bounds(10**12, 10**12, 100, 100) == (-1, -1)


def test_large_scores_of_many_blocks(path):
    """A running maximum that doesn't rise changes nothing: its factor is 1 exactly, block after block."""
    q = torch.full((1, 1, 1, 16), 7.3, device=DEVICE)
    k = torch.full((1, 400, 1, 16), 5.1, device=DEVICE)
    v = torch.arange(400.0, device=DEVICE)[None, :, None, None].expand(1, 400, 1, 16)
    torch.testing.assert_close(
        triton_attention(q, k, v), torch.full((1, 1, 1, 16), 199.5, device=DEVICE), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("T", [1, 40])
def test_compiles_into_one_graph(T):
    torch._dynamo.reset()
    inputs = inputs_of(B=1, T=T, S=40, H=1, Hkv=1, D=16, causal=True, window=9)
    compiled = torch.compile(triton_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(**inputs), triton_attention(**inputs))


def test_refusals_say_why():
    for D, dtype, reason in (
        (257, torch.float16, "head_dim 257"),
        (0, torch.float16, "head_dim 0"),
        (16, torch.float64, "float64"),
    ):
        q = torch.zeros(1, 2, 2, D, dtype=dtype, device=DEVICE)
        with pytest.raises(BackendError, match=reason):
            triton_attention(q, q, q)


def test_small_grids_get_small_tiles():
    """Every tile of the table fits what it is for; few queries or heads get the smaller ones."""
    for arch, D, size in itertools.product((0, 80, 86, 90, 100, 120), (16, 64, 80, 128, 256), (2, 4)):
        how = dict(descriptors=size == 2 and arch in (90, 100) and D != 80)
        large, small = (triton_fwd.config(arch, D, size, small=s, **how) for s in (False, True))
        assert small.block_m <= large.block_m
        for tile in (large, small):
            assert all(n >= 16 and n & (n - 1) == 0 for n in tile[:2])
