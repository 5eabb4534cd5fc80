"""The defects that users of other RoPE kernels hit, each against ours: any head and rotary size, a single key-value
head, positions that are ignored, tables of another dtype, 32-bit offsets, strides, cut gradients, the second GPU."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from harness.accuracy import check, run
from harness.machines import DEVICE, DTYPES

from pyllm.kernels import OPS, apply_rope, triton_support
from pyllm.kernels.rope import reference

if not triton_support.INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

from pyllm.kernels.rope import triton_pairs, triton_qk_norm_rope, triton_rope

NAMES = ["apply_rope", "qk_norm_rope"]


def make(name: str, dtype: torch.dtype = torch.float32, **case):
    return OPS[name].inputs(**case, dtype=dtype, device=DEVICE, generator=torch.Generator().manual_seed(1))


def judge(name: str, inputs: dict) -> None:
    check(OPS[name], functools.partial(OPS[name].function, backend="triton"), inputs)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(
    ("D", "R"),
    [(2, 2), (6, 6), (7, 2), (10, 4), (48, 48), (72, 72), (80, 32), (96, 96), (100, 64), (160, 160), (256, 64)],
)
@pytest.mark.parametrize("name", NAMES)
def test_any_head_and_rotary_size(name, D, R, interleaved):
    judge(name, make(name, B=1, T=5, H=3, Hkv=1, D=D, R=R, interleaved=interleaved))


@pytest.mark.parametrize("H", [1, 5, 33])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (1, 67)])
@pytest.mark.parametrize("name", NAMES)
def test_one_key_value_head_and_any_number_of_tokens(name, H, B, T):
    judge(name, make(name, B=B, T=T, H=H, Hkv=1, D=32))


@pytest.mark.parametrize("name", NAMES)
def test_a_head_wider_than_a_tile(name):
    judge(name, make(name, B=1, T=2, H=2, Hkv=1, D=4098))


@pytest.mark.parametrize("name", NAMES)
def test_a_head_too_wide_is_refused_with_a_reason(name):
    inputs = make(name, B=1, T=1, H=1, Hkv=1, D=8194)
    with pytest.raises(RuntimeError, match="triton: head_dim 8194 is above 8192"):
        OPS[name].function(**inputs, backend="triton")


@pytest.mark.parametrize("table", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("x", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_tables_of_any_dtype(name, x, table):
    """Angles are float32, whatever they came in: the table's own rounding is the only one."""
    inputs = make(name, x, B=2, T=5, H=2, Hkv=1, D=16)
    inputs.update({t: inputs[t].to(table) for t in ("cos", "sin")})
    got = run(functools.partial(OPS[name].function, backend="triton"), inputs, OPS[name].grads)
    same = {**inputs, **{t: inputs[t].float() for t in ("cos", "sin")}}
    expected = run(functools.partial(OPS[name].function, backend="triton"), same, OPS[name].grads)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_two_layouts(name):
    inputs = make(name, B=2, T=5, H=2, Hkv=1, D=16)
    inputs["sin"] = inputs["sin"].T.contiguous().T
    judge(name, inputs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", ["(B, T)", "(1, T)", "(T,)", "strided"])
@pytest.mark.parametrize("name", NAMES)
def test_positions_are_heeded(name, shape, dtype):
    inputs = make(name, B=2, T=7, H=2, Hkv=1, D=16, positions=True)
    positions = inputs["position_ids"].to(dtype)
    forms = {"(1, T)": positions[:1], "(T,)": positions[0], "strided": positions.T.contiguous().T}
    inputs["position_ids"] = forms.get(shape, positions)
    judge(name, inputs)
    in_order = {**inputs, "position_ids": torch.arange(7, device=DEVICE)}
    results = (OPS[name].function(**given, backend="triton") for given in (inputs, in_order))
    assert not torch.equal(*(out[0] for out in results))


@pytest.mark.parametrize("name", NAMES)
def test_positions_outside_the_table_are_clamped(name):
    inputs = make(name, B=1, T=4, H=2, Hkv=1, D=16, positions=True)
    wild = torch.tensor([-1, 12, 2**31 + 5, -(2**40)], device=DEVICE)
    got = OPS[name].function(**{**inputs, "position_ids": wild}, backend="triton")
    tame = OPS[name].function(**{**inputs, "position_ids": wild.clamp(0, 11)}, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, tame, strict=True))


def far(axis: int, B: int, T: int, H: int, D: int) -> torch.Tensor:
    """A tensor of zeros but for noise in which a step along an axis is 2^30 elements, so that three are over 2^31.

    The memory between is reserved, never touched.
    """
    strides = [T * H * D, H * D, D, 1]
    strides[axis] = 2**30
    sizes = (B, T, H, D)
    x = torch.empty_strided(sizes, strides, dtype=torch.float16)
    return x.copy_(torch.randn(sizes))


