// Faults of mbarriers, of bulk copies and of tensor copies.
#include "cuda_emulation.h"
#include "selftest/case.h"

namespace emulator::selftest {

namespace {

using csat::bulk_commit;
using csat::bulk_copy_to_global;
using csat::bulk_copy_to_shared;
using csat::bulk_wait_read;
using csat::fence_mbarrier_init;
using csat::fence_proxy_async;
using csat::mbarrier_arrive;
using csat::mbarrier_arrive_expect_bytes;
using csat::mbarrier_init;
using csat::mbarrier_wait;

// ---- one lane streams rows of 128 floats through two buffers, two warps sum their halves
enum class Ring {
  correct,
  nothing_expected,
  half_expected,
  too_much_expected,
  no_init_fence,
  no_barrier_after_init,
  init_for_one_warp,
  producer_does_not_wait,
  producer_waits_wrong_parity,
  consumer_does_not_wait,
  consumer_waits_wrong_parity,
  one_lane_waits,
  arrives_before_reading,
  arrives_without_syncwarp,
  every_lane_arrives,
  one_warp_never_arrives,
  size_misaligned,
  target_misaligned,
  past_the_end,
  barrier_word_read,
  tail_zeroed_without_fence,
  last_row_not_awaited,
};
constexpr int kRow = 128, kRowBytes = kRow * 4;

template <Ring fault>
__device__ void produce_rows(const float* x, float* buffers, uint64_t* full, uint64_t* empty, int rows) {
  for (int row = 0; row < rows; ++row) {
    const int slot = row % 2, round = row / 2;
    const unsigned free = fault == Ring::producer_waits_wrong_parity ? round % 2 : (round + 1) % 2;
    if (fault != Ring::producer_does_not_wait) mbarrier_wait(&empty[slot], free);
    const uint32_t bytes = fault == Ring::size_misaligned ? kRowBytes - 8 : kRowBytes;
    if (fault == Ring::nothing_expected) {
      mbarrier_arrive(&full[slot]);
    } else {
      const uint32_t more = fault == Ring::too_much_expected ? 16 : 0;
      mbarrier_arrive_expect_bytes(&full[slot], fault == Ring::half_expected ? bytes / 2 : bytes + more);
    }
    float* target = buffers + slot * kRow + (fault == Ring::target_misaligned ? 2 : 0);
    if (fault == Ring::tail_zeroed_without_fence) target[kRow - 1] = 0;
    const float* source = x + row * kRow + (fault == Ring::past_the_end && row == rows - 1 ? 4 : 0);
    bulk_copy_to_shared(target, source, bytes / 2, &full[slot]);
    bulk_copy_to_shared(target + kRow / 2, source + kRow / 2, bytes - bytes / 2, &full[slot]);
  }
}

template <Ring fault>
__device__ void sum_rows(float* y, const float* buffers, uint64_t* full, uint64_t* empty, int rows) {
  const int warp = int(threadIdx.x) / 32 - 1, lane = int(threadIdx.x) % 32;
  for (int row = 0; row < rows; ++row) {
    const int slot = row % 2;
    const unsigned parity = fault == Ring::consumer_waits_wrong_parity ? 0 : row / 2 % 2;
    const bool waits = fault == Ring::one_lane_waits         ? lane == 0
                       : fault == Ring::last_row_not_awaited ? row + 1 < rows
                                                             : fault != Ring::consumer_does_not_wait;
    if (waits) mbarrier_wait(&full[slot], parity);
    if (fault == Ring::last_row_not_awaited && row + 1 == rows) return;
    if (fault == Ring::arrives_before_reading && lane == 0) mbarrier_arrive(&empty[slot]);
    const float* half = buffers + slot * kRow + warp * 64;
    y[(row * 2 + warp) * 32 + lane] = half[lane] + half[63 - lane];
    if (fault == Ring::barrier_word_read && lane == 0) y[0] = float(full[slot]);
    if (fault == Ring::arrives_before_reading || (fault == Ring::one_warp_never_arrives && warp == 1)) continue;
    if (fault != Ring::arrives_without_syncwarp) __syncwarp();
    if (lane == 0 || fault == Ring::every_lane_arrives) mbarrier_arrive(&empty[slot]);
  }
}

template <Ring fault>
__global__ void ring(const float* x, float* y, int rows) {
  CSAT_DYN_SMEM(float, buffers);
  __shared__ uint64_t full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < 2; ++slot) {
      mbarrier_init(&full[slot], 1);
      mbarrier_init(&empty[slot], fault == Ring::init_for_one_warp ? 1 : 2);
    }
    if (fault != Ring::no_init_fence) fence_mbarrier_init();
  }
  if (fault != Ring::no_barrier_after_init) __syncthreads();
  if (threadIdx.x == 0) produce_rows<fault>(x, buffers, full, empty, rows);
  if (threadIdx.x >= 32) sum_rows<fault>(y, buffers, full, empty, rows);
}

