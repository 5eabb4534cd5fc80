"""What tests and benchmarks need to know of a public op, so that both are written once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

VARIANTS = ("plain", "small", "offset", "correlated")


class Cost(NamedTuple):
    """What an op must move and compute, whoever runs it."""

    bytes: int  # every tensor that must be read or written, once
    flops: int  # useful ones: masked pairs and recomputation earn nothing


@dataclass(frozen=True)
class Spec:
    """A public op as one row of the table `pyllm.kernels.OPS`.

    Attributes:
        function: the public function; called `function(**inputs, backend=...)`.
        eager: the reference with the same arguments but `backend`; differentiable, float64 stays float64.
        yardstick: eager PyTorch that rounds where the op's contract lets a kernel round, and nowhere else.
        op: the `dispatch.Op` behind it.
        cases: case name to the parameters that `inputs` takes; small enough for every test.
        inputs: inputs(case parameters..., dtype=, device=, generator=, variant=) gives the call's keyword arguments.
        grads: the arguments that a gradient flows to.
        cost: cost(inputs, backward) in bytes and useful FLOPs.
        sums: how many terms the longest sum behind an output element has: cols for a norm, keys for attention.
        weight_sums: the same for gradients that are summed over rows, by argument name.
    """

    function: Callable[..., Any]
    eager: Callable[..., Any]
    yardstick: Callable[..., Any]
    op: Any
    cases: Mapping[str, Mapping[str, Any]]
    inputs: Callable[..., dict[str, Any]]
    grads: tuple[str, ...]
    cost: Callable[[dict[str, Any], bool], Cost]
    sums: Callable[[dict[str, Any]], int]
    weight_sums: Mapping[str, Callable[[dict[str, Any]], int]] = field(default_factory=dict)


def draw(
    *shape: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    variant: str = "plain",
) -> torch.Tensor:
    """A random tensor of one of the VARIANTS that tests feed to every op.

    plain: N(0, 1). small: times 1e-3, where an epsilon forgotten or a flush to zero shows. offset: mean 8, where
    cancellation shows. correlated: every row leans to one direction, so that softmaxes and norms aren't flat.
    """
    x = torch.randn(shape, generator=generator, dtype=torch.float32)
    if variant == "small":
        x = x * 1e-3
    elif variant == "offset":
        x = x + 8.0
    elif variant == "correlated":
        x = 0.3 * x + torch.randn(shape[-1:], generator=generator, dtype=torch.float32)
    elif variant != "plain":
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return x.to(dtype).to(device)
