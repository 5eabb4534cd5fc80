from types import ModuleType

import torch
from harness.machines import DEVICE
from harness.mutants import Bug


def trial(module: ModuleType) -> str:
    """The sums by themselves, against torch's in float64."""
    try:
        for parts, cols, two in ((1, 1, False), (130, 40, False), (64, 32, True), (67, 7, True), (3, 0, True)):
            partial = torch.randn(parts, cols * (2 if two else 1), device=DEVICE)
            outs = [torch.full((cols,), float("nan"), device=DEVICE, dtype=d) for d in (torch.float32, torch.float16)]
            module.sum_partials(partial, *outs[: 2 if two else 1])
            for out, truth in zip(outs, partial.double().sum(0).split(max(cols, 1)), strict=False):
                torch.testing.assert_close(
                    out, truth.to(out.dtype), rtol=1e-5 if out.dtype == torch.float32 else 2e-3, atol=1e-5
                )
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return ""


MODULE = "pyllm.kernels.triton_reduce"
BUGS = [
    Bug("last part not summed", "(parts < P)", "(parts < P - 1)", quick=True),
    Bug("only the last block of parts", "total += tl.load", "total = tl.load"),
    Bug("second sum of the first's columns", "which * C + cols", "cols"),
    Bug("columns not masked", "mask=cols < C)\n    elif TWO", "mask=cols < C - 1)\n    elif TWO"),
    Bug("rows as wide as one sum", "width = 2 * C if TWO else C", "width = C"),
    Bug("a block of columns too few", "cdiv(cols, block_c), 1", "max(1, cols // block_c), 1"),
]  # fmt: skip
