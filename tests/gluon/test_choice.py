"""Which inputs the Gluon forward says that it takes."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyllm.kernels import triton_support
from pyllm.kernels.attention import gluon_choice

ROOT = Path(__file__).parents[2]


def reasons(q: Any = None, k: Any = None, capability: tuple[int, int] | None = (9, 0), **changed: Any) -> list[str]:
    q = torch.randn(2, 7, 4, 64).bfloat16() if q is None else q
    k = q if k is None else k
    options = dict(sinks=None, cu_seqlens_q=None, cu_seqlens_k=None, scale=0.1, left=-1, right=0, softcap=0.0) | changed
    return gluon_choice.why_not(q, k, k, *options.values(), capability=capability)


@pytest.fixture(autouse=True)
def _gluon_is_there(monkeypatch):
    monkeypatch.setattr(gluon_choice, "missing_api", lambda: "")


@pytest.mark.parametrize("right", (-1, 0))
@pytest.mark.parametrize("D", gluon_choice.HEAD_DIMS)
def test_takes(D, right):
    assert reasons(torch.randn(1, 3, 2, D).half(), right=right) == []
    assert reasons(torch.randn(5, 2, D).bfloat16(), right=right) == []


X = torch.randn(2, 7, 4, 64).bfloat16()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(capability=(10, 0)), "not a Hopper"),
        (dict(capability=(8, 0)), "not a Hopper"),
        (dict(capability=None), "not a Hopper"),
        (dict(q=X.float()), "float32 is not a 16-bit one"),
        (dict(q=X[..., :32].contiguous()), "head_dim 32 is not one of 64, 128, 256"),
        (dict(left=3), "a window"),
        (dict(right=2), "a window"),
        (dict(softcap=5.0), "a softcap"),
        (dict(sinks=torch.zeros(4)), "sinks"),
        (dict(scale=0.0), "softmax_scale 0.0 is not positive"),
        (dict(scale=-0.1), "softmax_scale -0.1 is not positive"),
        (dict(scale=float("nan")), "softmax_scale nan is not positive"),
        (dict(q=X[:, :0]), "no queries or no keys"),
        (dict(k=X[:, :0]), "no queries or no keys"),
        (dict(q=torch.randn(2, 7, 4, 68).bfloat16()[..., 1:65]), "q is not aligned to 16 bytes"),
        (dict(q=torch.randn(2, 7, 4, 68).bfloat16()[..., :64]), "q's strides .* are not rising multiples of 8"),
        (dict(q=torch.randn(2, 4, 7, 64).bfloat16().transpose(1, 2)), "q's strides .* are not rising"),
        (dict(k=X[:, :1].expand(2, 7, 4, 64)), "k's strides .* are not rising"),
        (dict(q=torch.randn(2, 7, 64, 4).bfloat16().transpose(2, 3)), "q's last dimension is not contiguous"),
    ],
)  # fmt: skip
def test_refuses(how, words):
    found = reasons(**how)
    assert len(found) >= 1
    assert re.search(words, "; ".join(found)), found


def test_says_what_gluon_lacks(monkeypatch):
    monkeypatch.setattr(gluon_choice, "missing_api", lambda: "Triton 9.9: there is no gluon")
    assert reasons() == ["Triton 9.9: there is no gluon"]
    assert "a softcap" in reasons(softcap=1.0)


def python(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.skipif(not triton_support.INSTALLED, reason="Triton is not installed")
def test_the_api_of_the_installed_triton():
    """Empty, or the version and what it lacks. Then, were a name gone or an argument renamed, it would say that."""
    found = python(
        "import sys; from pyllm.kernels.attention import gluon_choice as c\n"
        "assert 'triton' not in sys.modules\n"
        "print(repr(c.missing_api()))\n"
        "names = c._API['triton.experimental.gluon.language']\n"
        "names['warp_specialize'] += ('worker_num_stars',); c.missing_api.cache_clear(); print(c.missing_api())\n"
        "names['wrap'] = names.pop('warp_specialize'); c.missing_api.cache_clear(); print(c.missing_api())\n"
        "c._API = {'triton.experimental.glue': {}}; c.missing_api.cache_clear(); print(c.missing_api())\n"
    ).splitlines()
    version = importlib.metadata.version("triton")
    if found[0] != "''":
        assert version in found[0]
        return
    assert found[1:3] == [
        f"Triton {version}: triton.experimental.gluon.language.warp_specialize takes no worker_num_stars",
        f"Triton {version}: triton.experimental.gluon.language has no wrap",
    ]
    assert found[3].startswith(f"Triton {version} has no usable triton.experimental.glue (")


def test_runs_where_it_is_wanted_and_can(monkeypatch):
    """The Triton backend's forward hands over to it: on a GPU, or when asked, and only what it takes."""
    from pyllm.kernels.attention import triton_fwd

    q = torch.randn(1, 20, 2, 64).half()
    args = (q, q, q, None, None, None, 0.125, -1, 0, 0.0)
    handed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(triton_fwd, "gluon_forward", lambda *given: handed.append(given) or ("out", "lse"))
    monkeypatch.setattr(gluon_choice, "why_not", lambda *given, capability: [] if given[7] < 0 else ["a window"])
    monkeypatch.delenv("PYLLM_GLUON", raising=False)
    assert [gluon_choice.wanted(True, D) for D in (64, 128, 256)] == [False, True, True]
    assert not gluon_choice.wanted(False, 128)
    monkeypatch.setenv("PYLLM_GLUON", "0")
    assert not gluon_choice.wanted(True, 128)
    assert triton_fwd.attention_fwd(*args)[0].shape == q.shape
    assert not handed
    monkeypatch.setenv("PYLLM_GLUON", "1")
    assert triton_fwd.attention_fwd(*args) == ("out", "lse")
    assert handed == [(q, q, q, None, None, 0.125, True)]
    windowed = (*args[:7], 5, 0, 0.0)
    assert triton_fwd.attention_fwd(*windowed)[0].shape == q.shape
    assert len(handed) == 1
