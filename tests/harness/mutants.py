"""Bugs planted in a module of kernels, to see whether the checks notice them.

A bug is a change of the source's text. When a text is no longer found, the source has changed: adapt the bug to it.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyllm.kernels import OPS
from pyllm.kernels.dispatch import Impl

from .accuracy import check


class Bug(NamedTuple):
    """`text` becomes `instead` in the module's source, wherever it stands."""

    name: str
    text: str
    instead: str
    quick: bool = False  # tried in the fast tier as well


def plant(module: ModuleType, bug: Bug, folder: Path) -> ModuleType:
    """A copy of the module with the bug in it, loaded beside the original."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert bug.text in source, f"{bug.name}: the source has changed, this text isn't there: {bug.text!r}"
    changed = folder / f"{module.__name__.rsplit('.', 1)[-1]}.py"  # a file: Triton reads its kernels' source again
    changed.write_text(source.replace(bug.text, bug.instead))
    name = f"{module.__name__}_with_a_bug"
    spec = importlib.util.spec_from_file_location(name, changed)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[name] = mutant
    try:
        spec.loader.exec_module(mutant)
    finally:
        del sys.modules[name]
    return mutant


def caught(
    op: str,
    backend: str,
    impl: Impl,
    device: str = "cpu",
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    cases: Mapping[str, Mapping[str, Any]] | None = None,
    also: Callable[[str], None] | None = None,
) -> str:
    """What the checks say of an implementation; empty when they find nothing.

    Every case goes through the numerics rule with its inputs in padded rows (NaN between them, which a read out of
    bounds finds). `also(backend)` is a further check that raises.
    """
    spec = OPS[op]
    before = spec.op.impls
    spec.op.impls = {**before, backend: impl}
    try:
        for case in (spec.cases if cases is None else cases).values():
            for dtype in dtypes:
                inputs = spec.inputs(**case, dtype=dtype, device=device, generator=torch.Generator().manual_seed(11))
                laid = {k: padded(v) if _pads(spec, k, v) else v for k, v in inputs.items() if v is not None}
                check(spec, functools.partial(_laid, spec, backend), inputs, given=laid)
        if also is not None:
            also(backend)
    except Exception as found:  # whatever a bug provokes: a wrong number, a shape that doesn't fit, a compiler's error
        return f"{type(found).__name__}: {found}"
    finally:
        spec.op.impls = before
    return ""


def in_a_process(trial: Callable[[], str], seconds: float = 300) -> str:
    """trial() in a process of its own: a bug may well crash it, or make it hang, which is noticed too."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        faulthandler.disable()  # its crash is no news
        torch.set_num_threads(1)  # a forked process must not wait for OpenMP threads that it does not have
        sender.send(trial())

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    sender.close()  # the child's end is then the only one: the pipe closes when it dies
    try:
        return receiver.recv() if receiver.poll(seconds) else f"no end in {seconds} s"
    except EOFError:
        child.join()
        return f"the process died: {child.exitcode}"
    finally:
        child.kill()
        child.join()


def _laid(spec: Any, backend: str, **given: Any) -> Any:
    # run() clones its leaves, which undoes their layout
    return spec.function(**{k: padded(v) if _pads(spec, k, v) else v for k, v in given.items()}, backend=backend)


def _pads(spec: Any, name: str, value: Any) -> bool:
    """Whether an input is laid in padded rows: where gradients flow, or, for ops without any, every tensor."""
    return isinstance(value, Tensor) and (name in spec.grads or not spec.grads)


def padded(x: Tensor) -> Tensor:
    """The same values as the left part of wider rows, NaN in the rest."""
    if not x.is_floating_point() or x.dim() == 0:
        return x
    return torch.nn.functional.pad(x, (0, 5), value=float("nan"))[..., : x.shape[-1]]
