import torch
from harness.layouts import far_apart
from harness.mutants import Bug, padded

from pyllm.kernels import swiglu, swiglu_packed


def every_tensor_has_its_own_stride(backend):
    gate, up = torch.randn(5, 40), torch.randn(5, 40)
    assert torch.equal(swiglu(gate, padded(up), backend=backend), swiglu(gate, up, backend=backend))


def rows_start_past_32_bits(backend):
    both = torch.randn(3, 64).half()
    assert torch.equal(swiglu_packed(far_apart(both), backend=backend), swiglu_packed(both, backend=backend))


ALSO = {"swiglu": every_tensor_has_its_own_stride, "swiglu_packed": rows_start_past_32_bits}

MODULE = "pyllm.kernels.swiglu.triton_swiglu"
TABLE = {"swiglu": ("swiglu_fwd", "swiglu_bwd"), "swiglu_packed": ("swiglu_packed_fwd", "swiglu_packed_bwd")}
BUGS = [
    Bug("up is the gate in the packed form", "tl.load(UP + half + rows", "tl.load(UP + rows", quick=True),
    Bug("both gradients over each other", "tl.store(DUP + half + grads", "tl.store(DUP + grads"),
    Bug("columns not masked", "(rows < N) & (cols < F)", "(rows < N) & (cols < BLOCK_F * blocks)"),
    Bug("rows not masked", "(rows < N) & (cols < F)", "cols < F"),
    Bug("tiles of a row swapped with rows", "rows = (program // blocks)", "rows = (program % blocks)"),
    Bug("32-bit offsets", "rows = (program // blocks).to(tl.int64)", "rows = (program // blocks)"),
    Bug("first tile of a row only", "cols = (program % blocks).to(tl.int64) * BLOCK_F", "cols = (program % blocks).to(tl.int64) * 0"),
    Bug("sigmoid of minus gate", "tl.exp(-x)", "tl.exp(x)"),
    Bug("NaN where exp overflows", "1.0 / (1.0 + tl.exp(-x))", "tl.exp(x) / (1.0 + tl.exp(x))"),
    Bug("silu forgotten", "gate * _sigmoid(gate) * up", "_sigmoid(gate) * up"),
    Bug("derivative of the sigmoid forgotten", "(1.0 + gate * (1.0 - s))", "1.0"),
    Bug("derivative with the wrong sign", "(1.0 + gate * (1.0 - s))", "(1.0 - gate * (1.0 - s))"),
    Bug("dgate without up", "dy * up * s", "dy * s"),
    Bug("dup without dy", "(dy * (gate * s))", "(gate * s)"),
    Bug("up read with the gate's stride", "UP + half + rows * up_stride", "UP + half + rows * gate_stride"),
    Bug("dy read with the gate's stride", "DY + rows * dy_stride", "DY + rows * gate_stride"),
    Bug("gradient rows of the packed form half as far apart", "stride, stride, 2 * F, F)", "stride, stride, F, F)"),
    Bug("last tile not launched", "blocks = cdiv(cols, block_f)", "blocks = max(1, cols // block_f)"),
    Bug("last rows not launched", "cdiv(rows, block_n) * blocks", "max(1, rows // block_n) * blocks"),
    Bug("rounded in between", "gate * _sigmoid(gate) * up", "(gate * _sigmoid(gate)).to(Y.dtype.element_ty).to(tl.float32) * up"),
    Bug("padding taken for data", "gate.is_contiguous() and up.is_contiguous()", "gate.stride(-1) == 1"),
]  # fmt: skip
