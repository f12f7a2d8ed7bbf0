// Faults in device memory, between blocks, and of launches.
#include "cuda_emulation.h"
#include "selftest/case.h"

namespace emulator::selftest {

namespace {

// ---- y = 2 x, 256 elements a block
enum class Scale {
  correct,
  no_tail_check,
  store_past_end,
  load_before_start,
  blocks_overlap,
  in_place_neighbour,
  reads_other_block,
  tail_left_out,
  reads_output
};

template <Scale fault>
__global__ void scale(const float* x, float* y, int n) {
  const int stride = fault == Scale::blocks_overlap ? 255 : 256;
  const int i = int(blockIdx.x) * stride + int(threadIdx.x);
  if (fault == Scale::tail_left_out ? i >= n - 1 : fault == Scale::no_tail_check ? false : i >= n) return;
  if (fault == Scale::load_before_start) {
    y[i] = 2 * (i % 256 == 0 ? x[i - 1] : x[i]);
  } else if (fault == Scale::store_past_end) {
    y[i + 1] = 2 * x[i];
  } else if (fault == Scale::reads_output) {
    y[i] += 2 * x[i];
  } else if (fault == Scale::in_place_neighbour) {  // y is x
    y[i] = 2 * (i + 1 < n ? x[i + 1] : x[i]);
  } else if (fault == Scale::reads_other_block) {
    y[i] = 2 * x[i];
    if (i % 256 == 255 && i + 1 < n) y[i] += 0 * y[i + 1];
  } else {
    y[i] = 2 * x[i];
  }
}

template <Scale fault>
bool run_scale() {
  constexpr int n = 1000;
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[size_t(i)] = float(i);
  float* device = upload(x);
  float* y = fault == Scale::in_place_neighbour ? device : allocate<float>(n);
  auto kernel = scale<fault>;
  CSAT_LAUNCH(kernel, dim3(4), dim3(256), 0, nullptr, device, y, n);
  const auto result = download(y, n);
  for (int i = 0; i < n; ++i) {
    if (result[size_t(i)] != 2 * x[size_t(i)]) return false;
  }
  return true;
}

// ---- one counter for all blocks
enum class Count { correct, plain, plain_read };

template <Count fault>
__global__ void count(int* counter, int* seen) {
  if (threadIdx.x != 0) return;
  if (fault == Count::plain) {
    counter[0] += 1;
  } else {
    atomicAdd(counter, 1);
  }
  if (fault == Count::plain_read) seen[blockIdx.x] = counter[0];
}

template <Count fault>
bool run_count() {
  int *counter = upload(std::vector<int>{0}), *seen = upload(std::vector<int>(8));
  auto kernel = count<fault>;
  CSAT_LAUNCH(kernel, dim3(8), dim3(32), 0, nullptr, counter, seen);
  return download(counter, 1)[0] == 8;
}

// ---- threads of one block hand values to each other through device memory
enum class Exchange { correct, no_barrier, same_word };

template <Exchange fault>
__global__ void exchange(int* buffer, int* y) {
  const int t = int(threadIdx.x);
  buffer[fault == Exchange::same_word ? t / 2 : t] = fault == Exchange::same_word ? t / 2 : t;
  if (fault != Exchange::no_barrier) __syncthreads();
  y[t] = buffer[fault == Exchange::same_word ? t / 2 : t ^ 1];
}

template <Exchange fault>
bool run_exchange() {
  int *buffer = allocate<int>(64), *y = allocate<int>(64);
  auto kernel = exchange<fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(64), 0, nullptr, buffer, y);
  const auto result = download(y, 64);
  for (int t = 0; t < 64; ++t) {
    if (result[size_t(t)] != (fault == Exchange::same_word ? t / 2 : t ^ 1)) return false;
  }
  return true;
}

// ---- vectors of four, and elements of two bytes
template <int shift>
__global__ void copy_vectors(const float* x, float* y) {
  const auto* from = reinterpret_cast<const float4*>(x + shift);
  reinterpret_cast<float4*>(y)[threadIdx.x] = from[threadIdx.x];
}

template <int shift>
bool run_copy() {
  std::vector<float> x(132);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i);
  float *device = upload(x), *y = allocate<float>(128);
  auto kernel = copy_vectors<shift>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, device, y);
  const auto result = download(y, 128);
  for (size_t i = 0; i < 128; ++i) {
    if (result[i] != x[i + shift]) return false;
  }
  return true;
}

__global__ void halves(const float* x, __nv_bfloat16* a, __half* b) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;  // odd block size: blocks share 4-byte words, not elements
  a[i] = __float2bfloat16(x[i]);
  b[i] = __float2half(x[i]);
}

bool run_halves() {
  std::vector<float> x(99);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i) / 8 - 3;  // exact in both types
  float* device = upload(x);
  auto* a = allocate<__nv_bfloat16>(99);
  auto* b = allocate<__half>(99);
  CSAT_LAUNCH(halves, dim3(3), dim3(33), 0, nullptr, device, a, b);
  const auto first = download(a, 99);
  const auto second = download(b, 99);
  for (size_t i = 0; i < 99; ++i) {
    if (float(first[i]) != x[i] || float(second[i]) != x[i]) return false;
  }
  return true;
}