template <Ring fault>
bool run_ring() {
  constexpr int rows = 7;
  std::vector<float> x(rows * kRow);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i * 7 % 31);
  float *device = upload(x), *y = upload(std::vector<float>(rows * 64));
  auto kernel = ring<fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(96), (2 * kRow + 2) * sizeof(float), nullptr, device, y, rows);
  const auto result = download(y, rows * 64);
  for (size_t i = 0; i < rows * 64; ++i) {
    const float* half = &x[i / 32 * 64];
    if (result[i] != half[i % 32] + half[63 - i % 32]) return false;
  }
  return true;
}

// ---- an mbarrier as a barrier of threads: each hands its value to its neighbour, twice
enum class Exchange { correct, waits_for_the_next_phase, arrives_twice, half_arrive, initialised_twice, too_many };

template <Exchange fault>
__global__ void exchange(int* y) {
  __shared__ int slots[64];
  __shared__ uint64_t bars[65];
  const int t = int(threadIdx.x);
  if (t == 0) mbarrier_init(bars, fault == Exchange::arrives_twice ? 96 : 64);
  if (fault == Exchange::initialised_twice && t == 32) mbarrier_init(bars, 64);
  if (fault == Exchange::too_many && t == 0) {
    for (int i = 1; i < 65; ++i) mbarrier_init(&bars[i], 1);
  }
  __syncthreads();
  for (unsigned round = 0; round < 2; ++round) {
    if (round == 0) slots[t] = t;
    if (fault != Exchange::half_arrive || t < 32) mbarrier_arrive(bars);
    if (fault == Exchange::arrives_twice && t < 48) mbarrier_arrive(bars);
    mbarrier_wait(bars, fault == Exchange::waits_for_the_next_phase ? (round + 1) % 2 : round % 2);
    if (round == 0) y[t] = slots[t ^ 63];
  }
}

template <Exchange fault>
bool run_exchange() {
  int* y = allocate<int>(64);
  auto kernel = exchange<fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(64), 0, nullptr, y);
  const auto result = download(y, 64);
  for (int t = 0; t < 64; ++t) {
    if (result[size_t(t)] != (t ^ 63)) return false;
  }
  return true;
}

// ---- tiles of 64 floats doubled in one shared buffer, stored by bulk copies
enum class Store {
  correct,
  no_fence,
  fence_before_writing,
  no_barrier,
  overwritten,
  never_waited,
  no_commit,
  size_misaligned,
  output_read_back,
  two_tiles_in_one_place,
};

template <Store fault>
__global__ void store_tiles(const float* x, float* y, int tiles) {
  CSAT_DYN_SMEM(float, buffer);
  const int t = int(threadIdx.x);
  for (int tile = 0; tile < tiles; ++tile) {
    if (fault == Store::fence_before_writing) fence_proxy_async();
    buffer[t] = 2 * x[tile * 64 + t];
    if (fault != Store::no_fence && fault != Store::fence_before_writing) fence_proxy_async();
    if (fault != Store::no_barrier) __syncthreads();
    if (t == 0) {
      const int place = fault == Store::two_tiles_in_one_place ? 0 : tile;
      bulk_copy_to_global(y + place * 64, buffer, fault == Store::size_misaligned ? 248 : 256);
      if (fault != Store::no_commit) bulk_commit();
      const bool last = tile + 1 == tiles;
      if (fault != Store::overwritten && !(fault == Store::never_waited && last)) bulk_wait_read<0>();
    }
    __syncthreads();
    if (fault == Store::output_read_back && t == 0) buffer[0] = y[tile * 64];
  }
  if (fault == Store::overwritten && t == 0) bulk_wait_read<0>();
}

template <Store fault>
bool run_store() {
  std::vector<float> x(3 * 64);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i);
  float *device = upload(x), *y = upload(std::vector<float>(x.size()));
  auto kernel = store_tiles<fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(64), 64 * sizeof(float), nullptr, device, y, 3);
  const auto result = download(y, x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    if (result[i] != 2 * x[i]) return false;
  }
  return true;
}

// ---- a box of 16 rows by tensor copy, at any coordinates: zeros outside the tensor
enum class Box { correct, not_awaited, bounds_expected, target_misaligned, wrong_rank, no_init_fence };
constexpr int kBoxRows = 16;

