"""Which backend runs an op, and why not another.

A *backend* is a way of running an op: hand-written Triton, CUDA C++, C++ for CPUs, or the eager PyTorch reference.
What a backend owes an op is an `Impl`; the `Impl`s of an op are its table, written in `kernels/<op>/__init__.py`.

The choice, most specific first: the call (`backend=`), the model (which passes its choice to every call), the context
(`with use_backend("eager"):`), the environment (`PYLLM_BACKEND`), and else the op's own order for the device. A choice
is one name, or several with commas ("cpu,eager"), tried in that order. Whoever names backends gets one of them or a
`BackendError` with everybody's reasons; only the automatic choice may end at eager.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable as _once_differentiable

BACKENDS = ("triton", "cuda", "cpu", "eager")
_CPU = torch.device("cpu")

# The order in which backends are tried when nobody chose, by device type. An op whose measurements say otherwise
# passes its own. CPU: the C++ kernels beat eager in every shape measured (docs and benchmarks print the ratios).
# GPU: Triton first, until the benchmark suite has compared it with the CUDA C++ kernels on the same card.
AUTO_ORDER: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu", "eager"), "cuda": ("triton", "cuda", "eager")}


class BackendError(RuntimeError):
    """No backend that was asked for can run these inputs. The message lists every backend with its reasons."""


class Impl(NamedTuple):
    """What a backend owes an op. All three take the op's arguments, in the order of its schema, without `backend`."""

    fwd: Callable[..., Any]  # returns the op's outputs and the tensors saved for backward: both belong to the contract
    bwd: Callable[..., Any] | None  # takes them, from whichever backend's forward; None for ops without a gradient
    why_not: Callable[..., list[str]]  # reasons against these inputs; empty: can serve


def lazy(where: str) -> Callable[..., Any]:
    """A function named "module:attribute", imported at its first call: for modules that must import Triton."""
    found: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not found:
            module, attribute = where.split(":")
            found.append(getattr(importlib.import_module(module), attribute))
        return found[0](*args)

    return call


