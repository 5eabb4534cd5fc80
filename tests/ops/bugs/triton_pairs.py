from types import ModuleType

import torch
from harness.machines import DEVICE
from harness.mutants import Bug, caught

from pyllm.kernels import OPS, apply_rope
from pyllm.kernels.rope import triton_qk_norm_rope, triton_rope


def clamped(backend: str) -> None:
    """Positions outside the table, which no case of the op has."""
    spec = OPS["apply_rope"]
    inputs = spec.inputs(B=1, T=4, H=2, Hkv=1, D=16, positions=True, dtype=torch.float32, device=DEVICE)
    wild = torch.tensor([-1, 12, 2**31 + 5, -(2**40)], device=DEVICE)
    got, tame = (apply_rope(**{**inputs, "position_ids": p}, backend=backend) for p in (wild, wild.clamp(0, 11)))
    assert torch.equal(got[0], tame[0])


def fenced(backend: str) -> None:
    """Nothing is written behind the last head, whose half is no power of two: all other heads are overwritten by the next."""
    bands = []

    def banded(x: torch.Tensor, size: torch.Size, **how: object) -> torch.Tensor:
        if how:  # the interpreter's own
            return before(x, size, **how)
        buffer = torch.full((x.numel() + 64,), 77.0, dtype=x.dtype, device=x.device)
        bands.append(buffer[x.numel() :])
        return buffer[: x.numel()].view(size)

    spec, before = OPS["apply_rope"], torch.Tensor.new_empty
    torch.Tensor.new_empty = banded
    try:
        for interleaved in (False, True):
            how = dict(B=1, T=3, H=2, Hkv=1, D=24, interleaved=interleaved)
            apply_rope(**spec.inputs(**how, dtype=torch.float32, device=DEVICE), backend=backend)
    finally:
        torch.Tensor.new_empty = before
    assert len(bands) == 4
    assert all(bool((band == 77).all()) for band in bands)


def trial(module: ModuleType) -> str:
    """Both kernels of the folder with their tiles from `module`."""
    mine = {k: v for k, v in vars(module).items() if getattr(getattr(v, "fn", v), "__module__", "") == module.__name__}
    for user in (triton_rope, triton_qk_norm_rope):
        vars(user).update({name: value for name, value in mine.items() if name in vars(user)})
    for op, also in (("apply_rope", lambda backend: (clamped(backend), fenced(backend))), ("qk_norm_rope", None)):
        if found := caught(op, "triton", OPS[op].op.impls["triton"], DEVICE, also=also):
            return found
    return ""


MODULE = "pyllm.kernels.rope.triton_pairs"
BUGS = [
    Bug("turned the other way", "return x1 * cos - x2 * sin, x2 * cos + x1 * sin", "return x1 * cos + x2 * sin, x2 * cos - x1 * sin", quick=True),
    Bug("conjugate forgotten", "        sin = -sin", "        sin = sin"),
    Bug("second half off by one", "tl.load(X + at + HALF + cols", "tl.load(X + at + HALF - 1 + cols"),
    Bug("second half stored at the tile's half", "tl.store(Y + at + HALF + cols", "tl.store(Y + at + BLOCK_HALF + cols"),
    Bug("columns not masked", "mask=mask & (cols < HALF))", "mask=mask)"),
    Bug("interleaved columns not masked", "mask=mask & (cols < 2 * HALF))", "mask=mask)"),
    Bug("interleaved stored as halves", "tl.reshape(tl.join(y1, y2), [", "tl.reshape(tl.trans(tl.join(y1, y2), 0, 1, 3, 2), ["),
    Bug("position not clamped below", "tl.maximum(tl.minimum(row, table_rows - 1), 0)", "tl.minimum(row, table_rows - 1)"),
    Bug("position not clamped above", "tl.maximum(tl.minimum(row, table_rows - 1), 0)", "tl.maximum(row, 0)"),
    Bug("positions of the first batch row", "P + b * p_stride_b + t", "P + t"),
    Bug("angles of the first batch row", "at = b * c_stride_b + row", "at = row"),
    Bug("column stride of a full interleaved table", "cols * c_stride_d", "cols"),
    Bug("tokens past the last not masked", "return b, t, t < T", "return b, t, t >= 0"),
    Bug("runs of tokens one too near", "(block % blocks).to(tl.int64) * BLOCK_T +", "(block % blocks).to(tl.int64) * (BLOCK_T - 1) +"),
    Bug("batch row of the wrong block", "b = (block // blocks)", "b = (block // (blocks + 1))"),
    Bug("table's batch of one strides", "if cos.dim() == 3 and cos.shape[0] > 1 else 0", "if cos.dim() == 3 and cos.shape[0] > 2 else 0"),
    Bug("positions of one row for all", "position_ids.stride(0), position_ids.stride(1)", "0, position_ids.stride(1)"),
]  # fmt: skip
