"""RMSNorm on the SIMT machine: runs one case through the compiled functions and checks every output.

Shared by the tests and by the mutation trials, which prove that these checks notice planted bugs. Truth is float64. The
bounds are those of the contract: float32 arithmetic, one rounding to the output's dtype.
"""

from __future__ import annotations

import mmap
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CODES = {F32: 0, BF16: 1, F16: 2}
EPS32 = torch.finfo(F32).eps
SLACK = 16  # float32 roundings on the way from the inputs to a result, sums counted by their terms' magnitude


@dataclass(frozen=True)
class Case:
    """Shape, dtypes and placement of one forward and backward pass.

    pad: columns between the rows of the inputs; it breaks their 16-byte alignment unless it is a multiple of 8.
    shift: elements by which the inputs start past a 16-byte boundary.
    scale: of x; 1e-3 and eps matter alike.
    parts: rows of scratch for dweight, one block each.
    """

    rows: int
    cols: int
    x: torch.dtype = BF16
    residual: torch.dtype | None = None
    weight: torch.dtype | None = None
    offset: float = 0.0
    eps: float = 1e-6
    pad: int = 0
    shift: int = 0
    scale: float = 1.0
    parts: int = 2

    def __str__(self) -> str:
        def short(d: torch.dtype) -> str:
            return str(d).replace("torch.", "").replace("bfloat", "bf").replace("float", "f")

        words = [f"{self.rows}x{self.cols}", short(self.x)]
        words += [f"+{short(self.residual)}"] if self.residual else []
        words += [f"w{short(self.weight)}"] if self.weight else []
        for name, plain in (("offset", 0.0), ("pad", 0), ("shift", 0), ("scale", 1.0), ("parts", 2)):
            value = getattr(self, name)
            words += [f"{name}{value:g}"] if value != plain else []
        return "-".join(words)


CASES = [
    # rows shorter than a warp: several in a block, the last block not full
    Case(5, 1, F32),
    Case(70, 7),
    Case(131, 8),
    Case(19, 64, F16, parts=3),
    Case(37, 96, offset=1.0),
    Case(9, 128, F32),
    # a row to a warp
    Case(6, 256, BF16, BF16),
    Case(7, 1000, F16, F32),
    Case(5, 1024, weight=F32),
    Case(3, 500, F32, F32, offset=1.0),
    # a row to a block
    Case(3, 1032, BF16, BF16, offset=1.0),
    Case(4, 1024, F32, parts=3),
    Case(3, 2056, F16),
    Case(2, 4096, BF16, F32, BF16),
    Case(5, 1536, F16, F32, F32, offset=1.0, scale=1e-3, eps=1e-5),
    # rows that are not multiples of a vector, rows that don't start at 16 bytes
    Case(3, 1001),
    Case(2, 1333, F32, F32),
    Case(3, 1001, F16, pad=7),
    Case(3, 520, BF16, BF16, pad=3),
    Case(3, 520, F16, F32, pad=8),
    Case(2, 640, F32, shift=1),
    Case(2, 640, BF16, F32, F32, shift=4, offset=-0.5),
    # more columns than registers hold
    Case(2, 4999),
    Case(2, 8448, F32, F32, offset=1.0),
    Case(2, 16640, BF16, BF16),
    Case(1, 16392, F16, F32),
    Case(1, 65544, BF16, parts=1),
    # sizes at the edge
    Case(0, 64),
    Case(0, 64, F32, F32),
    Case(4, 0),
    Case(1, 8, F16, parts=7),
    # where eps and the mean matter
    Case(4, 512, F32, scale=1e-3),
    Case(4, 512, BF16, scale=1e-4, eps=1e-5),
]

# for the profile: aligned shapes
PROFILED = [
    Case(8, 4096),
    Case(4, 4096, BF16, BF16, offset=1.0),
    Case(4, 2048, BF16, F32, F32),
    Case(4, 2048, F16, weight=F32),
    Case(4, 4096, F32, F32),
    Case(8, 1024, F16, F16),
    Case(128, 128, BF16),
    Case(64, 64, F32),
    Case(2, 16640, BF16, BF16),
    Case(2, 8448, F32),
]


