"""How many rounds of a benchmark fit into the time that is left for its kind, and whether any do."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.results import SHED
from pyllm.kernels.products import torch_is_fast

FEWEST = 2  # rounds without which there is no median to speak of
HALF_RATE = 3e9  # operations a second of torch's products in half precision where the CPU has no instructions for them


def rounds(deadline: float, seconds: float, wanted: int, share: float = 0.5, before: float = 0.0) -> int:
    """Rounds that fit, at most those wanted; skips the test when fewer than FEWEST do.

    Args:
        deadline: `time.monotonic()` by which this kind of benchmark should be done; inf: all that are wanted.
        seconds: that a round takes, all contenders together.
        share: of what is left that one benchmark may have, so that something is left for the next.
        before: seconds that it takes to get ready.
    """
    left = deadline - time.monotonic()
    if left == float("inf"):
        return wanted
    if left < 0:
        pytest.skip(SHED)
    fit = int((share * left - before) / max(seconds, 1e-9))
    if fit < FEWEST:
        pytest.skip(f"shed: a round takes some {seconds:.1f} s, and {left:.0f} s of the time budget are left")
    return min(wanted, fit)


def expected(flops: float, dtype: torch.dtype) -> float:
    """Seconds below which torch can't be, where it is known to be very slow: there to try a call may take a minute."""
    return 0.0 if torch.cuda.is_available() or torch_is_fast(dtype) else flops / HALF_RATE
