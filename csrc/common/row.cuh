// Rows that begin anywhere: the elements before the first multiple of 16 bytes and after the last go one by one, all
// others in vectors.
#pragma once
#include "common/device.cuh"

namespace pyllm {

// A row of n elements: `lead` single ones, `vectors` vectors of V, then the rest.
template <class T, class Out = T>
struct Row {
  static constexpr int V = vector_length<T, Out>();
  int lead, vectors, singles;

  // out: another row that is written in the same vectors; if one doesn't begin where x's does, all go one by one.
  __device__ __forceinline__ Row(const T* x, int n, const Out* out) {
    const int off = int(reinterpret_cast<uintptr_t>(x) % (V * sizeof(T)));
    lead = off ? (V * int(sizeof(T)) - off) / int(sizeof(T)) : 0;
    if (lead > n) lead = n;
    const bool alike = reinterpret_cast<uintptr_t>(out + lead) % (V * sizeof(Out)) == 0;
    vectors = alike ? (n - lead) / V : 0;
    if (!alike) lead = 0;
    singles = n - vectors * V;
  }
  // Column of the i-th single element.
  __device__ __forceinline__ int single(int i) const { return i < lead ? i : i + vectors * V; }
};

template <class T>
__device__ __forceinline__ float element(const T* p) {
  return Vec<T, 1>::load(p)[0];
}

}  // namespace pyllm
