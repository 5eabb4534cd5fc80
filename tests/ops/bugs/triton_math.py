from types import ModuleType

import torch
import triton
import triton.language as tl
from harness.machines import DEVICE
from harness.mutants import Bug


@triton.jit
def kernel(X, Y, F: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, F(tl.load(X + at)))


def trial(module: ModuleType) -> str:
    """tanh against torch's in float64: 4 units in the last place, at 0, across the seam of its two halves, far out."""
    x = torch.cat(
        (torch.linspace(-0.5, 0.5, 1000), torch.linspace(-100, 100, 20), torch.tensor([0.0, 1e-20, 5.0, -9.0]))
    )
    x = x.to(DEVICE)
    try:
        y = torch.full_like(x, float("nan"))
        kernel[(1,)](x, y, module.tanh, 1024)
        truth = x.double().tanh()
        limit = 4 * torch.finfo(torch.float32).eps * truth.abs()
        assert bool(((y.double() - truth).abs() <= limit).all())
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return ""


MODULE = "pyllm.kernels.triton_math"
BUGS = [
    Bug("series too far", "square < 0.0625", "square < 0.25", quick=True),
    Bug("without its series", "square < 0.0625", "square < 0.0"),
    Bug("a term of the series", "-17 / 315", "17 / 315"),
    Bug("overflow", "tl.abs(x)", "x"),
    Bug("sign forgotten", "tl.where(x < 0, -far, far)", "far"),
    Bug("half the power", "(-2 * LOG2_E)", "(-1 * LOG2_E)"),
]  # fmt: skip
