// What the files of probes have in common.
#pragma once
#include <vector>

struct Data {
  const float* in;
  float* out;
  int n;
};
using Kernel = void (*)(Data);
struct Probe {
  const char* name;
  Kernel kernel;
};

std::vector<Probe> hopper_probes();
