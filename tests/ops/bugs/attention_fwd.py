import contextlib
import functools

import torch
from harness.accuracy import check
from harness.mutants import Bug

from pyllm.kernels import OPS


@contextlib.contextmanager
def small(backend, arch):
    """Tiles of 16 in the forward under test, on what it takes for an architecture; sections of one group of heads."""
    space = OPS["attention"].op.impls[backend].fwd.__globals__
    kept = {name: space[name] for name in ("config", "architecture", "L2_SECTION")}
    tile = space["Tile"](16, 16, 4, 2)
    space.update(
        config=lambda *_, **__: tile,
        architecture=lambda _: arch,
        L2_SECTION=kept["L2_SECTION"] if arch < 90 else 3 * 2 * 20 * 16 * 2,
    )
    try:
        yield
    finally:
        space.update(kept)


EDGES = (
    (torch.float16, 90, dict(T=20, S=20, H=8, Hkv=4, D=16, causal=True)),
    (torch.float16, 90, dict(T=18, S=85, H=1, Hkv=1, D=16, causal=True, window=45)),
    (torch.float16, 80, dict(T=18, S=85, H=1, Hkv=1, D=16, causal=True, window=45)),
    (torch.float32, 90, dict(T=34, S=20, H=4, Hkv=2, D=24, causal=True, sinks=True)),
    (torch.float16, 90, dict(lengths=(20, 0, 17), key_lengths=(35, 3, 9), H=2, Hkv=1, D=16, causal=True, softcap=1.5)),
    (torch.float16, 90, dict(T=3, S=100, H=1, Hkv=1, D=16)),
    (torch.float32, 90, dict(T=17, S=64, H=1, Hkv=1, D=16, window=(4, 11))),
)


def at_the_edges(backend):
    spec = OPS["attention"]
    for dtype, arch, case in EDGES:
        inputs = spec.inputs(**case, dtype=dtype, generator=torch.Generator().manual_seed(2)) | dict(return_lse=True)
        with small(backend, arch):
            check(spec, functools.partial(spec.function, backend=backend), inputs, wrt=())
    foreign_nan(backend)
    with small(backend, 90):  # a scale below 0 turns the order of the scores round
        check(spec, functools.partial(spec.function, backend=backend), inputs | dict(softmax_scale=-4.0), wrt=())


def foreign_nan(backend):
    """Rows past the last sequence are NaN, and the values of a sequence's neighbour."""
    q = torch.randn(40, 1, 16, dtype=torch.float16)
    v = q.clone()
    v[20:], q[33:] = float("nan"), float("nan")
    out = torch.full_like(q, 7.0)
    cu = torch.tensor([0, 20, 33], dtype=torch.int32)
    with small(backend, 90):
        out = OPS["attention"].op.impls[backend].fwd(q, q, v, None, cu, cu, 0.25, -1, -1, 0.0)[0]
    assert out[:20].isfinite().all()
    assert out[20:33].isnan().all()
    assert not out[33:].any()


MODULE = "pyllm.kernels.attention.triton_fwd"
TABLE = {"attention": ("attention_fwd", None)}
CASES = {"attention": {}}  # all of them are smaller than a tile
ALSO = {"attention": at_the_edges}
BUGS = [
    Bug("block that the diagonal cuts taken as full", "full_end = tl.maximum(tl.minimum(query + 1 + right, S), 0)", "full_end = tl.maximum(tl.minimum(query + BLOCK_M + right, S), 0)", quick=True),
    Bug("last block that is seen forgotten", "tl.minimum(query + BLOCK_M + right, S)", "tl.minimum(query + right, S)"),
    Bug("left edge forgotten", "end - full_end + full_first - first)", "end - full_end)"),
    Bug("left edge taken as full", "query + BLOCK_M - 1 - left", "query - left"),
    Bug("steady blocks not stepped over", "n -= tl.where(n < full_end, full_end - full_first, 0)", "n -= 0"),
    Bug("keys past the end not masked", "seen = (key < S)[None, :]", "seen = (key < S + BLOCK_N)[None, :]"),
    Bug("values past the end loaded", "v = load_rows(V + end * v_step, v_row, keys, S - end * BLOCK_N,", "v = load_rows(V + end * v_step, v_row, keys, BLOCK_N,"),
    Bug("a cut block alone forgotten", "    if cut:\n", "    if cut & (end > 0):\n"),
    Bug("last steady block's values", "k_first, full_first, v_step", "k_first, full_first + 1, v_step"),
    Bug("next keys are the same again", "k_first, n - 1, k_step", "k_first, n, k_step"),
    Bug("accumulator not rescaled", "                acc *= before[:, None]\n", ""),
    Bug("sum not rescaled", "total * before + tl.sum(p, 1)", "total + tl.sum(p, 1)"),
    Bug("plain loop a block short", "tl.range(full_end - 1, full_first - 1, -1)", "tl.range(full_end - 1, full_first, -1)"),
    Bug("row without keys yet", 'base = tl.where(highest == float("-inf"), 0.0, highest)\n    if SOFTCAP', "base = highest\n    if SOFTCAP"),
    Bug("wrong key-value head", "hkv = h // group", "hkv = h % group", quick=True),
    Bug("lse without the sum", "(m + tl.log2(total)) * LN_2", "m * LN_2"),
    Bug("lse in units of log 2", "(m + tl.log2(total)) * LN_2", "(m + tl.log2(total))"),
    Bug("sink not in the sum", "total = total * before + tl.exp2(sink - base)", "total = total * before"),
    Bug("sink in other units", "tl.load(SINKS + h).to(tl.float32) * LOG2_E", "tl.load(SINKS + h).to(tl.float32)"),
    Bug("first query sits on the first key", "query = at + S - T", "query = at"),
    Bug("scale outside the softcap", "scale / softcap if softcap", "scale if softcap"),
    Bug("first row of no sequence not written", "(rows >= end)) & (rows < total)", "(rows > end)) & (rows < total)"),
    Bug("a tile too few for packed", "T // tile.block_m + max(sequences, 1)", "T // tile.block_m"),
    Bug("lse of a packed head at its sequence's length", "h.to(tl.int64) * total_q + q_start", "h.to(tl.int64) * T + q_start"),
    Bug("last section as wide as all", "wide = tl.minimum(section, heads - begin)", "wide = section"),
    Bug("columns beyond the head stored", "stored = stored & (cols < D)[None, :]", "stored = stored & (cols < BLOCK_D)[None, :]"),
    Bug("scale's sign lost", "q * (-1.0 if scale else 0.0)", "q * (1.0 if scale else 0.0)"),
]  # fmt: skip
