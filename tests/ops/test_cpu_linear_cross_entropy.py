"""linear_cross_entropy in C++: chunks, gradients computed in the forward, what is skipped, memory, threads."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from harness.accuracy import check, run

from pyllm.kernels import OPS, linear_cross_entropy
from pyllm.kernels.cross_entropy import bindings, step

SPEC = OPS["linear_cross_entropy"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
on_cpu = functools.partial(linear_cross_entropy, backend="cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def many_chunks(monkeypatch):
    """12 rows at a time."""
    monkeypatch.setattr(bindings, "CHUNK_BYTES", 0)
    monkeypatch.setattr(bindings, "CHUNK_ROWS", 1)


@pytest.fixture
def steps(monkeypatch) -> list[str]:
    """Training takes the step however small it is; how its backward went is noted."""
    went: list[str] = []
    monkeypatch.setattr(step, "LEAST_LOGITS", 0)

    def noted(name: str, function):
        def call(*args):
            went.append(name)
            return function(*args)

        return call

    cpu = bindings.CPU_LINEAR
    monkeypatch.setattr(bindings, "CPU_LINEAR", cpu._replace(bwd=noted("made again", cpu.bwd)))
    monkeypatch.setattr(step, "_finished", noted("finished", step._finished))
    return went


def drawn(N: int = 30, C: int = 20, V: int = 70, dtype: torch.dtype = torch.float32):
    x, w = torch.randn(N, C).to(dtype).requires_grad_(), torch.randn(V, C).to(dtype).requires_grad_()
    target = torch.randint(V, (N,))
    target[::4] = -100
    return x, w, target


def test_chunks_cover_all_rows(monkeypatch):
    for budget in (0, 1 << 12, 1 << 20, 1 << 30):
        monkeypatch.setattr(bindings, "CHUNK_BYTES", budget)
        for N, V in ((0, 5), (1, 5), (191, 1000), (193, 1000), (1000, 77), (5000, 128256)):
            spans = bindings.chunks(N, V)
            assert [i for span in spans for i in range(span.start, span.stop)] == list(range(N))
            longest = max((s.stop - s.start for s in spans), default=0)
            assert longest <= max(bindings.CHUNK_ROWS, budget // (4 * V)) + bindings.STRIP


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("case", SPEC.cases)
def test_every_case_in_many_chunks(many_chunks, steps, case: str, reduction: str, dtype: torch.dtype):
    given = SPEC.cases[case]
    shape = (3, *given["shape"])  # more rows than a chunk
    inputs = SPEC.inputs(**{**given, "shape": shape, "reduction": reduction}, dtype=dtype)
    check(SPEC, on_cpu, inputs)
    assert "made again" not in steps and bool(steps) == (reduction != "none")


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("wants", ("input", "weight", "bias", "all"))
def test_gradients_that_are_not_wanted_are_not_computed(many_chunks, steps, wants: str, reduction: str, monkeypatch):
    products: list[tuple[int, ...]] = []
    plain = bindings.product
    monkeypatch.setattr(
        bindings, "product", lambda a, b, out, **o: (products.append(tuple(out.shape)), plain(a, b, out, **o))[1]
    )
    x, w, target = drawn()
    bias = torch.randn(70).requires_grad_()
    leaves = {"input": x, "weight": w, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(wants in (name, "all"))
    loss = on_cpu(x, w, target, linear_bias=bias, reduction=reduction).sum()
    loss.backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (wants in (name, "all"))
    made = {"input": (12, 20), "weight": (70, 20)}
    for name, shape in made.items():
        assert (shape in products) == (wants in (name, "all")), name


def test_rows_with_their_own_upstream_gradient(steps):
    """dloss that differs between rows: the logits are made again, the result is the same."""
    x, w, target = drawn()
    upstream = torch.randn(30)
    loss, predictions = step.LinearStep.apply(x, w, target, None, None, -100, 0.0, 0.0, 0.0, False)
    got = torch.autograd.grad(loss, (x, w), upstream)
    expected = torch.autograd.grad(F.cross_entropy(x @ w.t(), target, reduction="none"), (x, w), upstream)
    assert steps == ["made again"] and predictions.numel() == 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", (1.0, 3.0, 0.0))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_graph_walked_twice(steps, dtype: torch.dtype, factor: float):
    x, w, target = drawn(dtype=dtype)
    loss = on_cpu(x, w, target) * factor
    first = [g.clone() for g in torch.autograd.grad(loss, (x, w), retain_graph=True)]
    second = torch.autograd.grad(loss, (x, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(g.dtype == dtype for g in second)


def test_float32_means_need_no_second_matrix(steps):
    """dloss is what the forward took it to be: its gradients are handed on, without a copy."""
    x, w, target = drawn()
    torch.autograd.grad(on_cpu(x, w, target), (x, w))
    torch.autograd.grad(on_cpu(x, w, target, reduction="sum") / (target != -100).sum(), (x, w))
    assert steps == []
    torch.autograd.grad(on_cpu(x, w, target, reduction="sum"), (x, w))
    assert set(steps) == {"finished"}


@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_all_rows_ignored(steps, reduction: str):
    x, w, target = drawn()
    target.fill_(-100)
    loss = on_cpu(x, w, target, reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss == 0
    for grad in torch.autograd.grad(loss, (x, w)):
        assert not grad.any()


def test_a_bad_target_in_a_later_chunk(many_chunks, steps):
    x, w, target = drawn()
    target[29] = 70
    for wanted in (True, False):
        with pytest.raises(IndexError, match=r"target must be a class in \[0, 70\) or ignore_index \(-100\), got 70"):
            on_cpu(x.requires_grad_() if wanted else x.detach(), w if wanted else w.detach(), target)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_registered_step_passes_opcheck(dtype: torch.dtype):
    x, w, target = (t.detach() for t in drawn(dtype=dtype))
    for bias, weight, predict, needs in (
        (None, None, False, (True, True, False)),
        (torch.randn(70), torch.rand(70), True, (True, False, True)),
    ):
        given = (x, w, target, bias, weight)
        options = (-100, 0.1, 1e-3, 5.0)
        torch.library.opcheck(step.LINEAR_STEP.fwd.overload, (*given, *options, predict, *needs, "cpu"))
        loss, lse, _, *unfinished = step.LINEAR_STEP.fwd(*given, *options, predict, *needs, "cpu")
        saved = (*unfinished, x, w, lse, target, bias, weight)
        for dloss in (torch.ones_like(loss), torch.randn_like(loss)):
            torch.library.opcheck(step.LINEAR_STEP.bwd.overload, (dloss, *saved, *options, *needs, "cpu"))


def test_compiled_step(steps):
    x, w, target = drawn()
    inputs = dict(input=x.detach(), linear_weight=w.detach(), target=target)
    torch._dynamo.reset()
    compiled = torch.compile(on_cpu, fullgraph=True, backend="aot_eager", dynamic=False)
    expected, got = run(on_cpu, inputs, ("input", "linear_weight")), run(compiled, inputs, ("input", "linear_weight"))
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_same_bits_for_any_number_of_threads(many_chunks, dtype: torch.dtype):
    x, w, target = drawn(100, 64, 3000, dtype)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            loss = on_cpu(x, w, target)
            results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def peak(function) -> int:
    """The most bytes that function() holds beyond what was there, by the allocator's own record."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        most = max(most, live)
    return most