class Placed:
    """Tensors at exactly known places: rows with padding and shift, each registered with the machine's checker."""

    def __init__(self, module: ModuleType):
        self.module = module
        module.clear_buffers()
        self.held: list[Tensor] = []

    def rows(self, name: str, values: Tensor, pad: int, shift: int) -> tuple[Tensor, int]:
        """A copy of (rows, cols) values, and its row stride. What lies between rows is out of bounds."""
        n, cols = values.shape
        stride = cols + pad
        memory = torch.full((n * stride + shift + 8,), float("nan"), dtype=values.dtype)
        start = (-memory.data_ptr() % 16) // memory.element_size() + shift
        view = memory[start:].as_strided((n, cols), (stride, 1))
        view.copy_(values)
        self.held.append(memory)
        for i in range(n):
            self.module.add_buffer(view[i].data_ptr(), cols * view.element_size(), f"{name}[{i}]")
        return view, stride

    def whole(self, name: str, values: Tensor) -> Tensor:
        values = values.contiguous()
        memory = torch.empty(values.numel() + 16, dtype=values.dtype)
        start = (-memory.data_ptr() % 16) // memory.element_size()
        view = memory[start : start + values.numel()].view(values.shape)
        view.copy_(values)
        self.held.append(memory)
        self.module.add_buffer(view.data_ptr(), view.numel() * view.element_size(), name)
        return view

    def output(self, name: str, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        """Poisoned with NaN, so that what a kernel leaves out shows."""
        return self.whole(name, torch.full(shape, float("nan"), dtype=dtype))


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def run(module: ModuleType, case: Case, seed: int = 0) -> dict[str, Any]:
    """Forward, then backward from the forward's own h and rstd. All inputs and outputs by name."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    c, place = case, Placed(module)
    h_dtype, w_dtype = c.residual or c.x, c.weight or c.x
    x, x_stride = place.rows("x", draw(c.rows, c.cols, dtype=c.x, scale=c.scale), c.pad, c.shift)
    residual, r_stride = None, 0
    if c.residual:
        residual, r_stride = place.rows("residual", draw(c.rows, c.cols, dtype=h_dtype, scale=c.scale), c.pad, c.shift)
    weight = place.whole("weight", draw(c.cols, dtype=w_dtype))
    y = place.output("y", c.rows, c.cols, dtype=c.x)
    h = place.output("h", c.rows, c.cols, dtype=h_dtype) if c.residual else None
    rstd = place.output("rstd", c.rows)
    # fmt: off
    module.rms_norm_fwd(
        address(x), address(residual), address(weight), address(y), address(h), address(rstd), c.rows, c.cols,
        x_stride, r_stride, c.eps, c.offset, CODES[c.x], CODES[h_dtype], CODES[w_dtype], 0,
    )

    normed, n_stride = (x, x_stride) if h is None else (h, c.cols)
    bw_weight = weight if w_dtype == h_dtype else place.whole("weight as float32", weight.float())
    dy, dy_stride = place.rows("dy", draw(c.rows, c.cols, dtype=c.x), c.pad, c.shift)
    dh, dh_stride = None, 0
    if c.residual:
        dh, dh_stride = place.rows("dh", draw(c.rows, c.cols, dtype=h_dtype), c.pad, c.shift)
    dx = place.output("dx", c.rows, c.cols, dtype=h_dtype)
    dweight, partial = place.output("dweight", c.cols), place.output("partial", c.parts, c.cols)
    module.rms_norm_bwd(
        address(dy), address(dh), address(normed), address(bw_weight), address(rstd), address(dx), address(dweight),
        address(partial), c.parts, c.rows, c.cols, dy_stride, dh_stride, n_stride, c.offset,
        CODES[c.x], CODES[h_dtype], CODES[bw_weight.dtype], 0,
    )
    # fmt: on
    module.clear_buffers()
    names = ("x", "residual", "weight", "y", "h", "rstd", "dy", "dh", "dx", "dweight")
    return dict(zip(names, (x, residual, weight, y, h, rstd, dy, dh, dx, dweight), strict=True))


def check(case: Case, t: dict[str, Any]) -> None:
    """Raises AssertionError naming the first output that is off by more than rounding."""
    x, residual = t["x"], t["residual"]
    if residual is not None:
        exact = (x.float() + residual.float()).to(residual.dtype)
        assert torch.equal(t["h"], exact), "h is not round(x + residual), bit for bit"
    h = (x if residual is None else t["h"]).double()
    w = t["weight"].double() + case.offset
    rstd = torch.rsqrt(h.square().mean(-1) + case.eps)
    if case.cols:
        close("rstd", t["rstd"], rstd, rstd.abs())
    unit = h * rstd[:, None]
    close("y", t["y"], unit * w, (unit * w).abs())

    dy = t["dy"].double()
    g = dy * w
    mean = (g * unit).mean(-1, keepdim=True)
    dx, terms = rstd[:, None] * (g - unit * mean), (g * unit).abs().mean(-1, keepdim=True)
    magnitude = rstd[:, None] * (g.abs() + unit.abs() * terms)
    if t["dh"] is not None:
        dx, magnitude = dx + t["dh"].double(), magnitude + t["dh"].double().abs()
    close("dx", t["dx"], dx, magnitude)
    close("dweight", t["dweight"], (dy * unit).sum(0), (dy * unit).abs().sum(0))


def close(name: str, got: Tensor, want: Tensor, magnitude: Tensor) -> None:
    """|got - want| within half a unit of got's last place, plus SLACK float32 roundings of `magnitude`."""
    half_unit = torch.finfo(got.dtype).eps / 2
    bound = want.abs() * half_unit + magnitude * (SLACK * EPS32) + torch.finfo(got.dtype).smallest_normal * half_unit
    wrong = ~((got.double() - want).abs() <= bound)  # NaN is wrong
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        count, total = int(wrong.sum()), wrong.numel()
        raise AssertionError(
            f"{name}: {count} of {total} elements off, first {at}: {got[at].item()!r}, want {want[at].item()!r}"
        )


def check_huge_stride(module: ModuleType) -> None:
    """Offsets of rows beyond 2^31 elements. The memory between the rows is never touched, so it is never there."""
    cols, stride, rows = 8, 1_500_000_000, 3
    reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2 * (2 * stride + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve)
    x = torch.frombuffer(memory, dtype=BF16).as_strided((rows, cols), (stride, 1))
    x.copy_(torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)))
    place = Placed(module)
    for i in range(rows):
        module.add_buffer(x[i].data_ptr(), 2 * cols, f"x[{i}]")
    weight, rstd = place.whole("weight", torch.ones(cols, dtype=BF16)), place.output("rstd", rows)
    y, dx = place.output("y", rows, cols, dtype=BF16), place.output("dx", rows, cols, dtype=BF16)
    dweight, partial = place.output("dweight", cols), place.output("partial", 1, cols)
    p = address
    module.rms_norm_fwd(p(x), 0, p(weight), p(y), 0, p(rstd), rows, cols, stride, 0, 1e-6, 0.0, 1, 1, 1, 0)
    # x serves as its own dy: the gradient is then zero but for eps and rounding.
    # fmt: off
    module.rms_norm_bwd(
        p(x), 0, p(x), p(weight), p(rstd), p(dx), p(dweight), p(partial), 1, rows, cols, stride, 0, stride, 0.0,
        1, 1, 1, 0,
    )
    # fmt: on
    module.clear_buffers()
    want = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    close("y", y, want, want.abs())
    assert bool((dx.abs() < 1e-4).all()), "dx"
    close("dweight", dweight, (x.double() * want).sum(0), (x.double() * want).abs().sum(0))


