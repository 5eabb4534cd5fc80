import torch
from harness.layouts import far_apart
from harness.mutants import Bug, padded

from pyllm.kernels import add_rms_norm, rms_norm


def sum_is_rounded_first(backend):
    """The norm is that of the rounded sum: numbers nearer to the truth would be wrong here."""
    for cols in (64, 32771):
        x, residual, weight = torch.randn(4, cols).half(), torch.randn(4, cols).half(), torch.randn(cols).half()
        y, h = add_rms_norm(x, residual, weight, backend=backend)
        assert torch.equal(y, rms_norm(h, weight, backend=backend))


def rows_lie_anywhere(backend):
    x, weight = torch.randn(3, 64).half(), torch.randn(64).half()
    assert torch.equal(rms_norm(far_apart(x), weight, backend=backend), rms_norm(x, weight, backend=backend))
    y = rms_norm(x.requires_grad_(), weight, backend=backend)
    dy = torch.randn_like(y)
    grads = [torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for upstream in (padded(dy), dy)]
    assert torch.equal(*grads)


ALSO = {"add_rms_norm": sum_is_rounded_first, "rms_norm": rows_lie_anywhere}

MODULE = "pyllm.kernels.rms_norm.triton_rms_norm"
TABLE = {"rms_norm": ("rms_norm_fwd", "rms_norm_bwd"), "add_rms_norm": ("add_rms_norm_fwd", "add_rms_norm_bwd")}
DTYPES = (torch.float32,)  # of half precision only the rounding of the sum is a matter of its own: ALSO has it
# Rows that share a program, rows in registers, and the loops of both passes, each with a ragged end.
CASES = {
    op: {
        "65x40-offset1": dict(shape=(65, 40), offset=1.0, eps=1e-2),
        "7x1025": dict(shape=(7, 1025), eps=1e-2),
        "13x8195-offset1": dict(shape=(13, 8195), offset=1.0, eps=1e-2),
        "2x32771-offset1": dict(shape=(2, 32771), offset=1.0, eps=1e-2),
    }
    for op in TABLE
}
BUGS = [
    Bug("eps forgotten", "keep_dims=True) / C + eps)", "keep_dims=True) / C)", quick=True),
    Bug("offset forgotten", "other=0.0).to(tl.float32) + offset", "other=0.0).to(tl.float32)"),
    Bug("mean over the tile, not the row", "keep_dims=True) / C + eps", "keep_dims=True) / BLOCK_C + eps"),
    Bug("columns not masked", "mask = (rows < N) & (cols < C)", "mask = rows < N"),
    Bug("rows not masked in the backward", "mask = (rows < last) & (cols < C)\n        x =", "mask = cols < C\n        x ="),
    Bug("last part not summed", "sum_partials(partial, dweight)", "sum_partials(partial[:-1], dweight)"),
    Bug("dh forgotten", "            dx += dh.to(tl.float32)", "            dx += 0.0"),
    Bug("norm of the unrounded sum", "x = h.to(tl.float32)", "x += tl.load(R + rows * r_stride + cols, mask=mask, other=0.0).to(tl.float32)"),
    Bug("dweight of the last rows only", "dweight += dy * unit", "dweight = dy * unit"),
    Bug("a program too few", "return cdiv(rows, share), share", "return max(1, rows // share), share"),
    Bug("shares that overlap", "first = program * rows_per_program", "first = program * (rows_per_program - 1)"),
    Bug("rstd stored for the first row alone", "tl.store(RSTD + rows, rstd, mask=rows < N)", "tl.store(RSTD + rows, rstd, mask=rows < 1)"),
    Bug("dy read with x's stride", "DY + rows * dy_stride + cols, mask=mask, other=0.0)\n        rstd", "DY + rows * C + cols, mask=mask, other=0.0)\n        rstd"),
    Bug("projection forgotten", "dx = (g - unit * (tl.sum(g * unit, axis=1, keep_dims=True) / C)) * rstd", "dx = g * rstd"),
    Bug("rstd forgotten in dx", "axis=1, keep_dims=True) / C)) * rstd", "axis=1, keep_dims=True) / C))"),
    Bug("weight forgotten in dx", "g = dy * w", "g = dy"),
    Bug("32-bit offsets", "rows = tl.program_id(0).to(tl.int64) * BLOCK_N", "rows = tl.program_id(0) * BLOCK_N"),
    # the loops of the forward
    Bug("loop: squares of the last tile alone", "squares += x * x", "squares = x * x"),
    Bug("loop: eps forgotten", "tl.sum(squares, axis=0) / C + eps", "tl.sum(squares, axis=0) / C"),
    Bug("loop: norm of the unrounded sum", "        x = x.to(dtype).to(tl.float32)\n    return x", "    return x"),
    Bug("loop: the sum stored without its last tile", "x.to(dtype), mask=cols < C)", "x.to(dtype), mask=cols < C - BLOCK_C)"),
    Bug("loop: residual read with x's stride", "x_row, r_row = row * x_stride, row * r_stride", "x_row, r_row = row * x_stride, row * C"),
    Bug("loop: last columns not written", "tl.store(Y + row * C + cols, y.to(Y.dtype.element_ty), mask=cols < C)", "tl.store(Y + row * C + cols, y.to(Y.dtype.element_ty), mask=cols < C - 1)"),
    # the loops of the backward
    Bug("wide: dots of the last tile alone", "dots += dy", "dots = dy"),
    Bug("wide: mean over the tiles, not the row", "mean = tl.sum(dots, axis=1, keep_dims=True) / C", "mean = tl.sum(dots, axis=1, keep_dims=True) / BLOCK_C"),
    Bug("wide: projection of the first row for all", "unit * mean) * rstd", "unit * tl.sum(mean * (rows == first + block), axis=0)) * rstd"),
    Bug("wide: dh forgotten", "dx += tl.load(DH + rows * dh_stride + cols", "dx += 0.0 * tl.load(DH + rows * dh_stride + cols"),
    Bug("wide: dweight of the last rows only", "(flat < C) & (block > 0)", "(flat < C) & (block < 0)"),
    Bug("wide: dweight added to what was there", "(flat < C) & (block > 0)", "flat < C"),
    Bug("wide: rows not masked", "mask = (rows < last) & (cols < C)\n            unit", "mask = cols < C\n            unit"),
    Bug("wide: every program's dweight in one place", "sums = PARTIAL + program * C + flat", "sums = PARTIAL + flat"),
    Bug("wide: only the first block of rows", "for block in range(0, rows_per_program, BLOCK_N)", "for block in range(0, BLOCK_N, BLOCK_N)"),
]  # fmt: skip
