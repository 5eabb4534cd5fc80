// Runs blocks one after the other, and their threads as fibers. Finds deadlocks: when no fiber can go on and some have
// not finished.
#define SIMT_FIBER_IMPLEMENTATION
#include "machine.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>

dim3 gridDim, blockDim;

namespace simt {

Thread* self = nullptr;
Machine machine;

Options& options() { return machine.options; }
Stats& stats() { return machine.stats; }
unsigned char* dynamic_shared() { return machine.shared; }

void fail(const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (!self) throw Error(text);
  char place[160];
  const uint3 b = self->block, t = self->index;
  snprintf(place, sizeof place, ": block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  machine.error = function_name(machine.kernel) + place + text;
  yield();  // for good: the block is abandoned
  abort();
}

void yield() {
  machine.stats.switches++;
  switch_context(current().context, machine.host);
}

void wait(const char* where) {
  current().state = State::kWaiting;
  current().where = where;
  yield();
}

extern "C" void simt_fiber_main() {
  machine.body(machine.arguments);
  for (const auto& group : current().copy_groups)
    if (!group.empty()) fail("thread exits with cp.async copies not waited for");
  if (!current().product_groups.empty() || !current().open_products.empty())
    fail("thread exits with wgmma not waited for");
  current().state = State::kDone;
  yield();
  abort();
}

namespace {

char* stack_of(size_t fiber) { return machine.stacks + fiber * (kStackBytes + kGuardBytes) + kGuardBytes; }

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("the machine got no memory");
  return p;
}

void reserve_memory(size_t threads) {
  if (!machine.shared) machine.shared = static_cast<unsigned char*>(reserve(kSharedReserved));
  const size_t bytes = threads * (kStackBytes + kGuardBytes);
  if (machine.stacks_bytes >= bytes) return;
  if (machine.stacks) munmap(machine.stacks, machine.stacks_bytes);
  machine.stacks = static_cast<char*>(reserve(bytes));
  machine.stacks_bytes = bytes;
  for (size_t i = 0; i < threads; i++) mprotect(stack_of(i) - kGuardBytes, kGuardBytes, PROT_NONE);
}

void find_host_stack() {
  pthread_attr_t attributes;
  void* low;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &low, &machine.host_stack_bytes);
  pthread_attr_destroy(&attributes);
  machine.host_stack = reinterpret_cast<uintptr_t>(low);
}

void begin_block(dim3 at) {
  for (size_t i = 0; i < machine.fibers.size(); i++) {
    Fiber& f = machine.fibers[i];
    const Thread thread = f.thread;
    f = Fiber();
    f.thread = thread;
    f.thread.block = {at.x, at.y, at.z};
    make_context(f.context, stack_of(i), kStackBytes);
  }
  machine.meetings.clear();
  machine.meetings.resize((machine.fibers.size() + 31) / 32);
  for (auto& b : machine.barriers) b = Barrier();
  for (auto& b : machine.warpgroups) b = Barrier();
  if (machine.clocked)
    for (auto& clock : machine.warp_clocks) clock = WarpClock();
  machine.mbarriers.clear();
  machine.clocked = false;
  machine.block_epoch = 1;
  std::memset(machine.shared, 0xff, machine.shared_bytes);  // NaN, whatever the type
  checker_begin_block();
}

std::string deadlock(dim3 at) {
  std::map<std::string, int> count;
  for (auto& f : machine.fibers) count[f.state == State::kDone ? "have exited" : std::string("wait at ") + f.where]++;
  std::string text = function_name(machine.kernel) + ": deadlock in block (" + std::to_string(at.x) + "," +
                     std::to_string(at.y) + "," + std::to_string(at.z) + "):";
  for (auto& entry : count) text += " " + std::to_string(entry.second) + " threads " + entry.first + ";";
  return text;
}

void run_block(dim3 at) {
  begin_block(at);
  const size_t threads = machine.fibers.size();
  std::vector<size_t> order(threads);
  std::iota(order.begin(), order.end(), size_t(0));
  if (machine.options.schedule == kReversed) std::reverse(order.begin(), order.end());
  size_t done = 0;
  while (done < threads) {
    bool progress = false;
    if (machine.options.schedule == kRandom) std::shuffle(order.begin(), order.end(), machine.random);
    for (size_t i : order) {
      Fiber& f = machine.fibers[i];
      if (f.state != State::kReady) continue;
      const bool spinning = f.spinning;
      const uint32_t polled = f.polled;
      self = &f.thread;
      machine.stats.switches++;
      switch_context(machine.host, f.context);
      self = nullptr;
      if (!machine.error.empty()) throw Error(std::exchange(machine.error, {}));
      if (f.state == State::kDone) done++;
      if (!(spinning && f.spinning && polled == f.polled)) progress = true;
    }
    if (!progress) throw Error(deadlock(at));
  }
  profiler_end_block();
  machine.stats.blocks++;
}

}  // namespace

void run(dim3 g, dim3 b, size_t shared_bytes, Body body, void* arguments, const void* kernel) {
  machine.kernel = kernel;
  const size_t threads = size_t(b.x) * b.y * b.z;
  auto refuse = [&](const char* why) { throw Error(function_name(kernel) + ": " + why); };
  if (threads == 0 || threads > 1024 || b.z > 64) refuse("block size out of range");
  const bool grid_fits = g.x && g.y && g.z && g.x <= INT32_MAX && g.y <= 65535 && g.z <= 65535;
  if (!grid_fits) refuse("grid size out of range");
  if (shared_bytes > kMostShared) refuse("too much dynamic shared memory");
  if (double(threads + kMostMbarriers) * g.x * g.y * g.z > INT32_MAX) refuse("too many threads for the machine");
  gridDim = g;
  blockDim = b;
  machine.body = body;
  machine.arguments = arguments;
  machine.shared_bytes = shared_bytes;
  machine.random.seed(machine.options.seed);
  reserve_memory(threads);
  find_host_stack();
  machine.fibers.clear();
  machine.fibers.resize(threads);
  for (size_t i = 0; i < threads; i++) {
    Thread& t = machine.fibers[i].thread;
    t.index = {unsigned(i % b.x), unsigned(i / b.x % b.y), unsigned(i / b.x / b.y)};
    t.linear = int(i);
    t.warp = int(i / 32);
    t.lane = int(i % 32);
  }
  checker_begin_launch();

  std::vector<uint32_t> order(size_t(g.x) * g.y * g.z);
  std::iota(order.begin(), order.end(), 0u);
  if (machine.options.schedule == kRandom) std::shuffle(order.begin(), order.end(), machine.random);
  if (machine.options.schedule == kReversed) std::reverse(order.begin(), order.end());
  for (uint32_t i : order) {
    machine.block_number = i;
    run_block(dim3(i % g.x, i / g.x % g.y, i / g.x / g.y));
  }
  machine.stats.launches++;
  machine.stats.threads += threads * order.size();
}

}  // namespace simt
