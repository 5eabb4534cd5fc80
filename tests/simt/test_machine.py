"""The SIMT machine itself: wrong kernels are caught, right ones raise no alarm."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import simt_builder
import torch

SCHEDULES = {"in order": 0, "reversed": 1, "random": 2}
HERE = Path(__file__).resolve().parent

# probe: (blocks, threads), what its output must be
RIGHT = {
    "two_block_sums": ((1, 64), lambda x: (3 * x.sum()).expand(64)),
    "neighbour_after_barrier": ((1, 64), lambda x: x.roll(-1)),
    "lane_after_syncwarp": ((1, 64), lambda x: x.view(-1, 2).flip(1).flatten()),
    "copy": ((2, 32), lambda x: x),
    "count_atomically": ((2, 32), lambda x: torch.full((1,), 64.0)),
    "cp_async_waited_for": ((1, 64), lambda x: x),
    "bulk_copy": ((1, 64), lambda x: x),
    "wgmma_operand_overwritten_after_wait": ((1, 128), lambda x: torch.ones(64)),
    "handed_over_twice": ((1, 64), lambda x: x.view(2, 32).flip(1).flatten()),
    "named_barrier_of_all": ((1, 96), lambda x: x.roll(-32)),
    "named_barrier_arrived_at": ((1, 64), lambda x: x[:32]),
}

# probe: (blocks, threads), what the report must say
WRONG = {
    "block_sum_without_turns": ((1, 64), r"race on static shared.*write at device.cuh:\d+.*after read at device.cuh"),
    "neighbour_without_barrier": ((1, 64), r"race on dynamic shared|uninitialised dynamic shared"),
    "other_warp_after_syncwarp": ((1, 64), r"race on dynamic shared|uninitialised dynamic shared"),
    "overwrite_what_others_read": ((1, 64), r"race on dynamic shared at byte 0: (write|read) at probes.cu:\d+"),
    "uninitialised_shared": ((1, 64), r"read of uninitialised static shared memory"),
    "past_dynamic_shared": ((1, 64), r"4-byte write at byte \d+ of 512 bytes of dynamic shared"),
    "read_past_the_end": ((1, 64), r"out-of-bounds 4-byte read of global memory \(in at byte 256 of 256\)"),
    "write_past_the_end": ((2, 64), r"out-of-bounds 4-byte write of global memory \(out at byte 256 of 256\)"),
    "misaligned_vector": ((1, 64), r"misaligned 16-byte vector load at probes.cu:\d+"),
    "blocks_share_an_element": ((2, 64), r"race on out.*by block \d thread \d+"),
    "block_reads_what_another_wrote": ((2, 32), r"race on out.*by block \d"),
    "count_plainly": ((1, 2), r"race on out at byte 0"),
    "barrier_in_a_branch": ((1, 64), r"deadlock.*32 threads have exited; 32 threads wait at __syncthreads"),
    "exit_before_a_barrier": ((1, 64), r"deadlock.*32 threads have exited"),
    "shuffle_in_a_branch": ((1, 32), r"deadlock.*16 threads wait at __shfl_xor_sync"),
    "shuffle_outside_the_mask": ((1, 32), r"__shfl_xor_sync: calling lane \d+ is not in mask 0000ffff"),
    "lanes_at_different_places": ((1, 32), r"lane \d+ is at __(shfl|ballot)_sync, other lanes .* at __(shfl|ballot)"),
    "cp_async_without_wait": ((1, 64), r"race on dynamic shared.*wait for the copy"),
    "cp_async_without_barrier": ((1, 64), r"race on dynamic shared|uninitialised dynamic shared"),
    "exit_with_cp_async_pending": ((1, 64), r"exits with cp.async copies not waited for"),
    "bulk_copy_without_wait": ((1, 64), r"race on dynamic shared|uninitialised dynamic shared"),
    "bulk_copy_expecting_too_much": ((1, 64), r"deadlock.*64 threads wait at mbarrier.try_wait"),
    "mbarrier_not_initialised": ((1, 1), r"mbarrier used before mbarrier.init"),
    "bulk_copy_one_thread_waits_for": ((1, 64), r"race on dynamic shared|uninitialised dynamic shared"),
    "mbarrier_initialised_without_barrier": ((1, 64), r"race on an mbarrier|mbarrier used before mbarrier.init"),
    "handed_over_before_it_is_full": ((1, 64), r"race on dynamic shared|uninitialised dynamic shared"),
    "handed_over_before_it_is_empty": ((1, 64), r"deadlock|race on dynamic shared|uninitialised dynamic shared"),
    "named_barrier_of_some": ((1, 96), r"race on dynamic shared|uninitialised dynamic shared"),
    "named_barrier_counts_differ": ((1, 64), r"barrier 1: (64|96) threads, others say (96|64)"),
    "wgmma_operand_stored_without_fence": ((1, 128), r"wgmma reads dynamic shared.*no fence.proxy.async"),
    "wgmma_operand_overwritten_early": ((1, 128), r"race on dynamic shared.*write"),
    "wgmma_without_a_warp": ((1, 128), r"deadlock.*96 threads wait at wgmma.mma_async"),
}


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    reason = simt_builder.why_not()
    if reason:
        pytest.skip(reason)
    path = simt_builder.link("_probes", [HERE / "probes.cu", HERE / "probes_hopper.cu", HERE / "probes_bind.cpp"])
    return simt_builder.load(path, "_probes")


def launch(probes: ModuleType, name: str, blocks: int, threads: int, **options: object) -> tuple[torch.Tensor, ...]:
    x = torch.arange(64, dtype=torch.float32)
    out = torch.zeros(64 if name != "strided_pattern" else 8 * 32)
    probes.configure(**options)
    probes.clear_buffers()
    for label, t in (("in", x), ("out", out)):
        probes.add_buffer(t.data_ptr(), t.numel() * 4, label)
    shared = 4 * out.numel() + 256
    probes.run(name, x.data_ptr(), out.data_ptr(), 64, blocks, threads, shared)
    return x, out


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_raise_no_alarm(probes: ModuleType, name: str, schedule: int) -> None:
    (blocks, threads), expected = RIGHT[name]
    x, out = launch(probes, name, blocks, threads, schedule=schedule, seed=5, check=True)
    want = expected(x)
    assert torch.equal(out[: want.numel()], want)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_caught(probes: ModuleType, name: str, schedule: int) -> None:
    (blocks, threads), report = WRONG[name]
    with pytest.raises(RuntimeError, match=f"^{name}.*{report}"):
        launch(probes, name, blocks, threads, schedule=schedule, seed=5, check=True)


def multiply(probes: ModuleType, name: str, m: int, n: int, k: int, **options: object) -> tuple[torch.Tensor, ...]:
    """A (m, k), B (n, k) and what a probe makes of them; n of the launch is k."""
    both = torch.randn(m + n, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.full((m, n), float("nan"))
    probes.configure(check=True, **options)
    probes.clear_buffers()
    probes.add_buffer(both.data_ptr(), both.numel() * 2, "in")
    probes.add_buffer(out.data_ptr(), out.numel() * 4, "out")
    threads = 32 if m == 16 else 128
    probes.run(name, both.data_ptr(), out.data_ptr(), k, 1, threads, both.numel() * 2 + 64)
    return both[:m].double(), both[m:].double(), out


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(
    ("name", "m", "n", "k"),
    [("mma_16x8x16", 16, 8, 16), ("wgmma_of_rows", 64, 64, 64), ("wgmma_of_columns", 64, 64, 64)],
)
def test_matrix_instructions(probes: ModuleType, name: str, m: int, n: int, k: int, schedule: int) -> None:
    a, b, out = multiply(probes, name, m, n, k, schedule=schedule, seed=5)
    want = a @ (b if name == "wgmma_of_columns" else b.T)
    assert (out - want).abs().max() < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("wgmma_without_fence", r"wgmma at .*: no wgmma.fence before it"),
        ("wgmma_result_touched_early", r"wgmma at .*: its d was changed before wgmma.wait_group"),
        ("wgmma_operand_in_registers_touched_early", r"wgmma at .*: its a was changed before wgmma.wait_group"),
        ("wgmma_not_waited_for", r"thread exits with wgmma not waited for"),
    ],
)
def test_wrong_products_are_caught(probes: ModuleType, name: str, report: str, schedule: int) -> None:
    with pytest.raises(RuntimeError, match=f"^{name}.*{report}"):
        multiply(probes, name, 64, 64, 64, schedule=schedule, seed=5)


def test_tf32_products_see_ten_bits(probes: ModuleType) -> None:
    both = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    out = torch.full((16, 8), float("nan"))
    probes.configure(check=True)
    probes.clear_buffers()
    probes.add_buffer(both.data_ptr(), both.numel() * 4, "in")
    probes.add_buffer(out.data_ptr(), out.numel() * 4, "out")
    probes.run("mma_16x8x8_tf32", both.data_ptr(), out.data_ptr(), 0, 1, 32, 64)
    seen = (both.view(torch.int32) & ~0x1FFF).view(torch.float32).double()
    assert (out - seen[:16] @ seen[16:].T).abs().max() < 1e-5
    assert (out - both[:16].double() @ both[16:].double().T).abs().max() > 1e-4


def test_machine_works_after_a_report(probes: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="deadlock"):
        launch(probes, "barrier_in_a_branch", 1, 64, check=True)
    x, out = launch(probes, "copy", 2, 32, check=True)
    assert torch.equal(out, x)


def test_profile_counts_conflicts_and_sectors(probes: ModuleType) -> None:
    launch(probes, "dense_pattern", 1, 32, profile=True)
    dense = probes.profiles()
    launch(probes, "strided_pattern", 1, 32, profile=True)
    strided = probes.profiles()
    assert {p["space"] for p in dense} == {p["space"] for p in strided} == {"shared", "global"}
    assert all(p["actual"] == p["ideal"] for p in dense), dense
    # Every 8th float: 32 lanes share 4 banks, so 8 wavefronts; each lane touches a sector of its own.
    assert all(p["actual"] == 8 * p["ideal"] for p in strided), strided


def test_misuse_is_refused(probes: ModuleType) -> None:
    x = torch.zeros(64)
    for blocks, threads, shared in ((0, 32, 0), (1, 0, 0), (1, 1025, 0), (1, 32, 228 * 1024)):
        with pytest.raises(RuntimeError, match=r"copy: (block|grid) size|copy: too much dynamic shared"):
            probes.run("copy", x.data_ptr(), x.data_ptr(), 64, blocks, threads, shared)
