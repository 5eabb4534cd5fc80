// Copies in flight: cp.async groups, bulk copies counted by mbarriers, and wgmma, which reads its operands later.
//
// A copy may happen at any time between issue and wait. The checker forbids touching the destination in between, and
// the bytes arrive as late as allowed (on the random schedule: early or late), so that a kernel which reads too soon
// reads stale ones.
#include "machine.h"

namespace simt {
namespace {

void perform(Copy& c) {
  if (c.done) return;
  std::memcpy(c.dst, c.src, c.source_bytes);
  std::memset(static_cast<char*>(c.dst) + c.source_bytes, 0, c.bytes - c.source_bytes);
  c.done = true;
}

void issue(std::vector<Copy>& copies, void* dst, const void* src, int bytes, int source_bytes, void* pc) {
  access(src, source_bytes, Access::kRead, pc);
  access(dst, bytes, Access::kCopyIssued, pc);
  copies.push_back({dst, src, bytes, source_bytes, pc, false});
  if (machine.options.schedule == kRandom && (machine.random() & 1)) perform(copies.back());
}

Mbarrier& known(uint64_t* barrier) {
  auto it = machine.mbarriers.find(barrier);
  if (it == machine.mbarriers.end()) fail("mbarrier used before mbarrier.init");
  return it->second;
}

// The phase ends when everyone has arrived and every expected byte has landed.
void advance(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.count;
  b.phase ^= 1;
  for (Copy& c : b.in_flight) {
    perform(c);
    b.landed.push_back(c);
  }
  b.in_flight.clear();
}

}  // namespace

void cp_async(void* dst, const void* src, int bytes, int source_bytes, void* pc) {
  const bool aligned = uintptr_t(dst) % bytes == 0 && (source_bytes == 0 || uintptr_t(src) % bytes == 0);
  if (!aligned) fail("cp.async: misaligned %d-byte copy at %s", bytes, source_line(offset_of(pc)).c_str());
  issue(current().open_copies, dst, src, bytes, source_bytes, pc);
}

void cp_async_commit() {
  current().copy_groups.push_back(std::move(current().open_copies));
  current().open_copies.clear();
}

void cp_async_wait(int pending) {
  auto& groups = current().copy_groups;
  while (int(groups.size()) > pending) {
    for (Copy& c : groups.front()) {
      perform(c);
      access(c.dst, c.bytes, Access::kCopyLanded, c.pc);
    }
    groups.pop_front();
  }
}

void mbarrier_init(uint64_t* barrier, int count) {
  access(barrier, sizeof *barrier, Access::kWrite, SIMT_CALLER);
  Mbarrier b;
  b.count = b.pending = count;
  machine.mbarriers[barrier] = b;
}

void mbarrier_arrive(uint64_t* barrier, int expect_bytes) {
  Mbarrier& b = known(barrier);
  if (b.pending == 0) fail("mbarrier: more arrivals than its count of %d", b.count);
  b.bytes += expect_bytes;
  b.pending--;
  advance(b);
}

void bulk_copy(uint64_t* barrier, void* dst, const void* src, int bytes, int source_bytes, void* pc) {
  Mbarrier& b = known(barrier);
  issue(b.in_flight, dst, src, bytes, source_bytes, pc);
  b.bytes -= bytes;
  advance(b);
}

void mbarrier_wait(uint64_t* barrier, int parity) {
  while (known(barrier).phase == parity) {
    current().spinning = true;
    current().where = "mbarrier.try_wait";
    yield();
    current().spinning = false;
  }
  Mbarrier& b = known(barrier);
  for (const Copy& c : b.landed) access(c.dst, c.bytes, Access::kCopyPublished, c.pc);
  b.landed.clear();
}

void wgmma_read(const void* p, size_t bytes, void* pc) {
  access(p, bytes, Access::kAsyncRead, pc);
  current().open_reads.push_back({p, bytes});
}

void wgmma_commit() {
  current().read_groups.push_back(std::move(current().open_reads));
  current().open_reads.clear();
}

void wgmma_wait(int pending) {
  auto& groups = current().read_groups;
  while (int(groups.size()) > pending) {
    for (const Region& r : groups.front()) access(r.first, r.second, Access::kAsyncReadDone, nullptr);
    groups.pop_front();
  }
  warpgroup_sync("wgmma.wait_group");
}

}  // namespace simt
