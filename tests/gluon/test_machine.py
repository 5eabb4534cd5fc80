"""The CPU model itself: what it must allow, and what it must refuse with words that help."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gluon.language import HOPPER, Int, Pointer, TensorDescriptor, gl
from gluon.machine import DeadlockError, Machine, ProtocolError, RaceError, current

mbarrier, tma = HOPPER.mbarrier, HOPPER.tma
POLICIES = ("late", "early", 1, 2, 3)
ROWS = torch.arange(8 * 16, dtype=torch.float32).view(8, 16)


def prologue(slots: int = 2, arrivals: int = 1, fence: bool = True) -> types.SimpleNamespace:
    """A ring of boxes of two rows, its barriers, and a descriptor of ROWS."""
    ring = gl.allocate_shared_memory(torch.float32, [slots, 2, 16], "shared")
    full = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    for i in range(slots):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=arrivals)
    if fence:
        HOPPER.fence_async_shared()
    rows = TensorDescriptor(ROWS, [8, 16], [16, 1], [2, 16], "shared")
    return types.SimpleNamespace(ring=ring, full=full, empty=empty, rows=rows, slots=slots, seen=[])


def produce(m: Any, blocks: int, wait: bool = True, size: int = 128) -> None:
    for j in range(blocks):
        slot, phase = j % m.slots, (j // m.slots) & 1
        if wait:
            mbarrier.wait(m.empty.index(slot), phase ^ 1)
        mbarrier.expect(m.full.index(slot), size)
        tma.async_copy_global_to_shared(m.rows, [2 * j, 0], m.full.index(slot), m.ring.index(slot))


def consume(m: Any, blocks: int, wait: bool = True, arrive: bool = True) -> None:
    for j in range(blocks):
        slot, phase = j % m.slots, (j // m.slots) & 1
        if wait:
            mbarrier.wait(m.full.index(slot), phase)
        m.seen.append(m.ring.index(slot).load(None))
        if arrive:
            mbarrier.arrive(m.empty.index(slot), count=1)


def run(policy: str | int, kernel: Callable[[], Any]) -> Any:
    kept = []
    Machine(0, policy).run(lambda: kept.append(kernel()), [])
    return kept[0]


def pair(producer: dict[str, Any], consumer: dict[str, Any], **how: Any) -> Callable[[], Any]:
    def kernel() -> Any:
        m = prologue(**how)
        gl.warp_specialize(
            [(lambda: consume(m, 4, **consumer), ()), (lambda: produce(m, 4, **producer), ())], [1], [24]
        )
        return m

    return kernel


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", (1, 2, 3))
def test_a_ring(policy, slots):
    m = run(policy, pair({}, {}, slots=slots))
    assert torch.equal(torch.cat(m.seen), ROWS)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("producer", "consumer", "how", "error", "words"),
    [
        ({}, dict(arrive=False), {}, DeadlockError, r"waits for parity 0 of empty\[0\] \(phase 0: 0 of 1 arrivals"),
        ({}, {}, dict(arrivals=2), DeadlockError, r"waits for parity 0 of empty\[0\] \(phase 0: 1 of 2 arrivals"),
        (dict(size=256), {}, {}, DeadlockError, r"full\[0\] \(phase 0: 1 of 1 arrivals, 128 bytes outstanding"),
        ({}, dict(wait=False), {}, ProtocolError, r"ring\[\d\]|arrivals|nobody can go on"),
        (dict(wait=False), {}, {}, ProtocolError, r"may still be|more than 1 arrivals"),
        ({}, {}, dict(fence=False), ProtocolError, r"no fence between the init of full\[0\]"),
    ],
    ids=("not given back", "an arrival lacks", "too many bytes", "no wait for data", "no wait for room", "no fence"),
)  # fmt: skip
def test_broken_rings(policy, producer, consumer, how, error, words):
    with pytest.raises(error, match=words):
        run(policy, pair(producer, consumer, **how))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_race_is_found_where_this_order_of_events_hides_it(policy):
    """Half the bytes expected: the barrier opens when the first half lands, whatever the reader then finds."""

    def kernel() -> None:
        m = prologue()
        mbarrier.expect(m.full.index(0), 64)
        tma.async_copy_global_to_shared(m.rows, [0, 0], m.full.index(0), m.ring.index(0))
        gl.warp_specialize([(lambda: consume(m, 1), ())], [], [])

    with pytest.raises(RaceError, match=r"reads ring\[0\] without having waited"):
        run(policy, kernel)


@pytest.mark.parametrize("policy", POLICIES)
def test_wgmma_reads_until_it_is_waited_for(policy):
    def kernel(early: bool) -> Any:
        def consumer() -> None:
            mbarrier.wait(m.full.index(0), 0)
            a = m.ring.index(0)
            product = HOPPER.warpgroup_mma(a, a.permute((1, 0)), torch.zeros(2, 2), is_async=True)
            if early:
                mbarrier.arrive(m.empty.index(0), count=1)
            m.seen.append(HOPPER.warpgroup_mma_wait(0, deps=(product,)))
            if not early:
                mbarrier.arrive(m.empty.index(0), count=1)

        m = prologue(slots=1)
        gl.warp_specialize([(consumer, ()), (lambda: produce(m, 2), ())], [1], [24])
        mbarrier.wait(m.full.index(0), 1)
        return m.seen[0]

    assert torch.equal(run(policy, lambda: kernel(False)), ROWS[:2] @ ROWS[:2].T)
    with pytest.raises(RaceError, match=r"overwrites ring\[0\], which \S+ 0 may still be reading"):
        run(policy, lambda: kernel(True))


def test_results_of_wgmma_need_a_wait():
    def kernel() -> None:
        m = prologue()
        m.ring.index(0).store(ROWS[:2])
        a = m.ring.index(0)
        first = HOPPER.warpgroup_mma(a, a.permute((1, 0)), None, use_acc=False, is_async=True)
        second = HOPPER.warpgroup_mma(a, a.permute((1, 0)), first, is_async=True)
        HOPPER.warpgroup_mma_wait(1, deps=(first,))
        HOPPER.warpgroup_mma_wait(1, deps=(second,))

    with pytest.raises(RaceError, match="result of a wgmma"):
        run("early", kernel)


def test_a_copy_may_not_outlive_the_program():
    def kernel() -> None:
        m = prologue()
        produce(m, 1)

    with pytest.raises(ProtocolError, match=r"ends while a copy for full\[0\] is landing"):
        run("late", kernel)


def test_a_barrier_wants_one_init_and_not_too_many_arrivals():
    def twice() -> None:
        mbarrier.init(prologue().full.index(0), count=1)

    def often() -> None:
        mbarrier.arrive(prologue(arrivals=2).empty.index(0), count=3)

    with pytest.raises(ProtocolError, match="initialised twice"):
        run("late", twice)
    with pytest.raises(ProtocolError, match="more than 2 arrivals in phase 0"):
        run("late", often)


def test_a_new_barrier_passes_the_phase_before_its_first():
    def kernel() -> None:
        m = prologue()
        mbarrier.wait(m.empty.index(0), 1)
        mbarrier.wait(m.empty.index(0), 0)

    with pytest.raises(DeadlockError, match=r"parity 0 of empty\[0\]"):
        run("late", kernel)


def test_a_seed_repeats_its_order():
    def order(seed: int) -> list[Any]:
        events: list[Any] = []

        def partition(i: int) -> None:
            for j in range(20):
                events.append((i, j))
                current().maybe_yield()

        run(seed, lambda: gl.warp_specialize([(lambda i=i: partition(i), ()) for i in range(3)], [], []))
        return events

    assert order(7) == order(7)
    assert order(7) != order(8)


def test_scalars_are_those_of_c():
    assert (Int(-7) // 2, Int(-7) % 2, 7 // Int(2), Int(7).to(torch.int64).bits) == (-3, -1, 3, 64)
    assert Int(1 << 20).to(torch.int64) * (1 << 20) == 1 << 40
    with pytest.raises(OverflowError):
        Int(1 << 20) * (1 << 20)


def test_memory_outside_a_tensor_and_stores_on_each_other():
    memory = torch.zeros(10)
    here = Pointer(memory, 0, torch.zeros(10, dtype=torch.bool))
    mask = torch.tensor([True, True, False])
    gl.store(here + torch.tensor([8, 9, 10]), torch.ones(3), mask)
    assert memory.sum() == 2
    with pytest.raises(ProtocolError, match="elements 8 to 10 of a tensor that has 10"):
        gl.store(here + torch.tensor([8, 9, 10]), torch.ones(3), ~mask | mask)
    with pytest.raises(ProtocolError, match="stored twice"):
        gl.store(here + torch.tensor([0, 0, 1]), torch.ones(3), mask)


def test_boxes_reach_over_every_edge():
    rows = TensorDescriptor(ROWS, [8, 16], [16, 1], [4, 16], "shared")
    assert torch.equal(rows.box([-2, 0]), torch.cat([torch.zeros(2, 16), ROWS[:2]]))
    assert torch.equal(rows.box([6, 0]), torch.cat([ROWS[6:], torch.zeros(2, 16)]))
    assert not rows.box([-9, 0]).any() and not rows.box([8, 0]).any()
    with pytest.raises(ProtocolError, match="whole 16 bytes"):
        TensorDescriptor(ROWS.view(-1)[1:], [7, 16], [16, 1], [2, 16], "shared")
