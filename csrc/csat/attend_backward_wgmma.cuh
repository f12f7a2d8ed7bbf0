// Backward of attend on Hopper's warpgroup products (wgmma, sm_90a), for bf16 and fp16 and D, R up to 64 or 97 to 128:
// the formulas, the rounding and the partials of attend_backward_mma.cuh, whose shift kernel and host code it shares.
//
// A block owns one head, a slab of measurements and a range of queries, which it walks in tiles. Each of its two
// warpgroups (one, where 64 measurements are all) has 64 measurements against tiles of 64 queries or, where that saves
// a slab, 128 against 32: scores are computed transposed, P^T and dS^T become left operands in registers, dvc and dkc
// stay in float32 registers over the whole range. Only dS^T, rounded to T, crosses warps: as dS it is the right operand
// of dq^T = kc^T dS^T, which the warpgroups compute in turn (64 features) or by halves of the features (128), so that
// every product has 64 rows and dq no partial sums.
//
// Data flow: kc, vc of the slab -> shared under the 128-byte swizzle once, left operands from there; q, dz -> shared
// (cp.async), the next tile in flight while one is computed, right operands by rows and by columns from the same
// copy; z -> shared, where the thread that copied a piece of z and of dz multiplies the two for the centre of the next
// tile. Two barriers a tile:
//   before the first    this tile's rows, lse and centre have come, dS of the last tile is written; all fenced
//   between them        dq of the last tile from dS; S^T, dP^T, p, then dvc while the sums for the shift are taken
//   after the second    shift; dS -> shared; dkc while dq of the last tile -> global and the next centre is found
//
// Budget: 2 M (3 D + 2 R) FLOP a query, 2 M (D + R) more with several slabs; limits::attend_backward_wgmma_bytes of
// shared memory (D = 64: 78 KiB for 64 measurements, 105 KiB for 128, 109 KiB for 256; D = 128: 142 KiB for 64, 185 KiB
// for 128); up to 255 registers, of which dkc and dvc take 64, or 128 where 128 measurements or 128 features are a
// warpgroup's: one block an SM, or two of one warpgroup with D = 64. Tiles of 32 queries halve the work on what a
// product reads of its left operand: at 128 bytes a cycle 24 cycles of shared memory for 16 of products. Limits:
// limits::plan_wgmma.
#pragma once
#include "csat/attend_backward_mma.cuh"
#include "csat/warpgroup.cuh"

namespace csat {
namespace slab_backward {

// The shared memory of a block; limits::attend_backward_wgmma_bytes counts it.
template <typename T, int kD, int kRowBlocks, int kGroups>
struct SlabTiles {
  static constexpr int kQueries = limits::wgmma_backward_queries(kRowBlocks);
  static constexpr int kGroupRows = 64 * kRowBlocks, kRows = kGroups * kGroupRows;  // measurements
  static constexpr int kWarps = 4 * kGroups, kThreads = 32 * kWarps;
  T* base;

  CSAT_DEVICE SwizzledTile<T, kD> keys() const { return {base, kRows}; }
  CSAT_DEVICE SwizzledTile<T, kD> values() const { return {base + kRows * kD, kRows}; }
  // Rows of queries, a column a measurement.
  CSAT_DEVICE SwizzledTile<T, kRows> ds() const { return {base + 2 * kRows * kD, kQueries}; }
  CSAT_DEVICE SwizzledTile<T, kD> q(int buffer) const { return queries(buffer); }
  CSAT_DEVICE SwizzledTile<T, kD> dz(int buffer) const { return queries(2 + buffer); }
  CSAT_DEVICE SwizzledTile<T, kD> z() const { return queries(4); }
  CSAT_DEVICE Tile<T, kD> dq() const { return {queries(5).data}; }
  // Of two tiles, lse in units of log 2.
  CSAT_DEVICE float* lse(int buffer) const { return reinterpret_cast<float*>(dq().row(kQueries)) + buffer * kQueries; }
  CSAT_DEVICE float* centre(int buffer) const { return lse(2 + buffer); }
  CSAT_DEVICE float* shift(int buffer) const { return lse(4 + buffer); }
  // Of a warp: sums over its measurements as subtract_centre leaves them, and the shift that it found.
  CSAT_DEVICE float* sums(int warp) const { return lse(6) + warp * 2 * kQueries; }
  CSAT_DEVICE float* own_shift(int warp) const { return sums(kWarps) + warp * kQueries; }
  CSAT_DEVICE float* bias() const { return own_shift(kWarps); }  // in units of log 2
  CSAT_DEVICE Block<T>* block() const { return reinterpret_cast<Block<T>*>(bias() + kRows); }

