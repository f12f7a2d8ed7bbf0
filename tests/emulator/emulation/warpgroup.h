// Warpgroup products (wgmma, sm_90a) and the fence between the generic and the asynchronous proxy.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "emulation/intrinsics.h"
#include "emulation/types.h"

namespace emulator {

// D (64, n) += A (64, 16) B (16, n). A comes from registers, B from shared memory by its descriptor (128-byte swizzle).
struct WgmmaOperand {
  float* c;                   // n / 8 fragments of 4 values a lane
  std::array<uint32_t, 4> a;  // 4 pairs a lane, the layout of mma.sync in each warp's 16 rows
  uint64_t b;
  int columns;
  bool bf16, transposed;  // transposed: the descriptor's rows are k, not n
};
void wgmma_issue(const WgmmaOperand& operand);
void wgmma_commit();
// Products execute here, the latest that the hardware may: what is overwritten before is seen.
void wgmma_wait(int groups_left);

// Matrix descriptor: start, leading and stride byte offsets, 128-byte swizzle (PTX ISA, "Matrix Descriptor Format").
inline uint64_t wgmma_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  return uint64_t((shared_offset(start) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(1) << 62;
}

}  // namespace emulator

namespace csat {

inline void fence_proxy_async() { emulator::fence_proxy_async(); }
inline void wgmma_fence() {}  // orders registers only, which no other thread sees
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kGroupsLeft>
inline void wgmma_wait() {
  emulator::wgmma_wait(kGroupsLeft);
}
inline uint64_t wgmma_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  return emulator::wgmma_descriptor(start, leading, stride);
}
template <typename T, bool kTransposed, int kFragments>
inline void wgmma_k16(float (&c)[kFragments][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "wgmma takes bf16 or fp16 here");
  emulator::wgmma_issue(
      {&c[0][0], {a[0], a[1], a[2], a[3]}, b, 8 * kFragments, std::is_same_v<T, __nv_bfloat16>, kTransposed});
}

}  // namespace csat
