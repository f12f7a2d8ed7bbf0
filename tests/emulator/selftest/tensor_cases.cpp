// Faults of asynchronous copies, matrix loads, matrix products and named barriers.
#include <cmath>

#include "cuda_emulation.h"
#include "selftest/case.h"

namespace emulator::selftest {

namespace {

using csat::cp_async16;
using csat::cp_async16_zfill;
using csat::cp_async_commit;
using csat::cp_async_wait;

// ---- rows of 128 floats copied to shared memory one ahead, double-buffered, and summed
enum class Stream {
  correct,
  no_wait,
  waits_for_older,
  no_barrier,
  buffer_reused_early,
  never_waited,
  misaligned,
  tail,
  no_commit
};

template <Stream fault>
__global__ void stream_rows(const float* x, float* y, int rows, int columns) {
  CSAT_DYN_SMEM(float, buffers);
  const int t = int(threadIdx.x);  // 32 threads a row of 128 floats; threads sum what other threads have copied
  auto fetch = [&](int row) {
    float* target = buffers + row % 2 * 128 + t * 4 + (fault == Stream::misaligned ? 1 : 0);
    const int valid = std::max(0, std::min(16, (columns - t * 4) * 4));
    if (fault == Stream::tail) {
      cp_async16(target, x + row * columns + t * 4);
    } else {
      cp_async16_zfill(target, x + row * columns + t * 4, valid);
    }
    if (fault != Stream::no_commit) cp_async_commit();
  };
  fetch(0);
  for (int row = 0; row < rows; ++row) {
    if (row + 1 < rows) fetch(row + 1);
    if (fault == Stream::no_wait) {
    } else if (fault == Stream::waits_for_older || row + 1 < rows) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    if (fault != Stream::no_barrier) __syncthreads();
    const float* buffer = buffers + row % 2 * 128;
    y[row * 32 + t] = buffer[t] + buffer[t + 32] + buffer[t + 64] + buffer[t + 96];
    if (fault != Stream::buffer_reused_early) __syncthreads();
  }
  if (fault == Stream::never_waited) {
    fetch(0);
  }
}

template <Stream fault>
bool run_stream() {
  constexpr int rows = 5, columns = 124;  // rows of 496 bytes: aligned, the last thread's copy is all padding
  std::vector<float> x(rows * columns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 11);
  float *device = upload(x), *y = allocate<float>(rows * 32);
  auto kernel = stream_rows<fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(32), (256 + 4) * sizeof(float), nullptr, device, y, rows, columns);
  const auto result = download(y, rows * 32);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t t = 0; t < 32; ++t) {
      float sum = 0;
      for (size_t c = t; c < columns; c += 32) sum += x[row * columns + c];
      if (result[row * 32 + t] != sum) return false;
    }
  }
  return true;
}

// ---- C (16, 8) = A (16, 16) B (8, 16)^T or A (16, 16) B (16, 8) by ldmatrix and mma.sync
enum class Product { correct, rows_missing, no_barrier, misaligned_pitch, device_address };

template <typename T, bool transposed, Product fault>
__global__ void product(const T* a, const T* b, float* c) {
  CSAT_DYN_SMEM(T, shared);
  constexpr int pitch = fault == Product::misaligned_pitch ? 20 : 24, b_columns = transposed ? 8 : 16;
  T *shared_a = shared, *shared_b = shared + 16 * pitch;
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += 32) {
    if (fault != Product::rows_missing || i < 240) shared_a[i / 16 * pitch + i % 16] = a[i];
  }
  for (int i = lane; i < 128; i += 32) shared_b[i / b_columns * pitch + i % b_columns] = b[i];
  if (fault != Product::no_barrier) __syncthreads();
  uint32_t fragment_a[4], fragment_b[4];
  csat::ldmatrix_x4(fragment_a, (fault == Product::device_address ? a : shared_a) + lane % 16 * pitch + lane / 16 * 8);
  if (transposed) {
    csat::ldmatrix_x4_transposed(fragment_b, shared_b + lane % 16 * pitch);
  } else {
    csat::ldmatrix_x4(fragment_b, shared_b + lane % 8 * pitch + lane / 8 % 2 * 8);
  }
  float sums[4] = {};
  csat::mma_m16n8k16<T>(sums, fragment_a, fragment_b[0], fragment_b[1]);
  for (int e = 0; e < 4; ++e) c[(lane / 4 + 8 * (e / 2)) * 8 + lane % 4 * 2 + e % 2] = sums[e];
}