_context: str | None = None  # a plain global, so that torch.compile guards on it and retraces when it changes


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Choose the backend of every pyllm op inside the block, for the whole process (as torch's sdpa_kernel does).

    Args:
        backend: "auto", one of "triton", "cuda", "cpu", "eager", or several with commas, tried in that order.
    Raises:
        ValueError: unknown name.
    """
    global _context
    parse(backend)
    before, _context = _context, backend
    try:
        yield
    finally:
        _context = before


def parse(choice: str) -> tuple[str, ...]:
    """The backend names in a choice; () for "auto"."""
    if choice == "auto":
        return ()
    names = tuple(name.strip() for name in choice.split(","))
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}: choose from auto, {', '.join(BACKENDS)}, or list with commas")
    return names


def requested(backend: str | None) -> str | None:
    """The choice that holds for a call: its own, the context's, the environment's, or None for automatic."""
    if backend is not None and backend != "auto":
        return backend
    if _context is not None:
        return None if _context == "auto" else _context
    if _VARIABLE not in _ENVIRONMENT:
        return None
    named = os.environ.get("PYLLM_BACKEND")
    return None if named in (None, "", "auto") else named


# os.environ encodes names and raises and catches a KeyError to say that one is not set: longer than a small kernel
# runs. The dictionary behind it is where every change goes, too.
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_VARIABLE: Any = os.environ.encodekey("PYLLM_BACKEND") if _ENVIRONMENT is not os.environ else "PYLLM_BACKEND"


class Op:
    """One registered op: its schema, its backends and the order in which they are tried.

    Args:
        name: in `torch.ops.pyllm`; the backward is `<name>_bwd`.
        schema: of the forward, without name and without the last argument `str backend`, which is added here.
        fake: shapes and dtypes of the outputs for the same arguments (torch.compile, meta tensors).
        impls: backend to its `Impl`; a test may replace or add one.
        bwd_schema, bwd_fake: the same for the backward; None for an op without a gradient.
        order: backends tried per device type when nobody chose; AUTO_ORDER unless the op's measurements differ.

    Forward and backward are two ops of their own, called from an old-style autograd.Function: no registration of
    autograd on the op. Of all ways measured this costs least per call, and it passes opcheck, compile, export, FSDP2.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable[..., Any],
        impls: Mapping[str, Impl],
        *,
        bwd_schema: str | None = None,
        bwd_fake: Callable[..., Any] | None = None,
        order: Mapping[str, tuple[str, ...]] = AUTO_ORDER,
    ):
        self.name = name
        self.impls = impls
        self.order = order
        self._warned = False
        self._cpu_order = order.get("cpu", ("eager",))

        def run_fwd(*args: Any) -> Any:
            backend = args[-1]
            fwd = self.impl(backend).fwd
            if backend == "eager":  # the only one made of torch ops, which would record themselves for autograd
                with torch.no_grad():
                    return fwd(*args[:-1])
            if backend == "cuda" and _elsewhere(args[0]):
                with torch.cuda.device(args[0].device):
                    return fwd(*args[:-1])
            return fwd(*args[:-1])

        def run_bwd(*args: Any) -> Any:
            backend = args[-1]
            bwd = self.impl(backend).bwd
            assert bwd is not None, name
            if backend == "cuda" and _elsewhere(args[0]):
                with torch.cuda.device(args[0].device):
                    return bwd(*args[:-1])
            return bwd(*args[:-1])

        self.fwd = Registered(_register(name, schema, run_fwd, fake), run_fwd)
        self.bwd: Any = None
        if bwd_schema is not None and bwd_fake is not None:
            self.bwd = Registered(_register(f"{name}_bwd", bwd_schema, run_bwd, bwd_fake), run_bwd)

    def impl(self, backend: str) -> Impl:
        """The implementation of a backend; BackendError when the op has none."""
        found = self.impls.get(backend)
        if found is None:
            raise BackendError(f"{self.name} has no {backend} kernel; it has {', '.join(self.impls)}")
        return found

    def why_not(self, backend: str, *args: Any) -> list[str]:
        """Reasons why a backend can't run the op on these arguments; empty when it can."""
        found = self.impls.get(backend)
        return [f"no {backend} kernel for {self.name}"] if found is None else found.why_not(*args)

    def select(self, backend: str | None, device: torch.device, *args: Any) -> str:
        """The name of the backend that runs the op on these arguments.

        Raises:
            BackendError: backends were named and none of them can; or nothing can at all.
            ValueError: a name is unknown.
        """
        choice = requested(backend)
        names = () if choice is None else parse(choice)
        # device.type makes a string, which takes longer than the rest of the choice
        for name in names or (self._cpu_order if device == _CPU else self.order.get(device.type, ("eager",))):
            found = self.impls.get(name)
            if found is not None and not found.why_not(*args):
                if name == "eager" and not names and device.type != "cpu":
                    self._warn_eager(device, args)
                return name
        raise BackendError(self._refusal(choice, device, args))

    def _refusal(self, choice: str | None, device: torch.device, args: tuple[Any, ...]) -> str:
        what = ", ".join(f"{tuple(a.shape)} {a.dtype}" for a in args if isinstance(a, torch.Tensor))
        lines = [f"pyllm::{self.name} cannot run with backend={choice or 'auto'!r} on {device} for inputs {what}:"]
        for name in BACKENDS:
            lines.append(f"  {name}: {'; '.join(self.why_not(name, *args)) or 'can run this'}")
        return "\n".join(lines)

    def _warn_eager(self, device: torch.device, args: tuple[Any, ...]) -> None:
        if self._warned or torch.compiler.is_compiling():
            return
        self._warned = True
        reasons = [f"{n}: {'; '.join(self.why_not(n, *args))}" for n in self.order.get(device.type, ()) if n != "eager"]
        warnings.warn(
            f"pyllm::{self.name} runs as eager PyTorch on {device}, which is slow. {' | '.join(reasons)}. "
            "`pyllm kernels` shows every op; PYLLM_BACKEND=eager silences this.",
            stacklevel=4,
        )


def _elsewhere(x: torch.Tensor) -> bool:
    """Whether a tensor is on another GPU than the current one, where CUDA would launch a kernel that takes pointers."""
    return x.is_cuda and x.device.index != torch.cuda.current_device()


class Registered:
    """A registered op that is called without torch's dispatcher where nobody could tell: a third of a small op's time.

    Attributes:
        overload: what torch knows of it, `torch.ops.pyllm.<name>.default`.
    """

    def __init__(self, overload: Any, run: Callable[..., Any]):
        self.overload = overload
        self._schema = overload._schema
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args) if torch.compiler.is_compiling() or _watched(args) else self._run(*args)


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), int, float, bool, str})


def _watched(args: tuple[Any, ...]) -> bool:
    """Whether torch's dispatcher has a part in a call: another class of tensor, a mode, transform, tracer, profiler."""
    for arg in args:
        if type(arg) not in _PLAIN:
            return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch.autograd._profiler_enabled()
    )


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), without the Python that looks after torch.func's wrappers where there are none."""
    if torch.compiler.is_compiling() or _watched(args):
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of the same name, whose work is spared where no second derivative is asked for."""
    guarded = _once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return call


_library = torch.library.Library("pyllm", "FRAGMENT")


def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    arguments, returns = schema.split("->")
    arguments = arguments.strip().removesuffix(")")
    _library.define(f"{name}{arguments}, str backend) -> {returns.strip()}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyllm::{name}", lambda *args: fake(*args[:-1]), lib=_library)
    return getattr(torch.ops.pyllm, name).default


class _Once(torch.autograd.Function):
    """Identity that refuses a second differentiation, so that eager answers it as the kernels do."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grads


def once(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same tensors, whose gradient can be taken once: what eager's inputs go through."""
    return apply(_Once, *tensors) if needs_grad(*tensors) else tensors


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd wants a gradient of any of them."""
    for t in tensors:
        if t is not None and t.requires_grad:
            return torch.is_grad_enabled()
    return False
