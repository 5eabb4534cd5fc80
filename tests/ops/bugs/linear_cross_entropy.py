import functools
import inspect

import torch
from harness.machines import DEVICE
from harness.mutants import Bug

from pyllm.kernels import OPS, linear_cross_entropy
from pyllm.kernels.cross_entropy import reference
from pyllm.kernels.cross_entropy import triton_cross_entropy as rows


def panels(backend):
    """Several panels of rows and of classes, in both dtypes; products of half precision with float32 sums."""
    product = inspect.unwrap(OPS["linear_cross_entropy"].op.impls[backend].bwd.func).__globals__["product"]
    a, b = torch.randn(20, 30, device=DEVICE).half(), torch.randn(30, 40, device=DEVICE).half()
    out = torch.empty(20, 40, device=DEVICE)
    for add in (False, True):
        product(a, b, out, add)
        torch.testing.assert_close(out, (1 + add) * (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)
    before, reference.LOGITS_BYTES = reference.LOGITS_BYTES, 4 * 16 * 64
    try:
        for dtype, close in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
            made = reference.linear_cross_entropy_inputs(
                (50, 24), 150, bias=True, weighted=True, ignored=0.3, dtype=dtype, device=DEVICE
            )
            leaves = [made[name].requires_grad_() for name in ("input", "linear_weight", "linear_bias")]
            options = dict(label_smoothing=0.1, return_predictions=True)
            mine, predictions = linear_cross_entropy(**made, **options, backend=backend)
            theirs, expected = linear_cross_entropy(**made, **options, backend="eager")
            assert torch.equal(predictions, expected)
            got, true = (torch.autograd.grad(loss, leaves) for loss in (mine, theirs))
            for a, b in zip((mine, *got), (theirs, *true), strict=True):
                torch.testing.assert_close(a, b, rtol=close, atol=close * 0.1)
    finally:
        reference.LOGITS_BYTES = before


ALSO = {"linear_cross_entropy": panels}
MODULE = "pyllm.kernels.cross_entropy.panels"
TABLE = {
    "linear_cross_entropy": (
        lambda module: functools.partial(module.forward, rows.forward),
        lambda module: functools.partial(module.backward, rows.backward),
    )
}
BUGS = [
    Bug("dinput of the last panel", "sum_input[rows], add=first > 0", "sum_input[rows], add=False", quick=True),
    Bug("dinput starts with what was there", "sum_input[rows], add=first > 0", "sum_input[rows], add=True"),
    Bug("dweight of the last rows", "sums, add=begin > 0", "sums, add=False"),
    Bug("dweight starts with the panel before", "sums, add=begin > 0", "sums, add=True"),
    Bug("targets counted from the panel", "options, dlogits, first, V", "options, dlogits, 0, V"),
    Bug("classes of the panel, not of all", "options, dlogits, first, V", "options, dlogits, first"),
    Bug("the last panel of classes dropped", "range(0, V, width)", "range(0, V // width * width, width)"),
    Bug("the last rows dropped", "range(0, N, height)", "range(0, N // height * height, height)"),
    Bug("lse of the first rows", "lse[rows], flat[rows]", "lse[: rows.stop - begin], flat[rows]"),
    Bug("bias forgotten", "dloss[rows], logits, bias, lse", "dloss[rows], logits, None, lse"),
    Bug("bias forgotten forward", "row_forward(logits, bias,", "row_forward(logits, None,"),
    Bug("dbias of the last rows", "share if begin == 0 else sum_bias[first:last] + share", "share"),
    Bug("dbias not rounded into place", "        dbias.copy_(sum_bias)", "        pass"),
    Bug("dweight not rounded into place", "dweight[first:last] = sums", "pass"),
    Bug("a sum of half-precision products", "out.addmm_(a.float(), b.float())", "out.add_(a @ b)"),
    Bug("logits rounded to half", "torch.mm(a.float(), b.float(), out=out)", "out.copy_(a @ b)"),
    Bug("predictions of the first chunk for all", "predictions[rows] if return", "predictions[: end - begin] if return"),
]  # fmt: skip
