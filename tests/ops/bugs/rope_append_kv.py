import torch
from harness.layouts import far_apart
from harness.mutants import Bug

from pyllm.kernels import OPS
from pyllm.kernels.rope.append_reference import append_inputs

SPEC = OPS["rope_append_kv"]
CACHES = ("k_cache", "v_cache")


def inputs(**case):
    case = dict(B=3, T=3, S=8, H=4, Hkv=2, D=16) | case
    return append_inputs(**case, dtype=torch.float32, generator=torch.Generator().manual_seed(5))


def nothing_else_is_written(backend):
    """Tokens that have no place, and blocks that aren't there, leave the caches alone."""
    for block_size in (None, 4):
        given = inputs(block_size=block_size)
        given["cache_seqlens"] = torch.tensor([9, 30, -4])
        compare(given, backend)
    for block in (-1, given["k_cache"].shape[0]):
        given = inputs(block_size=4)
        given["block_table"][:] = block
        untouched = given["k_cache"].clone()
        got = SPEC.function(**given, backend=backend)[1]
        assert torch.equal(got.nan_to_num(), untouched.nan_to_num())
    for dim in (0, 1):
        given = inputs()
        compare(given | {name: far_apart(given[name], dim) for name in CACHES}, backend)


def compare(given, backend):
    for got, truth in zip(SPEC.function(**given, backend=backend), SPEC.eager(**given), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6, equal_nan=True)


MODULE = "pyllm.kernels.rope.triton_append"
TABLE = {"rope_append_kv": ("rope_append_kv_fwd", None)}
ALSO = {"rope_append_kv": nothing_else_is_written}
BUGS = [
    Bug("one place too far", ".to(tl.int64) - T + t", ".to(tl.int64) - T + t + 1", quick=True),
    Bug("lengths without the new tokens", ".to(tl.int64) - T + t", ".to(tl.int64) + t"),
    Bug("negative places", "placed = (position >= 0) & (position < capacity)", "placed = position < capacity"),
    Bug("places beyond the cache", "placed = (position >= 0) & (position < capacity)", "placed = position >= 0"),
    Bug("half of v", "mask, D, BLOCK_D,", "mask, HALF, BLOCK_D,"),
    Bug("the rest isn't copied", "if 2 * HALF < D:", "if 2 * HALF > D:"),
    Bug("turned the other way", "x1 * cos - x2 * sin", "x1 * cos + x2 * sin"),
    Bug("angles outside the tables", "row = tl.maximum(tl.minimum(position, table_rows - 1), 0)", "row = position"),
    Bug("angles of the token, not its position", "row = tl.maximum(tl.minimum(position, table_rows - 1), 0)", "row = t"),
    Bug("blocks of the first sequence", "TABLE + b * table_stride", "TABLE + 0 * table_stride"),
    Bug("place of the block forgotten", "minor = position % PAGE", "minor = position"),
    Bug("blocks not checked", "placed = placed & (major >= 0) & (major < n_blocks)", "placed = placed"),
    Bug("heads that aren't there", "mask = (h < HKV) & placed", "mask = (h < HKV + 1) & placed"),
    Bug("every part the first heads", "h = (part * BLOCK_H + ", "h = (0 * part + "),
    Bug("columns that aren't there", "inside = mask & (i < HALF)", "inside = mask & (i < BLOCK_HALF)"),
    Bug("k where v belongs", "V_CACHE + (major", "K_CACHE + (major"),
    Bug("32-bit sequences", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)"),
]  # fmt: skip