 private:
  CSAT_DEVICE SwizzledTile<T, kD> queries(int i) const {
    return {base + kRows * (2 * kD + kQueries) + i * kQueries * kD, kQueries};
  }
};

template <typename T, int kD, int kRowBlocks, int kGroups>
CSAT_DEVICE void load_measurements(const AttendBackwardMmaArgs& p, const Place& place,
                                   const SlabTiles<T, kD, kRowBlocks, kGroups>& s) {
  using Tiles = SlabTiles<T, kD, kRowBlocks, kGroups>;
  constexpr int rows = Tiles::kRows, threads = Tiles::kThreads;
  const int64_t batch = place.pair / p.heads, head = place.pair % p.heads / p.group, m = place.slab * rows;
  const auto kc = rows_of<const T>(p.kc, batch, head, p.measurements, p.head_dim);
  const auto vc = rows_of<const T>(p.vc, batch, head, p.measurements, p.features);
  load_rows_async(s.keys(), kc.from_row(m), rows, threadIdx.x, threads);
  load_rows_async(s.values(), vc.from_row(m), rows, threadIdx.x, threads);
  for (int i = threadIdx.x; i < rows; i += threads)
    s.bias()[i] = p.bias.data[place.pair * p.bias.matrix + m + i] * kLog2e;
}

// A tile of queries on its way: rows to shared memory, what is known of query threadIdx.x to registers.
struct ComingQuery {
  float lse, centre, shift;

  template <typename T, int kD, int kRowBlocks, int kGroups>
  CSAT_DEVICE void load(const AttendBackwardMmaArgs& p, const SlabTiles<T, kD, kRowBlocks, kGroups>& s, int buffer,
                        int first) {
    using Tiles = SlabTiles<T, kD, kRowBlocks, kGroups>;
    constexpr int kCount = Tiles::kQueries;
    const QueryRows<T>& rows = s.block()->rows;
    const auto copy = [&](SwizzledTile<T, kD> tile, const T* data, const View& v, int columns) {
      const GlobalRows<const T> from{data, v.stride[2], rows.count, columns};
      load_rows_async(tile, from.from_row(first), kCount, threadIdx.x, Tiles::kThreads);
    };
    copy(s.q(buffer), rows.q, p.q, p.head_dim);
    copy(s.dz(buffer), rows.dz, p.dz, p.features);
    if (p.slabs == 1) copy(s.z(), rows.z, p.z, p.features);
    cp_async_commit();
    const int query = first + static_cast<int>(threadIdx.x);
    const bool exists = threadIdx.x < kCount && query < rows.count;
    lse = exists ? rows.lse[query * p.lse.stride[2]] * kLog2e : -INFINITY;
    centre = exists && p.slabs > 1 ? rows.centre[query] : 0.f;
    shift = exists && p.slabs > 1 ? rows.shift[query] : 0.f;
  }

