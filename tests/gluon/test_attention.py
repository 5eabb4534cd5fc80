"""Attention's Gluon forward on the CPU model: right against float64 in every order of events, and bugs are noticed."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.accuracy import check
from harness.mutants import Bug, in_a_process

from gluon import language
from gluon.bugs import BUGS
from pyllm.kernels import OPS
from pyllm.kernels.attention import gluon_choice, reference

SOURCE = Path(gluon_choice.__file__).with_name("gluon_fwd.py")
PACKAGE = "pyllm.kernels.attention"
SPEC = OPS["attention"]
POLICIES = ("late", "early", 1, 2)
# (BLOCK_M, BLOCK_N, STAGES): the ring may be one slot deep; tiles are small, so that few rows make many of them.
TILES = {"32x16 ring 2": (32, 16, 2), "32x16 ring 1": (32, 16, 1), "16x32 ring 3": (16, 32, 3)}
CASES: dict[str, dict[str, Any]] = {
    "mha-2x48": dict(B=2, T=48, S=48, H=2, Hkv=2, D=64),
    "gqa-causal-2x70": dict(B=2, T=70, S=70, H=4, Hkv=2, D=64, causal=True),
    "mqa-causal-33": dict(B=1, T=33, S=33, H=3, Hkv=1, D=64, causal=True),
    "D128-causal-65": dict(B=1, T=65, S=65, H=2, Hkv=1, D=128, causal=True),
    "T5-S70": dict(B=2, T=5, S=70, H=2, Hkv=1, D=64),
    "causal-T37-S90": dict(B=1, T=37, S=90, H=2, Hkv=2, D=64, causal=True),
    "causal-T90-S37-empty-rows": dict(B=2, T=90, S=37, H=2, Hkv=1, D=64, causal=True),
    "causal-T1-S1": dict(B=1, T=1, S=1, H=2, Hkv=1, D=64, causal=True),
    "packed-causal": dict(lengths=(5, 0, 64, 1, 33), H=4, Hkv=2, D=64, causal=True),
    "packed-T-S": dict(lengths=(3, 40, 9, 1), key_lengths=(50, 4, 0, 17), H=2, Hkv=1, D=64, causal=True),
    "packed-full": dict(lengths=(31, 32, 2), key_lengths=(20, 0, 33), H=2, Hkv=2, D=64),
}
EVERYTHING = [
    # Fast: every case once, every ring and every order among them.
    pytest.param(case, tiles, policy, id=f"{case}-{tiles}-{policy}", marks=[] if fast else [pytest.mark.slow])
    for i, case in enumerate(CASES)
    for j, (tiles, policy) in enumerate(itertools.product(TILES, POLICIES))
    for fast in (j == 5 * i % 12,)
]


def forward(module: Any, tiles: tuple[int, int, int], policy: str | int, **inputs: Any) -> Any:
    """The launcher on CPU tensors. Three groups of heads make a section, so that the last one is not full."""
    module.config = lambda D: tiles
    language.POLICY[0] = policy
    q = inputs["q"]
    module.L2_SECTION = 3 * 4 * inputs["k"].shape[-3] * q.shape[-1]
    cu_q, cu_k = inputs.get("cu_seqlens_q"), inputs.get("cu_seqlens_k")
    scale = reference.scale_of(inputs.get("softmax_scale"), q)
    return module.attention_fwd_gluon(q, inputs["k"], inputs["v"], cu_q, cu_k, scale, inputs["causal"])


def inputs_of(case: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)
    return dict(reference.attention_inputs(**CASES[case], dtype=dtype, generator=generator), return_lse=True)


def judge(module: Any, case: str, tiles: tuple[int, int, int], policy: str | int, **how: Any) -> float:
    return check(SPEC, functools.partial(forward, module, tiles, policy), inputs_of(case, **how), wrt=())


@pytest.fixture(scope="module")
def kernel() -> Any:
    return language.load(SOURCE, PACKAGE)


@pytest.mark.parametrize(("case", "tiles", "policy"), EVERYTHING)
def test_right_in_every_order_of_events(kernel, case, tiles, policy):
    judge(kernel, case, TILES[tiles], policy)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("D", gluon_choice.HEAD_DIMS)
def test_right_with_the_tiles_it_is_launched_with(D, dtype):
    kernel = language.load(SOURCE, PACKAGE)
    inputs = reference.attention_inputs(2, 1, D, T=300, S=420, B=1, causal=True, dtype=dtype,
                                        generator=torch.Generator().manual_seed(3))  # fmt: skip
    check(SPEC, functools.partial(forward, kernel, kernel.config(D), 5), dict(inputs, return_lse=True), wrt=())


@pytest.mark.parametrize("variant", ("small", "offset", "correlated"))
def test_right_for_other_inputs(kernel, variant):
    generator = torch.Generator().manual_seed(5)
    case = CASES["gqa-causal-2x70"]
    inputs = reference.attention_inputs(**case, dtype=torch.float16, generator=generator, variant=variant)
    check(SPEC, functools.partial(forward, kernel, (32, 16, 2), "late"), dict(inputs, return_lse=True), wrt=())


def test_rows_behind_the_last_sequence(kernel):
    """They may hold anything, and get zeros and lse -inf; the sequences don't notice."""
    inputs = inputs_of("packed-causal")
    expected, expected_lse = forward(kernel, (32, 16, 2), "late", **inputs)
    n = expected.shape[0]
    for extra in (1, 31, 70):
        grown = {x: torch.cat([inputs[x], torch.full_like(inputs[x][:1], float("nan")).expand(extra, -1, -1)])
                 for x in "qkv"}  # fmt: skip
        out, lse = forward(kernel, (32, 16, 2), 3, **{**inputs, **grown})
        assert torch.equal(out[:n], expected) and torch.equal(lse[:, :n], expected_lse)
        assert (out[n:] == 0).all() and (lse[:, n:] == -float("inf")).all()
    nothing = torch.zeros(1, dtype=torch.int32)
    out, lse = forward(kernel, (32, 16, 2), 3, **{**inputs, "cu_seqlens_q": nothing, "cu_seqlens_k": nothing})
    assert (out == 0).all() and (lse == -float("inf")).all()