def expected_peak(N: int, V: int, C: int) -> int:
    """float32 bytes of the training step: the matrix's gradient, a chunk of logits, the input's gradient."""
    return 4 * (V * C + bindings.chunks(N, V)[0].stop * V + N * C)


def test_peak_memory(monkeypatch):
    """A quarter of eager's at most, for the shape of a small model: by formulas that hold at a smaller one."""
    N, V, C = 1024, 32000, 512
    assert expected_peak(N, V, C) <= 3 * N * V * 4 / 4
    N, V, C = 128, 4000, 64
    monkeypatch.setattr(bindings, "CHUNK_BYTES", bindings.CHUNK_BYTES // 64)
    monkeypatch.setattr(bindings, "CHUNK_ROWS", 1)
    x, w, target = drawn(N, C, V)

    def call(function):
        return lambda: torch.autograd.grad(function(x, w, target), (x, w))

    assert peak(call(lambda x, w, target: F.cross_entropy(F.linear(x, w), target))) >= 3 * N * V * 4
    assert peak(call(on_cpu)) == pytest.approx(expected_peak(N, V, C), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, share", ((torch.float32, 0.25), (torch.bfloat16, 0.26)), ids=str)
def test_peak_memory_of_the_real_shape(dtype: torch.dtype, share: float):
    """In bfloat16 the peak is where the matrix's gradient is there twice, in float32 and rounded."""
    x, w, target = drawn(1024, 512, 32000, dtype)
    assert peak(lambda: torch.autograd.grad(on_cpu(x, w, target), (x, w))) <= 3 * 1024 * 32000 * 4 * share
