// cp.async.bulk: copies by the asynchronous proxy, into shared memory through an mbarrier, out of it in groups.
#include "emulation/bulk_copy.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "runtime/mbarrier.h"
#include "runtime/report.h"
#include "runtime/scheduler.h"
#include "runtime/shadow.h"

namespace emulator {

namespace {

constexpr size_t kUnit = 16, kSwizzlePattern = 1024;

struct Store {
  unsigned char* target;
  const unsigned char* source;
  size_t bytes;
  int thread;
  bool read;
};
std::vector<Store> stores;  // by the running block; groups hold places here

// False if nothing can be copied.
bool check_arguments(const void* shared, const void* global, size_t bytes, const void* where) {
  check_aligned(shared, kUnit, "shared memory of a bulk copy", where);
  check_aligned(global, kUnit, "device memory of a bulk copy", where);
  if (bytes == 0 || bytes % kUnit != 0) {
    report.add(Fault::misaligned, where, format("bulk copy of %zu bytes: multiples of %zu are possible", bytes, kUnit));
  }
  if (in_shared_window(shared) && in_device_arena(global)) return true;
  report.add(Fault::out_of_bounds, where, "bulk copy: not between device memory and shared memory");
  return false;
}

void check_coordinates(const TensorMap& map, int rank, const void* shared, const void* where) {
  check_aligned(shared, kSwizzlePattern, "swizzled target of a tensor copy", where);
  if (map.rank != rank) {
    report.add(Fault::divergence, where, format("tensor copy of rank %d by a map of rank %d", rank, map.rank));
  }
}

// Row `row` of the box at `at`: what lies inside the tensor, zeros elsewhere.
void read_box_row(const TensorMap& map, const int* at, int row, unsigned char* target, const void* where) {
  const unsigned char* start = map.data;
  for (int axis = 1; axis < map.rank; ++axis) {
    const int64_t place = at[axis] + (axis == 1 ? row : 0);
    if (place < 0 || place >= map.sizes[axis]) return;
    start += place * map.strides[axis];
  }
  const int64_t columns = TensorMap::kBoxBytes / map.element_bytes;
  const int64_t first = std::clamp<int64_t>(at[0], 0, map.sizes[0]);
  const int64_t end = std::clamp<int64_t>(at[0] + columns, 0, map.sizes[0]);
  if (first >= end) return;
  const size_t bytes = size_t((end - first) * map.element_bytes);
  shadow_access(start + first * map.element_bytes, bytes, Access::read, where);
  std::memcpy(target + (first - at[0]) * map.element_bytes, start + first * map.element_bytes, bytes);
}

void read_source(Store& store, uint32_t clock) {
  std::memcpy(store.target, store.source, store.bytes);
  shadow_end_read(store.source, store.bytes, store.thread, clock);
  store.read = true;
}

}  // namespace

bool valid(const TensorMap& map) {
  bool ok = map.rank >= 2 && map.rank <= TensorMap::kMaxRank && map.box_rows >= 1 && map.box_rows <= 256 &&
            map.data != nullptr && reinterpret_cast<uintptr_t>(map.data) % kUnit == 0;
  for (int axis = 0; ok && axis < map.rank; ++axis) {
    ok = map.sizes[axis] >= 1 && map.sizes[axis] <= int64_t(1) << 32 &&
         (axis == 0 ||
          (map.strides[axis] > 0 && map.strides[axis] < int64_t(1) << 40 && map.strides[axis] % int64_t(kUnit) == 0));
  }
  return ok;
}

void bulk_copy_to_shared(void* shared, const void* global, uint32_t bytes, uint64_t* mbarrier) {
  const void* where = __builtin_return_address(0);
  if (!check_arguments(shared, global, bytes, where)) return;
  shadow_access(global, bytes, Access::read, where);
  check_proxy_fence(shared, bytes, "bulk copy into", where);
  const auto source = static_cast<const unsigned char*>(global);
  send({static_cast<unsigned char*>(shared), {source, source + bytes}, false}, mbarrier, where);
}

void tensor_copy(void* shared, const TensorMap& map, int rank, const int* at, uint64_t* mbarrier) {
  const void* where = __builtin_return_address(0);
  const size_t bytes = size_t(TensorMap::kBoxBytes) * size_t(map.box_rows);
  check_coordinates(map, rank, shared, where);
  if (!check_arguments(shared, map.data, bytes, where)) return;
  check_proxy_fence(shared, bytes, "tensor copy into", where);
  Landing landing{static_cast<unsigned char*>(shared), std::vector<unsigned char>(bytes), true};
  for (int row = 0; row < map.box_rows; ++row) {
    read_box_row(map, at, row, &landing.bytes[size_t(row) * TensorMap::kBoxBytes], where);
  }
  send(std::move(landing), mbarrier, where);
}

void bulk_copy_to_global(void* global, const void* shared, uint32_t bytes) {
  const void* where = __builtin_return_address(0);
  if (!check_arguments(shared, global, bytes, where)) return;
  shadow_access(shared, bytes, Access::asynchronous_read, where);
  check_proxy_fence(shared, bytes, "bulk copy from", where);
  shadow_begin_read(shared, bytes, running->id);
  shadow_begin_write(global, bytes, where);
  running->open_stores.push_back(stores.size());
  stores.push_back(
      {static_cast<unsigned char*>(global), static_cast<const unsigned char*>(shared), bytes, running->id, false});
}

void bulk_commit() {
  running->stores.push_back(std::move(running->open_stores));
  running->open_stores.clear();
}

// Until here every write into the source is a race.
void bulk_wait_read(int groups_left) {
  for (auto& groups = running->stores; int(groups.size()) > groups_left; groups.pop_front()) {
    for (const size_t i : groups.front()) read_source(stores[i], running->clock);
  }
}

// What was not waited for is reported where its thread ends.
void finish_bulk_stores() {
  for (Store& store : stores) {
    const uint32_t clock = thread_of_block(store.thread).clock;
    if (!store.read) read_source(store, clock);
    shadow_end_write(store.target, store.bytes, make_stamp(clock, store.thread));
  }
  stores.clear();
}

}  // namespace emulator
