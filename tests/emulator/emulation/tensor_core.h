// Tensor-core and asynchronous-copy instructions under the names that prims.cuh gives them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "emulation/intrinsics.h"
#include "emulation/types.h"

namespace emulator {

// Four matrices of 8 x 8 elements of 16 bits.
struct MatrixOperand {
  uint32_t* registers;  // one of each matrix
  void* row;            // of matrix lane / 8
};
struct MmaOperand {
  float* c;           // (16, 8) accumulator: 4 values a lane
  const uint32_t* a;  // (16, depth): 4 registers a lane
  uint32_t b[2];      // (depth, 8): 2 registers a lane
};
void ldmatrix(uint32_t mask, void* const* operands);
void ldmatrix_transposed(uint32_t mask, void* const* operands);
void stmatrix(uint32_t mask, void* const* operands);
void stmatrix_transposed(uint32_t mask, void* const* operands);
void mma_m16n8k16_bf16(uint32_t mask, void* const* operands);
void mma_m16n8k16_f16(uint32_t mask, void* const* operands);
void mma_m16n8k8_tf32(uint32_t mask, void* const* operands);

}  // namespace emulator

namespace csat {

inline void cp_async16(void* shared, const void* global) { emulator::async_copy(shared, global, 16, 16); }
// Copies `valid` bytes (0..16) and fills up with zeros.
inline void cp_async16_zfill(void* shared, const void* global, int valid) {
  emulator::async_copy(shared, global, 16, valid);
}
inline void cp_async_commit() { emulator::async_commit(); }
template <int kGroupsLeft>
inline void cp_async_wait() {
  emulator::async_wait(kGroupsLeft);
}

using SharedAddress = const char*;
inline int pinned(int x) { return x; }
inline SharedAddress pinned_address(const void* p) { return static_cast<SharedAddress>(p); }
template <typename T>
inline T* uniform_address(T* p) {
  return p;
}

// ldmatrix, stmatrix: lane l gives the address of row l % 8 of matrix l / 8 (8 x 8 elements of 16 bits).
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulator::MatrixOperand operand{r, const_cast<void*>(row)};
  emulator::warp_collective("ldmatrix", emulator::ldmatrix, emulator::kFullMask, &operand);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  emulator::MatrixOperand operand{r, const_cast<void*>(row)};
  emulator::warp_collective("ldmatrix.trans", emulator::ldmatrix_transposed, emulator::kFullMask, &operand);
}
inline void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  emulator::MatrixOperand operand{const_cast<uint32_t*>(r), row};
  emulator::warp_collective("stmatrix", emulator::stmatrix, emulator::kFullMask, &operand);
}
inline void stmatrix_x4_transposed(void* row, const uint32_t (&r)[4]) {
  emulator::MatrixOperand operand{const_cast<uint32_t*>(r), row};
  emulator::warp_collective("stmatrix.trans", emulator::stmatrix_transposed, emulator::kFullMask, &operand);
}
inline void stmatrix_x4(SharedAddress row, const uint32_t (&r)[4]) {
  stmatrix_x4(static_cast<void*>(const_cast<char*>(row)), r);
}
inline void stmatrix_x4_transposed(SharedAddress row, const uint32_t (&r)[4]) {
  stmatrix_x4_transposed(static_cast<void*>(const_cast<char*>(row)), r);
}

// c (16, 8) += a (16, 16) b (16, 8), accumulated in float32.
template <typename T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::MmaOperand operand{c, a, {b0, b1}};
  constexpr bool is_bf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(is_bf16 || std::is_same_v<T, __half>, "mma.sync.m16n8k16 takes bf16 or fp16");
  emulator::warp_collective("mma.sync", is_bf16 ? emulator::mma_m16n8k16_bf16 : emulator::mma_m16n8k16_f16,
                            emulator::kFullMask, &operand);
}

// cvt.rna.tf32: 10 bits of mantissa, halves away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return std::isnan(x) ? 0x7fffe000u : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}
// c (16, 8) += a (16, 8) b (8, 8); of the operands' mantissas the first 10 bits count.
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::MmaOperand operand{c, a, {b0, b1}};
  emulator::warp_collective("mma.sync", emulator::mma_m16n8k8_tf32, emulator::kFullMask, &operand);
}

// Two floats rounded to one register, the first in the low half.
template <typename T>
inline uint32_t pack2(float low, float high) {
  return uint32_t(T(low).bits) | uint32_t(T(high).bits) << 16;
}

template <typename T>
inline float2 unpack2(uint32_t pair) {
  T low, high;
  low.bits = uint16_t(pair);
  high.bits = uint16_t(pair >> 16);
  return {float(low), float(high)};
}

// As .ftz does; results that would be subnormal too.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }
inline float log2_approx(float x) { return std::log2(flushed(x)); }
inline float positive_part(float x) { return x <= 0.0f ? 0.0f : x; }
template <typename T>
inline uint32_t pack2_magnitudes(float low, float high, float low_sign, float high_sign) {
  return pack2<T>(std::copysign(positive_part(low), low_sign), std::copysign(positive_part(high), high_sign));
}
inline float divide_approx(float a, float b) { return a / (std::fabs(b) > 0x1p126f ? INFINITY : b); }

inline void named_barrier_sync(int id, int threads, int line = __builtin_LINE()) {
  emulator::named_barrier(id, threads, true, line);
}
inline void named_barrier_arrive(int id, int threads, int line = __builtin_LINE()) {
  emulator::named_barrier(id, threads, false, line);
}

}  // namespace csat