@pytest.mark.skipif(DEVICE != "cpu", reason="reserves 6 GB that only an operating system leaves untouched")
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "token", "head"])
@pytest.mark.parametrize("name", NAMES)
def test_offsets_are_64_bit(name, axis):
    sizes = [1, 2, 1, 8]
    sizes[axis] = 4
    B, T, H, D = sizes
    inputs = make(name, torch.float16, B=B, T=T, H=H, Hkv=H, D=D)
    try:
        q = far(axis, *sizes)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    got = OPS[name].function(**{**inputs, "q": q}, backend="triton")[0]
    expected = OPS[name].function(**{**inputs, "q": q.contiguous()}, backend="triton")[0]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_without_a_copy(name, monkeypatch):
    """(B, H, T, D) transposed, as Hugging Face holds it, and the slices of one packed projection."""
    B, T, H, Hkv, D = 2, 5, 4, 2, 16
    inputs = make(name, B=B, T=T, H=H, Hkv=Hkv, D=D)
    expected = OPS[name].function(**inputs, backend="triton")
    packed = torch.cat((inputs["q"], inputs["k"], inputs["k"]), 2).flatten(2)  # (B, T, (H + 2 Hkv) D)
    q, k, _ = packed.split((H * D, Hkv * D, Hkv * D), -1)
    layouts = [
        [inputs[x].transpose(1, 2).contiguous().transpose(1, 2) for x in ("q", "k")],
        [q.unflatten(-1, (H, D)), k.unflatten(-1, (Hkv, D))],
    ]
    contiguous = torch.Tensor.contiguous

    def refusing(x, *args, **kwargs):
        assert x.is_contiguous(), "copied"
        return contiguous(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "contiguous", refusing)
    for q, k in layouts:
        assert not q.is_contiguous()
        got = OPS[name].function(**{**inputs, "q": q, "k": k}, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("wanted", ["q", "k"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_not_cut(name, wanted):
    """Of q alone, of k alone: each has one, and it doesn't hang on the other."""
    inputs = make(name, B=1, T=3, H=2, Hkv=1, D=16)
    inputs[wanted].requires_grad_()
    outputs = OPS[name].function(**inputs, backend="triton")
    (grad,) = torch.autograd.grad(outputs[0 if wanted == "q" else 1].square().sum(), inputs[wanted])
    assert grad.isfinite().all()
    if name == "apply_rope":  # a rotation keeps norms, so this is 2 x
        torch.testing.assert_close(grad, 2 * inputs[wanted].detach())


@pytest.mark.parametrize("name", NAMES)
def test_launches_on_the_tensors_own_gpu(name, monkeypatch):
    module = triton_rope if name == "apply_rope" else triton_qk_norm_rope
    guarded = []

    @contextlib.contextmanager
    def on_device(x):
        guarded.append(x.device)
        yield

    monkeypatch.setattr(module, "on_device", on_device)
    inputs = make(name, B=1, T=3, H=2, Hkv=1, D=16)
    run(functools.partial(OPS[name].function, backend="triton"), inputs, OPS[name].grads)
    assert guarded == [inputs["q"].device] * 2  # forward, backward


@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_undoes_forward(interleaved):
    inputs = make("apply_rope", B=2, T=6, H=3, Hkv=1, D=40, R=24, interleaved=interleaved)
    q, k = apply_rope(**inputs, backend="triton")
    cos, sin = (reference.half_table(inputs[t], 40, 24, interleaved) for t in ("cos", "sin"))
    back = triton_rope.rope_bwd(q, k, cos, sin, None, interleaved)
    for got, expected in zip(back, (inputs["q"], inputs["k"]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("T", [1, 2, 4096])
@pytest.mark.parametrize(("H", "Hkv"), [(1, 1), (8, 1), (14, 2), (32, 8), (64, 64)])
@pytest.mark.parametrize(("D", "R"), [(64, 64), (80, 80), (128, 64), (256, 256), (8192, 8192)])
def test_tiles_are_full_and_never_too_large(T, H, Hkv, D, R):
    tiles = triton_pairs.config(T, H, Hkv, D, R)
    width = 2 * tiles.half + tiles.rest
    sizes = [tiles.tokens * heads * width for heads in (tiles.q_heads, tiles.k_heads)]
    assert max(sizes) <= max(triton_pairs.TILE, width)
    if T >= 16 and D <= 128 and R == D:
        assert min(sizes) >= 1024
    assert tiles.warps * 32 * 16 >= min(width, 16384) // 2