// ---- launches that no device takes
__global__ void nothing() {}

bool launches(dim3 grid, dim3 block, size_t shared_bytes) {
  CSAT_LAUNCH(nothing, grid, block, shared_bytes, nullptr);
  return cudaGetLastError() == cudaSuccess;
}

__global__ void large_static(float* y) {
  __shared__ float buffer[13 * 1024];
  for (unsigned i = threadIdx.x; i < 13 * 1024; i += 32) buffer[i] = 0;
  y[threadIdx.x] = buffer[threadIdx.x];
}

bool run_large_static() {
  float* y = allocate<float>(32);
  CSAT_LAUNCH(large_static, dim3(1), dim3(32), 0, nullptr, y);
  return download(y, 32)[0] == 0;
}

// Three workers of one launch that follows another: what a launch wrote is ordered before the next.
bool run_two_launches() {
  float *x = upload(std::vector<float>(1000, 1.0f)), *y = allocate<float>(1000), *z = allocate<float>(1000);
  auto kernel = scale<Scale::correct>;
  CSAT_LAUNCH(kernel, dim3(4), dim3(256), 0, nullptr, x, y, 1000);
  CSAT_LAUNCH(kernel, dim3(4), dim3(256), 0, nullptr, y, z, 1000);
  return download(z, 1000)[999] == 4.0f;
}

// Arriving at a barrier makes the clocks of shadow memory tick, here until they have to start again from zero.
__global__ void tick(int times) {
  for (int i = 0; i < times; ++i) csat::named_barrier_arrive(1, 32);
}

template <bool racing>
bool run_after_many_ticks() {
  float *x = upload(std::vector<float>(1000, 1.0f)), *y = allocate<float>(1000), *z = allocate<float>(1000);
  auto kernel = scale<Scale::correct>;
  CSAT_LAUNCH(kernel, dim3(4), dim3(256), 0, nullptr, x, y, 1000);
  for (int launches = 0; launches < 4; ++launches) CSAT_LAUNCH(tick, dim3(1), dim3(1), 0, nullptr, 600000);
  CSAT_LAUNCH(kernel, dim3(4), dim3(256), 0, nullptr, y, racing ? y + 1 : z, racing ? 999 : 1000);
  return download(z, racing ? 0 : 1000) == std::vector<float>(racing ? 0 : 1000, 4.0f);
}

}  // namespace

std::vector<Case> grid_cases() {
  const size_t budget = Options{}.shared_bytes_per_block;
  return {
      {"scale", {}, run_scale<Scale::correct>},
      {"scale: no check of the tail", {Fault::out_of_bounds}, run_scale<Scale::no_tail_check>},
      {"scale: stores one element too far", {Fault::out_of_bounds}, run_scale<Scale::store_past_end>},
      {"scale: loads the element before the first", {Fault::out_of_bounds}, run_scale<Scale::load_before_start>},
      {"scale: two blocks write one element", {Fault::block_conflict}, run_scale<Scale::blocks_overlap>},
      {"scale: in place, reads what the next block writes",
       {Fault::block_conflict},
       run_scale<Scale::in_place_neighbour>},
      {"scale: reads what another block writes", {Fault::block_conflict}, run_scale<Scale::reads_other_block>},
      {"scale: the last element is never written", {Fault::uninitialised_read}, run_scale<Scale::tail_left_out>},
      {"scale: adds to an output that nobody set", {Fault::uninitialised_read}, run_scale<Scale::reads_output>},
      {"count", {}, run_count<Count::correct>},
      {"count: without atomics", {Fault::block_conflict}, run_count<Count::plain>},
      {"count: plain read of an atomic counter", {Fault::block_conflict}, run_count<Count::plain_read>},
      {"exchange", {}, run_exchange<Exchange::correct>},
      {"exchange: through device memory without a barrier", {Fault::race}, run_exchange<Exchange::no_barrier>},
      {"exchange: two threads write one word", {Fault::race}, run_exchange<Exchange::same_word>},
      {"vectors", {}, run_copy<0>},
      {"vectors: a float4 load at an odd element", {Fault::misaligned}, run_copy<1>},
      {"two-byte elements of blocks that share words", {}, run_halves},
      {"two launches", {}, run_two_launches},
      {"after two million ticks of the clocks", {}, run_after_many_ticks<false>},
      {"after two million ticks of the clocks: in place, shifted by one",
       {Fault::race, Fault::block_conflict},
       run_after_many_ticks<true>},
      {"launch: too much dynamic shared memory",
       {Fault::budget},
       [=] { return launches(dim3(1), dim3(32), budget + 1); }},
      {"launch: too many threads", {Fault::budget}, [] { return launches(dim3(1), dim3(1025), 0); }},
      {"launch: grid too high", {Fault::budget}, [] { return launches(dim3(1, 65536), dim3(32), 0); }},
      {"launch: empty grid", {Fault::budget}, [] { return launches(dim3(0), dim3(32), 0); }},
      {"launch: too much static shared memory", {Fault::budget}, run_large_static},
  };
}

}  // namespace emulator::selftest
