// Pieces of a matrix of any dtype and layout, as float32 in the order in which the product of gemm_cpu.cpp reads them.
//
//   strips<W>: columns w of the source, k down: out[(w / W) * W * K + k * W + w % W]
//
// The last strip is filled up with zeros. Conversion from half precision happens here, once an element, and costs next
// to nothing: an element is read from the packed piece hundreds of times.
#pragma once
#include "../common/simd.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

inline float one(const float* p) { return *p; }
template <class T>
inline float one(const T* p) { return load(p, Part{1})[0]; }

// Eight neighbours of one strip and of the next seven k: 8 x 8 elements from rows of the source to rows of the strip.
#if defined(__AVX2__)
constexpr bool kTransposes = true;
inline __m256 eight(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 eight(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline __m256 eight(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// out[k * step + w] = from[w][k]
template <class T>
inline void transpose_8x8(const T* const from[8], int64_t k, float* out, int64_t step) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; i++) r[i] = eight(from[i] + k);
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm256_shuffle_ps(s[i + j], s[i + 2 + j], _MM_SHUFFLE(1, 0, 1, 0));
      r[i + 2 * j + 1] = _mm256_shuffle_ps(s[i + j], s[i + 2 + j], _MM_SHUFFLE(3, 2, 3, 2));
    }
  for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + i * step, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
  for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + (4 + i) * step, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
}
#else
constexpr bool kTransposes = false;
template <class T>
inline void transpose_8x8(const T* const[8], int64_t, float*, int64_t) {}
#endif

// One strip of `width` columns. w_step and k_step are the source's strides. Up to kPackSlack floats behind the strip
// may be overwritten.
constexpr int kPackSlack = 8;
template <int W, class T>
void pack_strip(const T* x, int64_t w_step, int64_t k_step, int64_t width, int64_t K, float* out) {
  int64_t k = 0;
  if (kTransposes && k_step == 1 && width > W / 2) {
    // Columns past the width read the last one again; zeros take their place afterwards.
    // Where W is no multiple of 8 the last eight run into the next row, whose elements are written after them.
    for (; k + 8 <= K; k += 8)
      for (int w = (W - 1) / 8 * 8; w >= 0; w -= 8) {
        const T* from[8];
        for (int i = 0; i < 8; i++) from[i] = x + min64(w + i, width - 1) * w_step;
        transpose_8x8(from, k, out + k * W + w, W);
      }
    for (int64_t w = width; w < W; w++)
      for (int64_t j = 0; j < k; j++) out[j * W + w] = 0;
  }
  for (; k < K; k++)
    for (int64_t w = 0; w < W; w++) out[k * W + w] = w < width ? one(x + w * w_step + k * k_step) : 0.f;
}

// Strips of a source whose columns are neighbours, kRows rows at a time across all of them: memory is read as it lies.
// Returns how many columns are done; the rest cannot be read in whole vectors.
template <int W, class T>
int64_t pack_rows(const T* x, int64_t k_step, int64_t width, int64_t K, float* out) {
  constexpr int kLoads = (W + kFloatLanes - 1) / kFloatLanes, kRows = 8;
  const int64_t last = width - kLoads * kFloatLanes;  // the last strip may begin here
  for (int64_t first = 0; first < K; first += kRows)
    for (int64_t w = 0; w <= last; w += W)
      for (int64_t k = first; k < min64(first + kRows, K); k++)
        for (int i = 0; i < kLoads; i++) {
          const int at = i * kFloatLanes;
          float* to = out + w * K + k * W + at;
          const Vec v = load(x + k * k_step + w + at, Full{});
          // A vector may run into the strip's next row, which is written after it, but not into the next strip.
          if (at + kFloatLanes <= W || k + 1 < K)
            store(to, v, Full{});
          else
            store(to, v, Part{W - at});
        }
  return last < 0 ? 0 : (last / W + 1) * W;
}

template <int W, class T>
void pack(const T* x, int64_t w_step, int64_t k_step, int64_t width, int64_t K, float* out) {
  int64_t w = w_step == 1 ? pack_rows<W>(x, k_step, width, K, out) : 0;
  for (; w < width; w += W)
    pack_strip<W>(x + w * w_step, w_step, k_step, min64(W, width - w), K, out + w * K);
}

// Columns [w, w + width), rows [k, k + K) of the source. Behind `out` there must be room for kPackSlack floats.
template <int W>
void pack(const void* x, int dtype, int64_t w_step, int64_t k_step, int64_t w, int64_t width, int64_t k, int64_t K,
          float* out) {
  const int64_t offset = w * w_step + k * k_step;
  switch (dtype) {
    case kFloat32: return pack<W>(static_cast<const float*>(x) + offset, w_step, k_step, width, K, out);
    case kBFloat16: return pack<W>(static_cast<const bf16*>(x) + offset, w_step, k_step, width, K, out);
    case kFloat16: return pack<W>(static_cast<const f16*>(x) + offset, w_step, k_step, width, K, out);
  }
}

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
