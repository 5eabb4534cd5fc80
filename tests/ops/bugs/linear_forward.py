import torch
from harness.machines import DEVICE
from harness.mutants import Bug

from pyllm.kernels import linear_cross_entropy
from pyllm.kernels.cross_entropy import reference


def ragged(backend):
    """Several blocks of rows, programs a row and tiles a program, the last ragged; weights in columns; no gradient."""
    for N, V, C, options in (
        (50, 333, 24, dict(return_predictions=True, weighted=True, label_smoothing=0.1)),
        (300, 100, 16, dict(softcap=4.0, bias=True, weighted=True, label_smoothing=0.1, return_predictions=True)),
        (7, 65, 20, dict(ignored=0.5)),
    ):
        made = reference.linear_cross_entropy_inputs((N, C), V, dtype=torch.float32, device=DEVICE, **options)
        made["input"][0] *= torch.linspace(1, 5, C, device=DEVICE)
        made["target"][0] = V - 1
        expected = linear_cross_entropy(**made, reduction="none", backend="eager")
        for matrix in (made["linear_weight"], made["linear_weight"].t().contiguous().t()):
            got = linear_cross_entropy(**{**made, "linear_weight": matrix}, reduction="none", backend=backend)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    made = reference.linear_cross_entropy_inputs((32, 16), 70, dtype=torch.float32, device=DEVICE)
    made["target"][:16] = -100
    made["input"][:16] = float("nan")
    assert linear_cross_entropy(**made, backend=backend).isfinite()
    h, w = torch.full((2, 1), -1.0, device=DEVICE), torch.full((70, 1), 1000.0, device=DEVICE)
    target = torch.tensor([0, 69], device=DEVICE)
    uniform = torch.full((2,), 70.0, device=DEVICE).log()
    torch.testing.assert_close(linear_cross_entropy(h, w, target, reduction="none", backend=backend), uniform)


ALSO = {"linear_cross_entropy": ragged}
MODULE = "pyllm.kernels.cross_entropy.triton_linear_forward"
TABLE = {"linear_cross_entropy": ("linear_cross_entropy_fwd", None)}  # None: with the backward that is there
BUGS = [
    Bug("maximum starts at 0", 'top = tl.full([BLOCK_N], float("-inf"), tl.float32)', "top = tl.zeros([BLOCK_N], dtype=tl.float32)", quick=True),
    Bug("sum not scaled when the maximum grows", "total = total * tl.exp(top - shift) + ", "total = total + "),
    Bug("classes past the end counted", 'logits = tl.where(mask, logits, float("-inf"))\n        new_top', "new_top"),
    Bug("hidden tail not masked", "mask=hidden[None, :] < C - c, other=0.0", "mask=hidden[None, :] < C, other=0.0"),
    Bug("every C even", "EVEN_C=C % block_c == 0", "EVEN_C=True"),
    Bug("bias forgotten", "logits += tl.load(B + cols", "_ = tl.load(B + cols"),
    Bug("bias of the first tile", "tl.load(B + cols,", "tl.load(B + cols - tile * BLOCK_V,"),
    Bug("softcap forgotten", "logits = softcap * tanh(logits / softcap)", "logits = logits * 1"),
    Bug("target found in every tile", "cols[None, :] == target[:, None]", "cols[None, :] % BLOCK_V == target[:, None] % BLOCK_V"),
    Bug("last tile dropped", "tl.minimum(begin + tiles, tl.cdiv(V, BLOCK_V))", "tl.minimum(begin + tiles, V // BLOCK_V)"),
    Bug("last row written past the end", "inside = rows < N\n", "inside = rows < N + 1\n"),
    Bug("target of another row", "source = tl.minimum(rows, N - 1)", "source = tl.minimum(rows + 1, N - 1)"),
    Bug("weight's step along C forgotten", "m_at += BLOCK_C * m_step", "m_at += BLOCK_C"),
    Bug("groups overlap", "// (GROUP * splits) * GROUP", "// (GROUP * splits)"),
    Bug("short group as tall as the others", "height = tl.minimum(blocks - first, GROUP)", "height = tl.minimum(blocks, GROUP)"),
    Bug("smoothing's sum not moved with the maximum", "spread += shares * (shift - anchor(top))\n            spread", "spread"),
    Bug("smoothing without weights", "w = tl.load(W + cols", "_ = tl.load(W + cols"),
    Bug("class within its tile", "tile * BLOCK_V + tile_class, best_class", "tile_class, best_class"),
    Bug("the last best class wins", "tile_best > best, tile", "tile_best > -1e9, tile"),
    Bug("ignored rows computed", "end = tl.where(tl.max(keep.to(tl.int32), axis=0) > 0, end, begin)", "end = end"),
    Bug("product rounded to half", "logits = tl.dot(x, m, logits", "logits = tl.dot(x.to(tl.float16), m.to(tl.float16), logits"),
]  # fmt: skip
