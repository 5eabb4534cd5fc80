// What ldmatrix, mma.sync, TMA loads and wgmma do, by the PTX ISA's words: the CPU side of the kernels' wrappers of
// these instructions. Elements are 16 bits wide; Decode makes a float of their bits. Products are summed in float32 in
// some order, as on a GPU.
#pragma once
#include "simt.h"

namespace simt {

using Decode = float (*)(uint16_t bits);

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
  for (int i = 0; i < 4; i++) d[i] += product[i];
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
  for (int i = 0; i < 4; i++) d[i] += product[i];
}

// ---- cp.async.bulk.tensor.2d with 128-byte swizzle -----------------------------------------------------------------
struct TensorMap2d {  // row-major, boxes of box_rows x 64 columns
  const unsigned char* first;
  int rows, cols, box_rows;
};
// Of an address in a tile that begins at a multiple of 1024 bytes: 16-byte chunks are permuted within each 128 bytes.
inline uintptr_t swizzle_128(uintptr_t address) { return address ^ (address >> 7 & 7) << 4; }

SIMT_UNSEEN inline void tma_load_2d(void* dst, const TensorMap2d& map, uint64_t* barrier, int col, int row, void* pc) {
  const uintptr_t tile = reinterpret_cast<uintptr_t>(dst);
  if (tile % 1024) fail("tma: destination is not aligned to 1024 bytes");
  for (int r = 0; r < map.box_rows; r++)
    for (int chunk = 0; chunk < 8; chunk++) {
      const int64_t from_row = row + r, from_col = col + 8 * chunk;
      const bool inside = from_row >= 0 && from_row < map.rows && from_col >= 0 && from_col < map.cols;
      const unsigned char* src = map.first + (inside ? (from_row * map.cols + from_col) * 2 : 0);
      void* to = reinterpret_cast<void*>(swizzle_128(tile + r * 128 + chunk * 16));
      bulk_copy(barrier, to, src, 16, inside ? 16 : 0, pc);  // outside the tensor: zeros
    }
}

// ---- wgmma.mma_async.sync.aligned.m64nNk16.f32, both operands K-major in swizzled shared memory ---------------------
// a and b are addresses of tiles with 128-byte rows, plus 32 bytes for each 16 columns walked along K. Each of the
// four warps computes 16 rows of d, laid out as by mma: d[4 * j + i] is d[i] of columns 8j to 8j + 7.
template <Decode decode, int N>
SIMT_UNSEEN void wgmma_m64k16(float (&d)[N / 2], uintptr_t a, uintptr_t b, void* pc) {
  warpgroup_sync("wgmma.mma_async");  // all four warps must be here together
  const int warp = self->warp % 4, g = self->lane / 4, t = self->lane % 4;
  auto at = [](uintptr_t tile, int row, int k) {
    return reinterpret_cast<const void*>(swizzle_128(tile + row * 128 + k * 2));
  };
  auto value = [&](uintptr_t tile, int row, int k) {
    uint16_t bits;
    std::memcpy(&bits, at(tile, row, k), 2);
    return decode(bits);
  };
  if (self->lane == 0)
    for (int k = 0; k < 16; k += 8) {
      for (int row = 0; row < 16; row++) wgmma_read(at(a, 16 * warp + row, k), 16, pc);
      for (int row = 0; row < N; row++) wgmma_read(at(b, row, k), 16, pc);
    }
  for (int j = 0; j < N / 8; j++)
    for (int i = 0; i < 4; i++) {
      const int row = 16 * warp + g + 8 * (i >> 1), col = 8 * j + 2 * t + (i & 1);
      for (int k = 0; k < 16; k++) d[4 * j + i] += value(a, row, k) * value(b, col, k);
    }
  warpgroup_sync("wgmma.mma_async");
}

}  // namespace simt
