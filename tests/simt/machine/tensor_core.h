// What ldmatrix, mma.sync and TMA loads do, by the PTX ISA's words: the CPU side of the kernels' wrappers of these
// instructions (wgmma is in async.cpp). Elements are 16 bits wide; Decode makes a float of their bits. Products are
// summed in float32 in some order; what is added to an accumulator is cut off, not rounded, as tensor cores do (Fasi et
// al. 2021, doi:10.7717/peerj-cs.330): over many steps the sum drifts towards zero.
#pragma once
#include <cmath>

#include "simt.h"

namespace simt {

inline float toward_zero(double x) {
  const float y = float(x);
  return std::fabs(double(y)) > std::fabs(x) ? std::nextafter(y, 0.f) : y;
}

// ---- ldmatrix.sync.aligned.m8n8.x4(.trans).shared.b16 --------------------------------------------------------------
// Lane i names the address of row i % 8 of 8x8 matrix i / 8. Of each matrix, lane l receives elements l/4, 2*(l%4) and
// the next one in the row (transposed: in the column).
template <bool kTransposed>
SIMT_UNSEEN void ldmatrix_combine(unsigned char* slots) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < 32; lane++) std::memcpy(matrix[lane / 8][lane % 8], slots + lane * kSlot, 16);
  for (int lane = 0; lane < 32; lane++)
    for (int which = 0; which < 4; which++)
      for (int e = 0; e < 2; e++) {
        const int row = lane / 4, col = 2 * (lane % 4) + e;
        const uint16_t& element = kTransposed ? matrix[which][col][row] : matrix[which][row][col];
        std::memcpy(slots + lane * kSlot + 4 * which + 2 * e, &element, 2);
      }
}
template <bool kTransposed>
SIMT_UNSEEN void ldmatrix_x4(uint32_t (&out)[4], const void* row, void* pc) {
  vector_access(row, 16, false, pc);
  const char* site = kTransposed ? "ldmatrix.trans" : "ldmatrix";
  const unsigned char* slots = warp_exchange(0xffffffffu, row, 16, site, ldmatrix_combine<kTransposed>);
  std::memcpy(out, slots + self->lane * kSlot, sizeof out);
}

// ---- mma.sync.aligned.m16n8k16.row.col.f32 -------------------------------------------------------------------------
// With g = lane / 4, t = lane % 4: a[i] holds row g + 8 * (i & 1), columns 2t + 8 * (i >> 1) and the next; b[i] holds
// column g, rows 2t + 8i and the next; d[i] holds row g + 8 * (i >> 1), column 2t + (i & 1).
template <Decode decode>
SIMT_UNSEEN void mma_combine(unsigned char* slots) {
  float a[16][16], b[16][8], d[16][8] = {};
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    uint16_t held[12];
    std::memcpy(held, slots + lane * kSlot, sizeof held);
    for (int i = 0; i < 8; i++) a[g + 8 * (i / 2 & 1)][2 * t + 8 * (i / 4) + (i & 1)] = decode(held[i]);
    for (int i = 0; i < 4; i++) b[2 * t + 8 * (i / 2) + (i & 1)][g] = decode(held[8 + i]);
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      std::memcpy(slots + lane * kSlot + 4 * i, &d[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)], 4);
}
template <Decode decode>
SIMT_UNSEEN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t held[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const unsigned char* slots = warp_exchange(0xffffffffu, held, sizeof held, "mma.sync", mma_combine<decode>);
  float product[4];
  std::memcpy(product, slots + self->lane * kSlot, sizeof product);
  for (int i = 0; i < 4; i++) d[i] = toward_zero(double(d[i]) + product[i]);
}

// ---- mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 -------------------------------------------------------------
// a[i] holds row g + 8 * (i & 1), column t + 4 * (i >> 1); b[i] holds column g, row t + 4i; d as above. Of the operands
// the lowest 13 bits are not looked at.
SIMT_UNSEEN inline void mma_tf32_combine(unsigned char* slots) {
  float a[16][8], b[8][8], d[16][8] = {};
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    uint32_t held[6];
    std::memcpy(held, slots + lane * kSlot, sizeof held);
    for (uint32_t& bits : held) bits &= 0xffffe000u;
    for (int i = 0; i < 4; i++) std::memcpy(&a[g + 8 * (i & 1)][t + 4 * (i >> 1)], &held[i], 4);
    for (int i = 0; i < 2; i++) std::memcpy(&b[t + 4 * i][g], &held[4 + i], 4);
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 8; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      std::memcpy(slots + lane * kSlot + 4 * i, &d[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)], 4);
}
SIMT_UNSEEN inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t held[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const unsigned char* slots = warp_exchange(0xffffffffu, held, sizeof held, "mma.sync", mma_tf32_combine);
  float product[4];
  std::memcpy(product, slots + self->lane * kSlot, sizeof product);
  for (int i = 0; i < 4; i++) d[i] = toward_zero(double(d[i]) + product[i]);
}

// ---- cp.async.bulk.tensor.4d with 128-byte swizzle -----------------------------------------------------------------
struct Boxes {  // of 64 columns and `box_rows` rows; dimensions are column, head, row, batch
  const unsigned char* first;
  int64_t size[4], stride[4];  // elements of 2 bytes; bytes
  int box_rows;
};
inline bool boxes_fit(const Boxes& x) {
  bool fit = reinterpret_cast<uintptr_t>(x.first) % 16 == 0 && x.box_rows >= 1 && x.box_rows <= 256;
  for (int i = 0; i < 4; i++) fit = fit && x.size[i] >= 1 && x.size[i] <= int64_t(1) << 32;
  for (int i = 1; i < 4; i++) fit = fit && x.stride[i] > 0 && x.stride[i] % 16 == 0 && x.stride[i] < int64_t(1) << 40;
  return fit;
}
// Of an address in a tile that begins at a multiple of 1024 bytes: 16-byte chunks are permuted within each 128 bytes.
inline uintptr_t swizzle_128(uintptr_t address) { return address ^ (address >> 7 & 7) << 4; }

SIMT_UNSEEN inline void fetch_box(void* dst, const Boxes& x, uint64_t* barrier, const int64_t (&at)[4], void* pc) {
  const uintptr_t tile = reinterpret_cast<uintptr_t>(dst);
  if (tile % 1024) fail("tma: destination is not aligned to 1024 bytes");
  for (int r = 0; r < x.box_rows; r++)
    for (int chunk = 0; chunk < 8; chunk++) {
      const int64_t from[4] = {at[0] + 8 * chunk, at[1], at[2] + r, at[3]};
      bool inside = true;
      int64_t offset = 0;
      for (int i = 0; i < 4; i++) inside = inside && from[i] >= 0 && from[i] < x.size[i];
      for (int i = 0; i < 4; i++) offset += from[i] * x.stride[i];
      const int64_t left = inside ? x.size[0] - from[0] : 0;  // elements; beyond the tensor's edge: zeros
      void* to = reinterpret_cast<void*>(swizzle_128(tile + r * 128 + chunk * 16));
      bulk_copy(barrier, to, x.first + (inside ? offset : 0), 16, int(left < 8 ? left : 8) * 2, pc);
    }
}

}  // namespace simt
