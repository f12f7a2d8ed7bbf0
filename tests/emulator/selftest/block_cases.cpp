// Faults within a block: barriers, shared memory, warp collectives.
#include "cuda_emulation.h"
#include "selftest/case.h"

namespace emulator::selftest {

namespace {

// ---- sum of each block's elements through shared memory
enum class Sum {
  correct,
  no_barrier_before_tree,
  no_barrier_in_tree,
  store_past_end,
  slot_never_written,
  barrier_in_branch,
  two_barriers,
  early_return,
  inactive_lane,
  collective_in_branch,
  half_mask
};
constexpr int kThreads = 128;

template <Sum fault>
__global__ void block_sum(const float* x, float* sums, int n) {
  CSAT_DYN_SMEM(float, partial);
  const int t = int(threadIdx.x), i = int(blockIdx.x) * kThreads + t;
  if (fault == Sum::early_return && i >= n) return;
  const float value = i < n ? x[i] : 0.0f;
  if (fault == Sum::slot_never_written) {
    if (i < n) partial[t] = value;
  } else {
    partial[fault == Sum::store_past_end ? t + 1 : t] = value;
  }
  if (fault == Sum::barrier_in_branch) {
    if (t < 64) __syncthreads();
  } else if (fault == Sum::two_barriers) {
    if (t < 64) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (fault != Sum::no_barrier_before_tree) {
    __syncthreads();
  }
  for (int width = kThreads / 2; width >= 32; width /= 2) {
    if (t < width) partial[t] += partial[t + width];
    if (fault != Sum::no_barrier_in_tree) __syncthreads();
  }
  if (t >= 32) return;
  float sum = partial[t];
  if (fault == Sum::collective_in_branch) {
    if (t < 16) sum += __shfl_xor_sync(kFullMask, sum, 8);
  }
  if (fault == Sum::inactive_lane) {
    if (t < 16) sum += __shfl_xor_sync(0xffffu, sum, 16);
  }
  if (fault == Sum::half_mask) {
    if (t == 0) sum += __shfl_xor_sync(0xffff0000u, sum, 16);
  }
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(kFullMask, sum, lane);
  if (t == 0) sums[blockIdx.x] = sum;
}

template <Sum fault>
bool run_sum() {
  constexpr int n = 300, blocks = (n + kThreads - 1) / kThreads;
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[size_t(i)] = float(i % 7);
  float *device = upload(x), *sums = allocate<float>(blocks);
  auto kernel = block_sum<fault>;
  CSAT_LAUNCH(kernel, dim3(blocks), dim3(kThreads), kThreads * sizeof(float), nullptr, device, sums, n);
  const auto result = download(sums, blocks);
  for (int b = 0; b < blocks; ++b) {
    float expected = 0;
    for (int i = b * kThreads; i < std::min(n, (b + 1) * kThreads); ++i) expected += x[size_t(i)];
    if (result[size_t(b)] != expected) return false;
  }
  return true;
}

// ---- a tile of static shared memory, transposed by one warp, twice
enum class Transpose { correct, no_syncwarp, no_syncwarp_before_reuse, shuffle_as_barrier };

template <Transpose fault>
__global__ void warp_transpose(const float* x, float* y) {
  __shared__ float tile[8][33];
  const int lane = int(threadIdx.x);
  for (int pass = 0; pass < 2; ++pass) {
    for (int r = 0; r < 8; ++r) tile[r][lane] = x[(pass * 8 + r) * 32 + lane];
    if (fault == Transpose::shuffle_as_barrier) {
      (void)__shfl_xor_sync(kFullMask, lane, 1);
    } else if (fault != Transpose::no_syncwarp) {
      __syncwarp();
    }
    for (int r = 0; r < 8; ++r) y[pass * 256 + r * 32 + lane] = tile[lane % 8][r * 4 + lane / 8];
    if (fault != Transpose::no_syncwarp_before_reuse) __syncwarp();
  }
}

template <Transpose fault>
bool run_transpose() {
  std::vector<float> x(512);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i);
  float *device = upload(x), *y = allocate<float>(x.size());
  auto kernel = warp_transpose<fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, device, y);
  const auto result = download(y, x.size());
  for (size_t pass = 0; pass < 2; ++pass) {
    for (size_t i = 0; i < 256; ++i) {
      if (result[pass * 256 + i] != x[pass * 256 + i % 8 * 32 + i / 8]) return false;
    }
  }
  return true;
}

// ---- a value that every thread reads and one thread then replaces
enum class Broadcast { correct, no_barrier_before_write, no_barrier_after_write };

template <Broadcast fault>
__global__ void broadcast(int* y) {
  __shared__ int value;
  const int t = int(threadIdx.x);
  if (t == 0) value = 1;
  __syncthreads();
  int sum = value;
  if (fault != Broadcast::no_barrier_before_write) __syncthreads();
  if (t == 0) value = 2;
  if (fault != Broadcast::no_barrier_after_write) __syncthreads();
  sum += value;
  y[t] = sum;
}

template <Broadcast fault>
bool run_broadcast() {
  int* y = allocate<int>(96);
  auto kernel = broadcast<fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(96), 0, nullptr, y);
  for (const int value : download(y, 96)) {
    if (value != 3) return false;
  }
  return true;
}

