import functools

import torch
from harness.accuracy import check
from harness.layouts import far_apart
from harness.mutants import Bug

from pyllm.kernels import OPS, attention_decode
from pyllm.kernels.attention.reference import decode_inputs

SPEC = OPS["attention_decode"]
CACHES = ("k_cache", "v_cache")


def inputs(**case):
    case = dict(B=2, T=1, S=150, H=4, Hkv=2, D=16) | case
    return decode_inputs(**case, dtype=torch.float16, generator=torch.Generator().manual_seed(5))


def fenced(backend, **given):
    """What the launcher allocates starts as NaN, between fences that must stand."""
    new_empty, fences = torch.Tensor.new_empty, []

    def allocate(x, size, dtype=None, **others):
        if others:  # Triton's interpreter
            return new_empty(x, size, dtype=dtype, **others)
        buffer = torch.full((torch.Size(size).numel() + 2048,), 7.0, dtype=dtype or x.dtype)
        fences.append(buffer)
        return buffer[1024:-1024].fill_(float("nan")).view(size)

    torch.Tensor.new_empty = allocate
    try:
        out = attention_decode(**given, backend=backend)
    finally:
        torch.Tensor.new_empty = new_empty
    for buffer in fences:
        assert bool((torch.cat((buffer[:1024], buffer[-1024:])) == 7).all()), "written outside of a result"
    return out


def forced_splits(backend):
    """More splits than tiles of keys, and than the merge takes at once."""
    launcher = SPEC.op.impls[backend].fwd.__globals__
    before = launcher["split_count"]
    try:
        for splits, case in (
            (1, dict(B=3, T=3, window=70, S=135, H=2, empty=True)),
            (2, dict(T=3, window=70, S=140, softcap=4.0)),
            (7, dict(B=3, T=2, block_size=16, empty=True)),
            (20, dict(S=1300, H=1, Hkv=1)),
        ):
            launcher["split_count"] = lambda *_, splits=splits: splits
            check(SPEC, functools.partial(fenced, backend), inputs(**case))
    finally:
        launcher["split_count"] = before


def callers_bugs(backend):
    """Lengths beyond the cache, and blocks that it doesn't have, read nothing out of bounds."""
    given = inputs(S=100)
    given["cache_seqlens"] += 7
    check(SPEC, functools.partial(attention_decode, backend=backend), given)
    given = inputs(block_size=16, S=40)
    last = given["k_cache"].shape[0] - 1
    given["k_cache"][last] = given["v_cache"][last] = 1.0
    given["block_table"][0, 1] = last
    expected = attention_decode(**given, backend=backend)
    given["block_table"][0, 1] = last + 1
    assert torch.equal(attention_decode(**given, backend=backend), expected)


def far(backend):
    for block_size, dim in ((None, 0), (None, 1), (16, 0), (16, 1)):
        given = inputs(B=3, S=70, block_size=block_size)
        given |= {name: far_apart(given[name], dim) for name in CACHES}
        check(SPEC, functools.partial(attention_decode, backend=backend), given)


def also(backend):
    forced_splits(backend)
    callers_bugs(backend)
    far(backend)


