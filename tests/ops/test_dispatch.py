"""Who runs an op: the order of choices, reasons, errors, the warning."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyllm.kernels import BackendError, describe, dispatch, rms_norm, use_backend
from pyllm.kernels.dispatch import Impl
from pyllm.kernels.rms_norm import RMS_NORM, reference

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ran(monkeypatch):
    """Names of the backends that ran, in order; every backend is the reference under another name."""
    names: list[str] = []

    def named(name):
        def fwd(*args):
            names.append(name)
            return reference.rms_norm_fwd(*args)

        return Impl(fwd, reference.rms_norm_bwd, lambda *args: [])

    monkeypatch.delenv("PYLLM_BACKEND", raising=False)
    monkeypatch.setattr(
        RMS_NORM, "impls", {b: named(b) for b in ("triton", "cuda", "cpu")} | {"eager": reference.EAGER}
    )
    return names


X, W = torch.randn(3, 8), torch.randn(8)


def test_most_specific_choice_wins(ran, monkeypatch):
    rms_norm(X, W)
    monkeypatch.setenv("PYLLM_BACKEND", "triton")
    rms_norm(X, W)
    with use_backend("cuda"):
        rms_norm(X, W)
        rms_norm(X, W, backend="cpu")
        rms_norm(X, W, backend="auto")  # "auto" is no choice: the context's holds
        with use_backend("auto"):
            rms_norm(X, W)  # as a context it asks for the automatic choice, whatever the environment says
        rms_norm(X, W)
    assert ran == ["cpu", "triton", "cuda", "cpu", "cuda", "cpu", "cuda"]


def test_a_list_is_tried_in_order(ran, monkeypatch):
    refusing = RMS_NORM.impls["triton"]._replace(why_not=lambda *a: ["not today"])
    monkeypatch.setitem(RMS_NORM.impls, "triton", refusing)
    rms_norm(X, W, backend="triton, cuda,cpu")
    assert ran == ["cuda"]


def test_a_named_backend_that_cannot_serve_is_an_error_with_all_reasons(ran, monkeypatch):
    monkeypatch.setitem(RMS_NORM.impls, "triton", RMS_NORM.impls["triton"]._replace(why_not=lambda *a: ["not today"]))
    impls = {k: v for k, v in RMS_NORM.impls.items() if k != "cuda"}
    monkeypatch.setattr(RMS_NORM, "impls", impls)
    with pytest.raises(BackendError) as error:
        rms_norm(X, W, backend="triton")
    text = str(error.value)
    assert "triton: not today" in text
    assert "cuda: no cuda kernel for rms_norm" in text
    assert "cpu: can run this" in text
    assert "(3, 8) torch.float32" in text
    assert ran == []


@pytest.mark.parametrize("where", ["call", "context", "environment"])
def test_unknown_name(where, monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'cudnn': choose from auto, triton, cuda, cpu, eager"):  # noqa: PT012
        if where == "call":
            rms_norm(X, W, backend="cudnn")
        elif where == "context":
            with use_backend("cudnn"):
                pass
        else:
            monkeypatch.setenv("PYLLM_BACKEND", "cudnn")
            rms_norm(X, W)


def test_context_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert dispatch.requested(None) is None


def test_backward_runs_where_forward_ran(ran, monkeypatch):
    seen = []
    cpu = RMS_NORM.impls["cpu"]
    monkeypatch.setitem(RMS_NORM.impls, "cpu", cpu._replace(bwd=lambda *a: seen.append("cpu") or cpu.bwd(*a)))
    x = X.clone().requires_grad_()
    y = rms_norm(x, W, backend="cpu")
    with use_backend("cuda"):
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
    assert seen == ["cpu"]
    assert x.grad is not None


def test_cuda_kernels_run_on_their_tensors_gpu(ran, monkeypatch):
    """They take pointers and a stream, and would be launched on the current GPU, whichever that is."""
    visited = []

    @contextlib.contextmanager
    def device(which):
        visited.append(which)
        yield
        visited.append("back")

    monkeypatch.setattr(torch.cuda, "device", device)
    x, weight = torch.randn(2, 8, requires_grad=True), torch.ones(8)
    for elsewhere, expected in ((False, []), (True, [x.device, "back"] * 2)):
        visited.clear()
        monkeypatch.setattr(dispatch, "_elsewhere", lambda _, elsewhere=elsewhere: elsewhere)
        rms_norm(x, weight, backend="cuda").sum().backward()
        assert visited == expected


def test_compiled_code_follows_the_context(ran):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: rms_norm(x, w), fullgraph=True, backend="aot_eager")
    compiled(X, W)
    with use_backend("cuda"):
        compiled(X, W)
    compiled(X, W)
    assert ran == ["cpu", "cuda", "cpu"]


@pytest.fixture
def through(monkeypatch):
    """How often a call goes through torch's dispatcher."""
    calls = []
    overload = RMS_NORM.fwd.overload
    monkeypatch.setattr(RMS_NORM.fwd, "overload", lambda *args: calls.append(args) or overload(*args))
    return calls


