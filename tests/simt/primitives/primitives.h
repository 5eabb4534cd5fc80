// One kernel for each of the package's wrappers of PTX, or few of them together, to be compiled by nvcc and by g++ for
// the SIMT machine alike: what test_primitives.py expects must come out of both.
#pragma once
#include <cstdint>
#include <string>

struct Operands {
  const void *a, *b;
  void* out;
  int n;
};

// Runs the kernel of this name; a CUDA error code, -1 when there is none.
int run_primitive(const std::string& name, const Operands& operands, void* stream);
int run_hopper_primitive(const std::string& name, const Operands& operands, void* stream);
