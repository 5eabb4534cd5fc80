// Counts what memory accesses would cost a GPU: wavefronts of shared memory (bank conflicts), sectors of global memory
// (coalescing). The n-th execution of an instruction by the lanes of a warp counts as one request.
#include "machine.h"

#include <algorithm>
#include <set>
#include <tuple>

namespace simt {
namespace {

struct Request {
  bool shared, write;
  int bytes;
  std::map<int, uintptr_t> lanes;
};
std::map<std::tuple<void*, unsigned, int>, Request> requests;  // by instruction, execution, warp
std::map<std::pair<uint32_t, bool>, Profile> profiles;         // by instruction and kind of memory

// 32 banks of 4 bytes. Accesses wider than 4 bytes go in groups of lanes that make up 128 bytes. A group takes as many
// wavefronts as the fullest bank has different words to give.
void count_wavefronts(const Request& r, const std::vector<uintptr_t>& address, Profile& total) {
  const size_t words = std::max(1, r.bytes / 4), group = std::max<size_t>(1, 32 / words);
  for (size_t first = 0; first < address.size(); first += group) {
    std::map<uintptr_t, std::set<uintptr_t>> bank;
    for (size_t i = first; i < std::min(address.size(), first + group); i++)
      for (size_t k = 0; k < words; k++) bank[(address[i] / 4 + k) % 32].insert(address[i] / 4 + k);
    size_t fullest = 1;
    for (auto& b : bank) fullest = std::max(fullest, b.second.size());
    total.actual += fullest;
    total.ideal += 1;
  }
}

// Ideal is what the bytes fill; lanes that read one and the same address count once.
void count_sectors(const Request& r, const std::vector<uintptr_t>& address, Profile& total) {
  std::set<uintptr_t> sectors, distinct(address.begin(), address.end());
  for (uintptr_t a : distinct)
    for (uintptr_t s = a / 32; s <= (a + r.bytes - 1) / 32; s++) sectors.insert(s);
  total.actual += sectors.size();
  total.ideal += (distinct.size() * r.bytes + 31) / 32;
}

}  // namespace

void profile(uintptr_t address, size_t bytes, bool shared, bool write, void* pc) {
  Request& r = requests[{pc, current().executions[pc]++, self->warp}];
  r.shared = shared;
  r.write = write;
  r.bytes = int(bytes);
  r.lanes[self->lane] = address;
}

void profiler_end_block() {
  for (auto& entry : requests) {
    const Request& r = entry.second;
    Profile& total = profiles[{offset_of(std::get<0>(entry.first)), r.shared}];
    total.shared = r.shared;
    total.write = r.write;
    total.bytes = r.bytes;
    total.requests++;
    std::vector<uintptr_t> address;
    for (auto& lane : r.lanes) address.push_back(lane.second);
    if (r.shared) count_wavefronts(r, address, total);
    else count_sectors(r, address, total);
  }
  requests.clear();
}

std::vector<Profile> take_profiles() {
  std::vector<uint32_t> offsets;
  for (auto& entry : profiles) offsets.push_back(entry.first.first);
  const std::vector<std::string> lines = source_lines(offsets);
  std::vector<Profile> out;
  for (auto& entry : profiles) {
    out.push_back(entry.second);
    out.back().where = lines[out.size() - 1];
  }
  profiles.clear();
  return out;
}

}  // namespace simt