template <typename T, bool transposed, Product fault>
bool run_product() {
  std::vector<T> a(512), b(128);
  for (size_t i = 0; i < a.size(); ++i) a[i] = T(float(i * 7 % 13) - 6);
  for (size_t i = 0; i < b.size(); ++i) b[i] = T(float(i * 5 % 11) - 5);
  T *device_a = upload(a), *device_b = upload(b);
  float* c = allocate<float>(128);
  auto kernel = product<T, transposed, fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(32), 40 * 24 * sizeof(T), nullptr, device_a, device_b, c);
  const auto result = download(c, 128);
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 8; ++j) {
      float sum = 0;
      for (size_t k = 0; k < 16; ++k) sum += float(a[i * 16 + k]) * float(transposed ? b[k * 8 + j] : b[j * 16 + k]);
      if (result[i * 8 + j] != sum) return false;
    }
  }
  return true;
}

// ---- Y = X or X^T, (16, 16), from the places that lanes hold of an accumulator, by stmatrix
enum class Store { correct, no_barrier, misaligned_pitch, rows_collide, device_address };

template <bool transposed, Store fault>
__global__ void store_tile(const uint16_t* x, uint16_t* y) {
  CSAT_DYN_SMEM(uint16_t, tile);
  constexpr int pitch = fault == Store::misaligned_pitch ? 20 : 24;
  const int lane = int(threadIdx.x), below = lane / 8 % 2 * 8, right = lane / 16 * 8;
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) {
    const uint16_t* pair = x + (i % 2 * 8 + lane / 4) * 16 + i / 2 * 8 + lane % 4 * 2;
    fragment[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
  const int row = fault == Store::rows_collide ? lane / 2 : lane % 8;
  uint16_t* target = fault == Store::device_address ? y : tile;
  if (transposed) {
    csat::stmatrix_x4_transposed(target + (right + row) * pitch + below, fragment);
  } else {
    csat::stmatrix_x4(target + (below + row) * pitch + right, fragment);
  }
  if (fault != Store::no_barrier) __syncwarp();
  for (int i = lane; i < 256; i += 32) y[i] = tile[i / 16 * pitch + i % 16];
}

template <bool transposed, Store fault>
bool run_store() {
  std::vector<uint16_t> x(256);
  for (size_t i = 0; i < x.size(); ++i) x[i] = uint16_t(i * 257);
  uint16_t *device = upload(x), *y = allocate<uint16_t>(48 * 24);
  auto kernel = store_tile<transposed, fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(32), 48 * 24 * 2, nullptr, device, y);
  const auto result = download(y, 256);
  for (size_t i = 0; i < 256; ++i) {
    if (result[i] != (transposed ? x[i % 16 * 16 + i / 16] : x[i])) return false;
  }
  return true;
}

// ---- C (16, 8) = A (16, 8) B (8, 8)^T in tf32, its operands from shared memory
enum class Tf32 { correct, no_barrier, column_missing, lane_leaves };

