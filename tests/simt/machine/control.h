// What tests see of the machine.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

enum Schedule { kInOrder = 0, kReversed = 1, kRandom = 2 };

struct Options {
  int schedule = kInOrder;  // in which order blocks and threads run
  unsigned seed = 0;
  bool check = false;       // bounds, races, alignment, uninitialised shared memory
  bool profile = false;     // bank conflicts and sectors per source line
};
struct Stats {
  uint64_t launches = 0, blocks = 0, threads = 0, switches = 0, barriers = 0, collectives = 0, accesses = 0;
};
// How one source line's accesses fell. Shared memory: wavefronts, 1 a request without bank conflicts (per 128 bytes).
// Global memory: 32-byte sectors touched, against those that the bytes would fill.
struct Profile {
  std::string where;
  bool shared = false;
  bool write = false;
  int bytes = 0;
  uint64_t requests = 0, actual = 0, ideal = 0;
};

Options& options();
Stats& stats();
void add_buffer(const void* p, size_t bytes, const char* name);  // global memory that kernels may touch when checked
void clear_buffers();
std::vector<Profile> take_profiles();

}  // namespace simt
