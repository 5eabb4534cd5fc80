"""One program of a Gluon kernel on a model of a Hopper multiprocessor. What it models is said in `__init__.py`.

Partitions are threads of which exactly one runs at a time; a scheduler chooses who is next, and when a piece of a copy
lands, by one of three policies: "late" (nothing asynchronous happens before somebody needs it), "early" (at once), or a
seed (by chance). So a run repeats exactly, and a deadlock is known at once: nobody can go on.

Order is kept by vector clocks. A *stamp* (who, when) marks the end of an access; the clock of whoever touches the same
memory next must contain it. Clocks travel through barriers alone: an arrival hands the clock over, a wait takes it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Clock = dict[int, int]
Stamp = tuple[int, int]


class ProtocolError(AssertionError):
    """The kernel breaks a rule of barriers, copies or wgmma."""


class RaceError(ProtocolError):
    """Two accesses to shared memory that nothing orders."""


class DeadlockError(ProtocolError):
    """Nobody can go on."""


class _Abandoned(BaseException):
    """Ends a partition's thread after another one has failed."""


def join(clock: Clock, other: Clock) -> None:
    for who, when in other.items():
        if clock.get(who, 0) < when:
            clock[who] = when


class Agent:
    """A partition, or the program before it divides: a clock, and the wgmmas in flight."""

    def __init__(self, number: int, name: str, clock: Clock):
        self.number, self.name = number, name
        self.clock = {**clock, number: 1}
        self.flying: list[Product] = []
        self.turn = threading.Semaphore(0)
        self.blocked: Barrier | None = None
        self.parity = 0
        self.finished = False

    def stamp(self) -> Stamp:
        return self.number, self.clock[self.number]

    def release(self) -> Clock:
        """What the agent has done so far; what it does from now on isn't in it."""
        given = dict(self.clock)
        self.clock[self.number] += 1
        return given


class Barrier:
    """An mbarrier: a phase completes when all arrivals and all bytes of it are there."""

    def __init__(self, name: str):
        self.name = name
        self.count = 0  # arrivals of a phase; 0 before init
        self.missing = self.bytes = self.phase = 0
        self.gathering: Clock = {}
        self.done: Clock = {}

    def init(self, count: int) -> None:
        if self.count:
            raise ProtocolError(f"{self.name} is initialised twice")
        self.count = self.missing = count

    def arrive(self, clock: Clock, arrivals: int = 0, expected: int = 0, landed: int = 0) -> None:
        if not self.count:
            raise ProtocolError(f"{self.name} is used before its init")
        if arrivals > self.missing:
            raise ProtocolError(f"{self.name}: more than {self.count} arrivals in phase {self.phase}")
        join(self.gathering, clock)
        self.missing -= arrivals
        self.bytes += expected - landed
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count
            join(self.done, self.gathering)
            self.gathering = {}

    def passed(self, parity: int) -> bool:
        """Whether the phase of that parity is over: of the two that the hardware can tell apart, the one before now."""
        return self.phase & 1 != parity

    def __str__(self) -> str:
        arrived = self.count - self.missing
        return f"{self.name} (phase {self.phase}: {arrived} of {self.count} arrivals, {self.bytes} bytes outstanding)"


class Slot:
    """A buffer in shared memory, the unit in which accesses are ordered."""

    def __init__(self, name: str, data: Tensor):
        self.name, self.data = name, data
        self.written: list[Stamp] = []  # all of them must be known to who reads; empty: never written
        self.reads: list[Read] = []

    def begin_read(self, agent: Agent) -> None:
        if not self.written:
            raise RaceError(f"{agent.name} reads {self.name}, which nobody has written")
        if not all(agent.clock.get(who, 0) >= when for who, when in self.written):
            raise RaceError(f"{agent.name} reads {self.name} without having waited for what is written there")

    def begin_write(self, agent: Agent) -> None:
        if not all(agent.clock.get(who, 0) >= when for who, when in self.written):
            raise RaceError(f"{agent.name} overwrites {self.name}, where an earlier copy may still be landing")
        for read in self.reads:
            if read.ended is None or agent.clock.get(read.ended[0], 0) < read.ended[1]:
                raise RaceError(f"{agent.name} overwrites {self.name}, which {read.agent.name} may still be reading")
        self.reads = []


class Read:
    def __init__(self, agent: Agent):
        self.agent = agent
        self.ended: Stamp | None = None


