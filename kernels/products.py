"""Matrix products on a CPU with float32 sums for half precision (`csrc/linear/linear_cpu.cpp`), and when they pay.

float32 products of torch (MKL, OpenBLAS) are at the machine's ceiling, and so are those of bfloat16 where the CPU
multiplies matrices of it. Elsewhere torch's products in half precision are a trap. Measured with torch 2.13 on one
thread of a Xeon, in GFLOP/s for 256 x 512 by 1408 x 512, forward, dX and dW (x W^T, dy W, dy^T x), with torch and
oneDNN held to an instruction set by ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA:

                                  float32        bfloat16, torch     float16, torch
    AVX2                          104  99  97    13    2  10         11    1    4
    AVX-512                       177 169 140    38   37  34         18    2    4
    AVX-512 with bf16 (vdpbf16ps) 189 172 169    109 102 100         as before
    AMX, AVX-512 with fp16        179 173 166    822 824 689         171 166 172

The products here run at 0.9 to 1.05 of float32's speed whatever the operands' dtype.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from .extension import DTYPE_CODES, cpu, pointer


def _fast() -> dict[torch.dtype, bool]:
    def onednn_has(what: str) -> bool:
        return torch.backends.mkldnn.is_available() and bool(
            getattr(torch.ops.mkldnn, f"_is_mkldnn_{what}_supported")()
        )

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    matrices = torch.cpu._is_amx_tile_supported() if x86 else True
    return {torch.bfloat16: onednn_has("bf16") and matrices, torch.float16: onednn_has("fp16")}


# Whether torch's own products of a dtype are fast on this CPU, by the table above. Those not listed are.
FAST = _fast()


def torch_is_fast(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype at least as fast as the kernels here."""
    return FAST.get(dtype, True)


def product(a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, add: bool = False) -> Tensor:
    """out = a @ b + bias, or out += a @ b: float32 sums, rounded once to out's dtype; the same for any thread count.

    Args:
        a: (M, K), any strides; b: (K, N), any strides. float64 with float64 only.
        out: (M, N), rows dense, written; float32 to add to.
        bias: (N,) float32, not with add.
    """
    if out.dtype == torch.float64:
        if add:
            return out.addmm_(a, b)
        torch.mm(a, b, out=out)
        return out if bias is None else out.add_(bias)
    (M, K), N = a.shape, b.shape[1]
    # fmt: off
    cpu.module.gemm(
        a.data_ptr(), b.data_ptr(), pointer(bias), out.data_ptr(), M, N, K, *a.stride(), *b.stride(), out.stride(0),
        add, DTYPE_CODES[a.dtype], DTYPE_CODES[b.dtype], DTYPE_CODES[out.dtype],
    )
    # fmt: on
    return out


def column_sums(x: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out = x.sum(0), or out += it, for x (M, N) with dense rows and out (N,) in float32 (float64 with float64)."""
    if out.dtype == torch.float64:
        return out.add_(x.sum(0)) if add else out.copy_(x.sum(0))
    M, N = x.shape
    cpu.module.column_sums(x.data_ptr(), out.data_ptr(), M, N, x.stride(0), add, DTYPE_CODES[x.dtype])
    return out
