"""Attention's CUDA forward for Hopper: when it runs, what it takes, and that it is as exact as the rule asks.

On a GPU that is no Hopper the numerics are skipped; with no GPU the SIMT machine plays one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import hopper
from harness.accuracy import check
from harness.machines import DEVICE, machine

from pyllm.kernels import OPS, extension
from pyllm.kernels.attention import bindings_cuda

SPEC = OPS["attention"]
HALVES = (torch.bfloat16, torch.float16)
CASES = {**SPEC.cases, **hopper.CASES}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is not a Hopper (compute capability 9.0)")
    monkeypatch.setenv("PYLLM_HOPPER", "1")
    with machine("cuda") as where:
        if extension.cuda.module is None:
            pytest.skip(extension.cuda.reason)
        yield where


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every forward, whether the kernel for Hopper ran it."""
    seen: list[bool] = []
    why_not = bindings_cuda.why_not_hopper

    def note(*tensors: torch.Tensor) -> list[str]:
        reasons = why_not(*tensors)
        seen.append(not reasons)
        return reasons

    monkeypatch.setattr(bindings_cuda, "why_not_hopper", note)
    return seen


def inputs_of(case: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    return SPEC.inputs(**CASES[case], dtype=dtype, device=device, generator=torch.Generator().manual_seed(0))


GRID = [
    pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}", marks=[pytest.mark.slow] * (again and case in SPEC.cases))
    for case in CASES
    for again, dtype in enumerate(HALVES)
]


@pytest.mark.parametrize(("case", "dtype"), GRID)
def test_numerics(case: str, dtype: torch.dtype, device: str, calls: list[bool]) -> None:
    inputs = inputs_of(case, device, dtype)
    check(SPEC, functools.partial(SPEC.function, backend="cuda"), inputs)
    assert calls
    assert all(calls)


def test_the_same_bits_every_time(device: str) -> None:
    inputs = inputs_of("rounds, window, sinks", device, torch.bfloat16)
    first, second = (SPEC.function(**inputs, backend="cuda") for _ in range(2))
    assert torch.equal(first, second)


def test_strides_and_neighbours(device: str, calls: list[bool]) -> None:
    """(B, H, T, D) in memory, rows with NaN between them."""
    inputs = inputs_of("rounds, D 96", device, torch.bfloat16)
    turned = dict(inputs)
    for name in ("q", "k", "v"):
        turned[name] = inputs[name].transpose(1, 2)
    laid = hopper.apart(turned)
    for name in ("q", "k", "v"):
        laid[name] = laid[name].transpose(1, 2).detach().requires_grad_()
    check(SPEC, functools.partial(SPEC.function, backend="cuda"), inputs, given=laid)
    assert calls
    assert all(calls)


def test_nothing_comes_from_the_next_sequence(device: str, calls: list[bool]) -> None:
    hopper.check_neighbours(device)
    assert len(calls) == 2
    assert all(calls)


@pytest.mark.parametrize("how", ["float32", "odd head", "odd address", "expanded", "no keys"])
def test_the_rest_goes_to_the_portable_kernel(how: str, device: str, calls: list[bool]) -> None:
    dtype = torch.float32 if how == "float32" else torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 20, 2, 24, generator=generator).to(device, dtype) for _ in range(3))
    if how == "odd head":
        q, k, v = (x[..., :17].contiguous() for x in (q, k, v))
    if how == "odd address":
        q = torch.empty(q.numel() + 1, dtype=dtype, device=device)[1:].view(q.shape).copy_(q)
    if how == "expanded":
        k = k[:, :, :1].expand(-1, -1, 2, -1)
    if how == "no keys":
        k, v = k[:, :0], v[:, :0]
    given = dict(q=q, k=k, v=v, causal=True)
    check(SPEC, functools.partial(SPEC.function, backend="cuda"), given, wrt=())
    assert calls
    assert not any(calls)


def test_runs_on_a_gpu_unless_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYLLM_HOPPER", raising=False)
    assert [bindings_cuda.hopper_wanted(on_gpu) for on_gpu in (False, True)] == [False, True]
    monkeypatch.setenv("PYLLM_HOPPER", "0")
    assert not bindings_cuda.hopper_wanted(True)
    monkeypatch.setenv("PYLLM_HOPPER", "1")
    assert bindings_cuda.hopper_wanted(False)


X = torch.randn(1, 4, 2, 16, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(dtype=0), "hopper: dtype must be a 16-bit one"),
        (dict(q=X.data_ptr() + 2), "hopper: q must be aligned to 16 bytes"),
        (dict(k_stride=(128, 31, 16)), "hopper: k must be aligned to 16 bytes, with strides that are multiples of 8"),
        (dict(v_stride=(128, 32, 0)), "hopper: v must be aligned to 16 bytes, with strides that are multiples of 8"),
        (dict(sizes=(1, 4, 0, 2, 2, 16)), "hopper: S must be at least 1"),
    ],
)
def test_the_binding_names_what_is_wrong(changed: dict[str, Any], words: str) -> None:
    address = X.data_ptr()
    with machine("cuda"):
        if not extension.cuda.module.has_hopper():
            pytest.skip("the CUDA kernels were built without sm_90")
        given = dict(
            q=address, k=address, v=address, sinks=0, out=address, lse=address, cu_q=0, cu_k=0,
            sizes=(1, 4, 4, 2, 2, 16), q_stride=(128, 32, 16), k_stride=(128, 32, 16), v_stride=(128, 32, 16),
            scale=0.25, left=-1, right=-1, softcap=0.0, dtype=extension.DTYPE_CODES[torch.bfloat16], hopper=True,
            stream=0,
        )  # fmt: skip
        with pytest.raises(ValueError, match=f"attention_fwd: {words}"):
            extension.cuda.module.attention_fwd(*(given | changed).values())
