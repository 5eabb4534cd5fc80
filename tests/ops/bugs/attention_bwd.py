import contextlib
import functools
import warnings

import torch
from harness.accuracy import check
from harness.mutants import Bug

from pyllm.kernels import OPS
from pyllm.kernels.attention import eager


@contextlib.contextmanager
def small(backend, parts):
    """Tiles of 16 in the backward under test, after eager's forward; what would be one program is `parts` of them."""
    op = OPS["attention"].op
    before, impl = op.impls, op.impls[backend]
    space = impl.bwd.__globals__
    kept = {name: space[name] for name in ("config", "parts_of")}
    tiles = space["Tiles"](16, 16, 4, 2)
    op.impls = {**before, backend: impl._replace(fwd=eager.EAGER.fwd)}
    space.update(config=lambda *_: (tiles, tiles), parts_of=lambda *_: parts)
    try:
        yield
    finally:
        op.impls = before
        space.update(kept)


EDGES = (
    (torch.float16, 1, dict(B=2, T=37, S=53, H=2, Hkv=1, D=16, causal=True, window=21)),
    (torch.float32, 1, dict(T=34, S=20, H=4, Hkv=2, D=24, causal=True, sinks=True)),
    (torch.float16, 2, dict(lengths=(20, 0, 17), key_lengths=(35, 3, 9), H=2, Hkv=1, D=16, causal=True, softcap=1.5)),
    (torch.float16, 1, dict(lengths=(18, 5), H=1, Hkv=1, D=16, sinks=True)),
    (torch.float32, 1, dict(T=50, S=33, H=1, Hkv=1, D=16, window=(4, 11))),
    (torch.float16, 1, dict(B=2, T=32, S=32, H=2, Hkv=2, D=16)),
)


def at_the_edges(backend):
    spec = OPS["attention"]
    for dtype, parts, case in EDGES:
        inputs = spec.inputs(**case, dtype=dtype, generator=torch.Generator().manual_seed(2)) | dict(return_lse=True)
        with small(backend, parts):
            check(spec, functools.partial(spec.function, backend=backend), inputs)
    far_below_zero(backend)
    foreign_nan(backend)
    far_apart(backend)