  // Waits for the copies of this thread and leaves lse, centre and shift in shared memory.
  template <typename T, int kD, int kRowBlocks, int kGroups>
  CSAT_DEVICE void store(const AttendBackwardMmaArgs& p, const SlabTiles<T, kD, kRowBlocks, kGroups>& s,
                         int buffer) const {
    using Tiles = SlabTiles<T, kD, kRowBlocks, kGroups>;
    constexpr int kUnits = kD / 8;
    cp_async_wait<0>();
    if (threadIdx.x < Tiles::kQueries) {
      s.lse(buffer)[threadIdx.x] = lse;
      if (p.slabs > 1) s.centre(buffer)[threadIdx.x] = centre, s.shift(buffer)[threadIdx.x] = shift;
    }
    if (p.slabs > 1) return;
    for (int i = threadIdx.x; i < Tiles::kQueries * kUnits; i += Tiles::kThreads) {  // as load_rows_async deals them
      const int r = i / kUnits, c = i % kUnits * 8;
      const uint4 x = *reinterpret_cast<const uint4*>(s.dz(buffer).piece(r, c));
      const uint4 y = *reinterpret_cast<const uint4*>(s.z().piece(r, c));
      const auto dot = QueryRow<T, kD>::dot;
      float sum = dot(x.x, y.x) + dot(x.y, y.y) + dot(x.z, y.z) + dot(x.w, y.w);
#pragma unroll
      for (int mask = 1; mask < kUnits; mask *= 2) sum += shfl_xor(sum, mask);
      if (i % kUnits == 0) s.centre(buffer)[r] = sum;
    }
  }
};

// dq^T of 64 features of a tile from dS over the slab -> shared, or the slab's partial.
template <typename T, int kD, int kRowBlocks, int kGroups>
CSAT_DEVICE void query_gradient(const AttendBackwardMmaArgs& p, const SlabTiles<T, kD, kRowBlocks, kGroups>& s,
                                int first, int feature) {
  using Tiles = SlabTiles<T, kD, kRowBlocks, kGroups>;
  constexpr int kCount = Tiles::kQueries;
  const SwizzledTile<T, kD> keys = s.keys();
  const auto ds = s.ds();
  Sums<16, kCount> dq;
  wgmma_fence(dq.at);
#pragma unroll
  for (int k = 0; k < Tiles::kRows / 16; ++k)
    wgmma_k16_shared<T, true, false>(dq.at[0],
                                     wgmma_descriptor(keys.columns_from(16 * k, feature / 16), keys.rows * 128, 1024),
                                     wgmma_descriptor(ds.columns_from(0, k), 16, 1024), k > 0);
  wgmma_commit();
  wgmma_wait<0>(dq.at);
  const int row = feature + warp_id() % 4 * 16;
  if (p.slabs == 1) {
    for_each(dq, [&](float& x, int, int) { x *= p.scale; });
    store_transposed(to_operand<T>(dq).at[0], [&](int query, int d) { return s.dq().row(query) + row + d; });
  } else {
    const int64_t count = s.block()->rows.count - first;
    float* part = s.block()->query_part + int64_t(first) * kD + row;
    for_each(dq, [&](float& x, int d, int query) {
      if (query < count) part[int64_t(query) * kD + d] = x;
    });
  }
}
// All of dq: by halves of its features, or by whose turn it is.
template <typename T, int kD, int kRowBlocks, int kGroups>
CSAT_DEVICE void take_turn_at_query_gradient(const AttendBackwardMmaArgs& p,
                                             const SlabTiles<T, kD, kRowBlocks, kGroups>& s, int first, int group) {
  if constexpr (kGroups == 1) {
    for (int feature = 0; feature < kD; feature += 64) query_gradient(p, s, first, feature);
  } else if constexpr (kD == 128) {
    query_gradient(p, s, first, 64 * group);
  } else if (first / SlabTiles<T, kD, kRowBlocks, kGroups>::kQueries % 2 == group) {
    query_gradient(p, s, first, 0);
  }
}

// Row r of a warp's sums is this row of its warpgroup's measurements.
CSAT_DEVICE int row_of_group(int r) { return r / 16 * 64 + warp_id() % 4 * 16 + r % 16; }

// Sums over the block's queries -> its partials in the workspace.
template <typename T, int kRows, int kD>
CSAT_DEVICE void store_group_parts(const Block<T>& block, int group, const Sums<kRows, kD>& dkc,
                                   const Sums<kRows, kD>& dvc, Rows<kRows>& dbias) {
  const int first = group * 4 * kRows;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
    const int64_t m = first + row_of_group(16 * i);
    store_floats(block.key_part + m * kD, kD, 16, dkc.at[i]);
    store_floats(block.value_part + m * kD, kD, 16, dvc.at[i]);
  }
  if (!block.bias_part) return;
  for_each_row(dbias, [&](float& x, int r) {
    x = quad_sum(x);
    if (lane_id() % 4 == 0) block.bias_part[first + row_of_group(r)] = x;
  });
}

}  // namespace slab_backward