template <Tf32 fault>
__global__ void tf32_product(const float* a, const float* b, float* c) {
  __shared__ float shared_a[16][8], shared_b[8][8];
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 128; i += 32) {
    if (fault != Tf32::column_missing || i % 8 < 7) shared_a[i / 8][i % 8] = a[i];
  }
  for (int i = lane; i < 64; i += 32) shared_b[i / 8][i % 8] = b[i];
  if (fault != Tf32::no_barrier) __syncthreads();
  const uint32_t fragment[4] = {csat::to_tf32(shared_a[g][t]), csat::to_tf32(shared_a[g + 8][t]),
                                csat::to_tf32(shared_a[g][t + 4]), csat::to_tf32(shared_a[g + 8][t + 4])};
  float sums[4] = {};
  if (fault == Tf32::lane_leaves && lane == 31) return;
  csat::mma_m16n8k8_tf32(sums, fragment, csat::to_tf32(shared_b[g][t]), csat::to_tf32(shared_b[g][t + 4]));
  for (int e = 0; e < 4; ++e) c[(g + 8 * (e / 2)) * 8 + t * 2 + e % 2] = sums[e];
}

template <Tf32 fault>
bool run_tf32() {
  std::vector<float> a(128), b(64);
  // 1 + 2^-11 is half a unit away: it rounds to 1 + 2^-10. 1 + 2^-12 rounds to 1.
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(i * 7 % 13) + 1 + (i % 3 == 0 ? 0x1p-20f : 0);
  for (size_t i = 0; i < b.size(); ++i) b[i] = i % 2 ? -(1 + 0x1p-11f) : 1 + 0x1p-12f;
  float *device_a = upload(a), *device_b = upload(b), *c = allocate<float>(128);
  auto kernel = tf32_product<fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, device_a, device_b, c);
  const auto result = download(c, 128);
  for (size_t i = 0; i < 16; ++i) {
    for (size_t j = 0; j < 8; ++j) {
      float sum = 0;
      for (size_t k = 0; k < 8; ++k) sum += std::round(a[i * 8 + k]) * (k % 2 ? -(1 + 0x1p-10f) : 1);
      if (result[i * 8 + j] != sum) return false;
    }
  }
  return true;
}

// ---- one warp produces, one consumes; "full" is barrier 1, "empty" barrier 2
enum class Pipe { correct, consumer_does_not_wait, producer_does_not_wait, no_arrival, wrong_count };

template <Pipe fault>
__global__ void pipe(int* y, int rounds) {
  __shared__ int slot[32];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int round = 0; round < rounds; ++round) {
    if (warp == 0) {
      if (fault != Pipe::producer_does_not_wait && round > 0) csat::named_barrier_sync(2, 64);
      slot[lane] = round * 32 + lane;
      csat::named_barrier_arrive(1, fault == Pipe::wrong_count ? 32 : 64);
    } else {
      if (fault != Pipe::consumer_does_not_wait) csat::named_barrier_sync(1, 64);
      y[round * 32 + lane] = slot[31 - lane];
      if (fault != Pipe::no_arrival && round + 1 < rounds) csat::named_barrier_arrive(2, 64);
    }
  }
}

template <Pipe fault>
bool run_pipe() {
  constexpr int rounds = 3;
  int* y = upload(std::vector<int>(rounds * 32));
  auto kernel = pipe<fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(64), 0, nullptr, y, rounds);
  const auto result = download(y, rounds * 32);
  for (int i = 0; i < rounds * 32; ++i) {
    if (result[size_t(i)] != i / 32 * 32 + 31 - i % 32) return false;
  }
  return true;
}

// ---- bank conflicts: a column of a tile with 32 or 33 floats a row
template <int pitch>
__global__ void read_columns(float* y) {
  __shared__ float tile[32 * 33];
  const int lane = int(threadIdx.x);
  for (int r = 0; r < 32; ++r) tile[r * pitch + lane] = float(r);
  __syncthreads();
  y[lane] = tile[lane * pitch];
}

template <int pitch, uint64_t expected>
bool run_columns() {
  options.count_bank_conflicts = true;
  float* y = allocate<float>(32);
  auto kernel = read_columns<pitch>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, y);
  return download(y, 32)[5] == 5 && report.counters.bank_conflicts == expected;
}

}  // namespace

