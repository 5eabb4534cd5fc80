"""Fixtures for every test, and the Triton interpreter where there is no GPU."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, at import

import pytest

from pyllm.kernels import triton_support


def _round_bfloat16_correctly() -> None:
    """Triton 3.6's interpreter truncates float32 to bfloat16, a GPU rounds to nearest: make it round, through torch."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, input_dtype, output_dtype, rounding_mode):
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            exact = torch.from_numpy(np.frombuffer(data.tobytes(), dtype=np.float32).copy())
            return exact.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
        return original(data, input_dtype, output_dtype, rounding_mode)

    interpreter._convert_float = convert


if triton_support.INSTALLED and triton_support.INTERPRET:
    _round_bfloat16_correctly()


def pytest_configure(config: pytest.Config) -> None:
    # xdist workers share the cores: one thread each, or OpenMP's barriers spin against each other.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
