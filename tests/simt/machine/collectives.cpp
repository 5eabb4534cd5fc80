// Where threads meet: warp-wide instructions, barriers of blocks and warpgroups. Finds lanes that don't take part and
// threads that meet at different places.
#include "machine.h"

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
  warp_exchange(mask, nullptr, 0, "__syncwarp");
  current().warp_epoch++;
}

int block_sync(int vote, int id, int count) {
  const int expected = count ? count : int(machine.fibers.size());
  Barrier& b = machine.barriers[id];
  b.votes += vote;
  b.arrived++;
  if (b.arrived > expected) fail("barrier %d: %d threads arrived, %d expected", id, b.arrived, expected);
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
  machine.block_epoch++;
  machine.stats.barriers++;
  return votes;
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
