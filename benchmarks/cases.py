"""What is timed. On CPU: an op, its shape, and the ratio over eager PyTorch that it must reach. On GPU: an op at the
shapes of real models, which come from `pyllm.PRESETS`, so that they cannot drift from the models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.rivals import EAGER
from pyllm import PRESETS
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

    def few(self) -> CpuCase:
        """The same with at most 96 rows or tokens, rows as long as before: to be judged against float64 in no time."""
        cut = {k: min(v, 96) if k in ("T", "S") else v for k, v in self.parameters.items()}
        if "shape" in cut:
            cut["shape"] = (min(cut["shape"][0], 96), *cut["shape"][1:])
        return replace(self, parameters=cut)

    def call(self, dtype: torch.dtype) -> tuple[dict[str, Any], Callable[[str], Callable[[], Any]]]:
        """(inputs, make) where make(backend) is the timed call: forward, then backward with a fixed gradient."""
        spec = OPS[self.op]
        inputs = spec.inputs(**self.parameters, dtype=dtype, generator=torch.Generator().manual_seed(1))
        leaves = {name: inputs[name].requires_grad_() for name in spec.grads if name in inputs}
        outputs = EAGER[self.op](**inputs)
        upstream = [torch.randn_like(out) for out in (outputs if isinstance(outputs, tuple) else (outputs,))]

        def make(backend: str) -> Callable[[], Any]:
            """ "compile" is torch.compile of the eager form."""
            function, chosen = spec.function, {"backend": backend}
            if backend in ("eager", "compile"):
                function, chosen = EAGER[self.op], {}
            if backend == "compile":
                torch._dynamo.reset()
                function = torch.compile(function, dynamic=False)

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
    CpuCase("cross_entropy", "2048x32000", dict(shape=(2048, 32000)), {_F32: 2.7, _BF16: 2.3}),
    CpuCase("cross_entropy", "64x32000", dict(shape=(64, 32000)), {_F32: 1.0, _BF16: 1.0}),
    # Ours in bfloat16 is for CPUs that have no instructions for it; elsewhere torch's products are the faster ones.
    CpuCase("linear_cross_entropy", "1024x512x32000", dict(shape=(1024, 512), V=32000), {_F32: 1.2, _BF16: None}),
    CpuCase("linear", "256x512x1408", dict(shape=(256, 512), outputs=1408), {_F32: None, _BF16: None}),
    # bf16: on CPUs with matrix units eager's products are theirs, ours are float32 wherever we run
    CpuCase(
        "attention",
        "T512, 32/8 heads x 64",
        dict(B=1, T=512, S=512, H=32, Hkv=8, D=64, causal=True),
        {_F32: 1.5, _BF16: None},
    ),
    CpuCase(
        "attention",
        "4 x T512, 8/4 heads x 64",
        dict(B=4, T=512, S=512, H=8, Hkv=4, D=64, causal=True),
        {_F32: 1.5, _BF16: None},
    ),
]


@dataclass(frozen=True)
class GpuCase:
    """An op at one shape.

    Attributes:
        op: name in `pyllm.kernels.OPS`.
        title: shape in words.
        parameters: of the op's `inputs`.
        passes: "forward" (no gradient wanted), "backward" (alone), "step" (both).
        priority: when time is short the larger ones are shed first.
        drop: keyword arguments that the op's `inputs` makes and that stay at their defaults here, for the rivals' sake.
    """

    op: str
    title: str
    parameters: dict[str, Any]
    passes: tuple[str, ...] = ("forward", "backward")
    priority: int = 1
    drop: tuple[str, ...] = ()

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 1) -> dict[str, Any]:
        """Keyword arguments, drawn on the device."""
        with torch.device(device):
            made = OPS[self.op].inputs(
                **self.parameters, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(seed)
            )
        return {k: v for k, v in made.items() if k not in self.drop}


def _model_cases(name: str, priority: int, tokens: int = 8192) -> list[GpuCase]:
    """The row ops of a model's training step, `tokens` at a time."""
    c = PRESETS[name]
    C, F, V, H, Hkv, D = (
        c.hidden_size, c.intermediate_size, c.vocab_size, c.num_attention_heads, c.kv_heads, c.width
    )  # fmt: skip
    heads = dict(B=1, T=tokens, H=H, Hkv=Hkv, D=D)
    rope_only = ("interleaved", "rotary_dim")
    return [
        GpuCase("rms_norm", f"{name} {tokens}x{C}", dict(shape=(tokens, C)), priority=priority),
        GpuCase("add_rms_norm", f"{name} {tokens}x{C}", dict(shape=(tokens, C)), priority=priority),
        GpuCase("apply_rope", f"{name} {tokens} tokens, {H}/{Hkv}x{D}", heads, priority=priority, drop=rope_only),
        GpuCase("swiglu", f"{name} {tokens}x{F}", dict(shape=(tokens, F)), priority=priority),
        GpuCase("swiglu_packed", f"{name} {tokens}x{F}", dict(shape=(tokens, F)), priority=priority + 1),
        GpuCase(
            "cross_entropy", f"{name} {tokens}x{V}", dict(shape=(tokens, V)), ("forward", "backward", "step"), priority
        ),
        GpuCase(
            "linear_cross_entropy",
            f"{name} {tokens}x{C}x{V}",
            dict(shape=(tokens, C), V=V),
            ("forward", "step"),
            priority,
        ),
    ]


def _attention_cases(tokens: int = 16384) -> list[GpuCase]:
    """`tokens` in sequences of T, at each head dim's usual number of heads; decode from half a gigabyte of cache."""
    found = []
    for D, H, Hkv in ((128, 32, 8), (64, 32, 8), (256, 16, 4)):
        for T in (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (True, False):
                found.append(GpuCase(
                    "attention", f"D{D} T{T} {'causal' if causal else 'full'}",
                    dict(B=tokens // T, T=T, S=T, H=H, Hkv=Hkv, D=D, causal=causal),
                    priority=1 if D == 128 and T in (2048, 8192) else 2, drop=("window", "softcap"),
                ))  # fmt: skip
    for B, S in ((32, 4096), (1, 131072), (64, 1024)):
        found.append(GpuCase(
            "attention_decode", f"B{B} S{S} 32/8x128", dict(B=B, T=1, S=S, H=32, Hkv=8, D=128), ("forward",),
            priority=1, drop=("window", "softcap"),
        ))  # fmt: skip
    return found


GPU_CASES = sorted(
    [
        *_model_cases("llama-3-8b", 1),
        *_model_cases("llama-3.2-1b", 2),
        *_model_cases("llama-3-70b", 3),
        GpuCase(
            "qk_norm_rope",
            "qwen3-8b 8192 tokens, 32/8x128",
            dict(B=1, T=8192, H=32, Hkv=8, D=128),
            priority=2,
            drop=("interleaved", "rotary_dim", "offset"),
        ),
        *[GpuCase("rms_norm", f"8192x{C}", dict(shape=(8192, C)), priority=2) for C in (1024, 16384)],
        *[GpuCase("rms_norm", f"64x{C}", dict(shape=(64, C)), ("forward",), 2) for C in (4096,)],
        *_attention_cases(),
        *[
            GpuCase(
                "sample",
                f"{B}x128256, top-k 50, top-p 0.95",
                dict(shape=(B, 128256), top_k=50, top_p=0.95),
                ("forward",),
                2,
            )
            for B in (1, 64)
        ],
    ],
    key=lambda case: case.priority,
)
