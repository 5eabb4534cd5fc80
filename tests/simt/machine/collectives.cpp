// Where threads meet: warp-wide instructions, barriers of blocks and warpgroups. Finds lanes that don't take part and
// threads that meet at different places.
#include "machine.h"

#include <algorithm>

namespace simt {

const unsigned char* warp_exchange(unsigned mask, const void* value, size_t bytes, const char* site,
                                   void (*combine)(unsigned char*)) {
  if (!(mask >> self->lane & 1)) fail("%s: calling lane %d is not in mask %08x", site, self->lane, mask);
  auto& meetings = machine.meetings[self->warp];
  Rendezvous* meeting = nullptr;
  for (auto& known : meetings)
    if (known->mask == mask) meeting = known.get();
  if (!meeting) {
    meetings.push_back(std::make_unique<Rendezvous>());
    meeting = meetings.back().get();
    meeting->mask = mask;
  }

  if (meeting->arrived == 0) meeting->site = site;
  else if (std::strcmp(meeting->site, site) != 0)
    fail("lane %d is at %s, other lanes of mask %08x at %s", self->lane, site, mask, meeting->site);

  unsigned char* slots = meeting->slots[meeting->generation & 1];
  if (bytes) std::memcpy(slots + self->lane * kSlot, value, bytes);
  meeting->arrived |= 1u << self->lane;
  machine.stats.collectives++;
  if (meeting->arrived != mask) {
    wait(site);
    return slots;
  }
  if (combine) combine(slots);
  meeting->arrived = 0;
  meeting->generation++;
  const size_t first = size_t(self->warp) * 32;
  for (int lane = 0; lane < 32; lane++)
    if ((mask >> lane & 1) && lane != self->lane && first + lane < machine.fibers.size())
      machine.fibers[first + lane].state = State::kReady;
  return slots;
}

void warp_sync(unsigned mask) {
  const bool clocked = machine.clocked && mask == 0xffffffffu;  // other masks: as if clocks had not been there
  WarpClock& clock = machine.warp_clocks[self->warp];
  const int turn = current().warp_epoch & 1;  // nobody comes again before all have gone on from the last but one
  if (clocked) {
    if (clock.arrived[turn]++ % 32 == 0) clock.brought[turn] = Clock();
    release(clock.brought[turn]);
  }
  warp_exchange(mask, nullptr, 0, "__syncwarp");
  if (clocked) current().seen.join(clock.brought[turn]);
  current().warp_epoch++;
}

void Clock::join(const Clock& other) {
  if (ticks.size() < other.ticks.size()) ticks.resize(other.ticks.size());
  for (size_t i = 0; i < other.ticks.size(); i++) ticks[i] = std::max(ticks[i], other.ticks[i]);
}
void Clock::note(size_t who, uint32_t tick) {
  if (ticks.empty()) ticks.resize(numbers_of_a_block());
  ticks[who] = std::max(ticks[who], tick);
}

void release(Clock& to) {
  Fiber& me = current();
  to.join(me.seen);
  to.note(size_t(self->linear), me.tick++);
}

int block_sync(int vote) {
  const int expected = int(machine.fibers.size());
  Barrier& b = machine.barriers[0];
  b.votes += vote;
  b.arrived++;
  if (b.arrived < expected) {
    b.waiting.push_back(&current());
    wait("__syncthreads");
    return current().barrier_result;
  }
  const int votes = b.votes;
  for (Fiber* f : b.waiting) {
    f->state = State::kReady;
    f->barrier_result = votes;
  }
  b = Barrier();
  if (machine.clocked) {  // what one has seen by way of an mbarrier, all have now
    Clock all;
    for (Fiber& f : machine.fibers) all.join(f.seen);
    for (Fiber& f : machine.fibers) f.seen = all;
  }
  machine.block_epoch++;
  machine.stats.barriers++;
  return votes;
}

void named_barrier(int number, int count, bool waits) {
  if (number < 1 || number > 15) fail("barrier %d: its number must be 1 to 15", number);
  if (count < 32 || count % 32) fail("barrier %d: %d threads are not whole warps", number, count);
  Barrier& b = machine.barriers[number];
  if (b.arrived && b.expected != count) fail("barrier %d: %d threads, others say %d", number, count, b.expected);
  b.expected = count;
  machine.clocked = true;
  release(b.brought);
  if (++b.arrived < count) {
    if (!waits) return;
    b.waiting.push_back(&current());
    wait("a named barrier");
    return;
  }
  for (Fiber* f : b.waiting) {
    f->state = State::kReady;
    f->seen.join(b.brought);
  }
  if (waits) current().seen.join(b.brought);
  b = Barrier();
  machine.stats.barriers++;
}

void warpgroup_sync(const char* site) {
  const int group = self->warp / 4;
  if (size_t(group + 1) * 128 > machine.fibers.size()) fail("%s: not a full warpgroup", site);
  Barrier& b = machine.warpgroups[group];
  if (b.arrived && std::strcmp(b.waiting.front()->where, site) != 0)
    fail("thread at %s while others of its warpgroup are at %s", site, b.waiting.front()->where);
  if (++b.arrived < 128) {
    b.waiting.push_back(&current());
    wait(site);
    return;
  }
  for (Fiber* f : b.waiting) f->state = State::kReady;
  b = Barrier();
}

}  // namespace simt