def test_plain_calls_spare_the_dispatcher(ran, through):
    x = X.clone().requires_grad_()
    rms_norm(X, W)
    rms_norm(x, torch.nn.Parameter(W)).sum().backward()
    assert ran == ["cpu", "cpu"]
    assert through == []


class Noting(TorchDispatchMode):
    """Notes the ops that pass by."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Everywhere(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_modes_see_the_op(ran, through):
    for x in (X, X.clone().requires_grad_()):
        with Noting() as mode:
            y = rms_norm(x, W)
            if y.requires_grad:
                y.sum().backward()
                assert "pyllm.rms_norm_bwd.default" in mode.seen
        assert "pyllm.rms_norm.default" in mode.seen
    with Everywhere():
        rms_norm(X, W)
    assert len(through) == 3


def test_fake_tensors_reach_no_kernel(ran, through):
    with FakeTensorMode() as mode:
        x, w = mode.from_tensor(X), mode.from_tensor(W)
        assert rms_norm(x, w).shape == X.shape
    assert type(rms_norm(x, w)) is FakeTensor  # also where the mode has ended
    assert ran == []
    assert len(through) == 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*Profiler clears events")
def test_profiler_and_tracer_see_the_op(ran, through):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        rms_norm(X, W)
    assert "pyllm::rms_norm" in {event.key for event in profile.key_averages()}
    traced = torch.jit.trace(lambda x: rms_norm(x, W), (X,), check_trace=False)
    assert "pyllm::rms_norm" in str(traced.graph)
    graph = make_fx(lambda x: rms_norm(x, W))(X)
    assert "pyllm.rms_norm" in graph.code


def test_an_op_on_another_class_of_tensor_is_its_to_handle(ran, through):
    class Mine(torch.Tensor):
        pass

    rms_norm(X.as_subclass(Mine), W)
    assert len(through) == 1


def test_falling_to_eager_on_a_gpu_warns_once():
    op = RMS_NORM
    fake_gpu = torch.device("cuda", 0)
    op._warned = False
    impls, op.impls = op.impls, {"eager": reference.EAGER}
    try:
        with pytest.warns(UserWarning, match=r"rms_norm runs as eager PyTorch on cuda:0.*triton: no triton kernel"):
            assert op.select(None, fake_gpu, X, W, 1e-6, 0.0) == "eager"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert op.select(None, fake_gpu, X, W, 1e-6, 0.0) == "eager"  # once
            op._warned = False
            assert op.select("eager", fake_gpu, X, W, 1e-6, 0.0) == "eager"  # who asks for eager knows
            assert op.select(None, torch.device("cpu"), X, W, 1e-6, 0.0) == "eager"  # no GPU, nothing lost
    finally:
        op.impls, op._warned = impls, False


def test_table_names_every_op_and_spells_out_reasons():
    text = describe()
    for word in ("rms_norm", "add_rms_norm", "triton", "cuda", "cpu", "eager", "runs on"):
        assert word in text
    if not torch.cuda.is_available():
        assert "[1]" in text


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_works_without_compiled_modules_and_without_triton():
    """A broken or absent backend is a reason in the table, never an ImportError."""
    code = """
import sys, importlib.abc
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("pyllm.kernels._cpu", "pyllm.kernels._cuda", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
from pyllm.kernels import rms_norm, describe
x = torch.ones(2, 4, requires_grad=True)
rms_norm(x, torch.ones(4)).sum().backward()
print(describe())
"""
    text = run_python(code, CUDA_VISIBLE_DEVICES="")  # torch itself wants Triton where it sees a GPU
    assert "_cpu is not built" in text
    assert "_cuda is not built" in text
    assert "eager" in text.splitlines()[1].split()[-1]


def test_is_not_the_public_package_called_kernels():
    """From the repository's root `import kernels` finds our folder: nobody may get anything out of it."""
    code = "try:\n    from kernels import rms_norm\nexcept ImportError as e: print(e)"
    assert "imported as pyllm.kernels" in run_python(code)


def test_transformers_can_be_imported_from_the_repository_root():
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert run_python("from transformers import LlamaForCausalLM; print('fine')") == "fine"