def check_access_patterns(module: ModuleType, case: Case) -> None:
    """No bank conflicts; no more than a tenth of the sectors moved in vain."""
    module.configure(profile=True)
    module.profiles()
    run(module, case)
    profile = module.profiles()
    shared = [p for p in profile if p["space"] == "shared"]
    stores = [p for p in profile if p["space"] == "global" and p["write"]]
    assert shared
    assert stores
    conflicts = [p for p in shared if p["actual"] > p["ideal"]]
    assert not conflicts, f"bank conflicts: {conflicts}"
    wasteful = [p for p in profile if p["space"] == "global" and p["actual"] > 1.1 * p["ideal"]]
    assert not wasteful, f"half-used sectors: {wasteful}"


def check_everything(module: ModuleType) -> None:
    """All of the above; raises at the first thing that is wrong."""
    for case in CASES:
        for schedule in (0, 2):
            module.configure(schedule=schedule, seed=11, check=True)
            try:
                check(case, run(module, case))
            except (AssertionError, RuntimeError) as error:
                raise AssertionError(f"{case}: {error}") from error
    module.configure(check=True)
    check_huge_stride(module)
    for case in PROFILED:
        check_access_patterns(module, case)


if __name__ == "__main__":  # python rms_norm_trials.py _simt.so: what a mutation trial runs
    import simt_builder

    torch.set_num_threads(1)
    try:
        check_everything(simt_builder.load(Path(sys.argv[1]), "_simt"))
    except (AssertionError, RuntimeError) as error:
        print(f"CAUGHT {' '.join(str(error).split())[:600]}")
    else:
        print("NOTHING NOTICED")