def far_below_zero(backend):
    """All scores near -256: a key that isn't there, with a score of 0, would have e^256 as its probability."""
    q, k = 8 + torch.randn(1, 5, 1, 16), torch.randn(1, 20, 1, 16) - 8
    options = (None, None, None, 0.25, -1, -1, 0.0)
    saved = eager.attention_fwd(q, k, k, *options)
    with small(backend, 1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in rows of dk and dv that aren't stored
        grads = OPS["attention"].op.impls[backend].bwd(q, None, q, k, k, *saved, *options)
    assert all(g.isfinite().all() for g in grads)


def foreign_nan(backend):
    """Rows past the last sequence are NaN, and so is a sequence's neighbour."""
    q = torch.randn(40, 1, 16, dtype=torch.float16)
    q[20:] = float("nan")
    cu = torch.tensor([0, 20, 33], dtype=torch.int32)
    with small(backend, 1):
        bwd = OPS["attention"].op.impls[backend].bwd
        options = (None, cu, cu, 0.25, -1, -1, 0.0)
        dq, dk, dv, _ = bwd(q, None, q, q, q, *eager.attention_fwd(q, q, q, *options), *options)
    assert all(g[:20].isfinite().all() for g in (dq, dk, dv))
    assert not any(g[33:].any() for g in (dq, dk, dv))


def far_apart(backend):
    """Batch elements 2^31 elements apart."""
    far = torch.empty((1 << 31) + 64, dtype=torch.float16).as_strided((2, 4, 1, 16), (1 << 31, 16, 16, 1))
    far.copy_(torch.randn(2, 4, 1, 16))
    options = (None, None, None, 0.25, -1, -1, 0.0)
    with small(backend, 1):
        bwd = OPS["attention"].op.impls[backend].bwd
        saved = eager.attention_fwd(far, far, far, *options)
        got, expected = (bwd(x, None, x, x, x, *saved, *options) for x in (far, far.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


MODULE = "pyllm.kernels.attention.triton_bwd"
TABLE = {"attention": (None, "attention_bwd")}
CASES = {"attention": {}}  # all checks are at_the_edges, with small tiles
ALSO = {"attention": at_the_edges}
BUGS = [
    Bug("dlse forgotten", "delta -= tl.load(DLSE", "tl.load(DLSE", quick=True),
    Bug("delta's sign", "tl.store(NEG_DELTA + at, -delta)", "tl.store(NEG_DELTA + at, delta)"),
    Bug("a query that sees nothing has its dlse", "tl.where(seen, delta, 0.0), tl.where(seen, lse, float(\"inf\"))", "delta, lse"),
    Bug("scratch not padded", "tl.store(NEG_LSE + at, -lse * unit)", "tl.store(NEG_LSE + at, -lse * unit, mask=rows < T - row)"),
    Bug("sinks' gradient of the last rows only", "PARTIAL + (tl.cast(b, tl.int64) * tiles + tile) * H + h", "PARTIAL + tl.cast(b, tl.int64) * tiles * H + h"),
    Bug("dsink without the sink", "(tl.load(SINKS + h).to(tl.float32) - lse)", "(0.0 - lse)"),
    Bug("32-bit offsets", "X + tl.cast(b, tl.int64) * stride_b", "X + (b * stride_b).to(tl.int32)"),
    Bug("lse folded in without its scale", "1.0 / scale if fold_lse", "1.0 if fold_lse"),
    Bug("softcap's slope forgotten", "ds *= 1.0 - s * s", "ds *= 1.0"),
    Bug("softcap of the unscaled score", "cap = (softcap * LOG2_E.value, scale / softcap)", "cap = (softcap * LOG2_E.value, 1.0 / softcap)"),
    Bug("keys beyond the sequence are seen", "    if RAGGED:\n        exponent = tl.where(key < keys, exponent, float(\"-inf\"))\n", ""),
    Bug("the bounds don't mask", "if HAS_LEFT or HAS_RIGHT:\n        exponent", "if False:\n        exponent"),
    Bug("dk not scaled", "dk * scale, Hkv", "dk, Hkv"),
    Bug("dq not scaled", "dq * scale, H", "dq, H"),
    Bug("one head of the group", "steps = blocks * GROUP", "steps = blocks"),
    Bug("another group's key-value head", "kv, down = h // GROUP", "kv, down = h % tl.maximum(H // GROUP, 1)"),
    Bug("top-left causal in dk and dv", "    # Query i sits on key i + S - T. The first and the last one that see any of these keys:\n    shift = S - T", "    shift = 0"),
    Bug("top-left causal in dq", "all of them see whole.\n    shift = S - T", "all of them see whole.\n    shift = 0"),
    Bug("a block of queries too few at the window's end", "tl.minimum(n + BLOCK_N, S) - shift + left)", "tl.minimum(n + BLOCK_N, S) - shift + left - 16)"),
    Bug("a block of queries skipped at the start", "begin = tl.maximum(0, n - shift - right)", "begin = tl.maximum(0, n - shift - right + 16)"),
    Bug("an unmasked block at the window's left", "tl.maximum(0, m_last + shift - left), BLOCK_N)", "tl.maximum(0, m + shift - left), BLOCK_N)"),
    Bug("an unmasked block at the diagonal", "tl.maximum(0, m + shift + right + 1) //", "tl.maximum(0, m_last + shift + right + 1) //"),
    Bug("keys right of the last query's missed", "tl.minimum(S, m_last + shift + right + 1))", "tl.minimum(S, m + shift + right + 1))"),
    Bug("the block that is not whole forgotten", "low = tl.maximum(S // BLOCK_N * BLOCK_N, begin)", "low = end"),
    Bug("the next sequence's rows are read", "q_t, across, T - m, D, BLOCK_D, True)\n            do", "q_t, across, T - m, D, BLOCK_D, False)\n            do"),
    Bug("descriptors across batch elements", "within = not packed and (B == 1 or T % m == 0)", "within = True"),
    Bug("rows past the last sequence get no zeros", "_sequence(CU_K, tile, B, BLOCK_N)", "_sequence(CU_K, tile, B - 1, BLOCK_N)"),
    Bug("a tile too few in a packed batch", "rows // block + cu_seqlens.shape[0] + 1", "rows // block + cu_seqlens.shape[0] - 1"),
    Bug("the second part's sums over the first's", "tl.cast(part, tl.int64) * part_stride", "tl.cast(part, tl.int64) * 0"),
    Bug("last part not summed", "mask = (parts < P) & (cols < C)", "mask = (parts < P - 1) & (cols < C)"),
    Bug("only the first sequence's scratch", "(start // PAD + b + 1) * PAD", "start * 0 + PAD"),
    Bug("P rounded away", "dv = tl.dot(p.to(do.dtype), do, dv", "dv = tl.dot((p * 64).to(tl.int32).to(do.dtype) / 64, do, dv"),
]  # fmt: skip
