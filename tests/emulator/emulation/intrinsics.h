// Instructions that concern more than one thread: barriers, warp collectives, atomics, fences.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "emulation/qualifiers.h"

// ---- barriers
inline void __syncthreads(int line = __builtin_LINE()) { emulator::block_barrier(line); }
inline int __syncthreads_count(int p, int line = __builtin_LINE()) {
  return emulator::block_barrier_count(p != 0, line);
}
inline int __syncthreads_or(int p, int line = __builtin_LINE()) {
  return emulator::block_barrier_count(p != 0, line) != 0;
}
inline int __syncthreads_and(int p, int line = __builtin_LINE()) {
  return emulator::block_barrier_count(p == 0, line) == 0;
}
inline void __syncwarp(unsigned mask = emulator::kFullMask) { emulator::warp_barrier(mask); }

// Memory fences order one thread's accesses; they do not synchronise threads, so the race checker learns nothing from
// them.
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- shuffles and votes
namespace emulator {

enum class Shuffle { exchange, index, up, down };
struct ShuffleOperand {
  uint64_t value, result;
  Shuffle kind;
  int argument, width;
};
struct VoteOperand {
  bool predicate;
  uint32_t result;
};
void shuffle(uint32_t mask, void* const* operands);
void ballot(uint32_t mask, void* const* operands);

template <typename T>
inline T shuffle_value(uint32_t mask, T value, Shuffle kind, int argument, int width) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 2, 4 or 8 bytes");
  ShuffleOperand operand{0, 0, kind, argument, width};
  std::memcpy(&operand.value, &value, sizeof(T));
  warp_collective("shuffle", shuffle, mask, &operand);
  std::memcpy(&value, &operand.result, sizeof(T));
  return value;
}
inline uint32_t vote(uint32_t mask, bool predicate) {
  VoteOperand operand{predicate, 0};
  warp_collective("ballot", ballot, mask, &operand);
  return operand.result;
}

}  // namespace emulator

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return emulator::shuffle_value(mask, value, emulator::Shuffle::exchange, lane_mask, width);
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator::shuffle_value(mask, value, emulator::Shuffle::index, lane, width);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle_value(mask, value, emulator::Shuffle::up, int(delta), width);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulator::shuffle_value(mask, value, emulator::Shuffle::down, int(delta), width);
}
inline unsigned __ballot_sync(unsigned mask, int p) { return emulator::vote(mask, p != 0); }
inline int __any_sync(unsigned mask, int p) { return emulator::vote(mask, p != 0) != 0; }
inline int __all_sync(unsigned mask, int p) { return emulator::vote(mask, p == 0) == 0; }

// ---- atomics
namespace emulator {
template <typename T, typename Update>
inline __attribute__((no_sanitize("thread"))) T atomic_update(T* p, Update update) {
  check_atomic(p, sizeof(T));
  T before = *p;
  *p = update(before);
  return before;
}
}  // namespace emulator

template <typename T>
inline T atomicAdd(T* p, T v) {
  return emulator::atomic_update(p, [&](T old) { return T(old + v); });
}
template <typename T>
inline T atomicMax(T* p, T v) {
  return emulator::atomic_update(p, [&](T old) { return old > v ? old : v; });
}
template <typename T>
inline T atomicMin(T* p, T v) {
  return emulator::atomic_update(p, [&](T old) { return old < v ? old : v; });
}
template <typename T>
inline T atomicExch(T* p, T v) {
  return emulator::atomic_update(p, [&](T) { return v; });
}
template <typename T>
inline T atomicCAS(T* p, T expected, T v) {
  return emulator::atomic_update(p, [&](T old) { return old == expected ? v : old; });
}
