"""Sampling's CUDA kernel (`csrc/sampling/sampling_cuda.cu`): tensors become pointers here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl
from ..extension import DTYPE_CODES, cuda, stream

MOST = 1 << 19  # tokens, whose 64-bit weights can be added up


def sample_fwd(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 or vocab == 1 else logits.contiguous()
    tokens = torch.empty((rows,), dtype=torch.int64, device=logits.device)
    cuda.module.sample(
        logits.data_ptr(), uniform.contiguous().data_ptr(), tokens.data_ptr(), rows, vocab, logits.stride(0),
        temperature, top_k if 0 < top_k < vocab else vocab, top_p, min_p, DTYPE_CODES[logits.dtype], stream(logits),
    )  # fmt: skip
    return tokens


def why_not(logits: Tensor, *_: Any) -> list[str]:
    reasons = cuda.why_not(logits)
    if not reasons and logits.shape[1] > MOST:
        reasons = [f"a vocabulary of {logits.shape[1]} is above {MOST}"]
    return reasons


CUDA = Impl(sample_fwd, None, why_not)
