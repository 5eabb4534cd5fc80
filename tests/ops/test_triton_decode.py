"""Decoding attention in Triton: splits, tiles of rows, paged caches, and what its launcher may know."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from harness.accuracy import check
from harness.layouts import far_apart
from harness.machines import DEVICE, DTYPES

from pyllm.kernels import OPS, attention_decode, triton_support
from pyllm.kernels.attention import reference

if not triton_support.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

from pyllm.kernels.attention import triton_decode

SPEC = OPS["attention_decode"]
decode = functools.partial(attention_decode, backend="triton")


def inputs(seed: int = 5, dtype: torch.dtype = torch.float16, **case) -> dict:
    case = dict(B=2, T=1, S=150, H=4, Hkv=2, D=16) | case
    return reference.decode_inputs(**case, dtype=dtype, device=DEVICE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def force(monkeypatch):
    """force(n): every launch has n splits."""
    return lambda n: monkeypatch.setattr(triton_decode, "split_count", lambda *_: n)


# Each option with each number of splits; 7 splits of three tiles of keys leave some without any.
OPTIONS = {
    "mha": dict(H=2, Hkv=2),
    "group 2": dict(H=4, Hkv=2, T=3),
    "group 4": dict(H=4, Hkv=1, empty=True, B=3),
    "group 8": dict(H=8, Hkv=1, D=24),
    "group 3": dict(H=6, Hkv=2, T=7),
    "window 1": dict(window=1),
    "window over a tile's edge": dict(window=70, T=3, S=135, B=3, empty=True),
    "softcap": dict(softcap=4.0, window=100),
    "blocks of 64": dict(block_size=64, T=2, B=3, empty=True),
    "blocks of 16": dict(block_size=16, softcap=9.0),
    "blocks of 3": dict(block_size=3, window=80, T=2),
    "blocks of 1000": dict(block_size=1000),
    "two tiles of rows": dict(T=17, H=4, Hkv=1, S=70, B=1),
    "more tokens than keys": dict(T=20, S=12, window=5, B=1),
}


@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("option", OPTIONS)
def test_splits(option, splits, force):
    force(splits)
    check(SPEC, decode, inputs(**OPTIONS[option]))


@pytest.mark.parametrize("D", [1, 16, 40, 96, 128, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(D, dtype, force):
    force(2)
    check(SPEC, decode, inputs(D=D, dtype=dtype, S=70, H=2, Hkv=1))


def test_head_dims_beyond_a_program_are_refused():
    given = inputs(D=257, S=3)
    assert SPEC.op.why_not("triton", *(given.get(n) for n in ("q", "k_cache", "v_cache"))) == [
        "head_dim is 257: up to 256 fit a program"
    ]


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_paged_equals_contiguous(backend, block_size):
    """Not a bit differs: the same keys in the same order, wherever they lie."""
    given = inputs(B=3, T=2, S=130, window=75, empty=True)
    expected = attention_decode(**given, backend=backend)
    for name in ("k_cache", "v_cache"):
        given[name], given["block_table"] = reference.paged(given[name], given["cache_seqlens"].cpu(), block_size)
    assert torch.equal(attention_decode(**given, backend=backend), expected)


def test_blocks_before_the_window_may_be_freed():
    given = inputs(T=2, S=150, window=20, block_size=8)
    expected = decode(**given)
    for b, n in enumerate(given["cache_seqlens"].tolist()):
        passed = max(0, n - 1 - 20) // 8
        given["k_cache"][given["block_table"][b, :passed].long()] = float("nan")
        given["v_cache"][given["block_table"][b, :passed].long()] = float("nan")
        given["block_table"][b, :passed] = -1
    assert torch.equal(decode(**given), expected)


def test_what_lies_beyond_the_lengths_may_be_anything():
    given = inputs(B=3, T=2, S=100, empty=True)
    expected = {backend: attention_decode(**given, backend=backend) for backend in ("triton", "eager")}
    for b, n in enumerate(given["cache_seqlens"].tolist()):
        given["k_cache"][b, n:] = float("nan")
        given["v_cache"][b, n:] = float("nan")
    for backend, out in expected.items():
        assert torch.equal(attention_decode(**given, backend=backend), out), backend


def test_a_block_that_does_not_exist_is_not_read():
    given = inputs(block_size=16, S=40)
    last = given["k_cache"].shape[0] - 1
    given["k_cache"][last] = given["v_cache"][last] = 1.0
    given["block_table"][0, 1] = last
    expected = decode(**given)
    given["block_table"][0, 1] = 1_000_000
    assert torch.equal(decode(**given), expected)


@pytest.mark.parametrize("splits", [1, 3])
def test_lengths_beyond_the_cache_are_cut(splits, force):
    force(splits)
    given = inputs(T=3, S=100)
    given["cache_seqlens"] = given["cache_seqlens"].long() + 7
    check(SPEC, decode, given)


def test_lengths_and_tables_may_lie_anyhow():
    given = inputs(B=3, block_size=8, S=60)
    laid = dict(given)
    laid["cache_seqlens"] = given["cache_seqlens"].long().repeat_interleave(2)[::2]
    laid["block_table"] = given["block_table"].t().contiguous().t()
    assert torch.equal(decode(**laid), decode(**given))


@pytest.mark.parametrize("splits", [1, 4])
def test_batch_mates_do_not_matter(splits, force):
    force(splits)
    given, other = inputs(seed=1, B=3, T=2), inputs(seed=2, B=3, T=2)
    mixed = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in other.items()}
    for name in ("q", "k_cache", "v_cache", "cache_seqlens"):
        mixed[name][1] = given[name][1]
    assert torch.equal(decode(**mixed)[1], decode(**given)[1])


def test_many_tokens_equal_one_at_a_time():
    given = inputs(T=3, S=90, dtype=torch.float32)
    whole = decode(**given)
    for t in range(3):
        step = {**given, "q": given["q"][:, t : t + 1], "cache_seqlens": given["cache_seqlens"] - 2 + t}
        torch.testing.assert_close(decode(**step), whole[:, t : t + 1], rtol=1e-5, atol=1e-6)


def test_nothing_to_attend_gives_zeros():
    for S, block_size in ((0, None), (5, None), (5, 4)):
        given = inputs(B=2, T=3, S=max(S, 1), block_size=block_size)
        given["cache_seqlens"] = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        if S == 0:
            given["k_cache"], given["v_cache"] = given["k_cache"][:, :0], given["v_cache"][:, :0]
        out = decode(**given)
        assert torch.equal(out, torch.zeros_like(out))
    for empty in (dict(B=0), dict(T=0)):
        given = inputs(**{**dict(B=2, T=1, S=4), **empty})
        assert decode(**given).shape == given["q"].shape
    given = inputs(block_size=4, S=8)
    given["k_cache"], given["v_cache"] = given["k_cache"][:0], given["v_cache"][:0]  # a cache without any block
    assert not decode(**given).any()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("block_size", [None, 16])
def test_offsets_beyond_32_bits(block_size, dim, force):
    force(2)
    given = inputs(B=3, S=70, H=2, Hkv=1, block_size=block_size)
    check(SPEC, decode, {**given, **{name: far_apart(given[name], dim) for name in ("k_cache", "v_cache")}})


class Launches:
    """Stands in for the kernels: what they would have been launched with."""

    def __init__(self, monkeypatch):
        self.seen: list[tuple] = []
        for name in ("_attention_decode_kernel", "_merge_splits_kernel"):
            monkeypatch.setattr(triton_decode, name, self)

    def __getitem__(self, grid):
        return lambda *args, **options: self.seen.append((grid, *(a for a in args if isinstance(a, (int, float)))))


def test_the_grid_comes_of_shapes_alone(monkeypatch):
    """On meta tensors whoever asks for a length fails. One launch where a split is enough, two otherwise."""
    launches = Launches(monkeypatch)
    for S, expected in ((200, 1), (4096, 2)):
        q, cache = torch.empty(1, 1, 8, 64, device="meta"), torch.empty(1, S, 2, 64, device="meta")
        launches.seen.clear()
        lengths = torch.empty(1, dtype=torch.int32, device="meta")
        triton_decode.attention_decode_fwd(q, cache, cache, lengths, None, 0.1, -1, 0.0)
        assert len(launches.seen) == expected


def test_split_count():
    count = triton_decode.split_count
    assert count(256, 64, 4, 132) == 1  # two programs for each multiprocessor, nearly
    assert count(64, 64, 4, 132) == 4  # one wave of 256 programs, 16 tiles each; nothing is faster
    assert count(8, 64, 4, 132) == 16  # as many as may be: 4 tiles each
    assert count(1, 3, 4, 132) == 1  # too few keys to share
    for programs, tiles, least, processors in itertools.product((1, 5, 40, 300), (0, 1, 9, 1000), (1, 4), (1, 3, 132)):
        splits = count(programs, tiles, least, processors)
        assert splits == 1 or tiles // splits >= least


def test_config_covers_every_head_dim_and_number_of_rows():
    for rows, D, size, paged, amd in itertools.product((1, 5, 64, 999), (1, 16, 80, 256), (2, 4), (0, 1), (0, 1)):
        block_m, block_n, block_d, warps, stages = triton_decode.config(rows, D, size, bool(paged), bool(amd))
        assert block_d >= D
        assert min(block_m, block_n, block_d) >= 16
        assert warps in (4, 8)
        assert 2 <= stages <= 5


def test_cost_by_hand():
    given = inputs(B=2, T=1, S=40, H=4, Hkv=2, D=32)
    given["cache_seqlens"] = torch.tensor([40, 7], dtype=torch.int32)
    # 47 keys and values of 2 heads, q and out of 4 heads for 2 tokens; in 2 bytes
    assert SPEC.cost(given, False) == (2 * 47 * 2 * 32 * 2 + 2 * 2 * 4 * 32 * 2, 4 * 32 * 4 * 47)
    given = inputs(B=1, T=2, S=100, H=2, Hkv=1, D=16, window=10, block_size=16)
    # keys 89 to 99, of which each token sees 10, in blocks 5 and 6
    assert SPEC.cost(given, False) == (2 * 11 * 16 * 2 + 2 * 2 * 2 * 16 * 2 + 2 * 4, 4 * 16 * 2 * 20)
