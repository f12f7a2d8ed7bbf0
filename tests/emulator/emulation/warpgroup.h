// Warpgroup products (wgmma, sm_90a) under the names that prims.cuh gives them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "emulation/intrinsics.h"
#include "emulation/types.h"

namespace emulator {

// A matrix in shared memory by its descriptor. Transposed: its rows of 128 bytes are k, not m or n.
struct SharedMatrix {
  uint64_t descriptor;
  bool transposed;
};
// D (64, columns) = A (64, 16) B (16, columns) + D, or without D.
struct WgmmaOperand {
  float* c;  // columns / 8 fragments of 4 values a lane
  int columns;
  const uint32_t* a;  // 4 pairs a lane, the layout of mma.sync in each warp's 16 rows; null: from shared_a
  SharedMatrix shared_a, b;
  bool bf16, accumulate;
};
void wgmma_issue(const WgmmaOperand& operand);
void wgmma_commit();
// Products execute here, the latest that the hardware may.
void wgmma_wait(int groups_left);
void wgmma_fence();
uint64_t wgmma_descriptor(const void* start, uint32_t leading, uint32_t stride);

template <typename T, int kColumns, bool kTransposedB>
constexpr bool wgmma_takes() {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "wgmma takes bf16 or fp16 here");
  static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 256, "wgmma has 8 to 256 columns");
  static_assert(!kTransposedB || kColumns % 64 == 0, "rows of k hold 64 columns each");
  return std::is_same_v<T, __nv_bfloat16>;
}

}  // namespace emulator

namespace csat {

// What the registers hold is the emulator's own affair: it sees every access to them. Naming them keeps g++ from giving
// the place of an array that no product has written yet to something else between fence and product.
template <typename... Registers>
inline void wgmma_fence(Registers&... registers) {
  (..., [](void* p) { asm volatile("" ::"r"(p) : "memory"); }(&registers));
  emulator::wgmma_fence();
}
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kGroupsLeft, typename... Registers>
inline void wgmma_wait(Registers&...) {
  emulator::wgmma_wait(kGroupsLeft);
}
inline uint64_t wgmma_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  return emulator::wgmma_descriptor(start, leading, stride);
}
template <typename T, bool kTransposed, int kFragments>
inline void wgmma_k16(float (&c)[kFragments][4], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
  constexpr bool bf16 = emulator::wgmma_takes<T, 8 * kFragments, kTransposed>();
  emulator::wgmma_issue({&c[0][0], 8 * kFragments, a, {}, {b, kTransposed}, bf16, accumulate});
}
template <typename T, bool kTransposedA, bool kTransposedB, int kFragments>
inline void wgmma_k16_shared(float (&c)[kFragments][4], uint64_t a, uint64_t b, bool accumulate = true) {
  constexpr bool bf16 = emulator::wgmma_takes<T, 8 * kFragments, kTransposedB>();
  emulator::wgmma_issue({&c[0][0], 8 * kFragments, nullptr, {a, kTransposedA}, {b, kTransposedB}, bf16, accumulate});
}

}  // namespace csat