def test_nothing_crosses_a_batch(kernel):
    """A block that reaches before the first key finds zeros there, not the batch before with its NaN."""
    inputs = inputs_of("gqa-causal-2x70")
    expected, _ = forward(kernel, (32, 16, 2), "late", **inputs)
    inputs["v"][0] = float("nan")
    out, _ = forward(kernel, (32, 16, 2), "late", **inputs)
    assert torch.equal(out[1], expected[1])


def test_strides(kernel):
    """Rows, heads and batches of any pitch; the same bits as from dense tensors."""
    inputs = inputs_of("gqa-causal-2x70")
    expected = forward(kernel, (32, 16, 2), "late", **inputs)
    for x in "qkv":
        B, T, H, D = inputs[x].shape
        wide = torch.full((B, T + 1, H + 1, D + 8), float("nan"), dtype=inputs[x].dtype)
        laid = wide[:, :T, :H, :D]
        laid.copy_(inputs[x])
        inputs[x] = laid
        assert gluon_choice._why_no_tma(x, laid) == []
    got = forward(kernel, (32, 16, 2), "late", **inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_head_one_row_and_odd_strides(kernel):
    """Where a dimension has one entry its stride may be anything, also what the TMA unit can't have."""
    q = torch.randn(1, 5, 1, 64).bfloat16().as_strided((1, 5, 1, 64), (7, 64, 3, 1))
    assert gluon_choice._why_no_tma("q", q) == []
    out, _ = forward(kernel, (32, 16, 2), "late", q=q, k=q, v=q, causal=False)
    dense, _ = forward(kernel, (32, 16, 2), "late", q=q.clone(), k=q.clone(), v=q.clone(), causal=False)
    assert torch.equal(out, dense)


def far(module: Any, packed: bool) -> None:
    """q and out of more than 2^31 elements, of which only the end is ever touched: the programs there alone run."""
    rows, H, D = (1 << 20) + 40, 32, 64
    q = torch.empty(rows, H, D, dtype=torch.bfloat16)
    q[-64:] = torch.randn(64, H, D)
    k, v = torch.randn(2, 8, H, D).bfloat16()
    cu: dict[str, Any] = {}
    if packed:
        cu = dict(cu_seqlens_q=reference.cu_seqlens((rows - 20, 20)), cu_seqlens_k=reference.cu_seqlens((0, 8)))
    tiles = rows // 32 + 3 if packed else -(-rows // 32)
    given = dict(q=q, k=k, v=v) if packed else dict(q=q[None], k=k[None], v=v[None])
    before, language.ONLY[0] = language.ONLY[0], lambda program, programs: 0 <= program - 30 * tiles < 6
    try:
        out, _ = forward(module, (32, 16, 2), "late", causal=False, **given, **cu)
    finally:
        language.ONLY[0] = before
    exact = reference.attention(q[None, -8:, 30:].double(), k[None, :, 30:].double(), v[None, :, 30:].double())
    assert (out.view(rows, H, D)[-8:, 30:] - exact[0]).abs().max() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("packed", (False, True))
def test_offsets_of_more_than_32_bits(packed, tmp_path):
    far(language.load(SOURCE, PACKAGE), packed)
    narrow = tmp_path / SOURCE.name
    narrow.write_text(SOURCE.read_text().replace("out_row = batch.to(gl.int64) * T", "out_row = batch * T").replace(
        "out_row = q_first.to(gl.int64)", "out_row = q_first"))  # fmt: skip
    with pytest.raises(AssertionError, match="an access to elements -"):
        far(language.load(narrow, PACKAGE), packed)


def trial(source: Path) -> str:
    """What the checks say of a kernel; empty when they find nothing."""
    try:
        module = language.load(source, PACKAGE)
        for case, tiles, policy in (
            ("gqa-causal-2x70", (32, 16, 2), "late"),
            ("packed-T-S", (16, 32, 3), "early"),
            ("causal-T90-S37-empty-rows", (32, 16, 1), 1),
            ("mha-2x48", (32, 16, 2), 2),
            ("packed-causal", (32, 32, 2), "late"),
        ):
            judge(module, case, tiles, policy, dtype=torch.float16)
        test_rows_behind_the_last_sequence(module)
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return ""


def planted(bug: Bug, folder: Path) -> str:
    text = SOURCE.read_text()
    assert bug.text in text, f"{bug.name}: the source has changed, this text isn't there: {bug.text!r}"
    changed = folder / SOURCE.name
    changed.write_text(text.replace(bug.text, bug.instead))
    return in_a_process(lambda: trial(changed), 60)


def test_no_false_alarm():
    assert trial(SOURCE) == ""


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.quick], ids=lambda bug: bug.name)
def test_planted_bug_is_noticed(bug, tmp_path):
    assert planted(bug, tmp_path), "nobody noticed"


@pytest.mark.slow
def test_every_planted_bug_is_noticed(tmp_path, capsys):
    found = {bug.name: planted(bug, tmp_path) for bug in BUGS}
    missed = [name for name, what in found.items() if not what]
    kinds = Counter(what.split(":")[0] for what in found.values() if what)
    with capsys.disabled():
        print(f"\n{len(BUGS) - len(missed)} of {len(BUGS)} planted bugs noticed, by {dict(kinds.most_common())}")
    assert not missed, missed