template <typename T, int rank, Box fault>
__global__ void copy_box(const csat::TensorMap map, T* y, int c0, int c1) {
  CSAT_DYN_SMEM(T, shared);
  __shared__ uint64_t bar;
  constexpr int columns = 128 / sizeof(T);
  T* box = shared + (fault == Box::target_misaligned ? columns : 0);
  if (threadIdx.x == 0) {
    mbarrier_init(&bar, 1);
    if (fault != Box::no_init_fence) fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_bytes(&bar, fault == Box::bounds_expected ? 128 * (kBoxRows - 3) : 128 * kBoxRows);
    constexpr int called = fault == Box::wrong_rank ? 2 : rank;
    if (called == 2) csat::tensor_copy_2d(box, map, c0, c1, &bar);
    if (called == 3) csat::tensor_copy_3d(box, map, c0, c1, 1, &bar);
    if (called == 4) csat::tensor_copy_4d(box, map, c0, c1, 1, 2, &bar);
  }
  if (fault != Box::not_awaited) mbarrier_wait(&bar, 0);
  for (int i = int(threadIdx.x); i < kBoxRows * columns; i += 64) {
    const int row = i / columns, piece = i % columns * int(sizeof(T)) / 16;
    y[i] = box[row * columns + ((piece ^ row % 8) - piece) * 16 / int(sizeof(T)) + i % columns];
  }
}

template <typename T>
bool refuses_wrong_maps(T* device) {
  const int64_t sizes[] = {70, 21}, even[] = {1, 72}, odd[] = {1, 71};
  csat::TensorMap map;
  return csat::make_tensor_map(&map, device, 2, sizes, even, kBoxRows) == cudaSuccess &&
         csat::make_tensor_map(&map, device + 1, 2, sizes, even, kBoxRows) != cudaSuccess &&
         csat::make_tensor_map(&map, device, 2, sizes, odd, kBoxRows) != cudaSuccess &&
         csat::make_tensor_map(&map, device, 2, sizes, even, 257) != cudaSuccess &&
         csat::make_tensor_map(&map, device, 1, sizes, even, 1) != cudaSuccess;
}

// The tensor is (4, 3, 21, 70) with rows of 72 elements; its unused axes are left out.
template <typename T, int rank, Box fault, int c0, int c1>
bool run_box() {
  const int64_t sizes[] = {70, 21, 3, 4}, strides[] = {1, 72, 21 * 72, 3 * 21 * 72};
  std::vector<T> x(4 * 3 * 21 * 72, T(-1.f));
  for (size_t i = 0; i < x.size(); ++i) x[i] = T(float(i % 251));
  T *device = upload(x), *y = allocate<T>(kBoxRows * 128 / sizeof(T));
  csat::TensorMap map;
  if (csat::make_tensor_map(&map, device, rank, sizes, strides, kBoxRows) != cudaSuccess) return false;
  auto kernel = copy_box<T, rank, fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(64), 128 * kBoxRows + 1024, nullptr, map, y, c0, c1);
  const auto result = download(y, kBoxRows * 128 / sizeof(T));
  const size_t start = size_t((rank > 2 ? strides[2] : 0) + (rank > 3 ? 2 * strides[3] : 0));
  for (int i = 0; i < int(result.size()); ++i) {
    const int row = c1 + i / int(128 / sizeof(T)), column = c0 + i % int(128 / sizeof(T));
    const bool inside = row >= 0 && row < 21 && column >= 0 && column < 70;
    const float expected = inside ? float(x[start + size_t(row * 72 + column)]) : 0;
    if (float(result[size_t(i)]) != expected) return false;
  }
  return refuses_wrong_maps(device);
}

}  // namespace

