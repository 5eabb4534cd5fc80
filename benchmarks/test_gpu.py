"""Every op x backend x rival on this machine's GPU: `pytest benchmarks --benchmark-only -k gpu`.

Device time, cold L2, no launch gaps (clock.py), against ceilings measured in this run (roofline.py). A kernel that
fails its accuracy check is not timed. Eager is timed twice: a difference within what those two differ by is none.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.accuracy import InaccurateError, check

from benchmarks import rivals, roofline
from benchmarks.cases import GPU_CASES, GpuCase
from benchmarks.clock import GRAPH_BELOW, Cold, Instant, graph, probe, warm_up
from pyllm.kernels import OPS
from pyllm.kernels.attention import bindings_cuda, gluon_choice

BACKENDS = ("triton", "cuda")
# Forwards for Hopper, beside those for all GPUs: the backend that they are part of, the variable that asks for them.
ASKED_FOR = {"cuda, Hopper": ("cuda", "PYLLM_HOPPER"), "triton, Gluon": ("triton", "PYLLM_GLUON")}
WHO = ("eager", *BACKENDS, *ASKED_FOR, *rivals.NAMES, "eager again")
ROUNDS = 30
DEVICE = "cuda"
BY_PRODUCTS = ("attention", "linear_cross_entropy")  # bound by products: their bytes are no measure
CHECKED = 1 << 22  # elements of the largest tensor of a case that is checked in float64 before it is timed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def contender(who: str, case: GpuCase, passed: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    """The function to time; skips with the reason when there is none."""
    if who in ASKED_FOR:
        if reason := why_not_asked_for(who, case, passed, inputs):
            pytest.skip(f"{who}: {reason}")
        return contender(ASKED_FOR[who][0], case, passed, inputs)
    if who in BACKENDS:
        spec = OPS[case.op]
        args = [inputs.get(a.name) for a in spec.op.fwd._schema.arguments[:-1]]
        if reasons := spec.op.why_not(who, *args):
            pytest.skip(f"{who}: {'; '.join(reasons)}")
        return functools.partial(spec.function, backend=who)
    found, reason = rivals.EAGER, ""
    if who in rivals.SDPA:
        found, reason = {"attention": rivals.sdpa_by(who)}, "it is a kernel of attention"
    elif who == "torch":
        found, reason = rivals.TORCH, "torch has no fused op for it"
    elif who == "liger":
        found, reason = rivals.liger()
        reason = reason or "Liger has none"
    if case.op not in found:
        pytest.skip(reason or "no eager form")
    if (who, case.op) in rivals.CONSUMES_ITS_INPUT and passed != "step":
        pytest.skip(f"{who} overwrites its inputs: only a whole step of it can be timed")
    if who == "compile":
        torch._dynamo.reset()  # every case is compiled for its own shape
        return torch.compile(found[case.op], dynamic=False)
    return found[case.op]


def why_not_asked_for(who: str, case: GpuCase, passed: str, inputs: dict[str, Any]) -> str:
    """Reasons against one of ASKED_FOR; empty when it is what runs where its variable is set."""
    if case.op != "attention" or passed == "backward":
        return "it is a forward of attention"
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if who.startswith("cuda"):
        if reasons := OPS["attention"].op.why_not("cuda", q, k, v):
            return "; ".join(reasons)
        return "; ".join(bindings_cuda.why_not_hopper(q, k, v))
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    options = (None, None, None, q.shape[-1] ** -0.5, -1, 0, 0.0)
    return "; ".join(gluon_choice.why_not(q, k, v, *options, capability=capability))


def timed_call(function: Callable[..., Any], case: GpuCase, passed: str, inputs: dict[str, Any]) -> Callable[[], Any]:
    """What one call is: forward, backward alone (the graph is kept), or both."""
    leaves = [inputs[name] for name in OPS[case.op].grads if inputs.get(name) is not None]
    for leaf in leaves:
        leaf.requires_grad_(passed != "forward")
    if passed == "forward":
        return functools.partial(function, **inputs)
    outputs = _tuple(function(**inputs))
    upstream = [torch.randn_like(out) for out in outputs]
    if passed == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(_tuple(function(**inputs)), leaves, upstream)


def in_rotation(
    function: Callable[..., Any], case: GpuCase, passed: str, dtype: torch.dtype, inputs: dict[str, Any]
) -> list[Callable[[], Any]]:
    """Calls over as many sets of inputs as overflow L2 three times, so that none finds its inputs there."""
    L2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    size = sum(v.nbytes for v in inputs.values() if isinstance(v, torch.Tensor))
    sets = min(200, max(8, -(-3 * L2 // max(1, size))))
    return [timed_call(function, case, passed, case.inputs(dtype, DEVICE, seed)) for seed in range(sets)]


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def check_accuracy(case: GpuCase, who: str, dtype: torch.dtype) -> None:
    """The numerics rule at the case's own shape, or at fewer rows where float64 of all of them would not fit."""
    small = dict(case.parameters)
    who = ASKED_FOR.get(who, (who,))[0]
    while True:
        inputs = GpuCase(case.op, case.title, small, drop=case.drop).inputs(dtype, DEVICE, seed=2)
        largest = max(v.numel() for v in inputs.values() if isinstance(v, torch.Tensor))
        if case.op == "attention":
            largest = max(largest, small["B"] * small["H"] * small["T"] * small["S"])
        if largest <= CHECKED:
            break
        shrunk = _halved(small)
        if shrunk == small:
            break
        small = shrunk
    check(OPS[case.op], functools.partial(OPS[case.op].function, backend=who), inputs)