std::vector<Case> tensor_cases() {
  using bf16 = __nv_bfloat16;
  using f16 = __half;
  return {
      {"stream", {}, run_stream<Stream::correct>},
      {"stream: no wait", {Fault::in_flight_access}, run_stream<Stream::no_wait>},
      {"stream: the last row waits for the row before", {Fault::in_flight_access}, run_stream<Stream::waits_for_older>},
      {"stream: no commit before the wait", {Fault::in_flight_access}, run_stream<Stream::no_commit>},
      {"stream: no barrier after the wait", {Fault::race}, run_stream<Stream::no_barrier>},
      {"stream: buffer refilled while others read it", {Fault::race}, run_stream<Stream::buffer_reused_early>},
      {"stream: a copy is in flight at the end", {Fault::missing_wait}, run_stream<Stream::never_waited>},
      {"stream: target not aligned to 16 bytes", {Fault::misaligned}, run_stream<Stream::misaligned>},
      {"stream: the last row's tail is copied from past the end", {Fault::out_of_bounds}, run_stream<Stream::tail>},
      {"product: bf16", {}, run_product<bf16, false, Product::correct>},
      {"product: fp16", {}, run_product<f16, false, Product::correct>},
      {"product: bf16, B by rows", {}, run_product<bf16, true, Product::correct>},
      {"product: fp16, B by rows", {}, run_product<f16, true, Product::correct>},
      {"product: the last row of A is never written",
       {Fault::uninitialised_read},
       run_product<bf16, false, Product::rows_missing>},
      {"product: no barrier before ldmatrix", {Fault::race}, run_product<bf16, false, Product::no_barrier>},
      {"product: rows of ldmatrix not aligned to 16 bytes",
       {Fault::misaligned},
       run_product<bf16, false, Product::misaligned_pitch>},
      {"product: ldmatrix from device memory",
       {Fault::out_of_bounds},
       run_product<f16, false, Product::device_address>},
      {"store", {}, run_store<false, Store::correct>},
      {"store: transposed", {}, run_store<true, Store::correct>},
      {"store: no barrier after stmatrix", {Fault::race}, run_store<false, Store::no_barrier>},
      {"store: rows of stmatrix not aligned to 16 bytes",
       {Fault::misaligned},
       run_store<true, Store::misaligned_pitch>},
      {"store: two lanes give one row", {Fault::race}, run_store<false, Store::rows_collide>},
      {"store: stmatrix to device memory", {Fault::out_of_bounds}, run_store<true, Store::device_address>},
      {"tf32", {}, run_tf32<Tf32::correct>},
      {"tf32: no barrier before the fragments are read", {Fault::race}, run_tf32<Tf32::no_barrier>},
      {"tf32: the last column is never written", {Fault::uninitialised_read}, run_tf32<Tf32::column_missing>},
      {"tf32: a lane returns before the product", {Fault::divergence, Fault::deadlock}, run_tf32<Tf32::lane_leaves>},
      {"pipe", {}, run_pipe<Pipe::correct>},
      {"pipe: the consumer does not wait", {Fault::race}, run_pipe<Pipe::consumer_does_not_wait>},
      {"pipe: the producer does not wait", {Fault::race, Fault::deadlock}, run_pipe<Pipe::producer_does_not_wait>},
      {"pipe: the consumer never frees the slot", {Fault::deadlock}, run_pipe<Pipe::no_arrival>},
      {"pipe: the sides expect different counts", {Fault::divergence, Fault::deadlock}, run_pipe<Pipe::wrong_count>},
      {"columns of a padded tile: no bank conflicts", {}, run_columns<33, 0>},
      {"columns of a square tile: 31 bank conflicts", {}, run_columns<32, 31>},
  };
}

}  // namespace emulator::selftest