MODULE = "pyllm.kernels.attention.triton_decode"
TABLE = {"attention_decode": ("attention_decode_fwd", None)}
DTYPES = (torch.float32,)
ALSO = {"attention_decode": also}
BUGS = [
    Bug("keys beyond the length", "seen = (cols >= lo) & (cols < end)", "seen = (cols >= lo) & (cols < S)", quick=True),
    Bug("new tokens see later ones", "keep = seen[None, :] & (cols[None, :] <= query[:, None])", "keep = seen[None, :] & (query[:, None] > -9999)"),
    Bug("window a key short", "(cols[None, :] >= query[:, None] - left)", "(cols[None, :] > query[:, None] - left)"),
    Bug("window starts at the last row's", "n - T + first_row // GROUP - left", "n - T + last_row // GROUP - left"),
    Bug("keys end at the first row's", "n - T + last_row // GROUP + 1, S)", "n - T + first_row // GROUP + 1, S)"),
    Bug("lengths not cut", "tl.minimum(n - T + last_row // GROUP + 1, S)", "n - T + last_row // GROUP + 1"),
    Bug("heads of a group far apart", "(hk * GROUP + rows % GROUP) * q_stride_h", "(rows % GROUP * Hkv + hk) * q_stride_h"),
    Bug("heads before tokens in the output", "h = hk * GROUP + rows % GROUP", "h = hk * GROUP + rows // T"),
    Bug("sum not rescaled", "total = total * alpha + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
    Bug("output not rescaled", "acc * alpha[:, None], input", "acc, input"),
    Bug("maximum forgotten between tiles", "m_new = tl.maximum(m, tl.max(s, 1))", "m_new = tl.maximum(LOWEST, tl.max(s, 1))"),
    Bug("rows without a key are NaN", "m = tl.full([BLOCK_M], LOWEST, tl.float32)", 'm = tl.full([BLOCK_M], float("-inf"), tl.float32)'),
    Bug("tanh forgotten", "s = cap * tanh(s)", "s = cap * s"),
    Bug("softmax's scale forgotten", 'input_precision="ieee") * scale', 'input_precision="ieee")'),
    Bug("block by tile", "start // PAGE", "start // BLOCK_N"),
    Bug("blocks of the first sequence", "TABLE + b * table_stride + cols", "TABLE + 0 * table_stride + cols"),
    Bug("key of the block forgotten", "(cols % PAGE).to(tl.int64)", "cols.to(tl.int64)"),
    Bug("blocks not checked", "block = tl.maximum(tl.minimum(block, n_blocks - 1), 0)", "block = tl.maximum(block, 0)"),
    Bug("32-bit keys", "return b, cols.to(tl.int64)", "return b, cols"),
    Bug("32-bit blocks", "return block.to(tl.int64)", "return block"),
    Bug("32-bit sequences", "head = (program // splits // tiles).to(tl.int64)", "head = program // splits // tiles"),
    Bug("shares rounded down", "share = tl.cdiv(tl.maximum(tl.cdiv(hi, BLOCK_N) - first, 0), splits)", "share = tl.maximum(tl.cdiv(hi, BLOCK_N) - first, 0) // splits"),
    Bug("splits overlap", "end = tl.minimum(begin + share * BLOCK_N, hi)", "end = tl.minimum(begin + (share + 1) * BLOCK_N, hi)"),
    Bug("padding of q is read", "q_mask = live[:, None] & (d < D)[None, :]", "q_mask = live[:, None] & (d < BLOCK_D)[None, :]"),
    Bug("padding of keys is read", "if D < BLOCK_D:", "if D < 0:"),
    Bug("rows that aren't there are written", "live = rows < T * GROUP", "live = rows < T * GROUP + 1"),
    Bug("natural logarithm", "m + tl.log2(total)", "m + tl.log(total)"),
    Bug("empty splits leave no mark", 'tl.where(some, m + tl.log2(total), float("-inf")), mask=live)', 'm + tl.log2(total), mask=live & some)'),
    Bug("splits not weighted", "part * weight[:, None]", "part"),
    Bug("what empty splits left is read", "mask = (weight > 0)[:, None] & (d < D)[None, :]", "mask = (s < splits)[:, None] & (d < D)[None, :]"),
    Bug("sixteen splits merged", "total += weight", "total = weight"),
    Bug("merged rows of the wrong head", "* T + t) * Hkv + head % Hkv)", "* T + t) * Hkv + Hkv - 1 - head % Hkv)"),
    Bug("a tile of rows too few", "tiles = triton.cdiv(rows, block_m)", "tiles = max(1, rows // block_m)"),
]  # fmt: skip
