// Weights of 8 and of 4 bits, times rows that stay (almost) what they are.
//
// int8: W[n][k] = scale[n] q, q in [-127, 127].  int4: W[n][k] = scale[n][k / 32] (u - 8), u in [0, 15].
// The inputs are rounded to 16 bits, in groups of 32 with a step of their own each: that is 2^-16 of the group's
// largest element, hundreds of times finer than the weights, and lets the CPU multiply integers, twice as many per
// instruction as floats. A group's sum of products is exact in 32 bits: 32 * 127 * 32767 < 2^31.
//
// Packed for vectors whose lanes are outputs, in blocks of 16 of them (zeros beyond N and K):
//   int8  weight int8 (N/16, K/2, 16, 2), a pair of k for each output; scale float32 (N/16, 16)
//   int4  weight uint32 (N/16, K/8, 16), scale bf16 (N/16, K/32, 16): nibble j of the lower half of a number is
//         k = 2 j of the eight, nibble j of its upper half is k = 2 j + 1
#pragma once
#include "../common/simd.h"
#include "decode_cpu.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

constexpr int64_t kGroup = 32, kBlock = 16;
constexpr int kParts = int(kBlock) / kFloatLanes;  // vectors per block

inline int64_t packed_columns(int64_t K) { return (K + kGroup - 1) / kGroup * kGroup; }

typedef int16_t ShortVec __attribute__((vector_size(4 * kFloatLanes)));  // pairs of 16-bit numbers, one per lane
typedef int8_t ByteVec __attribute__((vector_size(2 * kFloatLanes)));

