// The machine's own state, shared by its source files: scheduler.cpp (blocks, fibers), collectives.cpp (meeting
// points), async.cpp (copies in flight), checker.cpp (bounds and races), profiler.cpp (conflicts and sectors),
// symbols.cpp (addresses to source lines).
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "control.h"
#include "fiber.h"
#include "simt.h"

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State { kReady, kWaiting, kDone };

struct Copy {  // an asynchronous copy into shared memory
  void* dst;
  const void* src;
  int bytes, source_bytes;
  void* pc;
  bool done;
};
using Region = std::pair<const void*, size_t>;

// What has happened before a point, where more than the block's barriers say so: of every thread, and of every mbarrier
// (whose copies count as its own deeds), up to which tick. Threads count their releases, mbarriers their phases.
struct Clock {
  std::vector<uint32_t> ticks;  // empty: nothing

  void join(const Clock& other);
  void note(size_t who, uint32_t tick);
};

struct When {  // within a block: how many barriers had passed, and how often the thread had released what it did
  uint32_t block_epoch, warp_epoch, tick;
};
struct Deed {
  uint32_t who;  // thread number + 1
  When when;
};

struct Product {  // a thread's part of a wgmma: rows g and g + 8 of its warp's 16
  float* d;
  const uint32_t* a;              // null: a_tile
  uint32_t a_was[4];
  float a_rows[2][16];
  std::vector<float> d_was;       // empty: an earlier one writes the same d
  uintptr_t a_tile, b_tile;
  int b_panel, n;
  bool add, columns;
  Decode decode;
  void* pc;
};

struct Fiber {
  Thread thread;  // `self` points here
  Context context;
  State state = State::kReady;
  const char* where = "";     // it waits
  int barrier_result = 0;
  bool spinning = false;      // polls an mbarrier: running it again may change nothing,
  uint32_t polled = 0;        // unless this many waits had not ended before
  uint32_t warp_epoch = 0;    // counts __syncwarp
  std::vector<Copy> open_copies;                 // cp.async not yet committed
  std::deque<std::vector<Copy>> copy_groups;     // committed, not yet waited for
  std::vector<Region> open_reads;                // the same for wgmma: operands in shared memory
  std::deque<std::vector<Region>> read_groups;
  std::vector<Product> open_products;            // and what is to be added
  std::deque<std::vector<Product>> product_groups;
  bool wgmma_fenced = false;
  uint32_t proxy_fences = 0;
  uint32_t tick = 1;                             // counts releases
  Clock seen;
  std::map<void*, unsigned> executions;          // of each memory instruction, when profiling
};

struct Rendezvous {  // of lanes `mask` of a warp
  unsigned mask = 0, arrived = 0;
  uint64_t generation = 0;
  const char* site = nullptr;
  unsigned char slots[2][32 * kSlot];  // two, since a lane may come again before another one has read
};
struct Barrier {
  int arrived = 0, votes = 0, expected = 0;
  Clock brought;
  std::vector<Fiber*> waiting;
};
struct WarpClock {  // of __syncwarp
  Clock brought[2];
  int arrived[2] = {};
};
struct Mbarrier {
  int count = 0, pending = 0, bytes = 0;
  size_t index = 0;
  uint32_t phases = 0;  // that have ended
  Deed init;
  Clock arriving, ended;
  std::vector<Copy> in_flight;
};

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4096;
constexpr size_t kMostShared = 227 * 1024, kSharedReserved = 256 << 10;
constexpr size_t kMostMbarriers = 64;

struct Machine {
  Options options;
  Stats stats;
  std::mt19937 random{0};

  // launch
  Body body = nullptr;
  void* arguments = nullptr;
  const void* kernel = nullptr;
  std::vector<Fiber> fibers;
  Context host;
  char* stacks = nullptr;
  size_t stacks_bytes = 0;
  uintptr_t host_stack = 0;
  size_t host_stack_bytes = 0;
  std::string error;  // set by a fiber that failed; the host throws it

  // block
  uint32_t block_number = 0;
  uint32_t block_epoch = 0;  // counts barriers
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<std::vector<std::unique_ptr<Rendezvous>>> meetings;  // per warp
  Barrier barriers[16], warpgroups[32];
  WarpClock warp_clocks[32];
  std::map<uint64_t*, Mbarrier> mbarriers;
  bool clocked = false;  // an mbarrier or a named barrier is in use: epochs don't tell all
  uint32_t publisher = 0, publisher_tick = 0;  // whose copies land
};
extern Machine machine;

inline Fiber& current() { return machine.fibers[self->linear]; }
// Threads, and behind them mbarriers, are numbered on from block to block.
inline size_t numbers_of_a_block() { return machine.fibers.size() + kMostMbarriers; }

// scheduler.cpp
void wait(const char* where);  // until someone sets this fiber ready
void yield();
// collectives.cpp
void release(Clock& to);  // all that the running thread has seen and done
// checker.cpp
enum class Access {
  kRead, kWrite, kAtomic,
  kCopyIssued,    // cp.async or bulk copy: the destination must be left alone
  kCopyLanded,    // waited for by the thread that issued it
  kCopyPublished, // counted by an mbarrier (machine.publisher): all who wait for it may read
  kAsyncRead, kAsyncReadDone,  // operands of wgmma
};
void access(const void* p, size_t bytes, Access kind, void* pc);
Deed deed();  // of the running thread, now
void must_be_before(const Deed& other, const char* what);
void checker_begin_launch();
void checker_begin_block();
// profiler.cpp
void profile(uintptr_t address, size_t bytes, bool shared, bool write, void* pc);
void profiler_end_block();
// symbols.cpp
struct Image {
  uintptr_t base, low, high, writable_low, writable_high;  // the shared object that kernels and machine are part of
};
const Image& image();
uint32_t offset_of(const void* pc);
std::vector<std::string> source_lines(const std::vector<uint32_t>& offsets);
std::string source_line(uint32_t offset);
std::string function_name(const void* function);

}  // namespace simt
