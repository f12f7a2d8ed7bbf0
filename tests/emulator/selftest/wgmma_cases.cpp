// Faults of warpgroup products, alone and behind tensor copies.
#include "cuda_emulation.h"
#include "selftest/case.h"

namespace emulator::selftest {

namespace {

using csat::fence_proxy_async;
using csat::wgmma_commit;
using csat::wgmma_descriptor;
using csat::wgmma_fence;
using csat::wgmma_wait;
using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr uint32_t kPattern = 1024;  // bytes from 8 rows of 128 bytes to the next 8

// Element (row, column) of a matrix of `rows` rows in shared memory: 64 columns a row of 128 swizzled bytes, further
// columns `rows` rows on.
template <typename T>
T* place(T* matrix, int rows, int row, int column) {
  return matrix + (column / 64 * rows + row) * 64 + (column % 64 / 8 ^ row % 8) * 8 + column % 8;
}

// Where 16 columns from k on start, or 16 rows: what a product reads, the matrix being K-major or not.
template <typename T>
uint64_t k_columns(const T* matrix, int rows, int k) {
  return wgmma_descriptor(matrix + k / 64 * rows * 64 + k % 64, 0, kPattern);
}
template <typename T>
uint64_t k_rows(const T* matrix, int rows, int k) {
  return wgmma_descriptor(matrix + k * 64, uint32_t(rows) * 128, kPattern);
}

// ---- D (64, N) = A (64, 128) B. In memory B is (N, 128), or (128, N); A (64, 128), or (128, 64), or in registers
enum class Operand { registers, shared, shared_transposed };
enum class Wgmma {
  correct,
  no_proxy_fence,
  proxy_fence_before_store,
  no_barrier,
  no_wait,
  no_commit,
  waits_for_older,
  overwritten_in_flight,
  lane_differs,
  lane_leaves,
  sums_read_in_flight,
  sums_written_in_flight,
  fragments_written_in_flight,
  no_register_fence,
  sums_touched_without_fence,
  starts_within_pattern,
  stride_too_small,
  past_the_end,
};
constexpr int kDepth = 128;

template <typename T>
__device__ void stage(T* shared, const T* matrix, int rows, int columns) {
  for (int i = int(threadIdx.x); i < rows * columns; i += 128) {
    *place(shared, rows, i / columns, i % columns) = matrix[i];
  }
}

template <typename T, Operand left, bool transposed, int columns, Wgmma fault>
__global__ void product(const T* a, const T* b, float* d) {
  CSAT_DYN_SMEM(T, shared_b);
  constexpr int b_rows = transposed ? kDepth : columns, a_rows = left == Operand::shared_transposed ? kDepth : 64;
  T* shared_a = shared_b + columns * kDepth;
  const int t = int(threadIdx.x), lane = t % 32, row = t / 32 * 16 + lane / 4;
  if (fault == Wgmma::proxy_fence_before_store) fence_proxy_async();
  stage(shared_b, b, b_rows, columns * kDepth / b_rows);
  if (left != Operand::registers) stage(shared_a, a, a_rows, 64 * kDepth / a_rows);
  if (fault != Wgmma::no_proxy_fence && fault != Wgmma::proxy_fence_before_store) fence_proxy_async();
  if (fault != Wgmma::no_barrier) __syncthreads();
  if (fault == Wgmma::lane_leaves && t == 127) return;

  float sums[columns / 8][4];
  uint32_t fragments[kDepth / 16][4];
  for (auto& fragment : sums) std::fill_n(fragment, 4, 99.0f);  // the first product starts from nothing
  for (int i = 0; i < kDepth / 16 * 4; ++i) {
    const T* pair = a + (row + 8 * (i % 2)) * kDepth + i / 4 * 16 + lane % 4 * 2 + 8 * (i % 4 / 2);
    fragments[i / 4][i % 4] = uint32_t(pair[0].bits) | uint32_t(pair[1].bits) << 16;
  }
  if (fault != Wgmma::no_register_fence) wgmma_fence(sums, fragments);
  for (int k = 0; k < kDepth; k += 16) {
    uint64_t right = transposed ? k_rows(shared_b, b_rows, k) : k_columns(shared_b, b_rows, k);
    if (fault == Wgmma::starts_within_pattern) right = wgmma_descriptor(shared_b + 2 * 64, 0, kPattern);
    if (fault == Wgmma::stride_too_small) right = wgmma_descriptor(shared_b, 0, kPattern / 2);
    if (fault == Wgmma::past_the_end) right = wgmma_descriptor(shared_b + columns * kDepth - 8 * 64, 0, kPattern);
    if (fault == Wgmma::lane_differs && t == 77) right = wgmma_descriptor(shared_b, 0, kPattern);
    if (left == Operand::registers) {
      csat::wgmma_k16<T, transposed>(sums, fragments[k / 16], right, k > 0);
    } else {
      constexpr bool m_major = left == Operand::shared_transposed;
      const uint64_t above = m_major ? k_rows(shared_a, a_rows, k) : k_columns(shared_a, a_rows, k);
      csat::wgmma_k16_shared<T, m_major, transposed>(sums, above, right, k > 0);
    }
    if (fault == Wgmma::waits_for_older && k == kDepth / 2) wgmma_commit();
    if (fault == Wgmma::fragments_written_in_flight) fragments[k / 16][1] = 0;
    if (fault == Wgmma::sums_touched_without_fence) {
      wgmma_commit();
      wgmma_wait<0>(sums);
      sums[1][1] += 0;
    }
  }
  if (fault != Wgmma::no_commit) wgmma_commit();
  if (fault == Wgmma::overwritten_in_flight && t == 0) shared_b[0] = shared_b[64];
  if (fault == Wgmma::sums_written_in_flight) sums[1][1] = 0;
  if (fault == Wgmma::sums_read_in_flight) d[row * columns] = sums[0][0];
  if (fault == Wgmma::waits_for_older) {
    wgmma_wait<1>(sums);
  } else if (fault != Wgmma::no_wait) {
    wgmma_wait<0>(sums);
  }
  for (int j = 0; j < columns / 8; ++j) {
    for (int e = 0; e < 4; ++e) d[(row + e / 2 * 8) * columns + j * 8 + lane % 4 * 2 + e % 2] = sums[j][e];
  }
  if (fault == Wgmma::waits_for_older) wgmma_wait<0>(sums);
}

template <typename T, Operand left, bool transposed, int columns, Wgmma fault>
bool run_product() {
  std::vector<T> a(64 * kDepth), b(columns * kDepth);
  for (size_t i = 0; i < a.size(); ++i) a[i] = T(float(i * 7 % 13) - 6);
  for (size_t i = 0; i < b.size(); ++i) b[i] = T(float(i * 5 % 11) - 5);
  T *device_a = upload(a), *device_b = upload(b);
  float* d = allocate<float>(64 * columns);
  auto kernel = product<T, left, transposed, columns, fault>;
  const size_t shared_bytes = (columns + (left == Operand::registers ? 0 : 64)) * kDepth * sizeof(T);
  CSAT_LAUNCH(kernel, dim3(1), dim3(128), shared_bytes, nullptr, device_a, device_b, d);
  const auto result = download(d, 64 * columns);
  for (size_t i = 0; i < 64; ++i) {
    for (size_t j = 0; j < columns; ++j) {
      float sum = 0;
      for (size_t k = 0; k < kDepth; ++k) {
        const T x = left == Operand::shared_transposed ? a[k * 64 + i] : a[i * kDepth + k];
        sum += float(x) * float(transposed ? b[k * columns + j] : b[j * kDepth + k]);
      }
      if (result[i * columns + j] != sum) return false;
    }
  }
  return true;
}

// ---- Z = (Q K^T) V for tiles of 64 queries: K and V (64, 64) stay in shared memory, one lane streams the tiles of Q
// by tensor copies through two buffers, two warpgroups take turns
enum class Stream {
  correct,
  freed_before_wait,
  one_warp_frees,
  keys_not_awaited,
  one_lane_awaits_queries,
  no_turns_at_output,
  tile_left_in_flight,
};

struct StreamBarriers {
  uint64_t matrices, full[2], empty[2];
};

__device__ void produce_tiles(const csat::TensorMap& q, const csat::TensorMap& k, const csat::TensorMap& v,
                              bf16* shared, StreamBarriers& bars, int tiles) {
  csat::mbarrier_arrive_expect_bytes(&bars.matrices, 2 * 64 * 128);
  csat::tensor_copy_2d(shared, k, 0, 0, &bars.matrices);
  csat::tensor_copy_2d(shared + 64 * 64, v, 0, 0, &bars.matrices);
  for (int tile = 0; tile < tiles; ++tile) {
    csat::mbarrier_wait(&bars.empty[tile % 2], uint32_t(tile / 2 + 1) % 2);
    csat::mbarrier_arrive_expect_bytes(&bars.full[tile % 2], 64 * 128);
    csat::tensor_copy_2d(shared + (2 + tile % 2) * 64 * 64, q, 0, tile * 64, &bars.full[tile % 2]);
  }
}

template <Stream fault>
__device__ void consume_tiles(float* z, bf16* shared, StreamBarriers& bars, int tiles) {
  const int t = int(threadIdx.x) % 128, group = int(threadIdx.x) / 128 - 1, lane = t % 32;
  const int row = t / 32 * 16 + lane / 4;
  if (fault != Stream::keys_not_awaited) csat::mbarrier_wait(&bars.matrices, 0);
  for (int tile = group; tile < tiles; tile += 2) {
    const bf16* queries = shared + (2 + group) * 64 * 64;
    if (fault != Stream::one_lane_awaits_queries || t == 0)
      csat::mbarrier_wait(&bars.full[group], uint32_t(tile) / 2 % 2);
    float scores[8][4], sums[8][4];
    wgmma_fence(scores);
    for (int k = 0; k < 64; k += 16) {
      csat::wgmma_k16_shared<bf16, false, false>(scores, k_columns(queries, 64, k), k_columns(shared, 64, k), k > 0);
    }
    wgmma_commit();
    const bool frees = fault == Stream::one_warp_frees ? t == 0 : lane == 0;
    if (fault == Stream::freed_before_wait && frees) csat::mbarrier_arrive(&bars.empty[group]);
    wgmma_wait<0>(scores);
    if (fault != Stream::freed_before_wait && frees) csat::mbarrier_arrive(&bars.empty[group]);
    uint32_t left[4][4];
    for (int i = 0; i < 16; ++i) {
      const float* pair = &scores[i / 4 * 2 + i % 4 / 2][i % 2 * 2];
      left[i / 4][i % 4] = csat::pack2<bf16>(pair[0], pair[1]);
    }
    wgmma_fence(sums, left);
    for (int k = 0; k < 64; k += 16) {
      csat::wgmma_k16<bf16, true>(sums, left[k / 16], k_rows(shared + 64 * 64, 64, k), k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>(sums);
    // The last row of z counts the tiles: the warpgroups take turns at it.
    if (fault != Stream::no_turns_at_output && tile > 0) csat::named_barrier_sync(1 + group, 256);
    if (t == 0) z[tiles * 64 * 64] += 1;
    if (fault != Stream::no_turns_at_output && tile + 1 < tiles) csat::named_barrier_arrive(2 - group, 256);
    for (int i = 0; i < 32; ++i) {
      z[(tile * 64 + row + i % 4 / 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i / 4][i % 4];
    }
  }
}

template <Stream fault>
__global__ void stream_tiles(const csat::TensorMap q, const csat::TensorMap k, const csat::TensorMap v, float* z,
                             int tiles) {
  CSAT_DYN_SMEM(bf16, shared);
  __shared__ StreamBarriers bars;
  if (threadIdx.x == 0) {
    csat::mbarrier_init(&bars.matrices, 1);
    for (int i = 0; i < 2; ++i) {
      csat::mbarrier_init(&bars.full[i], 1);
      csat::mbarrier_init(&bars.empty[i], fault == Stream::one_warp_frees ? 1 : 4);
    }
    csat::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    csat::registers_decrease<24>();
    if (threadIdx.x == 0)
      produce_tiles(q, k, v, shared, bars, fault == Stream::tile_left_in_flight ? tiles + 1 : tiles);
  } else {
    csat::registers_increase<240>();
    consume_tiles<fault>(z, shared, bars, tiles);
  }
}

template <Stream fault>
bool run_stream() {
  constexpr int tiles = 5, queries = tiles * 64 - 9;
  std::vector<bf16> q(queries * 64), k(64 * 64), v(64 * 64);
  const auto fill = [](std::vector<bf16>& x, size_t step) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = bf16(i * step % 17 == 0 ? float(i % 3) - 1 : 0);
  };
  fill(q, 5), fill(k, 3), fill(v, 7);
  float* z = upload(std::vector<float>(tiles * 64 * 64 + 1));
  csat::TensorMap maps[3];
  const int64_t q_sizes[] = {64, queries}, sizes[] = {64, 64}, strides[] = {1, 64};
  (void)csat::make_tensor_map(&maps[0], upload(q), 2, q_sizes, strides, 64);
  (void)csat::make_tensor_map(&maps[1], upload(k), 2, sizes, strides, 64);
  (void)csat::make_tensor_map(&maps[2], upload(v), 2, sizes, strides, 64);
  auto kernel = stream_tiles<fault>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(384), 4 * 64 * 128, nullptr, maps[0], maps[1], maps[2], z, tiles);
  const auto result = download(z, tiles * 64 * 64 + 1);
  if (result.back() != tiles) return false;
  for (size_t i = 0; i < tiles * 64; ++i) {
    float scores[64] = {}, sums[64] = {};
    for (size_t j = 0; j < 64; ++j) {
      for (size_t c = 0; c < 64 && i < queries; ++c) scores[j] += float(q[i * 64 + c]) * float(k[j * 64 + c]);
      for (size_t c = 0; c < 64; ++c) sums[c] += scores[j] * float(v[j * 64 + c]);
    }
    if (!std::equal(sums, sums + 64, &result[i * 64])) return false;
  }
  return true;
}

template <Wgmma fault, Operand left = Operand::registers, bool transposed = false>
bool run_fault() {
  return run_product<bf16, left, transposed, 64, fault>();
}

}  // namespace

std::vector<Case> wgmma_cases() {
  constexpr auto registers = Operand::registers, shared = Operand::shared, m_major = Operand::shared_transposed;
  constexpr auto correct = Wgmma::correct;
  return {
      {"wgmma: bf16, 64 columns", {}, run_product<bf16, registers, false, 64, correct>},
      {"wgmma: fp16, 8 columns", {}, run_product<f16, registers, false, 8, correct>},
      {"wgmma: bf16, 80 columns, A in shared memory", {}, run_product<bf16, shared, false, 80, correct>},
      {"wgmma: fp16, 256 columns", {}, run_product<f16, registers, false, 256, correct>},
      {"wgmma: bf16, 64 columns, B by rows", {}, run_product<bf16, registers, true, 64, correct>},
      {"wgmma: fp16, 128 columns, B by rows", {}, run_product<f16, registers, true, 128, correct>},
      {"wgmma: bf16, 256 columns, B by rows, A in shared memory", {}, run_product<bf16, shared, true, 256, correct>},
      {"wgmma: fp16, 192 columns, A in shared memory by columns", {}, run_product<f16, m_major, true, 192, correct>},
      {"wgmma: bf16, 16 columns, A in shared memory by columns", {}, run_product<bf16, m_major, false, 16, correct>},
      {"wgmma: no proxy fence", {Fault::missing_fence}, run_fault<Wgmma::no_proxy_fence>},
      {"wgmma: no proxy fence for A", {Fault::missing_fence}, run_fault<Wgmma::no_proxy_fence, shared>},
      {"wgmma: proxy fence before the stores",
       {Fault::missing_fence},
       run_fault<Wgmma::proxy_fence_before_store, registers, true>},
      {"wgmma: no barrier after the stores", {Fault::race, Fault::uninitialised_read}, run_fault<Wgmma::no_barrier>},
      {"wgmma: never waited for", {Fault::missing_wait}, run_fault<Wgmma::no_wait>},
      {"wgmma: no commit before the wait", {Fault::in_flight_access}, run_fault<Wgmma::no_commit>},
      {"wgmma: waits for the group before", {Fault::in_flight_access}, run_fault<Wgmma::waits_for_older>},
      {"wgmma: B overwritten in flight", {Fault::race}, run_fault<Wgmma::overwritten_in_flight, m_major, true>},
      {"wgmma: one lane has another descriptor", {Fault::divergence}, run_fault<Wgmma::lane_differs>},
      {"wgmma: a lane returns before the products",
       {Fault::deadlock, Fault::divergence},
       run_fault<Wgmma::lane_leaves>},
      {"wgmma: accumulators read in flight", {Fault::in_flight_access}, run_fault<Wgmma::sums_read_in_flight>},
      {"wgmma: accumulators written in flight",
       {Fault::in_flight_access},
       run_fault<Wgmma::sums_written_in_flight, shared>},
      {"wgmma: registers of A written in flight",
       {Fault::in_flight_access},
       run_fault<Wgmma::fragments_written_in_flight>},
      {"wgmma: no fence of the registers", {Fault::missing_fence}, run_fault<Wgmma::no_register_fence>},
      {"wgmma: accumulators touched between products, no fence",
       {Fault::missing_fence},
       run_fault<Wgmma::sums_touched_without_fence>},
      {"wgmma: starts within the swizzle's pattern", {Fault::misaligned}, run_fault<Wgmma::starts_within_pattern>},
      {"wgmma: stride below the swizzle's pattern", {Fault::misaligned}, run_fault<Wgmma::stride_too_small>},
      {"wgmma: B reaches past shared memory", {Fault::out_of_bounds}, run_fault<Wgmma::past_the_end>},
      {"tiles", {}, run_stream<Stream::correct>},
      {"tiles: buffer freed before wgmma_wait", {Fault::race}, run_stream<Stream::freed_before_wait>},
      {"tiles: one warp frees for four", {Fault::race}, run_stream<Stream::one_warp_frees>},
      {"tiles: nobody waits for K and V",
       {Fault::in_flight_access, Fault::uninitialised_read, Fault::race},
       run_stream<Stream::keys_not_awaited>},
      {"tiles: one lane waits for Q",
       {Fault::in_flight_access, Fault::uninitialised_read, Fault::race},
       run_stream<Stream::one_lane_awaits_queries>},
      {"tiles: no turns at what both warpgroups update", {Fault::race}, run_stream<Stream::no_turns_at_output>},
      {"tiles: one tile too many is fetched", {Fault::missing_wait}, run_stream<Stream::tile_left_in_flight>},
  };
}

}  // namespace emulator::selftest