// a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] in lane i
inline IntVec multiply_pairs(ShortVec a, ShortVec b) {
#if defined(__AVX512F__)
  return IntVec(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return IntVec(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#elif PYLLM_X86
  return IntVec(_mm_madd_epi16(__m128i(a), __m128i(b)));
#else
  IntVec sum;
  for (int i = 0; i < kFloatLanes; i++) sum[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

inline ShortVec load_bytes(const int8_t* p) {
  const ByteVec bytes = load_raw<ByteVec>(p, Full{});
#if defined(__AVX512F__)
  return ShortVec(_mm512_cvtepi8_epi16(__m256i(bytes)));
#elif defined(__AVX2__)
  return ShortVec(_mm256_cvtepi8_epi16(__m128i(bytes)));
#else
  return __builtin_convertvector(bytes, ShortVec);
#endif
}

// two neighbouring inputs in every lane
inline ShortVec pair_everywhere(const int16_t* q) {
  int32_t both;
  memcpy(&both, q, sizeof both);
  return ShortVec(IntVec{} + both);
}

// sum += v, here and now: GCC would rather gather all the products of a group, and have no registers left for them.
// (For int8, where little is unrolled, it need not be told.)
inline void add_in_order(IntVec& sum, IntVec v) {
  sum += v;
#if PYLLM_X86
  asm("" : "+v"(sum));
#endif
}

inline Vec to_float(IntVec v) {
#if defined(__AVX512F__)
  return Vec(_mm512_cvtepi32_ps(__m512i(v)));
#else
  return __builtin_convertvector(v, Vec);
#endif
}

// q, step and sum (product.h) of a row x.
inline void quantize_row(const float* x, int64_t K, int16_t* q, float* step, int32_t* sum) {
  for (int64_t g = 0; g < packed_columns(K); g += kGroup) {
    float group[kGroup] = {};
    memcpy(group, x + g, size_t(min64(kGroup, K - g)) * sizeof(float));
    Vec largest = {};
    for (int i = 0; i < kGroup; i += kFloatLanes) {
      const Vec v = load(group + i, Full{});
      largest = max(max(v, -v), largest);
    }
    float top = 0.f;
    for (int i = 0; i < kFloatLanes; i++) top = largest[i] > top ? largest[i] : top;
    // Denormals have no inverse; what is that small is 0 here. NaN and infinity must come out as NaN.
    const float inverse = top > 1e-30f ? 32767.f / top : 0.f;
    IntVec total = {};
    float nan = 0.f;
    for (int i = 0; i < kGroup; i += kFloatLanes) {
      const Vec v = load(group + i, Full{});
      nan += hsum(v * 0.f);
      constexpr float kShift = 12582912.f;  // 1.5 * 2^23: in a sum with it no bit stands for less than 1
      const IntVec whole = bit_cast<IntVec>(v * inverse + kShift) - bit_cast<IntVec>(splat<Vec>(kShift));
      for (int j = 0; j < kFloatLanes; j++) q[g + i + j] = int16_t(whole[j]);
      total += whole;
    }
    int32_t all = 0;
    if (nan == nan)
      for (int i = 0; i < kFloatLanes; i++) all += total[i];
    else
      memset(q + g, 0, kGroup * sizeof(int16_t));
    step[g / kGroup] = top * (1.f / 32767.f) + nan;
    sum[g / kGroup] = all;
  }
}

// One block of 16 outputs for B rows.
template <bool kFour, int B>
inline void packed_block(const Matrix& w, int64_t block, int64_t padded, const int16_t* q, const float* step,
                         const int32_t* sum, float* out /* (B, 16) */) {
  const int64_t groups = padded / kGroup;
  const int8_t* bytes = static_cast<const int8_t*>(w.weight) + block * padded * (kFour ? kBlock / 2 : kBlock);
  const bf16* scales = static_cast<const bf16*>(w.scale) + block * groups * kBlock;
  Vec acc[B][kParts] = {};
  for (int64_t g = 0; g < groups; g++) {
    IntVec part[B][kParts];
#pragma GCC unroll 8
    for (int b = 0; b < B; b++)
      for (int p = 0; p < kParts; p++) part[b][p] = IntVec{} + (kFour ? -8 * sum[b * groups + g] : 0);
    const int16_t* x = q + g * kGroup;
    constexpr int kStep = kFour ? 256 : 512, kAhead = 2048;  // bytes of a group, and to the ones asked for meanwhile
    for (int i = 0; i < kStep; i += 64) __builtin_prefetch(bytes + g * kStep + i + kAhead);
    if constexpr (kFour) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++)
#pragma GCC unroll 4
        for (int p = 0; p < kParts; p++) {
          const ShortVec eight = ShortVec(load_raw<IntVec>(bytes + (g * 4 + c) * 64 + p * 4 * kFloatLanes, Full{}));
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) {
            const ShortVec weight = (eight >> (4 * j)) & 15;
#pragma GCC unroll 8
            for (int b = 0; b < B; b++)
              add_in_order(part[b][p], multiply_pairs(weight, pair_everywhere(x + b * padded + c * 8 + j * 2)));
          }
        }
    } else {
#pragma GCC unroll 2
      for (int c = 0; c < 16; c++)
#pragma GCC unroll 4
        for (int p = 0; p < kParts; p++) {
          const ShortVec weight = load_bytes(bytes + (g * 16 + c) * 32 + p * 2 * kFloatLanes);
#pragma GCC unroll 8
          for (int b = 0; b < B; b++) part[b][p] += multiply_pairs(weight, pair_everywhere(x + b * padded + c * 2));
        }
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; b++)
      for (int p = 0; p < kParts; p++) {
        Vec v = to_float(part[b][p]);
        if constexpr (kFour) v *= load(scales + g * kBlock + p * kFloatLanes, Full{});
        acc[b][p] = fma(step[b * groups + g], v, acc[b][p]);
      }
  }
  for (int b = 0; b < B; b++)
    for (int p = 0; p < kParts; p++) {
      Vec v = acc[b][p];
      if constexpr (!kFour)
        v *= load(static_cast<const float*>(w.scale) + block * kBlock + p * kFloatLanes, Full{});
      store(out + b * kBlock + p * kFloatLanes, v, Full{});
    }
}

constexpr int kPackedRows = kFloatLanes == 16 ? 8 : 4;

template <bool kFour>
inline void packed_rows(const Matrix& w, int64_t block, int64_t padded, int rows, const int16_t* q, const float* step,
                        const int32_t* sum, float* out) {
  int b = 0;
  const int64_t groups = padded / kGroup;
  const auto at = [&](auto count) {
    constexpr int B = decltype(count)::value;
    for (; b + B <= rows; b += B)
      packed_block<kFour, B>(w, block, padded, q + b * padded, step + b * groups, sum + b * groups, out + b * kBlock);
  };
  if constexpr (kPackedRows == 8) at(Index<8>{});
  at(Index<4>{});
  at(Index<2>{});
  at(Index<1>{});
}

// out[m][n - begin] for n in [begin, end), begin a multiple of 16.
inline void packed_product(const Matrix& w, int64_t begin, int64_t end, int64_t K, int64_t M, const int16_t* q,
                           const float* step, const int32_t* sum, float* out, int64_t out_stride) {
  const int64_t padded = packed_columns(K), groups = padded / kGroup;
  constexpr int64_t kTile = 8;
  for (int64_t n = begin; n < end; n += kBlock)
    for (int64_t m = 0; m < M; m += kTile) {
      const int rows = int(min64(kTile, M - m));
      float tile[kTile * kBlock];
      const auto take = w.kind == kInt4 ? packed_rows<true> : packed_rows<false>;
      take(w, n / kBlock, padded, rows, q + m * padded, step + m * groups, sum + m * groups, tile);
      const int64_t count = min64(kBlock, end - n);
      for (int b = 0; b < rows; b++)
        memcpy(out + (m + b) * out_stride + (n - begin), tile + b * kBlock, size_t(count) * sizeof(float));
    }
}

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