// ---- votes and partial masks
template <int width>
__global__ void votes(unsigned* y) {
  const int lane = int(threadIdx.x);
  unsigned result = __ballot_sync(kFullMask, lane % 3 == 0);
  if (lane < 16) {
    result += unsigned(__shfl_down_sync(0xffffu, lane, 1, width)) + unsigned(__shfl_sync(0xffffu, lane, 3)) +
              unsigned(__all_sync(0xffffu, lane < 16)) + unsigned(__any_sync(0xffffu, lane == 99));
  }
  y[lane] = result + unsigned(__syncthreads_count(lane < 5));
}

template <int width>
bool run_votes() {
  unsigned* y = allocate<unsigned>(32);
  auto kernel = votes<width>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, y);
  const auto result = download(y, 32);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; lane += 3) ballot |= 1u << lane;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned down = lane < 15 ? lane + 1 : 15;  // lane 15 has no lane below it in its segment
    const unsigned extra = lane < 16 ? down + 3 + 1 + 0 : 0;
    if (result[lane] != ballot + extra + 5) return false;
  }
  return true;
}

}  // namespace

std::vector<Case> block_cases() {
  return {
      {"sum", {}, run_sum<Sum::correct>},
      {"sum: no barrier between store and tree", {Fault::race}, run_sum<Sum::no_barrier_before_tree>},
      {"sum: no barrier between the tree's levels", {Fault::race}, run_sum<Sum::no_barrier_in_tree>},
      {"sum: stores one slot too far", {Fault::out_of_bounds}, run_sum<Sum::store_past_end>},
      {"sum: the tail's slots are never written", {Fault::uninitialised_read}, run_sum<Sum::slot_never_written>},
      {"sum: barrier in a branch", {Fault::divergence}, run_sum<Sum::barrier_in_branch>},
      {"sum: the halves meet in different barriers", {Fault::divergence}, run_sum<Sum::two_barriers>},
      {"sum: the tail's threads return before the barrier", {Fault::divergence}, run_sum<Sum::early_return>},
      {"sum: shuffle from a lane outside the mask", {Fault::divergence}, run_sum<Sum::inactive_lane>},
      {"sum: full-mask shuffle in a branch", {Fault::divergence}, run_sum<Sum::collective_in_branch>},
      {"sum: lane calls a shuffle whose mask leaves it out", {Fault::divergence}, run_sum<Sum::half_mask>},
      {"transpose", {}, run_transpose<Transpose::correct>},
      {"transpose: no __syncwarp between store and load", {Fault::race}, run_transpose<Transpose::no_syncwarp>},
      {"transpose: no __syncwarp before the tile's reuse",
       {Fault::race},
       run_transpose<Transpose::no_syncwarp_before_reuse>},
      {"transpose: a shuffle taken for a memory barrier", {Fault::race}, run_transpose<Transpose::shuffle_as_barrier>},
      {"broadcast", {}, run_broadcast<Broadcast::correct>},
      {"broadcast: overwritten while others may still read",
       {Fault::race},
       run_broadcast<Broadcast::no_barrier_before_write>},
      {"broadcast: read while it may not be written yet",
       {Fault::race},
       run_broadcast<Broadcast::no_barrier_after_write>},
      {"votes", {}, run_votes<16>},
      {"votes: shuffle down across the mask's end", {Fault::divergence}, run_votes<32>},
  };
}

}  // namespace emulator::selftest
