"""Fixtures for every test, and the Triton interpreter where there is no GPU."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, at import

# Kernels that only Hopper has are tested by name; all other tests are of those that every GPU runs.
os.environ.setdefault("PYLLM_HOPPER", "0")
os.environ.setdefault("PYLLM_GLUON", "0")

import pytest

from pyllm.kernels import triton_support


def _repair_bfloat16() -> None:
    """What Triton 3.6's interpreter gets wrong about bfloat16, done as a GPU does it.

    It truncates float32 to bfloat16 where a GPU rounds to nearest, and its `tl.dot` multiplies the raw 16 bits as
    integers.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert_float, create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert(data, input_dtype, output_dtype, rounding_mode):
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            exact = torch.from_numpy(np.frombuffer(data.tobytes(), dtype=np.float32).copy())
            return exact.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
        return convert_float(data, input_dtype, output_dtype, rounding_mode)

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return create_dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


if triton_support.INSTALLED and triton_support.INTERPRET:
    _repair_bfloat16()


def pytest_configure(config: pytest.Config) -> None:
    # xdist workers share the cores: one thread each, or OpenMP's barriers spin against each other.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


_failed = False  # a test of this worker's


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _failed
    _failed = _failed or report.failed


def pytest_runtest_logfinish() -> None:
    """After an illegal access nothing runs on the GPU in this process any more: xdist then starts a new one."""
    if not (_failed and torch.cuda.is_available() and os.environ.get("PYTEST_XDIST_WORKER")):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = {
        outcome: sum("planted_bug_is_noticed" in report.nodeid for report in terminalreporter.stats.get(outcome, ()))
        for outcome in ("passed", "failed")
    }
    if total := sum(counts.values()):
        terminalreporter.write_line(f"planted bugs: {counts['passed']} of {total} noticed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
