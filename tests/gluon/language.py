"""What a Gluon kernel's module imports, on `machine.py` and torch: `load` runs the file as it stands.

Scalars are Int: they divide as C does, and one that leaves its 32 bits is an error. Tensors in registers are torch
tensors (int32 where a kernel's would be), pointers check their bounds, and what is stored twice is an error.
"""

from __future__ import annotations

import importlib.util
import linecache
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .machine import Machine, ProtocolError, Ring, View, current

# How the next launch runs its programs, and which of them.
POLICY: list[str | int] = ["late"]
ONLY: list[Callable[[int, int], bool]] = [lambda program, programs: True]


class Int(int):
    """A scalar of 32 or 64 bits."""

    bits: int

    def __new__(cls, value: int, bits: int = 32) -> Int:
        if not -(1 << bits - 1) <= value < 1 << bits - 1:
            raise OverflowError(f"{value} doesn't fit {bits} bits")
        made = super().__new__(cls, value)
        made.bits = bits
        return made

    def to(self, dtype: torch.dtype) -> Int:
        return Int(int(self), 64 if dtype == torch.int64 else 32)


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _operator(work: Callable[[int, int], int], swapped: bool) -> Callable[[Int, Any], Any]:
    def apply(self: Int, other: Any) -> Any:
        if isinstance(other, Tensor) and self.bits == 64:
            return work(int(self), other.long())
        if not isinstance(other, int):
            return NotImplemented
        bits = max(self.bits, getattr(other, "bits", 32))
        a, b = (int(other), int(self)) if swapped else (int(self), int(other))
        return Int(work(a, b), bits)

    return apply


for _name, _work in {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": _quotient,
    "mod": lambda a, b: a - _quotient(a, b) * b,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
}.items():
    setattr(Int, f"__{_name}__", _operator(_work, False))
    setattr(Int, f"__r{_name}__", _operator(_work, True))


class Pointer:
    """An address, or a tensor of them, in one tensor's memory."""

    def __init__(self, memory: Tensor, offset: Any = 0, stored: Tensor | None = None):
        self.memory, self.offset, self.stored = memory, offset, stored

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other, self.stored)

    def inside(self, offset: Any) -> None:
        size = self.memory.numel()
        low, high = (int(offset.min()), int(offset.max())) if isinstance(offset, Tensor) else (offset, offset)
        if low < 0 or high >= size:
            raise ProtocolError(f"an access to elements {low} to {high} of a tensor that has {size}")


class TensorDescriptor:
    """Checks what the TMA unit wants of a tensor."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: Any):
        size = base.element_size()
        if base.data_ptr() % 16 or any(s * size % 16 for s in strides[:-1]) or strides[-1] != 1:
            raise ProtocolError("a TMA descriptor needs a base and strides of whole 16 bytes, and unit last stride")
        if any(n > 256 for n in block_shape) or any(n < 1 for n in shape):
            raise ProtocolError(f"a TMA descriptor of {shape} with boxes of {block_shape}")
        self.whole = base.as_strided(shape, strides)
        self.block_shape, self.layout, self.dtype = block_shape, layout, base.dtype
        self.block_type = types.SimpleNamespace(shape=block_shape, nbytes=math.prod(block_shape) * size)

    def box(self, at: list[int]) -> Tensor:
        """The box at these coordinates; zeros outside of the tensor."""
        got = torch.zeros(self.block_shape, dtype=self.dtype)
        source, target = [], []
        for first, length, size in zip(at, self.block_shape, self.whole.shape, strict=True):
            low, high = max(first, 0), min(first + length, size)
            if low >= high:
                return got
            source.append(slice(low, high))
            target.append(slice(low - first, high - first))
        got[tuple(target)] = self.whole[tuple(source)]
        return got


class Kernel:
    """A @gluon.jit function: called by other kernels, or launched with kernel[grid](...)."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.__name__ = function, function.__name__

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int) -> None:
            (programs,) = grid
            given = [_argument(a) for a in args]
            chosen = [program for program in range(programs) if ONLY[0](program, programs)]
            for program in chosen:
                Machine(program, POLICY[0]).run(self.function, given)
            for pointer in given if len(chosen) == programs else ():
                if isinstance(pointer, Pointer) and pointer.stored is not None and pointer.stored.any():
                    missing = int((~pointer.stored).sum())
                    if missing:
                        raise ProtocolError(f"{missing} elements of an output are never stored")

        return launch


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        few = value.numel() < 1 << 24
        return Pointer(value.view(-1), 0, torch.zeros(value.numel(), dtype=torch.bool) if few else None)
    if isinstance(value, int) and not isinstance(value, bool):
        return Int(value, 32 if -(1 << 31) <= value < 1 << 31 else 64)
    return value


