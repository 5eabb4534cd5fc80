"""The GPU benchmarks' own parts, tried on the CPU with small shapes: what is timed must run, and be the same thing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from harness.accuracy import InaccurateError

from benchmarks import clock, rivals, table, test_gpu
from benchmarks.cases import GPU_CASES, GpuCase
from benchmarks.roofline import Ceilings, score
from pyllm.kernels import OPS
from pyllm.kernels.spec import Cost

SMALL = {
    "rms_norm": dict(shape=(6, 40)),
    "add_rms_norm": dict(shape=(6, 40)),
    "apply_rope": dict(B=1, T=6, H=4, Hkv=2, D=16),
    "qk_norm_rope": dict(B=1, T=6, H=4, Hkv=2, D=16),
    "swiglu": dict(shape=(6, 40)),
    "swiglu_packed": dict(shape=(6, 40)),
    "cross_entropy": dict(shape=(6, 40)),
    "linear_cross_entropy": dict(shape=(6, 16), V=40),
    "attention": dict(B=2, T=20, S=20, H=4, Hkv=2, D=16, causal=True),
    "attention_decode": dict(B=2, T=1, S=20, H=4, Hkv=2, D=16),
    "sample": dict(shape=(6, 40), top_k=9, top_p=0.9),
}
CASES = [dataclasses.replace(next(c for c in GPU_CASES if c.op == op), parameters=p) for op, p in SMALL.items()]


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")


def test_every_benchmarked_op_has_a_small_case():
    assert SMALL.keys() == {case.op for case in GPU_CASES}
    assert SMALL.keys() <= OPS.keys()


@pytest.mark.parametrize("who", ["eager", "triton", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.op)
def test_contenders_compute_the_same(case, who):
    for passed in case.passes:
        given = case.inputs(torch.float32, "cpu")
        expected = test_gpu._tuple(OPS[case.op].eager(**given))
        function = test_gpu.contender(who, case, passed, case.inputs(torch.float32, "cpu"))
        for got, want in zip(test_gpu._tuple(function(**given)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        call = test_gpu.timed_call(function, case, passed, case.inputs(torch.float32, "cpu"))
        for first, second in zip(test_gpu._tuple(call()), test_gpu._tuple(call()), strict=True):
            assert torch.equal(first, second)


def test_wrong_kernels_are_refused(monkeypatch):
    case = CASES[0]
    spec = OPS[case.op]
    test_gpu.check_accuracy(case, "eager", torch.float32)
    monkeypatch.setitem(
        OPS, case.op, dataclasses.replace(spec, function=lambda **given: spec.function(**given) * 1.001)
    )
    with pytest.raises(InaccurateError):
        test_gpu.check_accuracy(case, "eager", torch.float32)


def test_large_cases_are_checked_at_fewer_rows(monkeypatch):
    monkeypatch.setattr(test_gpu, "CHECKED", 40 * 40)
    seen = []
    monkeypatch.setattr(test_gpu, "check", lambda spec, function, inputs: seen.append(inputs["x"].shape))
    test_gpu.check_accuracy(GpuCase("rms_norm", "", dict(shape=(1000, 40))), "eager", torch.float32)
    assert seen == [(31, 40)]


class FakeEvent:
    """A CUDA event whose time the test sets."""

    now = 0.0
    waited = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        FakeEvent.waited += 1

    def elapsed_time(self, other):
        return other.at - self.at


def test_instants_subtract_to_device_seconds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    FakeEvent.now, FakeEvent.waited = 5.0, 0
    start = clock.Instant()
    FakeEvent.now = 7.5  # milliseconds
    assert clock.Instant() - start == pytest.approx(2.5e-3)
    assert FakeEvent.waited == 1


def test_score_by_hand():
    ceilings = Ceilings(copy=4e12, read=4e12, matmul=800e12, matmul32=50e12)
    memory = score(Cost(bytes=4_000_000_000, flops=10), 2e-3, ceilings, torch.bfloat16)
    assert (memory.bandwidth, memory.of_copy, memory.of_roofline) == pytest.approx((2e12, 0.5, 0.5))
    arithmetic = score(Cost(bytes=1000, flops=800_000_000_000), 2e-3, ceilings, torch.bfloat16)
    assert (arithmetic.rate, arithmetic.of_roofline) == pytest.approx((400e12, 0.5))


def test_table_marks_what_is_within_the_noise():
    ceilings = Ceilings(copy=4e12, read=4e12, matmul=800e12, matmul32=50e12)
    rows = [
        dict(op="rms_norm", passed="forward", case="8x8", dtype="bfloat16", who=who, seconds=seconds, spread=1e-7,
             bytes=1000, flops=10, peak=1 << 20)
        for who, seconds in (("eager", 10e-6), ("triton", 9.8e-6), ("cuda", 5e-6), ("eager again", 10.5e-6))
    ]  # fmt: skip
    text = list(table.gpu_table(rows, ceilings))
    assert any(line.startswith("triton") and "1.02=" in line for line in text)
    assert any(line.startswith("cuda") and "2.00 " in line for line in text)
    assert not any(line.startswith("eager again") for line in text)


def test_liger_says_why_not():
    found, reason = rivals.liger()
    assert found or "not installed" in reason
