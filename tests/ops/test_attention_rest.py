"""Packed attention: rows behind the last sequence belong to nobody, and get zeros, as do their gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from harness.accuracy import check, run
from harness.machines import machine, served

from pyllm.kernels import BACKENDS, OPS, attention
from pyllm.kernels.attention.reference import attention_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(5, 9, 21), (70, 3, 90), (0, 0, 6)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_behind_the_last_sequence(backend, lengths, dtype):
    spec = OPS["attention"]
    served("attention", backend)
    with machine(backend) as device:
        inputs = attention_inputs(
            lengths=lengths, H=4, Hkv=2, D=16, causal=True, dtype=dtype, device=device,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            inputs[name] = inputs[name][:-1]
        check(spec, functools.partial(attention, backend=backend), inputs)
        got = run(functools.partial(attention, backend=backend), inputs, spec.grads)
    end = sum(lengths[:-1])
    for name in ("out0", "dq", "dk", "dv"):
        assert got[name][end:].eq(0).all(), name
        assert got[name][:end].ne(0).any() or end == 0, name
