"""`sample`: every backend draws what transformers' filters leave, with its probabilities, and survives any logits."""

from __future__ import annotations

import math

import pytest
import torch
from harness.draws import check_draws
from harness.machines import DEVICE, machine

from pyllm.kernels import sample

INF, NAN = math.inf, math.nan


@pytest.fixture(params=["cuda", "eager"])
def backend(request):
    with machine(request.param):
        yield request.param


def even(n):
    """n numbers that fill [0, 1) evenly: what is drawn by them is the distribution itself, up to 1 / n."""
    return ((torch.arange(n, dtype=torch.float64) + 0.5) / n).to(DEVICE)


def distribution(logits, n, backend, **options):
    """(V,) share of the draws that fall on each token."""
    drawn = sample(logits.to(DEVICE).expand(n, -1), even(n), **options, backend=backend)
    return torch.bincount(drawn.cpu(), minlength=logits.shape[-1]).double() / n


FILTERS = [
    dict(temperature=0.6),
    dict(top_k=3),
    dict(top_p=0.7),
    dict(min_p=0.2),
    dict(temperature=1.5, top_k=9, top_p=0.8, min_p=0.1),
    dict(top_k=1),
    dict(top_p=0.0),
    dict(top_k=50, top_p=1.0),
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_distribution_is_transformers(backend, dtype, options):
    warpers = pytest.importorskip("transformers", reason="transformers is not installed").generation.logits_process
    logits = 2 * torch.randn(24, generator=torch.Generator().manual_seed(3)).to(dtype)
    scores = logits.float()[None]
    for name, kind in (
        ("temperature", warpers.TemperatureLogitsWarper), ("top_k", warpers.TopKLogitsWarper),
        ("top_p", warpers.TopPLogitsWarper), ("min_p", warpers.MinPLogitsWarper),
    ):  # fmt: skip
        if name in options:
            scores = kind(options[name])(None, scores)
    expected = scores.double().softmax(-1)[0]
    n = 48 if backend == "cuda" and DEVICE == "cpu" else 4096  # threads that the CPU plays take their time
    found = distribution(logits, n, backend, **options)
    assert float((found - expected).abs().max()) <= 1 / n + 1e-6
    assert (found[expected == 0] == 0).all()


def test_dense_draws(backend):
    check_draws(backend, DEVICE)


def test_ties_at_the_thresholds(backend):
    """All that tie with the k-th stay; of those at top-p's threshold the first columns go, as in a stable sort."""
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    assert (distribution(logits, 64, backend, top_k=2) > 0).tolist() == [True, True, True, False, True, True]
    flat = torch.zeros(8)
    assert (distribution(flat, 64, backend, top_p=0.3) > 0).tolist() == [False] * 5 + [True] * 3
    mixed = torch.tensor([0.0, 3.0, 0.0, 3.0, 0.0, 3.0])  # three with 0.317 each
    assert (distribution(mixed, 64, backend, top_p=0.5) > 0).tolist() == [False, False, False, True, False, True]


def test_the_ends_of_the_numbers(backend):
    logits = torch.tensor([[-INF, 1.0, -INF, 0.0, -40.0, -INF]] * 2, device=DEVICE)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64, device=DEVICE)
    first, last = sample(logits, ends, backend=backend).tolist()
    assert first == 1
    assert last in (3, 4)
    assert sample(logits, ends, top_k=2, backend=backend).tolist() == [1, 3]


def test_logits_that_are_no_numbers(backend):
    rows = torch.tensor(
        [
            [NAN, 0.0, NAN, NAN],  # NaN is never drawn
            [1.0, INF, 0.0, -INF],  # an infinite one takes all
            [INF, 0.0, INF, NAN],  # or they share
            [-INF, -INF, -INF, -INF],  # nothing to draw from
            [NAN, NAN, NAN, NAN],
            [-INF, -INF, 5.0, NAN],
            [3e38, -3e38, 0.0, 0.0],
        ],
        device=DEVICE,
    )
    for options in ({}, {"top_k": 2}, {"top_p": 0.4}, {"min_p": 0.5}, {"temperature": 1e-30}):
        for u, shared in ((0.0, 0), (0.9, 2)):
            numbers = torch.full((len(rows),), u, dtype=torch.float64, device=DEVICE)
            got = sample(rows, numbers, **options, backend=backend).tolist()
            shared = 2 if "top_p" in options else shared  # of two equal ones the first goes
            assert got == [1, 1, shared, 0, 0, 2, 0], (options, u)


def test_what_is_almost_impossible_is_not_what_is_drawn(backend):
    """Masked by a large negative number, as models' heads do it; and a vocabulary of one likely token."""
    logits = torch.full((4, 1000), -1e4, device=DEVICE)
    logits[:, 700] = 0.0
    logits[:, 40] = -1.0
    assert set(sample(logits, even(4), backend=backend).tolist()) <= {40, 700}
    assert set(sample(logits, even(4), top_k=3, backend=backend).tolist()) <= {40, 700}
    assert sample(logits, even(4), top_p=0.6, backend=backend).tolist() == [700] * 4


@pytest.mark.parametrize("V", [1, 7, 1000, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts(backend, V, dtype):
    """Rows that begin anywhere, apart, transposed, repeated: the same tokens."""
    logits = 2 * torch.randn(3, V, generator=torch.Generator().manual_seed(V)).to(DEVICE, dtype)
    options = dict(top_k=40, top_p=0.9, backend=backend)
    expected = sample(logits, even(3), **options)
    wide = torch.full((3, V + 5), 100.0, device=DEVICE, dtype=dtype)
    for shift in range(1, 5):
        wide.fill_(100.0)  # what lies beside a row must not count
        given = wide[:, shift : shift + V].copy_(logits)
        assert torch.equal(sample(given, even(3), **options), expected)
    assert torch.equal(sample(logits.t().contiguous().t(), even(3), **options), expected)
    one = logits[1:2].expand(3, V)
    alone = sample(one.contiguous(), even(3), **options)
    assert torch.equal(sample(one, even(3), **options), alone)
    assert sample(logits[:0], even(0), **options).shape == (0,)


def test_generators():
    logits = torch.randn(4, 50, device=DEVICE)

    def drawn(seed):
        return sample(logits, generator=torch.Generator(DEVICE).manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert any(not torch.equal(drawn(1), drawn(seed)) for seed in range(2, 8))
    torch.manual_seed(9)
    first = sample(logits)
    torch.manual_seed(9)
    assert torch.equal(sample(logits), first)
    assert (
        torch.equal(sample(logits, generator=torch.Generator().manual_seed(1)).cpu(), drawn(1).cpu()) or DEVICE != "cpu"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_in_a_cuda_graph():
    logits, numbers = torch.randn(4, 5000, device="cuda"), even(4)
    expected = sample(logits, numbers, top_k=50, top_p=0.9, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sample(logits, numbers, top_k=50, top_p=0.9, backend="cuda")
    graph.replay()
    assert torch.equal(got, expected)
