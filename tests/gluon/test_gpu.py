"""Attention's Gluon forward on a Hopper GPU, with the tiles that it is launched with."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.accuracy import check

from gluon.test_attention import CASES
from pyllm.kernels import OPS
from pyllm.kernels.attention import gluon_choice, triton_fwd

pytestmark = pytest.mark.gpu
SPEC = OPS["attention"]
LONG: dict[str, dict[str, Any]] = {
    f"D{D}-{'causal' if causal else 'full'}": dict(B=2, T=700, S=900, H=4, Hkv=2, D=D, causal=causal)
    for D in gluon_choice.HEAD_DIMS
    for causal in (False, True)
}
LONG["packed, many tiles"] = dict(lengths=(300, 0, 1, 517, 128), H=4, Hkv=1, D=128, causal=True)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many keys each call of the Gluon forward saw; every test must make one at least."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU is not a Hopper (compute capability 9.0)")
    if reason := gluon_choice.missing_api():
        pytest.skip(reason)
    seen: list[int] = []
    forward = triton_fwd.gluon_forward

    def note(q: Any, k: Any, *rest: Any) -> Any:
        seen.append(k.shape[-3])
        return forward(q, k, *rest)

    monkeypatch.setenv("PYLLM_GLUON", "1")
    monkeypatch.setattr(triton_fwd, "gluon_forward", note)
    yield seen
    assert seen


def inputs_of(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return SPEC.inputs(**case, dtype=dtype, device="cuda", generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [*CASES, *LONG])
def test_numerics_on_a_gpu(case: str, dtype: torch.dtype) -> None:
    check(SPEC, functools.partial(SPEC.function, backend="triton"), inputs_of({**CASES, **LONG}[case], dtype))


def test_the_same_bits_every_time_on_a_gpu() -> None:
    inputs = inputs_of(LONG["D128-causal"], torch.bfloat16)
    first, second = (SPEC.function(**inputs, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
