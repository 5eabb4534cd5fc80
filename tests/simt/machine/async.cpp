// Copies in flight: cp.async groups, bulk copies counted by mbarriers, and wgmma, which reads its operands later.
//
// A copy may happen at any time between issue and wait. The checker forbids touching the destination in between, and
// the bytes arrive as late as allowed (on the random schedule: early or late), so that a kernel which reads too soon
// reads stale ones.
#include <algorithm>

#include "machine.h"
#include "tensor_core.h"

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
  must_be_before(it->second.init, "an mbarrier, used by another thread than mbarrier.init");
  return it->second;
}

// The phase ends when everyone has arrived and every expected byte has landed.
void advance(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.count;
  b.phases++;
  const size_t me = machine.fibers.size() + b.index;
  b.ended.join(b.arriving);
  b.ended.note(me, b.phases);
  b.arriving = Clock();
  machine.publisher = uint32_t(machine.block_number * numbers_of_a_block() + me + 1);
  machine.publisher_tick = b.phases;
  for (Copy& c : b.in_flight) {
    perform(c);
    access(c.dst, c.bytes, Access::kCopyPublished, c.pc);
  }
  b.in_flight.clear();
}

// Adds a product to this thread's part of d.
void add_up(const Product& x) {
  const int warp = self->warp % 4, g = self->lane / 4, t = self->lane % 4;
  auto value = [&](uintptr_t address) {
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const void*>(swizzle_128(address)), 2);
    return x.decode(bits);
  };
  float a[2][16];
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 16; k++)
      a[half][k] = x.a ? x.a_rows[half][k] : value(x.a_tile + (16 * warp + g + 8 * half) * 128 + 2 * k);
  for (int j = 0; j < x.n; j++)
    for (int e = 0; e < 2; e++) {
      const int col = 8 * j + 2 * t + e;
      float sum[2] = {};
      for (int k = 0; k < 16; k++) {
        const uintptr_t in_columns = x.b_tile + col / 64 * x.b_panel + k * 128 + col % 64 * 2;
        const float b = value(x.columns ? in_columns : x.b_tile + col * 128 + 2 * k);
        for (int half = 0; half < 2; half++) sum[half] += a[half][k] * b;
      }
      for (int half = 0; half < 2; half++) {
        float& d = x.d[4 * j + 2 * half + e];
        d = x.add ? toward_zero(double(d) + sum[half]) : sum[half];
      }
    }
}

void must_be_untouched(const Product& x) {
  const bool d_is = x.d_was.empty() || std::memcmp(x.d, x.d_was.data(), x.d_was.size() * sizeof(float)) == 0;
  if (!d_is) fail("wgmma at %s: its d was changed before wgmma.wait_group", source_line(offset_of(x.pc)).c_str());
  if (x.a && std::memcmp(x.a, x.a_was, sizeof x.a_was) != 0)
    fail("wgmma at %s: its a was changed before wgmma.wait_group", source_line(offset_of(x.pc)).c_str());
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
  b.init = deed();
  b.index = machine.mbarriers.size();
  if (b.index == kMostMbarriers) fail("the machine has no more than %zu mbarriers", kMostMbarriers);
  if (machine.mbarriers.count(barrier)) fail("mbarrier.init of one that is in use");
  machine.mbarriers[barrier] = b;
  machine.clocked = true;
}

void mbarrier_arrive(uint64_t* barrier, int expect_bytes) {
  Mbarrier& b = known(barrier);
  if (b.pending == 0) fail("mbarrier: more arrivals than its count of %d", b.count);
  release(b.arriving);
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
  while (int(known(barrier).phases & 1) == parity) {
    current().spinning = true;
    current().where = "mbarrier.try_wait";
    yield();
    current().spinning = false;
  }
  current().polled++;
  current().seen.join(known(barrier).ended);
}

void fence_proxy_async() { current().proxy_fences++; }

void wgmma_fence() {
  warpgroup_sync("wgmma.fence");
  current().wgmma_fenced = true;
}

void wgmma_read(const void* p, size_t bytes, void* pc) {
  access(p, bytes, Access::kAsyncRead, pc);
  current().open_reads.push_back({p, bytes});
}

// By the PTX ISA's words: m64n(8n)k16, tiles of 128-byte rows with the 128-byte swizzle. Of `a` and of b's transpose
// rows are along K; of `columns` the rows are K, and 64 columns on a panel begins. a in registers is laid out as mma's.
void wgmma(float* d, const uint32_t* a, uintptr_t a_tile, uintptr_t b_tile, int b_panel, int n, bool add, bool columns,
           Decode decode, void* pc) {
  warpgroup_sync("wgmma.mma_async");  // all four warps must be here together
  Fiber& me = current();
  if (!me.wgmma_fenced) fail("wgmma at %s: no wgmma.fence before it", source_line(offset_of(pc)).c_str());
  Product x{d, a, {}, {}, {}, a_tile, b_tile, b_panel, n, add, columns, decode, pc};
  auto at = [](uintptr_t address) { return reinterpret_cast<const void*>(swizzle_128(address)); };
  if (self->lane == 0) {
    const int warp = self->warp % 4;
    for (int row = 0; row < 16 && !a; row++)
      for (int k = 0; k < 16; k += 8) wgmma_read(at(a_tile + (16 * warp + row) * 128 + 2 * k), 16, pc);
    for (int col = 0; col < 8 * n && !columns; col++)
      for (int k = 0; k < 16; k += 8) wgmma_read(at(b_tile + col * 128 + 2 * k), 16, pc);
    for (int k = 0; k < 16 && columns; k++)
      for (int col = 0; col < 8 * n; col += 8)
        wgmma_read(at(b_tile + col / 64 * b_panel + k * 128 + col % 64 * 2), 16, pc);
  }
  if (a) {
    std::memcpy(x.a_was, a, sizeof x.a_was);
    const unsigned char* slots = warp_exchange(0xffffffffu, a, sizeof x.a_was, "wgmma.mma_async");
    for (int half = 0; half < 2; half++)
      for (int k = 0; k < 16; k++) {
        const int lane = self->lane / 4 * 4 + k % 8 / 2, word = half + k / 8 * 2;
        uint16_t bits;
        std::memcpy(&bits, slots + lane * kSlot + 4 * word + 2 * (k % 2), 2);
        x.a_rows[half][k] = decode(bits);
      }
  }
  auto writes_d = [&](const std::vector<Product>& group) {
    return std::any_of(group.begin(), group.end(), [&](const Product& other) { return other.d == d; });
  };
  const auto& groups = me.product_groups;
  if (!writes_d(me.open_products) && std::none_of(groups.begin(), groups.end(), writes_d))
    x.d_was.assign(d, d + 4 * n);
  me.open_products.push_back(std::move(x));
}

void wgmma_commit() {
  Fiber& me = current();
  me.read_groups.push_back(std::move(me.open_reads));
  me.product_groups.push_back(std::move(me.open_products));
  me.open_reads.clear();
  me.open_products.clear();
}

void wgmma_wait(int pending) {
  Fiber& me = current();
  for (; int(me.read_groups.size()) > pending; me.read_groups.pop_front(), me.product_groups.pop_front()) {
    for (const Product& x : me.product_groups.front()) must_be_untouched(x);
    for (const Product& x : me.product_groups.front()) add_up(x);
    for (const Region& r : me.read_groups.front()) access(r.first, r.second, Access::kAsyncReadDone, nullptr);
  }
  if (pending == 0) me.wgmma_fenced = false;
  warpgroup_sync("wgmma.wait_group");
}

}  // namespace simt