def _halved(parameters: dict[str, Any]) -> dict[str, Any]:
    """Half the rows, tokens or sequences."""
    changed = dict(parameters)
    if "shape" in changed and changed["shape"][0] > 32:
        changed["shape"] = (changed["shape"][0] // 2, *changed["shape"][1:])
    elif changed.get("B", 1) > 1:
        changed["B"] //= 2
    elif changed.get("T", 1) > 64:
        changed["T"] //= 2
        if "S" in changed:
            changed["S"] //= 2
    elif changed.get("S", 1) > 64:
        changed["S"] //= 2
    return changed


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize(
    ("case", "passed"), [pytest.param(c, p, id=f"{c.op}-{c.title}-{p}") for c in GPU_CASES for p in c.passes]
)
@pytest.mark.benchmark(timer=Instant, warmup=False)
def test_gpu(benchmark, record_gpu, deadline, monkeypatch, case, passed, who):
    if time.monotonic() > deadline:
        pytest.skip("shed: the time budget is used up")
    for name, (_, variable) in ASKED_FOR.items():
        monkeypatch.setenv(variable, str(int(who == name)))
    dtype = torch.bfloat16
    eager = who.startswith("eager")
    inputs = case.inputs(dtype, DEVICE)
    function = contender("eager" if eager else who, case, passed, inputs)
    if who in BACKENDS or who in ASKED_FOR:
        try:
            check_accuracy(case, who, dtype)
        except InaccurateError as error:
            pytest.fail(f"not timed, because it is wrong: {error}")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        call = timed_call(function, case, passed, inputs)
        warm_up(call, 0.1)
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"{who}: out of GPU memory")
    except (RuntimeError, UserWarning) as error:  # torch's reasons are warnings, which pytest makes errors
        if who not in rivals.SDPA:
            raise
        pytest.skip(f"{who}: {error}")
    peak = torch.cuda.max_memory_allocated() - before
    device, host = probe(call)
    calls = 1
    if device < GRAPH_BELOW:
        many = in_rotation(function, case, passed, dtype, inputs)
        call, calls = graph(many).replay, len(many)
    benchmark.group = f"{case.op} {passed} {case.title}"
    cold = Cold(host)
    benchmark.pedantic(call, setup=cold, rounds=ROUNDS, warmup_rounds=3)
    if not benchmark.enabled:
        return
    seconds = [s / calls for s in benchmark.stats.stats.data]
    quarter = statistics.quantiles(seconds, n=4)
    cost = OPS[case.op].cost(inputs, passed == "backward")
    if passed == "step":
        back = OPS[case.op].cost(inputs, True)
        cost = type(cost)(cost.bytes + back.bytes, cost.flops + back.flops)
    row = dict(
        op=case.op, case=case.title, passed=passed, dtype="bfloat16", who=who, seconds=statistics.median(seconds),
        spread=quarter[2] - quarter[0], host=host, peak=peak, bytes=cost.bytes, flops=cost.flops, graph_calls=calls,
    )  # fmt: skip
    if case.op not in BY_PRODUCTS:
        row["copy"] = roofline.equal_copy(int(cost.bytes))
    record_gpu.append(row)
    benchmark.extra_info.update(row)