def _jit(function: Any = None, **options: Any) -> Any:
    return Kernel if function is None else Kernel(function)


def _load(pointer: Pointer, mask: bool = True, other: Any = None) -> Any:
    if not mask:
        return other
    pointer.inside(pointer.offset)
    return Int(int(pointer.memory[int(pointer.offset)]), 64 if pointer.memory.dtype == torch.int64 else 32)


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    offset, value, mask = torch.broadcast_tensors(pointer.offset, value, mask)
    offset, value = offset[mask].long(), value[mask]
    if not len(offset):
        return
    pointer.inside(offset)
    if pointer.stored is not None:
        if pointer.stored[offset].any() or len(offset.unique()) != len(offset):
            raise ProtocolError("an element is stored twice")
        pointer.stored[offset] = True
    if value.dtype != pointer.memory.dtype:
        raise ProtocolError(f"{value.dtype} stored to {pointer.memory.dtype}")
    pointer.memory[offset] = value


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Ring:
    frame = sys._getframe(1)
    name = linecache.getline(frame.f_code.co_filename, frame.f_lineno).split("=")[0].strip()
    return current().allocate(name, dtype, shape, barriers=layout == "mbarrier")


def _either(tensor: Callable[..., Any], scalar: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: tensor(a, b) if isinstance(a, Tensor) else scalar(a, b)


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, Tensor):
        return a if condition else b
    return torch.where(condition, a, b)


def _copy(descriptor: TensorDescriptor, at: list[int], barrier: Any, target: View) -> None:
    current().copy(descriptor.box([int(Int(c)) for c in at]), target, barrier)


def _mma(a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    product = current().multiply(a, b, acc, use_acc)
    return product if is_async else current().retire(0, [product])[0]


def _mma_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
    values = current().retire(outstanding, deps)
    return values[0] if len(values) == 1 else tuple(values)


def _symbol(name: str) -> Callable[..., Any]:
    return lambda *args, **named: (name, args, tuple(named.items()))


def _range(*args: int) -> Any:
    return (Int(i) for i in range(*args))


gl = types.SimpleNamespace(
    constexpr=lambda value: value,
    **{name: getattr(torch, name) for name in ("int32", "int64", "float32", "float16", "bfloat16", "exp2", "log2")},
    **{
        name: _symbol(name)
        for name in (
            "NVMMADistributedLayout",
            "NVMMASharedLayout",
            "DotOperandLayout",
            "BlockedLayout",
            "SliceLayout",
        )
    },
    arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    expand_dims=lambda x, axis: x.unsqueeze(axis),
    convert_layout=lambda x, layout: x,
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    maximum=_either(torch.maximum, max),
    minimum=_either(torch.minimum, min),
    where=_where,
    cdiv=lambda a, b: (a + (b - 1)) // b,
    static_range=range,
    program_id=lambda axis: Int(current().program),
    load=_load,
    store=_store,
    allocate_shared_memory=_allocate,
    warp_specialize=lambda partitions, warps, registers: current().specialize(partitions),
)
HOPPER = types.SimpleNamespace(
    fence_async_shared=lambda: current().fence(),
    mbarrier=types.SimpleNamespace(
        MBarrierLayout=lambda: "mbarrier",
        init=lambda barrier, count: current().init(barrier, count),
        wait=lambda barrier, phase: current().wait(barrier, int(phase)),
        arrive=lambda barrier, *, count: current().arrive(barrier, count),
        expect=lambda barrier, size: current().expect(barrier, size),
    ),
    tma=types.SimpleNamespace(async_copy_global_to_shared=_copy),
    warpgroup_mma=_mma,
    warpgroup_mma_wait=_mma_wait,
)
_GLUON = types.SimpleNamespace(jit=_jit, constexpr_function=lambda function: function, language=gl)
_MODULES = {
    "triton": types.SimpleNamespace(),
    "triton.experimental": types.SimpleNamespace(gluon=_GLUON),
    "triton.experimental.gluon": _GLUON,
    "triton.experimental.gluon.language": gl,
    "triton.experimental.gluon.language.nvidia": types.SimpleNamespace(hopper=HOPPER),
    "triton.experimental.gluon.language.nvidia.hopper": HOPPER,
    "triton.experimental.gluon.nvidia": types.SimpleNamespace(),
    "triton.experimental.gluon.nvidia.hopper": types.SimpleNamespace(TensorDescriptor=TensorDescriptor),
}


def load(path: Path, package: str) -> Any:
    """The module at `path`, a member of `package`, as it stands, over this language."""
    linecache.checkcache(str(path))
    name = f"{package}.{path.stem}_on_the_cpu"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    module.range = _range
    with mock.patch.dict(sys.modules, _MODULES):  # type: ignore[arg-type]
        spec.loader.exec_module(module)
    return module
