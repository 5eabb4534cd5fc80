"""What the CPU benchmarks time: an op, its shape, and the ratio over eager PyTorch that it must reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.rivals import EAGER
from pyllm.kernels import OPS


@dataclass(frozen=True)
class CpuCase:
    """One comparison of the C++ kernels with eager PyTorch, forward + backward.

    Attributes:
        op: name in `pyllm.kernels.OPS`.
        title: shape in words.
        parameters: of the op's `inputs`.
        floor: eager's time over ours that must be reached, by dtype; None: no promise is made.
    """

    op: str
    title: str
    parameters: dict[str, Any]
    floor: dict[torch.dtype, float | None]

    def call(self, dtype: torch.dtype) -> tuple[dict[str, Any], Callable[[str], Callable[[], Any]]]:
        """(inputs, make) where make(backend) is the timed call: forward, then backward with a fixed gradient."""
        spec = OPS[self.op]
        inputs = spec.inputs(**self.parameters, dtype=dtype, generator=torch.Generator().manual_seed(1))
        leaves = {name: inputs[name].requires_grad_() for name in spec.grads}
        outputs = EAGER[self.op](**inputs)
        upstream = [torch.randn_like(out) for out in (outputs if isinstance(outputs, tuple) else (outputs,))]

        def make(backend: str) -> Callable[[], Any]:
            function = EAGER[self.op] if backend == "eager" else spec.function
            chosen = {} if backend == "eager" else {"backend": backend}

            def run() -> Any:
                out = function(**inputs, **chosen)
                out = out if isinstance(out, tuple) else (out,)
                return torch.autograd.grad(out, list(leaves.values()), upstream)

            return run

        return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}, make


_F32, _BF16 = torch.float32, torch.bfloat16
CPU_CASES = [
    CpuCase("rms_norm", "2048x2048", dict(shape=(2048, 2048)), {_F32: 3.0, _BF16: 5.0}),
    CpuCase("rms_norm", "512x512", dict(shape=(512, 512)), {_F32: 3.0, _BF16: 5.0}),
    CpuCase("add_rms_norm", "2048x2048", dict(shape=(2048, 2048)), {_F32: None, _BF16: None}),
    CpuCase("add_rms_norm", "512x512", dict(shape=(512, 512)), {_F32: None, _BF16: None}),
    CpuCase(
        "apply_rope", "2048 tokens, 32/8 heads x 64", dict(B=1, T=2048, H=32, Hkv=8, D=64), {_F32: 5.0, _BF16: 5.0}
    ),
    CpuCase("apply_rope", "512 tokens, 8/4 heads x 64", dict(B=1, T=512, H=8, Hkv=4, D=64), {_F32: 5.0, _BF16: 5.0}),
    CpuCase("swiglu", "2048x2048", dict(shape=(2048, 2048)), {_F32: 1.8, _BF16: None}),
    CpuCase("swiglu", "512x512", dict(shape=(512, 512)), {_F32: 1.8, _BF16: None}),
]
