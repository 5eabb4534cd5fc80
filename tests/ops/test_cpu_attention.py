"""Attention's C++ beyond the generic tests: every instruction set, more than one block, task and wave, threads.

The checks themselves are in harness/attention_cpu.py; test_cpu_attention_bugs.py gives them modules with bugs in them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from harness import attention_cpu as checks
from harness.attention_cpu import BF16, CASES, DECODE, F16, F32
from harness.cpu_kernels import ISAS, load
from torch import Tensor

from pyllm.kernels import OPS, attention, attention_decode, extension
from pyllm.kernels.attention import reference

pytestmark = pytest.mark.skipif(extension.cpu.module is None, reason=extension.cpu.reason or "built")


@pytest.fixture(scope="module", params=ISAS)
def module(request: pytest.FixtureRequest) -> ModuleType:
    try:
        return load(request.param)
    except ImportError:
        pytest.skip(f"this CPU has no {request.param}")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_accuracy(module: ModuleType, name: str, dtype: torch.dtype):
    checks.check_accuracy(module, name, dtype)


@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", DECODE)
def test_decode(module: ModuleType, name: str, dtype: torch.dtype):
    checks.check_decode(module, name, dtype)


def test_powers_and_tanh(module: ModuleType):
    checks.check_exp(module)
    checks.check_tanh(module)


def test_nobody_reads_what_is_not_seen(module: ModuleType):
    checks.check_unseen_values(module)


def test_offsets_past_32_bits():
    checks.check_offsets(extension.cpu.module)


def test_waves_of_heads():
    checks.check_waves(extension.cpu.module)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_threads_do_not_change_a_bit(module: ModuleType, dtype: torch.dtype):
    checks.check_threads(module, dtype)


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch):
    """Hugging Face's (B, H, T, D), seen transposed, goes to the kernels as it is."""
    q, k, v = (torch.randn(2, heads, 20, 16).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))

    def copied(x: Tensor, *_: Any, **__: Any) -> Tensor:
        assert x.is_contiguous(), "copied"
        return x

    monkeypatch.setattr(Tensor, "contiguous", copied)
    out = attention(q, k, v, causal=True, backend="cpu")
    torch.autograd.grad(out, (q, k, v), torch.randn(2, 4, 20, 16).transpose(1, 2))


def test_head_dim_of_nothing_is_refused():
    empty = torch.ones(1, 3, 2, 0)
    assert OPS["attention"].op.why_not("cpu", empty, empty, empty, None) == ["head_dim 0 is not served, 1 and more are"]


SIZES = dict(B=1, T=1, S=1, H=2, Hkv=1, D=2)
STRIDES = dict.fromkeys(("q_stride", "k_stride", "v_stride"), (4, 4, 2, 1))
REST = dict(scale=1.0, left=-1, softcap=0.0, dtype=0)
GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "attention_fwd": (
        "q k v out lse", dict(sinks=0, cu_seqlens_q=0, cu_seqlens_k=0, right=-1) | SIZES | STRIDES | REST
    ),
    "attention_bwd": (
        "q k v out dout lse dq dk dv",
        dict(dlse=0, sinks=0, delta=0, dsinks=0, cu_seqlens_q=0, cu_seqlens_k=0, right=-1)
        | SIZES | STRIDES | REST | dict.fromkeys(("out_stride", "dout_stride"), (4, 4, 2, 1)),
    ),
    "attention_decode": (
        "q k_cache v_cache out lengths",
        dict(narrow=False, table=0, table_width=-1, table_stride=0, blocks=1) | SIZES | STRIDES | REST,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_bad_arguments(name: str):
    memory = torch.zeros(16)
    pointers, rest = GOOD[name]
    function, good = getattr(extension.cpu.module, name), dict.fromkeys(pointers.split(), memory.data_ptr()) | rest
    function(**good)
    for key in pointers.split():
        with pytest.raises(ValueError, match=f"^{key} is a null pointer"):
            function(**good | {key: 0})
    for key in SIZES:
        with pytest.raises(ValueError, match=f"^{key} must not be negative, got -2"):
            function(**good | {key: -2})
    with pytest.raises(ValueError, match=r"^dtype must be a dtype code from 0 to 3, got 4"):
        function(**good | {"dtype": 4})
    with pytest.raises(ValueError, match=r"^H must be a multiple of Hkv = 2, got 3"):
        function(**good | {"H": 3, "Hkv": 2})
    function(**good | dict.fromkeys(pointers.split(), 0) | {"B": 0})


def test_bad_cu_seqlens():
    memory, cu = torch.zeros(64), torch.tensor([0, 2, 1], dtype=torch.int32)
    pointers, rest = GOOD["attention_bwd"]
    good = dict.fromkeys(pointers.split(), memory.data_ptr()) | rest | dict(B=2, T=4, S=4)
    right = torch.tensor([0, 1, 4], dtype=torch.int32)
    extension.cpu.module.attention_bwd(**good | dict(cu_seqlens_q=right.data_ptr(), cu_seqlens_k=right.data_ptr()))
    with pytest.raises(ValueError, match=r"cu_seqlens_k must rise from 0 to at most the 4 rows of k, got \[0, 2, 1\]"):
        extension.cpu.module.attention_bwd(**good | dict(cu_seqlens_q=right.data_ptr(), cu_seqlens_k=cu.data_ptr()))
    with pytest.raises(ValueError, match="cu_seqlens_k is a null pointer"):
        extension.cpu.module.attention_bwd(**good | dict(cu_seqlens_q=right.data_ptr()))


def test_decode_takes_either_integer():
    inputs = reference.decode_inputs(**DECODE["paged"], dtype=F32, generator=torch.Generator().manual_seed(3))
    expected = attention_decode(**inputs, backend="cpu")
    inputs["cache_seqlens"] = inputs["cache_seqlens"].long()
    inputs["block_table"] = inputs["block_table"].t().contiguous().t()
    assert torch.equal(attention_decode(**inputs, backend="cpu"), expected)
