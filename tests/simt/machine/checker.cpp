// The memory checker: bounds, alignment, uninitialised shared memory, races.
//
// Kernels are compiled with -fsanitize=thread, libtsan is not linked: the __tsan_* functions at the end of this file
// stand in for it and see every access of every CUDA thread. Two accesses of one place, one of them a write, race
// unless a barrier lies between them: __syncthreads for threads of a block, __syncwarp for lanes of a warp, the end of
// the launch for blocks; those are epochs. Where a kernel uses mbarriers or named barriers, which only some threads come
// to, each thread has a Clock as well. The history of each two bytes is kept in a Cell.
#include "machine.h"

#include <algorithm>

namespace simt {
namespace {

// Who: thread number + 1, counted over the launch; 0 is nobody.
constexpr uint32_t kAtomicFlag = 0x80000000u;  // of a writer: by an atomic operation
constexpr uint32_t kMany = 0x80000000u;        // of a reader: several threads, of the warp in the low bits or of
constexpr uint32_t kAnyWarp = 0x7ffffffeu;     // ... several warps of the block or of
constexpr uint32_t kAnyBlock = 0x7fffffffu;    // ... several blocks

struct Cell {
  uint32_t era;  // launch (global memory) or block (shared): what happened in another one is over
  uint32_t writer, reader, reader_block, copier;  // copier: issued an asynchronous copy to here, not yet waited for
  When written, read;
  uint32_t writer_pc, reader_pc;
  uint32_t async_reads;  // by wgmma, not yet waited for
  uint32_t proxy_fences;  // that the writer had made
  uint32_t readings;      // place in `readings`, of shared memory where clocks are in use; 0: none
};

struct Buffer {
  uintptr_t low, high;
  std::string name;
  std::vector<Cell> cells;
};
struct Place {
  Cell* cell;  // of the first byte
  const char* name;
  long offset;
  bool shared;
};

std::map<uintptr_t, Buffer> buffers;  // by end address
std::vector<Cell> dynamic_cells, static_cells;
uint32_t launch_era = 0, block_era = 0;
std::vector<std::vector<Deed>> readings(1);  // since the last write

bool writes(Access kind) {
  return kind != Access::kRead && kind != Access::kAsyncRead && kind != Access::kAsyncReadDone;
}
uint32_t threads() { return uint32_t(machine.fibers.size()); }
uint32_t per_block() { return uint32_t(numbers_of_a_block()); }
uint32_t my_number() { return machine.block_number * per_block() + uint32_t(self->linear) + 1; }
uint32_t block_of(uint32_t number) { return (number - 1) / per_block(); }
uint32_t index_of(uint32_t number) { return (number - 1) % per_block(); }
uint32_t warp_of(uint32_t number) { return index_of(number) / 32; }
When now() { return {machine.block_epoch, current().warp_epoch, current().tick}; }

// Did thread `other` do it before this thread came here, whatever the schedule?
bool ordered(uint32_t other, When then) {
  if (other == 0 || other == my_number()) return true;
  if (block_of(other) != machine.block_number) return false;
  const uint32_t index = index_of(other);
  const auto& seen = current().seen.ticks;
  if (index < seen.size() && then.tick <= seen[index]) return true;
  if (index >= threads()) return false;  // a copy counted by an mbarrier
  if (then.block_epoch < machine.block_epoch) return true;
  return warp_of(other) == uint32_t(self->warp) && then.warp_epoch < current().warp_epoch;
}
bool readers_ordered(const Cell& c) {
  if (c.readings) {
    const auto& all = readings[c.readings];
    return std::all_of(all.begin(), all.end(), [](const Deed& r) { return ordered(r.who, r.when); });
  }
  if (!(c.reader & kMany)) return ordered(c.reader, c.read);
  const uint32_t who = c.reader & ~kMany;
  if (who == kAnyBlock || c.reader_block != machine.block_number) return false;
  if (c.read.block_epoch < machine.block_epoch) return true;
  return who == uint32_t(self->warp) && c.read.warp_epoch < current().warp_epoch;
}

[[noreturn]] void race(const Place& at, uint32_t other, uint32_t other_pc, bool other_wrote, uint32_t pc,
                       bool write) {
  std::string who = "several threads";
  if (!(other & kMany)) {
    const uint32_t number = other - 1;
    who = "block " + std::to_string(number / per_block());
    const uint32_t index = number % per_block();
    if (index < threads()) who += " thread " + std::to_string(index);
    else who += " a copy of mbarrier " + std::to_string(index - threads());
  }
  fail("race on %s at byte %ld: %s at %s, after %s at %s by %s, with no barrier (or wait for the copy) between",
       at.name, at.offset, write ? "write" : "read", source_line(pc).c_str(), other_wrote ? "write" : "read",
       source_line(other_pc).c_str(), who.c_str());
}

void note_write(Cell& c, Access kind, uint32_t pc) {
  c.writer = my_number() | (kind == Access::kAtomic ? kAtomicFlag : 0);
  c.written = now();
  c.writer_pc = pc;
  c.proxy_fences = current().proxy_fences;
  c.readings = 0;
}

// Keeps one reader where that suffices for later decisions, else the smallest group that holds all of them.
void note_read(Cell& c, bool shared, uint32_t pc) {
  const uint32_t me = my_number();
  if (machine.clocked && shared) {
    if (!c.readings) {
      c.readings = uint32_t(readings.size());
      readings.emplace_back();
    }
    auto& all = readings[c.readings];
    all.erase(std::remove_if(all.begin(), all.end(), [](const Deed& r) { return ordered(r.who, r.when); }), all.end());
    all.push_back({me, now()});
    c.reader = me;
  } else if (c.reader == 0 || readers_ordered(c)) {
    c.reader = me;
  } else if (c.reader_block != machine.block_number) {
    c.reader = kMany | kAnyBlock;
  } else if (c.reader != me && c.reader != (kMany | kAnyBlock)) {
    const uint32_t warp = c.reader & kMany ? c.reader & ~kMany : warp_of(c.reader);
    c.reader = kMany | (warp == uint32_t(self->warp) ? warp : kAnyWarp);
  }
  c.reader_block = machine.block_number;
  c.read = now();
  c.reader_pc = pc;
}

void touch(const Place& at, Cell& c, Access kind, uint32_t pc) {
  const uint32_t era = at.shared ? block_era : launch_era;
  if (c.era != era) {
    c = Cell{};
    c.era = era;
  }
  const bool write = writes(kind);
  if (kind == Access::kAsyncReadDone) {
    c.async_reads--;
    note_read(c, at.shared, c.reader_pc);  // only now has it been read: what was released before doesn't cover it
    return;
  }
  if (kind == Access::kCopyPublished) {
    c.copier = 0;
    c.writer = machine.publisher;
    c.written = {0, 0, machine.publisher_tick};
    c.writer_pc = pc;
    return;
  }
  if (kind == Access::kAsyncRead) {
    c.async_reads++;
    const uint32_t index = index_of(c.writer & ~kAtomicFlag);
    const bool stored = c.writer != 0 && block_of(c.writer & ~kAtomicFlag) == machine.block_number && index < threads();
    if (stored && machine.fibers[index].proxy_fences <= c.proxy_fences)
      fail("wgmma reads %s memory at byte %ld at %s, stored at %s, with no fence.proxy.async after it", at.name,
           at.offset, source_line(pc).c_str(), source_line(c.writer_pc).c_str());
  }
  if (write && c.async_reads) race(at, kMany, c.reader_pc, false, pc, true);

  if (kind == Access::kCopyLanded) c.copier = 0;
  else if (c.copier) race(at, c.copier, c.writer_pc, true, pc, write);
  if (kind == Access::kCopyIssued) c.copier = my_number();

  const bool both_atomic = kind == Access::kAtomic && (c.writer & kAtomicFlag);
  const uint32_t writer = c.writer & ~kAtomicFlag;
  if (!both_atomic && !ordered(writer, c.written)) race(at, writer, c.writer_pc, true, pc, write);
  if (at.shared && !write && c.writer == 0)
    fail("read of uninitialised %s memory at byte %ld at %s", at.name, at.offset, source_line(pc).c_str());

  if (!write) {
    note_read(c, at.shared, pc);
    return;
  }
  if (!readers_ordered(c)) race(at, c.reader, c.reader_pc, false, pc, true);
  note_write(c, kind, pc);
}

[[noreturn]] void out_of_bounds(uintptr_t address, size_t bytes, bool write, uint32_t pc) {
  std::string near = "no buffer is near";
  auto after = buffers.upper_bound(address);
  if (after == buffers.end() || address < after->second.low) {
    if (after != buffers.begin()) after = std::prev(after);
    else after = buffers.end();
  }
  if (after != buffers.end()) {
    const Buffer& b = after->second;
    near = b.name + " at byte " + std::to_string(address - b.low) + " of " + std::to_string(b.high - b.low);
  }
  fail("out-of-bounds %zu-byte %s of global memory (%s) at %s", bytes, write ? "write" : "read", near.c_str(),
       source_line(pc).c_str());
}

enum class Space { kUnchecked, kShared, kGlobal };

// Which memory is this, and where are its cells?
Space locate(uintptr_t address, size_t bytes, bool write, uint32_t pc, Place& at) {
  auto within = [&](uintptr_t low, size_t size) { return address - low < size; };
  auto is_part_of = [&](const auto& object) { return within(reinterpret_cast<uintptr_t>(&object), sizeof object); };
  if (within(reinterpret_cast<uintptr_t>(machine.stacks), machine.stacks_bytes)) return Space::kUnchecked;

  const uintptr_t shared = reinterpret_cast<uintptr_t>(machine.shared);
  if (within(shared, kSharedReserved)) {
    const size_t offset = address - shared;
    if (offset + bytes > machine.shared_bytes)
      fail("%zu-byte %s at byte %zu of %zu bytes of dynamic shared memory at %s", bytes, write ? "write" : "read",
           offset, machine.shared_bytes, source_line(pc).c_str());
    at = {&dynamic_cells[offset / 2], "dynamic shared", long(offset), true};
    return Space::kShared;
  }
  // A __shared__ variable is a static one here, since one block runs at a time.
  if (within(image().low, image().high - image().low)) {
    const bool own = is_part_of(machine) || is_part_of(self) || is_part_of(gridDim) || is_part_of(blockDim);
    if (own || !within(image().writable_low, image().writable_high - image().writable_low)) return Space::kUnchecked;
    const size_t offset = address - image().writable_low;
    at = {&static_cells[offset / 2], "static shared", long(offset), true};
    return Space::kShared;
  }
  const bool arguments = within(machine.host_stack, machine.host_stack_bytes) || is_part_of(*self);
  if (arguments && !write) return Space::kUnchecked;

  auto it = buffers.upper_bound(address);
  if (it == buffers.end() || address < it->second.low || address + bytes > it->second.high) {
    if (machine.options.check) out_of_bounds(address, bytes, write, pc);
    return Space::kUnchecked;
  }
  Buffer& b = it->second;
  at = {b.cells.data() + (address - b.low) / 2, b.name.c_str(), long(address - b.low), false};
  return Space::kGlobal;
}

}  // namespace

Deed deed() { return {my_number(), now()}; }
void must_be_before(const Deed& other, const char* what) {
  if (machine.options.check && !ordered(other.who, other.when)) fail("race on %s: no barrier between", what);
}

void checker_begin_launch() {
  launch_era++;
  if (!static_cells.empty()) return;
  static_cells.resize((image().writable_high - image().writable_low) / 2 + 1);
  dynamic_cells.resize(kSharedReserved / 2);
}
void checker_begin_block() {
  block_era++;
  readings.resize(1);
}

void access(const void* p, size_t bytes, Access kind, void* pc) {
  if (!self || bytes == 0 || !(machine.options.check || machine.options.profile)) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const uint32_t ip = offset_of(pc);
  const bool write = writes(kind);
  Place at;
  const Space space = locate(address, bytes, write, ip, at);
  if (space == Space::kUnchecked) return;
  machine.stats.accesses++;
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && address % bytes)
    fail("misaligned %zu-byte %s of %s at byte %ld at %s", bytes, write ? "write" : "read", at.name, at.offset,
         source_line(ip).c_str());
  if (machine.options.check) {
    const size_t cells = (address % 2 + bytes + 1) / 2;
    for (size_t i = 0; i < cells; i++, at.offset += 2) touch(at, at.cell[i], kind, ip);
  }
  const bool instruction = kind == Access::kRead || kind == Access::kWrite || kind == Access::kAtomic ||
                           kind == Access::kCopyIssued;
  if (machine.options.profile && instruction) profile(address, bytes, space == Space::kShared, write, pc);
}

