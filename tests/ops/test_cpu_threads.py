"""The C++ kernels and threads: the same bits for any number of them, and work in forked processes.

Every op with a "cpu" row is tried on its own test cases; kernels are told to use threads however small the work is.
"""

from __future__ import annotations

import functools
import hashlib
import os
import select
import signal

import pytest
import torch
from harness.accuracy import run
from harness.machines import arguments
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyllm.kernels import OPS
from pyllm.kernels.extension import cpu

pytestmark = pytest.mark.skipif(cpu.module is None, reason=cpu.reason or "built")

SERVED = [name for name, spec in OPS.items() if "cpu" in spec.op.impls]
# Their products are torch's, whose own threads do not survive a fork.
USES_TORCH = {"linear_cross_entropy"}


@pytest.fixture(autouse=True)
def threads_for_all():
    """Threads even for small inputs, and as many afterwards as before."""
    before, count = cpu.module.set_serial_elements(0), torch.get_num_threads()
    yield
    cpu.module.set_serial_elements(before)
    torch.set_num_threads(count)


def inputs_of(name: str, case: str, dtype: torch.dtype) -> dict:
    spec = OPS[name]
    inputs = spec.inputs(**spec.cases[case], dtype=dtype, generator=torch.Generator().manual_seed(3))
    if reasons := spec.op.why_not("cpu", *arguments(inputs, spec.op)):
        pytest.skip("; ".join(reasons))
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "case"), [(name, case) for name in SERVED for case in OPS[name].cases])
def test_the_same_bits_for_any_number_of_threads(name, case, dtype):
    spec = OPS[name]
    inputs = inputs_of(name, case, dtype)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(run(functools.partial(spec.function, backend="cpu"), inputs, spec.grads))
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value.nan_to_num(), other[key].nan_to_num()), key


def calls_of(name: str) -> list[tuple]:
    """(registered op, arguments) of a forward and a backward of the op's first case."""
    spec = OPS[name]
    inputs = inputs_of(name, next(iter(spec.cases)), torch.float32)
    recorded = []
    before = spec.op.fwd, spec.op.bwd

    def recording(op):
        def call(*args):
            recorded.append((op, args))
            return op(*args)

        return call

    spec.op.fwd, spec.op.bwd = recording(before[0]), recording(before[1]) if before[1] else None
    try:
        run(functools.partial(spec.function, backend="cpu"), inputs, spec.grads)
    finally:
        spec.op.fwd, spec.op.bwd = before
    return [(op, [a.detach() if isinstance(a, Tensor) else a for a in args]) for op, args in recorded]


def digest(calls: list[tuple]) -> bytes:
    """Of all results, computed without torch's threads."""
    found = hashlib.sha256()
    with torch.no_grad():
        for op, args in calls:
            results = op(*args)
            for result in results if isinstance(results, tuple | list) else (results,):
                if result is not None:
                    found.update(bytes(result.detach().contiguous().view(torch.uint8).numpy().data))
    return found.digest()


def in_child(function, seconds: float = 20.0) -> bytes | None:
    """What function() returns in a forked process; None when it says nothing for so long."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, function())
        finally:
            os._exit(0)
    os.close(write)
    try:
        ready, _, _ = select.select([read], [], [], seconds)
        return os.read(read, 64) if ready else None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*")
@pytest.mark.parametrize("name", [name for name in SERVED if name not in USES_TORCH])
def test_a_forked_process_computes_the_same(name):
    """With two threads in the parent, and two wanted in the child, OpenMP would wait for threads that aren't there."""
    torch.set_num_threads(2)
    calls = calls_of(name)
    expected = digest(calls)
    assert in_child(lambda: digest(calls)) == expected
    assert digest(calls) == expected  # and the parent goes on


class Uses(Dataset):
    """Items that are computed with an op."""

    def __init__(self, calls: list[tuple]):
        self.calls = calls

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(list(digest(self.calls)))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*")
def test_data_loader_workers():
    torch.set_num_threads(2)
    calls = [call for name in SERVED for call in calls_of(name)]
    expected = list(digest(calls))
    loader = DataLoader(Uses(calls), batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert [item.flatten().tolist() for item in loader] == [expected] * 4
