"""Attention's Gluon forward: every head_dim, dense and packed, causal and not, as its launcher launches it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

from pyllm.kernels.attention import gluon_fwd
from pyllm.kernels.attention.gluon_choice import HEAD_DIMS

from .compiler import Config, Target

KERNEL = gluon_fwd._attention_fwd_kernel


def configurations(target: Target) -> Iterator[Config]:
    if target.name != "sm_90":
        return
    for D in HEAD_DIMS:
        for causal in (False, True):
            for packed in (False, True):
                for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
                    if name == "fp16" and (packed or not causal):  # a dtype changes an instruction's name
                        continue
                    title = f"fwd {name} {D}{' causal' if causal else ''}{' packed' if packed else ''}"
                    yield launched(title, D, causal, packed, dtype)


def launched(title: str, D: int, causal: bool, packed: bool, dtype: torch.dtype) -> Config:
    """What the launcher asks Triton for, recorded and typed as Triton types it."""
    lead = (300,) if packed else (2, 150)
    q, k = (torch.empty(*lead, heads, D, dtype=dtype) for heads in (8, 2))  # a fill would start OpenMP before a fork
    cu = torch.tensor([0, 150, 300], dtype=torch.int32) if packed else None
    recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    recorder = mock.MagicMock()
    recorder.__getitem__.return_value = lambda *args, **options: recorded.append((args, options))
    with mock.patch.object(gluon_fwd, "_attention_fwd_kernel", recorder):
        gluon_fwd.attention_fwd_gluon(q, k, k, cu, cu, D**-0.5, causal)
    ((args, options),) = recorded
    types, constants = {}, {}
    for parameter, value in zip(KERNEL.params, args, strict=True):
        if parameter.is_constexpr or value is None:
            constants[parameter.name] = value
        else:
            specialize = not parameter.do_not_specialize
            types[parameter.name] = native_specialize_impl(CUDABackend, value, False, specialize, specialize)[0]
    warps = options.pop("num_warps")
    return Config(title, KERNEL, types, constants, warps, options=options, gluon=True)
