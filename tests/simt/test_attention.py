"""What the machine's profile says of attention: tiles are read and written without bank conflicts."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from pyllm.kernels import attention, attention_decode, extension


@pytest.fixture
def profiled(simt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name, value in (("module", simt), ("device_type", "cpu"), ("reason", "")):
        monkeypatch.setattr(extension.cuda, name, value)
    simt.configure(profile=True)
    simt.profiles()
    return simt


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_no_bank_conflicts(profiled: ModuleType, D: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 70, heads, D, dtype=dtype, requires_grad=True) for heads in (2, 1, 1))
    attention(q, k, v, causal=True, backend="cuda").sum().backward()
    with torch.no_grad():
        attention_decode(q[:, :1], k, v, torch.tensor([70]), backend="cuda")
    shared = [p for p in profiled.profiles() if p["space"] == "shared" and p["bytes"] == 16]
    assert len(shared) > 10
    worst = max(shared, key=lambda p: p["actual"] / p["ideal"])
    assert worst["actual"] == worst["ideal"], worst
