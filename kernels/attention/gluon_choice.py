"""Whether the Gluon forward (`gluon_fwd.py`) can run an input. Imports Triton only when everything else has agreed."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import math
import os

import torch
from torch import Tensor

from .. import triton_support

HEAD_DIMS = (64, 128, 256)
# What gluon_fwd.py takes from Gluon, which is experimental and moves: names, and the arguments that they must have.
_API: dict[str, dict[str, tuple[str, ...]]] = {
    "triton.experimental.gluon": {"jit": ("do_not_specialize",), "constexpr_function": ()},
    "triton.experimental.gluon.language": {
        "NVMMADistributedLayout": ("version", "warps_per_cta", "instr_shape"),
        "NVMMASharedLayout": ("swizzle_byte_width", "element_bitwidth", "rank"),
        "DotOperandLayout": ("operand_index", "parent", "k_width"),
        "BlockedLayout": ("size_per_thread", "threads_per_warp", "warps_per_cta", "order"),
        "SliceLayout": ("dim", "parent"),
        "allocate_shared_memory": ("element_ty", "shape", "layout"),
        "warp_specialize": ("functions_and_args", "worker_num_warps", "worker_num_regs"),
    },
    "triton.experimental.gluon.language.nvidia.hopper": {
        "fence_async_shared": (),
        "warpgroup_mma": ("a", "b", "acc", "use_acc", "is_async"),
        "warpgroup_mma_wait": ("num_outstanding", "deps"),
    },
    "triton.experimental.gluon.language.nvidia.hopper.mbarrier": {
        "MBarrierLayout": (),
        "init": ("mbarrier", "count"),
        "wait": ("mbarrier", "phase"),
        "expect": ("mbarrier", "bytes"),
        "arrive": ("mbarrier", "count"),
    },
    "triton.experimental.gluon.language.nvidia.hopper.tma": {
        "async_copy_global_to_shared": ("tensor_desc", "coord", "barrier", "result"),
    },
    "triton.experimental.gluon.nvidia.hopper": {
        "TensorDescriptor": ("base", "shape", "strides", "block_shape", "layout"),
    },
}


def wanted(on_gpu: bool, D: int) -> bool:
    """Whether the Gluon forward is to run where it can.

    On a GPU it is, for the head dimensions at which it is the faster one (docs/results.md): 1.3 times at 128 and 256,
    but 0.9 times at 64. PYLLM_GLUON=0 forbids it, PYLLM_GLUON=1 wants it at 64 too.
    """
    asked = os.environ.get("PYLLM_GLUON", "")
    return asked != "0" if asked else on_gpu and D > 64


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    *,
    capability: tuple[int, int] | None,
) -> list[str]:
    """Reasons against the Gluon forward, whose arguments are those of the op; empty: it can run this.

    capability: of q's GPU, as torch.cuda.get_device_capability says; None for a device that has none.
    """
    if capability != (9, 0) or torch.version.hip:
        return ["the GPU is not a Hopper (compute capability 9.0)"]
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {q.dtype} is not a 16-bit one")
    if q.shape[-1] not in HEAD_DIMS:
        reasons.append(f"head_dim {q.shape[-1]} is not one of {', '.join(map(str, HEAD_DIMS))}")
    if left >= 0 or right > 0:
        reasons.append("a window")
    if softcap:
        reasons.append("a softcap")
    if sinks is not None:
        reasons.append("sinks")
    if not 0 < scale < math.inf:  # the maximum of scaled scores is taken as the scaled maximum
        reasons.append(f"softmax_scale {scale} is not positive and finite")
    if q.numel() == 0 or k.numel() == 0:
        reasons.append("no queries or no keys")
    else:
        reasons += [reason for name, x in (("q", q), ("k", k), ("v", v)) for reason in _why_no_tma(name, x)]
    if not reasons and (missing := missing_api()):
        reasons.append(missing)
    return reasons


def _why_no_tma(name: str, x: Tensor) -> list[str]:
    """What keeps the TMA unit from reading x (..., rows, heads, D) with 16-bit elements."""
    if x.data_ptr() % 16:
        return [f"{name} is not aligned to 16 bytes"]
    if x.is_contiguous():  # a head is whole 16 bytes
        return []
    if x.stride(-1) != 1:
        return [f"{name}'s last dimension is not contiguous"]
    inner = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if size == 1:  # its stride is never used
            continue
        if stride < inner or (stride != 1 and stride % 8):
            return [f"{name}'s strides {tuple(x.stride())} are not rising multiples of 8 from the last on"]
        inner = size * stride
    return []


@functools.cache
def missing_api() -> str:
    """What the installed Triton lacks of the Gluon that the kernel is written in; empty when it has all of it."""
    if not triton_support.INSTALLED:
        return "Triton is not installed"
    if triton_support.INTERPRET:
        return "Triton's interpreter does not run Gluon"
    version = importlib.metadata.version("triton")
    for module, names in _API.items():
        try:
            found = importlib.import_module(module)
        except ImportError as failure:
            return f"Triton {version} has no usable {module} ({failure})"
        for name, arguments in names.items():
            if not hasattr(found, name):
                return f"Triton {version}: {module} has no {name}"
            has = inspect.signature(getattr(found, name)).parameters
            if lacking := [a for a in arguments if a not in has]:
                return f"Triton {version}: {module}.{name} takes no {', '.join(lacking)}"
    return ""