void vector_access(const void* p, size_t bytes, bool write, void* pc) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail("misaligned %zu-byte vector %s at %s", bytes, write ? "store" : "load", source_line(offset_of(pc)).c_str());
  access(p, bytes, write ? Access::kWrite : Access::kRead, pc);
}
void atomic_access(const void* p, size_t bytes, void* pc) { access(p, bytes, Access::kAtomic, pc); }

void add_buffer(const void* p, size_t bytes, const char* name) {
  if (bytes == 0) return;
  const uintptr_t low = reinterpret_cast<uintptr_t>(p);
  Buffer& b = buffers[low + bytes];
  b = {low, low + bytes, name, {}};
  b.cells.resize(bytes / 2 + 2);
}
void clear_buffers() { buffers.clear(); }

}  // namespace simt

// What GCC and clang call before memory accesses of code compiled with -fsanitize=thread.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
#define SIMT_HOOK(N)                                                                                \
  void __tsan_read##N(void* p) { simt::access(p, N, simt::Access::kRead, SIMT_CALLER); }            \
  void __tsan_write##N(void* p) { simt::access(p, N, simt::Access::kWrite, SIMT_CALLER); }          \
  void __tsan_unaligned_read##N(void* p) { simt::access(p, N, simt::Access::kRead, SIMT_CALLER); }  \
  void __tsan_unaligned_write##N(void* p) { simt::access(p, N, simt::Access::kWrite, SIMT_CALLER); }
SIMT_HOOK(1)
SIMT_HOOK(2)
SIMT_HOOK(4)
SIMT_HOOK(8)
SIMT_HOOK(16)
void __tsan_read_range(void* p, size_t n) { simt::access(p, n, simt::Access::kRead, SIMT_CALLER); }
void __tsan_write_range(void* p, size_t n) { simt::access(p, n, simt::Access::kWrite, SIMT_CALLER); }
}