class View:
    """Shared memory as a kernel holds it: data, and the slot that it is a part of."""

    def __init__(self, slot: Slot, data: Tensor):
        self.slot, self.data, self.dtype = slot, data, data.dtype

    def reshape(self, shape: Sequence[int]) -> View:
        return View(self.slot, self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> View:
        return View(self.slot, self.data.permute(*order))

    def load(self, layout: Any) -> Tensor:
        agent = current().agent
        self.slot.begin_read(agent)
        read = Read(agent)
        read.ended = agent.stamp()
        self.slot.reads.append(read)
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        agent = current().agent
        self.slot.begin_write(agent)
        if value.shape != self.data.shape or value.dtype != self.dtype:
            raise ProtocolError(f"{self.slot.name}: {tuple(value.shape)} {value.dtype} doesn't fit")
        self.data.copy_(value)
        self.slot.written = [agent.stamp()]


class Ring:
    """Several buffers, or barriers, under one name."""

    def __init__(self, name: str, items: list[Any], dtype: Any):
        self.name, self.items, self.dtype = name, items, dtype

    def index(self, i: int) -> Any:
        if not 0 <= i < len(self.items):
            raise ProtocolError(f"{self.name}[{i}] is outside its {len(self.items)} slots")
        item = self.items[i]
        return View(item, item.data) if isinstance(item, Slot) else item


class Piece:
    """A part of a TMA copy: the box travels as several messages, which land when they like."""

    def __init__(self, machine: Machine, source: Tensor, target: Tensor, barrier: Barrier, clock: Clock):
        self.source, self.target, self.barrier = source, target, barrier
        self.number = machine.new_number()
        self.clock = {**clock, self.number: 1}

    def land(self) -> None:
        self.target.copy_(self.source)
        self.barrier.arrive(self.clock, landed=self.source.numel() * self.source.element_size())


class Product:
    """A wgmma in flight: acc + a b, where reading a and b may take until a wait retires it."""

    def __init__(self, agent: Agent, a: View | Tensor, b: View, acc: Tensor | Product | None):
        self.a, self.b, self.acc = a, b, acc
        self.value: Tensor | None = None
        self.retired = False
        self.reads = []
        for operand in (a, b):
            if isinstance(operand, View):
                operand.slot.begin_read(agent)
                self.reads.append(Read(agent))
                operand.slot.reads.append(self.reads[-1])

    def compute(self) -> None:
        if self.value is not None:
            return
        a = self.a.data if isinstance(self.a, View) else self.a
        product = a.float() @ self.b.data.float()
        if isinstance(self.acc, Product):
            self.acc.compute()
            product = product + self.acc.value
        elif self.acc is not None:
            product = product + self.acc
        self.value = product


class Machine:
    """Runs one program; `policy` is "late", "early" or a seed."""

    def __init__(self, program: int, policy: str | int):
        self.program, self.policy = program, policy
        self.chance = random.Random(policy) if isinstance(policy, int) else None
        self.numbers = 0
        self.agent = self.first = Agent(self.new_number(), "the program", {})
        self.pieces: list[Piece] = []
        self.rings: list[Ring] = []
        self.unfenced: list[Barrier] = []
        self.back = threading.Semaphore(0)
        self.failure: BaseException | None = None

    def new_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def run(self, kernel: Callable[..., Any], args: Sequence[Any]) -> None:
        _here.machine = self
        try:
            kernel(*args)
            if self.pieces:
                raise ProtocolError(f"the program ends while a copy for {self.pieces[0].barrier.name} is landing")
        finally:
            _here.machine = None

    # What kernels do.

    def allocate(self, name: str, dtype: Any, shape: Sequence[int], barriers: bool) -> Ring:
        names = [f"{name}[{i}]" for i in range(shape[0])]
        if barriers:
            ring = Ring(name, [Barrier(n) for n in names], dtype)
        else:
            nowhere = [torch.full(tuple(shape[1:]), float("nan"), dtype=dtype) for _ in names]
            ring = Ring(name, [Slot(n, data) for n, data in zip(names, nowhere, strict=True)], dtype)
        self.rings.append(ring)
        return ring

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.init(count)
        self.unfenced.append(barrier)

    def fence(self) -> None:
        self.unfenced = []

    def wait(self, barrier: Barrier, parity: int) -> None:
        if not barrier.count:
            raise ProtocolError(f"{self.agent.name} waits at {barrier.name}, which has had no init")
        agent = self.agent
        self.maybe_yield()
        while agent is self.first and self.pieces and not barrier.passed(parity):
            self.land()
        if not barrier.passed(parity):
            agent.blocked, agent.parity = barrier, parity
            self.yield_()
            agent.blocked = None
        join(agent.clock, barrier.done)

    def arrive(self, barrier: Barrier, count: int) -> None:
        barrier.arrive(self.agent.release(), arrivals=count)
        self.maybe_yield()

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.arrive(self.agent.release(), arrivals=1, expected=size)
        self.maybe_yield()

    def copy(self, box: Tensor, target: View, barrier: Barrier) -> None:
        if barrier in self.unfenced:
            raise ProtocolError(f"no fence between the init of {barrier.name} and a copy that arrives there")
        if box.shape != target.data.shape or box.dtype != target.dtype:
            raise ProtocolError(f"a copy of {tuple(box.shape)} into {target.slot.name} {tuple(target.data.shape)}")
        slot = target.slot
        slot.begin_write(self.agent)
        target.data.fill_(float("nan"))  # nobody may look here before all of it has landed
        clock = self.agent.release()
        halves = zip(box.chunk(2, -1), target.data.chunk(2, -1), strict=True)
        pieces = [Piece(self, source, part, barrier, clock) for source, part in halves]
        slot.written = [(piece.number, 1) for piece in pieces]
        self.pieces += pieces
        while self.policy == "early" and self.pieces:
            self.land()
        self.maybe_yield()

    def multiply(self, a: View | Tensor, b: View, acc: Any, use_acc: bool) -> Product:
        product = Product(self.agent, a, b, acc if use_acc else None)
        self.agent.flying.append(product)
        if self.policy == "early" or (self.chance and self.chance.random() < 0.5):
            product.compute()
        self.maybe_yield()
        return product

    def retire(self, outstanding: int, deps: Sequence[Any]) -> list[Any]:
        """warpgroup_mma_wait: at most `outstanding` stay in flight; the values of deps."""
        agent = self.agent
        while len(agent.flying) > outstanding:
            product = agent.flying.pop(0)
            product.compute()
            product.retired = True
            for read in product.reads:
                read.ended = agent.stamp()
        values = []
        for dep in deps:
            if isinstance(dep, Product) and not dep.retired:
                raise RaceError(f"{agent.name} uses the result of a wgmma that may still be running")
            values.append(dep.value if isinstance(dep, Product) else dep)
        return values

    def specialize(self, partitions: Sequence[tuple[Callable[..., Any], Sequence[Any]]]) -> None:
        """Runs the partitions to their ends."""
        start = self.agent
        agents = []
        for i, (function, args) in enumerate(partitions):
            name = f"{function.__name__.strip('_')} {i}"
            agent = Agent(self.new_number(), name, start.clock)
            threading.Thread(target=self._partition, args=(agent, function, args), daemon=True).start()
            agents.append(agent)
        try:
            self._schedule(agents)
        finally:
            self.agent = start
            for agent in agents:
                if not agent.finished:
                    self.failure = self.failure or _Abandoned()
                    agent.turn.release()
                    self.back.acquire()
                join(start.clock, agent.clock)

    # Who is next.

    def _partition(self, agent: Agent, function: Callable[..., Any], args: Sequence[Any]) -> None:
        agent.turn.acquire()
        _here.machine = self
        try:
            if self.failure is None:
                function(*args)
                if agent.flying:
                    raise ProtocolError(f"{agent.name} ends with a wgmma in flight")
        except _Abandoned:
            pass
        except BaseException as failure:
            self.failure = self.failure or failure
        agent.finished = True
        self.back.release()

    def _schedule(self, agents: list[Agent]) -> None:
        while not all(agent.finished for agent in agents):
            ready = [a for a in agents if not a.finished and (a.blocked is None or a.blocked.passed(a.parity))]
            land = bool(self.pieces) and (self.chance.random() < 0.3 if self.chance else not ready)
            if land or (not ready and self.pieces):
                self.land()
                continue
            if not ready:
                waits = [f"{a.name} waits for parity {a.parity} of {a.blocked}" for a in agents if not a.finished]
                raise DeadlockError("nobody can go on: " + "; ".join(waits))
            self.agent = self.chance.choice(ready) if self.chance else ready[0]
            self.agent.turn.release()
            self.back.acquire()
            if self.failure is not None:
                raise self.failure

    def land(self) -> None:
        self.pieces.pop(self.chance.randrange(len(self.pieces)) if self.chance else 0).land()

    def maybe_yield(self) -> None:
        if self.chance and self.agent is not self.first and self.chance.random() < 0.3:
            self.yield_()

    def yield_(self) -> None:
        agent = self.agent
        if agent is self.first:
            raise DeadlockError(f"the program waits for parity {agent.parity} of {agent.blocked}")
        self.back.release()
        agent.turn.acquire()
        if self.failure is not None:
            raise _Abandoned


_here = threading.local()


def current() -> Machine:
    return _here.machine