std::vector<Case> bulk_cases() {
  using bf16 = __nv_bfloat16;
  return {
      {"ring", {}, run_ring<Ring::correct>},
      {"ring: no bytes expected", {Fault::in_flight_access}, run_ring<Ring::nothing_expected>},
      {"ring: half of the bytes expected", {Fault::in_flight_access}, run_ring<Ring::half_expected>},
      {"ring: more bytes expected than come", {Fault::deadlock}, run_ring<Ring::too_much_expected>},
      {"ring: no fence after mbarrier_init", {Fault::missing_fence}, run_ring<Ring::no_init_fence>},
      {"ring: no barrier after mbarrier_init", {Fault::race, Fault::mbarrier}, run_ring<Ring::no_barrier_after_init>},
      {"ring: initialised for one of two warps",
       {Fault::race, Fault::in_flight_access, Fault::deadlock},
       run_ring<Ring::init_for_one_warp>},
      {"ring: the producer does not wait",
       {Fault::race, Fault::in_flight_access, Fault::mbarrier},
       run_ring<Ring::producer_does_not_wait>},
      {"ring: the producer waits for the wrong parity", {Fault::deadlock}, run_ring<Ring::producer_waits_wrong_parity>},
      {"ring: the consumers do not wait",
       {Fault::in_flight_access, Fault::uninitialised_read, Fault::race},
       run_ring<Ring::consumer_does_not_wait>},
      {"ring: the consumers wait for the wrong parity",
       {Fault::in_flight_access, Fault::race, Fault::deadlock},
       run_ring<Ring::consumer_waits_wrong_parity>},
      {"ring: one lane waits for all",
       {Fault::in_flight_access, Fault::race, Fault::uninitialised_read},
       run_ring<Ring::one_lane_waits>},
      {"ring: buffer freed before it is read",
       {Fault::in_flight_access, Fault::race},
       run_ring<Ring::arrives_before_reading>},
      {"ring: one lane frees the buffer, no __syncwarp", {Fault::race}, run_ring<Ring::arrives_without_syncwarp>},
      {"ring: every lane arrives in place of one",
       {Fault::race, Fault::in_flight_access, Fault::mbarrier, Fault::deadlock},
       run_ring<Ring::every_lane_arrives>},
      {"ring: a warp never frees its buffer", {Fault::deadlock}, run_ring<Ring::one_warp_never_arrives>},
      {"ring: size not a multiple of 16 bytes", {Fault::misaligned}, run_ring<Ring::size_misaligned>},
      {"ring: target not aligned to 16 bytes", {Fault::misaligned}, run_ring<Ring::target_misaligned>},
      {"ring: the last row is copied from past the end", {Fault::out_of_bounds}, run_ring<Ring::past_the_end>},
      {"ring: an mbarrier read as a number", {Fault::mbarrier}, run_ring<Ring::barrier_word_read>},
      {"ring: plain store before a bulk copy, no proxy fence",
       {Fault::missing_fence},
       run_ring<Ring::tail_zeroed_without_fence>},
      {"ring: nobody waits for the last row", {Fault::missing_wait}, run_ring<Ring::last_row_not_awaited>},
      {"exchange by mbarrier", {}, run_exchange<Exchange::correct>},
      {"exchange by mbarrier: parity of the phase before",
       {Fault::race, Fault::uninitialised_read},
       run_exchange<Exchange::waits_for_the_next_phase>},
      {"exchange by mbarrier: some threads arrive twice",
       {Fault::race, Fault::mbarrier, Fault::uninitialised_read},
       run_exchange<Exchange::arrives_twice>},
      {"exchange by mbarrier: half of the threads arrive", {Fault::deadlock}, run_exchange<Exchange::half_arrive>},
      {"exchange by mbarrier: initialised twice", {Fault::mbarrier}, run_exchange<Exchange::initialised_twice>},
      {"exchange by mbarrier: more mbarriers than told apart", {Fault::mbarrier}, run_exchange<Exchange::too_many>},
      {"bulk store", {}, run_store<Store::correct>},
      {"bulk store: no proxy fence", {Fault::missing_fence}, run_store<Store::no_fence>},
      {"bulk store: proxy fence before the writes", {Fault::missing_fence}, run_store<Store::fence_before_writing>},
      {"bulk store: no barrier after the writes", {Fault::race}, run_store<Store::no_barrier>},
      {"bulk store: source overwritten before it is read", {Fault::race}, run_store<Store::overwritten>},
      {"bulk store: never waited for", {Fault::missing_wait}, run_store<Store::never_waited>},
      {"bulk store: no commit before the wait", {Fault::race, Fault::missing_wait}, run_store<Store::no_commit>},
      {"bulk store: size not a multiple of 16 bytes", {Fault::misaligned}, run_store<Store::size_misaligned>},
      {"bulk store: output read by the same block", {Fault::in_flight_access}, run_store<Store::output_read_back>},
      {"bulk store: two copies to one place", {Fault::in_flight_access}, run_store<Store::two_tiles_in_one_place>},
      {"box: bf16, inside", {}, run_box<bf16, 2, Box::correct, 2, 3>},
      {"box: bf16, past the last row and column", {}, run_box<bf16, 3, Box::correct, 64, 8>},
      {"box: float, before the first row and column", {}, run_box<float, 4, Box::correct, -6, -3>},
      {"box: float, wholly outside", {}, run_box<float, 2, Box::correct, 0, 21>},
      {"box: nobody waits", {Fault::in_flight_access}, run_box<bf16, 2, Box::not_awaited, 0, 0>},
      {"box: only the rows inside expected", {Fault::deadlock}, run_box<bf16, 2, Box::bounds_expected, 0, 8>},
      {"box: target not aligned to 1024 bytes", {Fault::misaligned}, run_box<float, 2, Box::target_misaligned, 0, 0>},
      {"box: map of another rank", {Fault::divergence}, run_box<float, 3, Box::wrong_rank, 0, 0>},
      {"box: no fence after mbarrier_init", {Fault::missing_fence}, run_box<bf16, 2, Box::no_init_fence, 0, 0>},
  };
}

}  // namespace emulator::selftest