template <typename T, int kD, int kRowBlocks, int kGroups>
__global__ void __launch_bounds__(128 * kGroups, 1) attend_backward_wgmma_kernel(AttendBackwardMmaArgs p) {
  using namespace slab_backward;
  using Tiles = SlabTiles<T, kD, kRowBlocks, kGroups>;
  constexpr int kCount = Tiles::kQueries, kRows = 16 * kRowBlocks;  // of a warp
  CSAT_DYN_SMEM(T, memory);
  const Tiles s{memory};
  const int group = warpgroup_id();
  if (threadIdx.x == 0) *s.block() = Block<T>(p, Place(p), kD, Tiles::kRows);
  load_measurements(p, Place(p), s);
  __syncthreads();
  const int queries = s.block()->rows.count;
  ComingQuery coming;
  coming.load(p, s, 0, 0);
  coming.store(p, s, 0);

  Sums<kRows, kD> dkc = {}, dvc = {};
  Rows<kRows> dbias = {};
  int now = 0;
  for (int first = 0; first < queries; first += kCount, now ^= 1) {
    const int next = first + kCount;
    fence_proxy_async();
    __syncthreads();
    if (next < queries) coming.load(p, s, now ^ 1, next);
    if (first > 0) take_turn_at_query_gradient(p, s, first - kCount, group);

    Sums<kRows, kCount> probability, ds;
    wgmma_fence(probability.at, ds.at);
    start_product_transposed(probability, s.keys(), group * Tiles::kGroupRows, s.q(now));
    wgmma_commit();
    start_product_transposed(ds, s.values(), group * Tiles::kGroupRows, s.dz(now));
    wgmma_commit();
    wgmma_wait<1>(probability.at);
    Rows<kRows> bias;
    for_each_row(bias, [&](float& x, int r) { x = s.bias()[group * Tiles::kGroupRows + row_of_group(r)]; });
    to_probabilities(probability, p.scale * kLog2e, bias, load_columns<kCount>(s.lse(now)));
    Operand<T, kRows, kCount> left = to_operand<T>(probability);
    wgmma_fence(dvc.at, left.at);
    start_product(dvc, left, s.dz(now), 0, true);
    wgmma_commit();
    wgmma_wait<1>(ds.at);
    subtract_centre(ds, probability, s.centre(now), s.sums(warp_id()));
    __syncthreads();

    const Columns<kCount> shift = p.slabs == 1
                                      ? shift_of<kCount>(s.sums(0), 2 * kCount, Tiles::kWarps, s.own_shift(warp_id()))
                                      : load_columns<kCount>(s.shift(now));
    to_score_gradients(ds, probability, shift, dbias);
    Operand<T, kRows, kCount> rounded = to_operand<T>(ds);
    wgmma_fence(dkc.at, rounded.at);
    start_product(dkc, rounded, s.q(now), 0, true);
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i)
      store_transposed(rounded.at[i], [&](int query, int m) {
        return s.ds().piece(query, group * Tiles::kGroupRows + row_of_group(16 * i) + m);
      });
    if (first > 0) store_query_gradient(p, s.block()->rows, s.dq(), first - kCount, kCount);
    if (next < queries) coming.store(p, s, now ^ 1);
    wgmma_wait<0>(dvc.at, dkc.at);
  }
  const int last = (queries - 1) / kCount * kCount;
  fence_proxy_async();
  __syncthreads();
  take_turn_at_query_gradient(p, s, last, group);
  __syncthreads();
  store_query_gradient(p, s.block()->rows, s.dq(), last, kCount);

  store_group_parts(*s.block(), group, dkc, dvc, dbias);
}

template <typename T, int kD, int kRowBlocks, int kGroups>
int launch_attend_backward_wgmma(const AttendBackwardMmaArgs& p, int64_t blocks, void* stream) {
  constexpr int kWarps = 4 * kGroups;
  auto kernel = attend_backward_wgmma_kernel<T, kD, kRowBlocks, kGroups>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(32 * kWarps),
              static_cast<size_t>(limits::attend_backward_wgmma_bytes(kWarps, kD, kRowBlocks)), stream, p);
  return last_error();
}

// csrc/kernels/attend_backward_wgmma_<dtype>_<feature>.cu instantiate these. 128 features leave registers for one row
// block.
#define CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, kD, row_blocks, groups)                                                \
  prefix template int launch_attend_backward_wgmma<T, kD, row_blocks, groups>(const AttendBackwardMmaArgs&, int64_t, \
                                                                              void*);
#define CSAT_ATTEND_BACKWARD_WGMMA_64(prefix, T)  \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 64, 1, 1) \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 64, 1, 2) \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 64, 2, 2)
#define CSAT_ATTEND_BACKWARD_WGMMA_128(prefix, T)  \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 128, 1, 1) \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 128, 1, 2)
#define CSAT_ATTEND_BACKWARD_WGMMA_INSTANCE(T, kD) CSAT_ATTEND_BACKWARD_WGMMA_##kD(, T)
#ifndef CSAT_INSTANTIATE
CSAT_ATTEND_BACKWARD_WGMMA_64(extern, bf16)
CSAT_ATTEND_BACKWARD_WGMMA_64(extern, f16)
CSAT_ATTEND_BACKWARD_WGMMA_128(extern, bf16)
CSAT_ATTEND_BACKWARD_WGMMA_128(extern, f16)
#endif

}  // namespace csat
