"""rope_append_kv: against apply_rope and an indexed copy, in place and nowhere else, and with attention_decode."""

from __future__ import annotations

import functools

import pytest
import torch
from harness.layouts import far_apart
from harness.machines import DEVICE, DTYPES
from torch import Tensor

from pyllm.kernels import OPS, apply_rope, attention, attention_decode, extension, rope_append_kv, triton_support
from pyllm.kernels.rope import append_reference

BACKENDS = ["eager", *(["triton"] if triton_support.INSTALLED else [])]
BACKENDS += ["cpu"] if DEVICE == "cpu" and extension.cpu.module is not None else []
CACHES = ("k_cache", "v_cache")


def inputs(case: str | None = None, dtype: torch.dtype = torch.float32, **given) -> dict:
    given = {**append_reference.CASES[case]} if case else dict(B=2, T=2, S=9, H=4, Hkv=2, D=16) | given
    generator = torch.Generator().manual_seed(9)
    return append_reference.append_inputs(**given, dtype=dtype, device=DEVICE, generator=generator)


def place(given: dict, b: int, t: int) -> tuple[int, int] | None:
    """Where a token goes, by the contract."""
    size, table = given["k_cache"].shape[1], given.get("block_table")
    p = int(given["cache_seqlens"][b]) - given["q"].shape[1] + t
    if p < 0 or p >= (size if table is None else size * table.shape[1]):
        return None
    return (b, p) if table is None else (int(table[b, p // size]), p % size)


def expected(given: dict) -> tuple[Tensor, Tensor, Tensor]:
    """apply_rope, and copies of single rows."""
    T = given["q"].shape[1]
    positions = given["cache_seqlens"].long()[:, None] - T + torch.arange(T, device=given["q"].device)
    options = {k: given[k] for k in ("cos", "sin", "interleaved", "rotary_dim")}
    rows = positions.clamp(0, given["cos"].shape[0] - 1)
    q, k = apply_rope(given["q"], given["k"], position_ids=rows, **options, backend="eager")
    caches = [given[name].clone() for name in CACHES]
    for b, t in ((b, t) for b in range(len(q)) for t in range(T)):
        if (where := place(given, b, t)) is not None:
            caches[0][where], caches[1][where] = k[b, t], given["v"][b, t]
    return q, *caches


def assert_same(got: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """To a unit in the last place (a product may be fused into a sum); v and all that isn't written to the bit."""
    for a, b in zip(got[:2], truth[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)
    assert torch.equal(got[2].nan_to_num(nan=7.0), truth[2].nan_to_num(nan=7.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", append_reference.CASES)
def test_apply_rope_and_a_copy(case, dtype, backend):
    given = inputs(case, dtype)
    truth = expected(given)
    kept = [given[name] for name in CACHES]
    q = rope_append_kv(**given, backend=backend)
    assert_same((q, *kept), truth, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", append_reference.CASES)
def test_no_other_place_is_touched(case, backend):
    """Caches in wider rows, heads and places, with NaN between; only the new tokens' elements may change."""
    given = inputs(case)
    wide = {}
    for name in CACHES:
        shape = given[name].shape
        wide[name] = torch.full((shape[0] + 2, shape[1] + 2, shape[2] + 1, shape[3] + 3), float("nan"), device=DEVICE)
        window = wide[name][1:-1, 1:-1, 1:, 1:-2]
        given[name] = window.copy_(torch.full_like(window, 5.0))
    before = {name: wide[name].clone() for name in CACHES}
    truth = expected(given)
    rope_append_kv(**given, backend=backend)
    for name, cache in zip(CACHES, truth[1:], strict=True):
        before[name][1:-1, 1:-1, 1:, 1:-2] = cache
        torch.testing.assert_close(wide[name], before[name], rtol=3e-7, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_in_place(backend):
    """Heads before places, as Hugging Face has them, and even elements far apart."""
    given = inputs(T=3)
    truth = expected(given)
    for lay in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
    ):
        laid = {k: lay(v) if isinstance(v, Tensor) and v.dim() == 4 else v for k, v in given.items()}
        q = rope_append_kv(**laid, backend=backend)
        assert_same((q, laid["k_cache"], laid["v_cache"]), truth, torch.float32)


@pytest.mark.parametrize("block_size", [None, 4])
def test_what_has_no_place_is_not_written(block_size):
    """Lengths and blocks that a CPU would refuse, and a GPU cannot ask for."""
    if not triton_support.INSTALLED:
        pytest.skip("Triton is not installed")
    given = inputs(B=3, T=3, S=8, block_size=block_size)
    given["cache_seqlens"] = torch.tensor([9, 30, -4], dtype=torch.int64, device=DEVICE)
    truth = expected(given)
    q = rope_append_kv(**given, backend="triton")
    assert_same((q, given["k_cache"], given["v_cache"]), truth, torch.float32)
    if block_size is not None:
        for block in (-1, given["k_cache"].shape[0]):
            given["cache_seqlens"][:] = 8
            given["block_table"][:] = block
            before = given["k_cache"].clone()
            rope_append_kv(**given, backend="triton")
            assert torch.equal(given["k_cache"].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [None, 4])
def test_two_steps_then_attention_equal_attention_to_the_whole(backend, block_size):
    """A prompt of 5 and 3 tokens, then 2 and 2 more: as if all had been there at once. The lengths serve both ops."""
    B, H, Hkv, D, steps = 2, 4, 2, 16, ((5, 3), (2, 2))
    given = inputs(B=B, S=12, H=H, Hkv=Hkv, D=D, block_size=block_size)
    table = {}
    if block_size is not None:
        table["block_table"] = torch.arange(6, device=DEVICE, dtype=torch.int32).view(2, 3)
    caches = [torch.full_like(given[name], float("nan")) for name in CACHES]
    lengths = torch.zeros(B, dtype=torch.int32, device=DEVICE)
    history: list[list[list[Tensor]]] = [[], []]
    for counts in steps:
        T = max(counts)  # the shorter sequence's tokens are the last ones
        q, k, v = (torch.randn(B, T, heads, D, device=DEVICE) for heads in (H, Hkv, Hkv))
        lengths = lengths + torch.tensor(counts, dtype=torch.int32, device=DEVICE)
        turned = rope_append_kv(q, k, v, given["cos"], given["sin"], *caches, lengths, **table, backend=backend)
        out = attention_decode(turned, *caches, lengths, **table, backend=f"{backend},eager")
        for b, n in enumerate(counts):
            history[b].append([x[b, T - n :] for x in (q, k, v)])
            q_all, k_all, v_all = (torch.cat(x)[None] for x in zip(*history[b], strict=True))
            q_all, k_all = apply_rope(q_all, k_all, given["cos"], given["sin"], backend="eager")
            whole = attention(q_all, k_all, v_all, causal=True, backend="eager")
            torch.testing.assert_close(out[b, T - n :], whole[0, -n:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [None, 4])
def test_compiled_in_one_graph_it_still_writes(block_size):
    torch._dynamo.reset()
    given = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs(block_size=block_size).items()}
    compiled = torch.compile(functools.partial(rope_append_kv, backend="eager"), fullgraph=True, backend="aot_eager")
    truth = expected(given)
    q = compiled(**given)
    assert_same((q, given["k_cache"], given["v_cache"]), truth, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_learns_that_the_caches_changed(backend):
    given = inputs()
    weight = torch.ones((), requires_grad=True, device=DEVICE)
    product = (weight * given["k_cache"]).sum()
    with torch.no_grad():
        rope_append_kv(**given, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_and_nothing_to_do(backend):
    with torch.inference_mode():
        given = inputs()
        truth = expected(given)
        q = rope_append_kv(**given, backend=backend)
        assert_same((q, given["k_cache"], given["v_cache"]), truth, torch.float32)
    for empty in (dict(B=0), dict(T=0)):
        given = inputs(**empty)
        before = given["k_cache"].clone()
        assert rope_append_kv(**given, backend=backend).shape == given["q"].shape
        assert torch.equal(given["k_cache"], before)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("block_size", [None, 4])
def test_offsets_beyond_32_bits(block_size, dim):
    if not triton_support.INSTALLED:
        pytest.skip("Triton is not installed")
    given = inputs(dtype=torch.float16, B=3, block_size=block_size)
    truth = expected(given)
    given |= {name: far_apart(given[name], dim) for name in CACHES}
    q = rope_append_kv(**given, backend="triton")
    assert_same((q, given["k_cache"], given["v_cache"]), truth, torch.float16)


def test_one_launch(monkeypatch):
    """And none of the lengths is asked for: on meta tensors that fails."""
    if not triton_support.INSTALLED:
        pytest.skip("Triton is not installed")
    from pyllm.kernels.rope import triton_append

    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    monkeypatch.setattr(triton_append, "_rope_append_kv_kernel", Kernel())
    given = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs("4x5-empty-blocks4").items()}
    given.pop("rotary_dim")
    triton_append.rope_append_kv_fwd(**given)
    assert launches == [(20, 2)]


def test_cost_by_hand():
    given = inputs(B=1, T=2, S=9, H=4, Hkv=2, D=16, R=8, dtype=torch.float16)
    # q of 4 heads, k and v of 2, in and out, 2 bytes; 4 columns of cos and sin for 2 tokens; 6 heads of 8 turned
    assert OPS["rope_append_kv"].cost(given, False) == (2 * 2 * 16 * (4 + 4) * 2 + 2 * 4 * 2 * 4, 2 * 6 * 8 * 3)
