"""Whether Triton can be used. Imports no Triton: that costs a second, and may be impossible."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # somebody's import hook forbids it, or a half-made module stands in its place
        return False


INSTALLED = _installed()
# Triton reads this once, when it is imported; under its interpreter the kernels run on CPU tensors.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(*tensors: torch.Tensor | None) -> list[str]:
    """Reasons against Triton that hold for every op: not installed, device, dtype."""
    if not INSTALLED:
        return ["Triton is not installed (pip install triton)"]
    for t in tensors:
        if t is None:
            continue
        if t.device.type != "cuda" and not (INTERPRET and t.device.type == "cpu"):
            return [f"a tensor is on {t.device}: Triton needs a GPU, or TRITON_INTERPRET=1 set before it is imported"]
        if t.dtype not in DTYPES:
            return [f"dtype {t.dtype} is not served"]
    return []


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Makes x's GPU the current one for a launch: Triton launches on the current device, whatever its pointers say."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few under the interpreter, so that tests see several programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's data-center GPUs, 32 elsewhere."""
    return 64 if device.type == "cuda" and torch.version.hip else 32


# Triton's own cdiv and next_power_of_2 take 4 and 6 microseconds a call, as much as a launch.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
