import torch
from harness.machines import DEVICE
from harness.mutants import Bug

from pyllm.kernels import apply_rope
from pyllm.kernels.rope import reference


def any_stride(backend):
    """Heads whose elements are not neighbours."""
    q, k = (torch.randn(8, 2, 3, h, device=DEVICE).permute(1, 2, 3, 0) for h in (2, 1))
    cos, sin = (t.to(DEVICE) for t in reference.tables(3, 8))
    for a, b in zip(apply_rope(q, k, cos, sin, backend=backend), apply_rope(q, k, cos, sin), strict=True):
        torch.testing.assert_close(a, b)


ALSO = {"apply_rope": any_stride}

MODULE = "pyllm.kernels.rope.triton_rope"
TABLE = {"apply_rope": ("rope_fwd", "rope_bwd")}
BUGS = [
    Bug("backward turns as forward does", "interleaved, True)", "interleaved, False)", quick=True),
    Bug("k read with q's strides", "*k.stride()[:3],", "*q.stride()[:3],"),
    Bug("last heads dropped", "range(tl.program_id(1) * BLOCK_H, HEADS,", "range(tl.program_id(1) * BLOCK_H, HEADS - 1,"),
    Bug("heads past the last not masked", "live & (h < HEADS)", "live & (h < 1000000)"),
    Bug("outputs of k laid out for q's heads", "K, K_OUT, b, t, live, cos, sin, T, k_stride_b, k_stride_t, k_stride_h,\n        HKV,", "K, K_OUT, b, t, live, cos, sin, T, k_stride_b, k_stride_t, k_stride_h,\n        H,"),
    Bug("rest not written", "tl.store(Y + target + R + cols, rest,", "tl.store(Y + target + R + cols, rest * 0,"),
    Bug("rest from the head's start", "tl.load(X + source + R + cols", "tl.load(X + source + cols"),
    Bug("rest one short", "mask=mask & (cols < D - R))\n", "mask=mask & (cols < D - R - 1))\n"),
    Bug("batch forgotten in the output", "((b * T + t) * HEADS + h) * D", "(t * HEADS + h) * D"),
    Bug("batch forgotten in the input", "b * stride_b + t * stride_t", "t * stride_t"),
    Bug("positions ignored", "position_ids is not None, H", "False, H"),
    Bug("a block of tokens too few", "blocks = cdiv(T, tiles.tokens)", "blocks = max(1, T // tiles.tokens)"),
    Bug("head-dense copy forgotten", "q, k = dense_heads(q), dense_heads(k)", "q, k = dense_heads(q), k[..., :]"),
    Bug("always interleaved", "interleaved, conjugate,\n", "True, conjugate,\n"),
    Bug("every other block of heads skipped", "tl.num_programs(1) * BLOCK_H)", "2 * tl.num_programs(1) * BLOCK_H)"),
]  # fmt: skip
