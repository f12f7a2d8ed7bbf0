// mbarriers, bulk copies and tensor maps (sm_90) under the names that prims.cuh gives them.
#pragma once

#include <cstdint>

#include "emulation/runtime_api.h"
#include "runtime/thread.h"

namespace emulator {

// What cuTensorMapEncodeTiled is told: axes from the innermost, strides in bytes; a box of 128 bytes by `box_rows`.
struct TensorMap {
  static constexpr int kMaxRank = 4, kBoxBytes = 128;
  const unsigned char* data;
  int rank, element_bytes, box_rows;
  int64_t sizes[kMaxRank], strides[kMaxRank];
};
// The driver's conditions: false where it refuses.
bool valid(const TensorMap& map);

}  // namespace emulator

namespace csat {

inline void fence_proxy_async() { emulator::fence_proxy_async(); }

inline void mbarrier_init(uint64_t* bar, int arrivals) { emulator::mbarrier_init(bar, arrivals); }
inline void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint64_t* bar) { emulator::mbarrier_arrive(bar, 0); }
inline void mbarrier_arrive_expect_bytes(uint64_t* bar, uint32_t bytes) { emulator::mbarrier_arrive(bar, bytes); }
inline void mbarrier_wait(uint64_t* bar, uint32_t parity, int line = __builtin_LINE()) {
  emulator::mbarrier_wait(bar, parity, line);
}

inline void bulk_copy_to_shared(void* shared, const void* global, uint32_t bytes, uint64_t* bar) {
  emulator::bulk_copy_to_shared(shared, global, bytes, bar);
}
inline void bulk_copy_to_global(void* global, const void* shared, uint32_t bytes) {
  emulator::bulk_copy_to_global(global, shared, bytes);
}
inline void bulk_commit() { emulator::bulk_commit(); }
template <int kGroupsLeft>
inline void bulk_wait_read() {
  emulator::bulk_wait_read(kGroupsLeft);
}

using emulator::TensorMap;

template <typename T>
inline int make_tensor_map(TensorMap* map, const T* data, int rank, const int64_t* sizes, const int64_t* strides,
                           int box_rows) {
  *map = {reinterpret_cast<const unsigned char*>(data), rank, int(sizeof(T)), box_rows, {}, {}};
  for (int i = 0; i < rank && i < TensorMap::kMaxRank; ++i) {
    map->sizes[i] = sizes[i];
    map->strides[i] = (i == 0 ? 1 : strides[i]) * int64_t(sizeof(T));
  }
  return emulator::valid(*map) ? cudaSuccess : cudaErrorInvalidValue;
}

inline void tensor_copy_2d(void* shared, const TensorMap& map, int c0, int c1, uint64_t* bar) {
  const int at[] = {c0, c1};
  emulator::tensor_copy(shared, map, 2, at, bar);
}
inline void tensor_copy_3d(void* shared, const TensorMap& map, int c0, int c1, int c2, uint64_t* bar) {
  const int at[] = {c0, c1, c2};
  emulator::tensor_copy(shared, map, 3, at, bar);
}
inline void tensor_copy_4d(void* shared, const TensorMap& map, int c0, int c1, int c2, int c3, uint64_t* bar) {
  const int at[] = {c0, c1, c2, c3};
  emulator::tensor_copy(shared, map, 4, at, bar);
}

template <int kRegisters>
inline void registers_increase() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
}
template <int kRegisters>
inline void registers_decrease() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
}

}  // namespace csat
