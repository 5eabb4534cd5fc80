import torch
from harness.mutants import Bug

from pyllm.kernels import add_rms_norm, rms_norm


def sum_is_rounded_first(backend):
    """The norm is that of the rounded sum: numbers nearer to the truth would be wrong here."""
    x, residual, weight = torch.randn(4, 64).half(), torch.randn(4, 64).half(), torch.randn(64).half()
    y, h = add_rms_norm(x, residual, weight, backend=backend)
    assert torch.equal(y, rms_norm(h, weight, backend=backend))


ALSO = {"add_rms_norm": sum_is_rounded_first}

MODULE = "pyllm.kernels.rms_norm.triton_rms_norm"
TABLE = {"rms_norm": ("rms_norm_fwd", "rms_norm_bwd"), "add_rms_norm": ("add_rms_norm_fwd", "add_rms_norm_bwd")}
BUGS = [
    Bug("eps forgotten", "/ C + eps)", "/ C)", quick=True),
    Bug("offset forgotten in y", "other=0.0).to(tl.float32) + offset\n    tl.store(Y", "other=0.0).to(tl.float32)\n    tl.store(Y"),
    Bug("mean over the tile, not the row", "keep_dims=True) / C + eps", "keep_dims=True) / BLOCK_C + eps"),
    Bug("columns not masked", "mask = (rows < N) & (cols < C)", "mask = rows < N"),
    Bug("rows not masked in the backward", "mask = (rows < last) & (cols < C)\n        rstd", "mask = cols < C\n        rstd"),
    Bug("last part not summed", "mask = (parts < P) & (cols < C)", "mask = (parts < P - 1) & (cols < C)"),
    Bug("dh forgotten", "    if HAS_DH:\n            dx += ", "    if HAS_DH:\n            dx + "),
    Bug("norm of the unrounded sum", "x = h.to(tl.float32)", "x += tl.load(R + rows * r_stride + cols, mask=mask, other=0.0).to(tl.float32)"),
    Bug("dweight of the last rows only", "dweight += tl.sum(dy * unit, axis=0)", "dweight = tl.sum(dy * unit, axis=0)"),
    Bug("a program too few", "parts = min(triton.cdiv(rows, block_n), ", "parts = min(rows // block_n, "),
]  # fmt: skip
