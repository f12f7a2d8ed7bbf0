// Backward of attend on Hopper's warpgroup products (wgmma, sm_90a), for bf16 and fp16 and D, R up to 64 or 97 to 128:
//
//   p = exp(s - lse), dP = dz vc^T, mean = sum p dP / sum p
//   ds = p (dP - mean), dq = scale ds kc, dkc = scale ds^T q, dvc = p^T dz, dbias = colsum ds
//
// The mean comes from the probabilities, in float32, not from z, whose rounding would show in it.
//
// A block owns one head and a range of queries, and walks them in tiles, once a slab of measurements. A warpgroup has
// 64 measurements of the slab against tiles of 32 or 64 queries or, of 64 features, 128 against 32. Scores are computed
// transposed: P^T and dS^T become left operands in registers, dvc and dkc stay in float32 registers over the whole
// range. Only dS^T, rounded to T, crosses warps: as dS it is the right operand of dq^T = kc^T dS^T, of which each
// warpgroup computes half of the queries (64 features) or half of the features (128).
//
// Data flow: kc, vc of the slab -> shared once, rows of measurements whose bias is -inf cleared (whatever they hold: 0
// times it must be 0); q, dz -> shared, by tensor copies two tiles ahead, so that both are right operands by rows and
// by columns; dq -> shared -> global. A tile:
//   scores, dP     products that the tile before has started; p, then dvc while the sums for the mean are taken
//   barrier        sums of all warps and dq of the tile before are there; its q and dz may be filled again
//   gradients      mean, dS -> registers and shared, dkc; dq of the tile before -> global
//   barrier        dS is there: dq, then scores and dP of the next tile, all running while dkc and dq are waited for
// With several slabs no walk sees all measurements of a query: backward_mean_wgmma_kernel finds the mean before (128
// queries a block, each thread's sums run along its rows of scores), and dq stands in float32 in the workspace between
// walks, in the order of the accumulators: each thread reads what it wrote. dkc, dvc and dbias are partials of the
// ranges, and of the heads of a group, that reduce() adds in a fixed order.
//
// Budget: 2 M (3 D + 2 R) FLOP a query, 2 M (D + R) more with several slabs, and 8 D (slabs - 1) bytes a query for dq;
// limits::attend_backward_wgmma_bytes of shared memory (D = 64: 86 KiB for 64 measurements, 72 KiB for 128, 114 KiB for
// 256; D = 128: 95 KiB for 64, 133 KiB for 128); up to 255 registers, of which dkc and dvc take 64, or 128 where 128
// measurements or 128 features are a warpgroup's: one block of two warpgroups or two of one on an SM. What a product of
// 32 queries reads of a left operand in shared memory (at 128 bytes a cycle) takes 24 cycles where the product
// takes 16. Limits: limits::plan_wgmma. p and ds are rounded to T before the products with them; dbias and the mean
// take them unrounded. fp16 as attend_backward_mma.cuh says. Rows with lse = -inf have p = ds = 0.
#pragma once
#include "csat/attend_backward_mma.cuh"
#include "csat/warpgroup.cuh"

namespace csat {

// Tensors that come by tensor copies.
struct AttendBackwardMaps {
  RowBoxes q, dz;   // of the rows of a tile
  RowBoxes kc, vc;  // of the rows of a slab; all of 64 rows for the mean
};

namespace group_backward {

using slab_backward::fold;
using slab_backward::to_score_gradients;

// Stages are filled and read in turns; `parity` is of the phase in which the stage is filled.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  CSAT_DEVICE Ring next() const { return stage == kStages - 1 ? Ring{0, parity ^ 1} : Ring{stage + 1, parity}; }
};
using QueryRing = Ring<limits::kWgmmaBackwardStages>;

// What all threads of a block would hold alike; it stands in shared memory, registers being short.
template <typename T>
struct Block {
  const float *lse, *mean;  // of the first query; mean of several slabs
  T* dq;
  float* query_sums;                         // several slabs
  float *key_part, *value_part, *bias_part;  // of measurement 0
  int64_t first;                             // query
  int count, batch, head;                    // queries

  CSAT_DEVICE Block(const AttendBackwardMmaArgs& p, int feature, int slab_rows) {
    const int64_t pair = blockIdx.x / p.chunks, m = int64_t(blockIdx.x) * p.slabs * slab_rows;
    first = blockIdx.x % p.chunks * p.chunk_queries;
    batch = static_cast<int>(pair / p.heads);
    head = static_cast<int>(pair % p.heads);
    count = static_cast<int>(p.queries - first < p.chunk_queries ? p.queries - first : p.chunk_queries);
    lse = at<const float>(p.lse, batch, head, first);
    mean = p.shift ? p.shift + pair * p.queries + first : nullptr;
    dq = at<T>(p.dq, batch, head, first);
    query_sums = p.query_parts ? p.query_parts + blockIdx.x * p.chunk_queries * feature : nullptr;
    key_part = p.key_parts + m * feature;
    value_part = p.value_parts + m * feature;
    bias_part = p.bias_parts ? p.bias_parts + m : nullptr;
  }
};

// The shared memory of a block; limits::attend_backward_wgmma_bytes counts it.
template <typename T, int kD, int kRowBlocks, int kGroups>
struct SlabTiles {
  static constexpr int kQueries = limits::wgmma_backward_queries(kD, kRowBlocks);
  static constexpr int kGroupRows = 64 * kRowBlocks, kRows = kGroups * kGroupRows;  // measurements
  static constexpr int kWarps = 4 * kGroups, kThreads = 32 * kWarps;
  // Of dq^T a warpgroup computes a share.
  static constexpr int kShareFeatures = kGroups == 2 && kD == 128 ? 64 : kD;
  static constexpr int kShareQueries = kGroups == 2 && kD == 64 ? kQueries / 2 : kQueries;
  static CSAT_DEVICE int share_feature(int group) { return kShareFeatures < kD ? group * kShareFeatures : 0; }
  static CSAT_DEVICE int share_query(int group) { return kShareQueries < kQueries ? group * kShareQueries : 0; }
  static constexpr int kFeatures = kD;
  using Element = T;
  T* base;

  CSAT_DEVICE SwizzledTile<T, kD> keys() const { return {base, kRows}; }
  CSAT_DEVICE SwizzledTile<T, kD> values() const { return {base + kRows * kD, kRows}; }
  // Rows of queries, a column a measurement.
  CSAT_DEVICE SwizzledTile<T, kRows> ds() const { return {base + 2 * kRows * kD, kQueries}; }
  CSAT_DEVICE SwizzledTile<T, kD> q(int stage) const { return queries(2 * stage); }
  CSAT_DEVICE SwizzledTile<T, kD> dz(int stage) const { return queries(2 * stage + 1); }
  CSAT_DEVICE Tile<T, kD> dq() const { return {queries(2 * limits::kWgmmaBackwardStages).data}; }
  CSAT_DEVICE Block<T>* block() const { return reinterpret_cast<Block<T>*>(dq().row(kQueries)); }
  CSAT_DEVICE uint64_t* filled(int stage) const {
    return reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(block()) + limits::kBackwardBlockBytes) + stage;
  }
  CSAT_DEVICE uint64_t* measured() const { return filled(limits::kWgmmaBackwardStages); }
  // Of a warp: sums of p dP, then of p, a query each.
  CSAT_DEVICE float* sums(int warp) const {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(filled(0)) + limits::kWgmmaBackwardBarrierBytes) +
           warp * 2 * kQueries;
  }
  CSAT_DEVICE float* lse() const { return sums(kWarps); }  // in units of log 2
  CSAT_DEVICE float* mean(int buffer) const { return lse() + (1 + buffer) * kQueries; }
  CSAT_DEVICE float* own_mean(int warp) const { return mean(2) + warp * kQueries; }
  CSAT_DEVICE float* bias() const { return own_mean(kWarps); }  // in units of log 2
  static_assert(sizeof(Block<T>) <= limits::kBackwardBlockBytes, "limits.h has room for it");
  static_assert(8 * (limits::kWgmmaBackwardStages + 1) <= limits::kWgmmaBackwardBarrierBytes, "the same");

  CSAT_DEVICE void start(const AttendBackwardMmaArgs& p) const {
    *block() = Block<T>(p, kD, kRows);
    for (int i = 0; i <= limits::kWgmmaBackwardStages; ++i) mbarrier_init(filled(i), 1);
    fence_mbarrier_init();
  }
  // A tile of queries on its way, by one thread.
  CSAT_DEVICE void fetch_queries(const AttendBackwardMaps& maps, int stage, int first) const {
    const Block<T>& b = *block();
    mbarrier_arrive_expect_bytes(filled(stage), 2 * kQueries * kD * sizeof(T));
    maps.q.copy(q(stage), b.batch, b.head, static_cast<int>(b.first + first), filled(stage));
    maps.dz.copy(dz(stage), b.batch, b.head, static_cast<int>(b.first + first), filled(stage));
  }
  CSAT_DEVICE void fetch_measurements(const AttendBackwardMmaArgs& p, const AttendBackwardMaps& maps, int slab) const {
    const int head = static_cast<int>(block()->head / p.group);
    mbarrier_arrive_expect_bytes(measured(), 2 * kRows * kD * sizeof(T));
    maps.kc.copy(keys(), block()->batch, head, static_cast<int>(slab * kRows), measured());
    maps.vc.copy(values(), block()->batch, head, static_cast<int>(slab * kRows), measured());
  }
  // bias -> shared memory; rows of kc, vc whose bias is -inf are cleared. A fence and a barrier follow.
  CSAT_DEVICE void mask_measurements(const AttendBackwardMmaArgs& p, int slab) const {
    const int64_t pair = blockIdx.x / p.chunks;
    mbarrier_wait(measured(), slab & 1);
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
      const float x = p.bias.data[pair * p.bias.matrix + slab * kRows + i];
      bias()[i] = x * kLog2e;
      if (x != -INFINITY) continue;
      for (int c = 0; c < kD; c += 8) {
        *reinterpret_cast<uint4*>(keys().piece(i, c)) = {};
        *reinterpret_cast<uint4*>(values().piece(i, c)) = {};
      }
    }
  }

 private:
  CSAT_DEVICE SwizzledTile<T, kD> queries(int i) const {
    return {base + kRows * (2 * kD + kQueries) + i * kQueries * kD, kQueries};
  }
};

// lse in units of log 2 as p takes it: of a row without mass +inf, so that every p is 0.
CSAT_DEVICE float finite_or_above(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }

// What is known of query threadIdx.x of a tile, on its way.
template <bool kOneSlab>
struct ComingQuery {
  float lse = -INFINITY, mean = 0.f;

  template <typename Tiles>
  CSAT_DEVICE void load(const AttendBackwardMmaArgs& p, const Tiles& s, int first) {
    if (threadIdx.x >= Tiles::kQueries) return;
    const auto& block = *s.block();
    const int query = first + static_cast<int>(threadIdx.x);
    const bool exists = query < block.count;
    lse = exists ? block.lse[query * p.lse.stride[2]] : -INFINITY;
    if constexpr (!kOneSlab) mean = exists ? block.mean[query] : 0.f;
  }
  template <typename Tiles>
  CSAT_DEVICE void store(const Tiles& s, int buffer) const {
    if (threadIdx.x >= Tiles::kQueries) return;
    s.lse()[threadIdx.x] = finite_or_above(lse);
    if constexpr (!kOneSlab) s.mean(buffer)[threadIdx.x] = mean;
  }
};

// p^T in place of the scores.
template <int kRows, int kColumns>
CSAT_DEVICE void to_probabilities(Sums<kRows, kColumns>& s, float scale, const Rows<kRows>& bias,
                                  const Columns<kColumns>& lse) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s.at[i][j][e] = exp2_approx(scale * s.at[i][j][e] + (bias.at[i][e / 2] - lse.at[j][e % 2]));
}

// Sums over this warp's rows, of 32 columns from `first` on: of p dP in lanes 0 .. 15, of p in lanes 16 .. 31, of
// columns 8 (lane / 4 % 4) + 2 (lane % 4) and the next. 14 shuffles where one sum at a time takes 48.
template <int kRows, int kColumns>
CSAT_DEVICE float2 weighted_sums(const Sums<kRows, kColumns>& dp, const Sums<kRows, kColumns>& p, int first) {
  float x[8];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float probability = p.at[i][first / 8 + j][e];
        sum[e % 2] += probability * dp.at[i][first / 8 + j][e];
        sum[2 + e % 2] += probability;
      }
    fold<4>(sum, 16);
    x[2 * j] = sum[0];
    x[2 * j + 1] = sum[1];
  }
  fold<8>(x, 8);
  fold<4>(x, 4);
  return {x[0], x[1]};
}
// The same for all columns -> shared memory.
template <typename Tiles, int kRows, int kColumns>
CSAT_DEVICE void store_weighted_sums(const Tiles& s, const Sums<kRows, kColumns>& dp, const Sums<kRows, kColumns>& p) {
  const int lane = lane_id();
  float* to = s.sums(warp_id()) + lane / 16 * kColumns + lane / 4 % 4 * 8 + lane % 4 * 2;
#pragma unroll
  for (int first = 0; first < kColumns; first += 32)
    *reinterpret_cast<float2*>(to + first) = weighted_sums(dp, p, first);
}

// The mean of a tile's queries from the sums of all warps, in their order.
template <typename Tiles>
CSAT_DEVICE Columns<Tiles::kQueries> mean_of_sums(const Tiles& s) {
  const auto of_warps = [&](int row) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < Tiles::kWarps; ++w) sum += s.sums(w)[row];
    return sum;
  };
  float* own = s.own_mean(warp_id());
#pragma unroll
  for (int first = 0; first < Tiles::kQueries; first += 32) {
    const int query = first + pinned(lane_id());
    const float sum = of_warps(query), mass = of_warps(Tiles::kQueries + query);
    own[query] = mass == 0.f ? 0.f : divide_approx(sum, mass);
  }
  sync_warp();
  return load_columns<Tiles::kQueries>(own);
}

// dq^T: a warpgroup's share of the features and queries of a tile.
template <typename Tiles>
struct QueryGradient {
  using T = typename Tiles::Element;
  static constexpr int kFeatureBlocks = Tiles::kShareFeatures / 64, kQueryBlocks = Tiles::kShareQueries / 8;
  Sums<16 * kFeatureBlocks, Tiles::kShareQueries> sums;

  // Between the walks of two slabs: 16 bytes of each thread side by side.
  CSAT_DEVICE void load(const float* from) {
#pragma unroll
    for (int i = 0; i < kFeatureBlocks * kQueryBlocks; ++i) {
      const float4 y = load4(from + (i * Tiles::kThreads + static_cast<int>(threadIdx.x)) * 4);
      float (&x)[4] = sums.at[i / kQueryBlocks][i % kQueryBlocks];
      x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
    }
  }
  CSAT_DEVICE void store(float* to) const {
#pragma unroll
    for (int i = 0; i < kFeatureBlocks * kQueryBlocks; ++i) {
      const float (&x)[4] = sums.at[i / kQueryBlocks][i % kQueryBlocks];
      *reinterpret_cast<float4*>(to + (i * Tiles::kThreads + static_cast<int>(threadIdx.x)) * 4) =
          float4{x[0], x[1], x[2], x[3]};
    }
  }
  CSAT_DEVICE void start(const Tiles& s, int group, bool accumulate) {
    const auto keys = s.keys();
    const auto ds = s.ds();
    const uint64_t left = keys.depth_of_product(0, Tiles::share_feature(group));
    const uint64_t right = ds.rows_of_product(Tiles::share_query(group));
#pragma unroll
    for (int i = 0; i < kFeatureBlocks; ++i)
#pragma unroll
      for (int k = 0; k < Tiles::kRows / 16; ++k)
        wgmma_k16_shared<T, true, false>(sums.at[i], wgmma_advance(left, keys.depth_offset(4 * i) + 2048 * k),
                                         wgmma_advance(right, ds.depth_offset(k)), accumulate || k > 0);
  }
  // Scaled and rounded -> shared memory.
  CSAT_DEVICE void finish(const Tiles& s, int group, float scale) {
    for_each(sums, [&](float& x, int, int) { x *= scale; });
    const auto rounded = to_operand<T>(sums);
    const int feature = Tiles::share_feature(group) + warp_id() % 4 * 16, query = Tiles::share_query(group);
#pragma unroll
    for (int i = 0; i < kFeatureBlocks; ++i)
      store_transposed(rounded.at[i], [&](int row, int d) { return s.dq().row(query + row) + feature + 64 * i + d; });
  }
};

// dq of a tile from shared memory -> global, 16 bytes a thread where the rows allow it.
template <typename Tiles>
CSAT_DEVICE void store_query_gradient(const AttendBackwardMmaArgs& p, const Tiles& s, int first) {
  using T = typename Tiles::Element;
  constexpr int kUnits = Tiles::kFeatures / 8;
  const Block<T>& block = *s.block();
#pragma unroll
  for (int i = 0; i < Tiles::kQueries * kUnits; i += Tiles::kThreads) {
    const int unit = i + pinned(threadIdx.x), r = unit / kUnits, c = unit % kUnits * 8;
    if (first + r >= block.count || c >= p.head_dim) continue;
    T* out = block.dq + (first + r) * p.dq.stride[2] + c;
    const T* in = s.dq().row(r) + c;
    if (p.vector_dq) {
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(in);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8 && c + e < p.head_dim; ++e) out[e] = in[e];
    }
  }
}

// Row r of a warp's sums is this row of its warpgroup's measurements.
CSAT_DEVICE int row_of_group(int r) { return r / 16 * 64 + warp_id() % 4 * 16 + r % 16; }

// dS^T of a warpgroup -> shared memory, as dS.
template <typename Tiles, int kRows>
CSAT_DEVICE void store_score_gradients(const Tiles& s, int group,
                                       const Operand<typename Tiles::Element, kRows, Tiles::kQueries>& ds) {
  const int lane = pinned(lane_id()), measurement = group * Tiles::kGroupRows + row_of_group(0);
  const SharedAddress from = pinned_address(s.ds().piece(lane / 16 * 8 + lane % 8, measurement + lane / 8 % 2 * 8));
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)  // panels of 64 measurements, in each of which the swizzle is the same
#pragma unroll
    for (int k = 0; k < Tiles::kQueries / 16; ++k)
      stmatrix_x4_transposed(from + (i * Tiles::kQueries + 16 * k) * 128, ds.at[i][k]);
}

// Sums over the block's queries -> its partials in the workspace, from measurement `first` on.
template <typename T, int kRows, int kD>
CSAT_DEVICE void store_group_parts(const Block<T>& block, int first, const Sums<kRows, kD>& dkc,
                                   const Sums<kRows, kD>& dvc, Rows<kRows>& dbias) {
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

// What a warpgroup carries from step to step of a walk.
template <bool kOneSlab, typename Tiles>
struct Walk {
  using T = typename Tiles::Element;
  static constexpr int kRows = Tiles::kGroupRows / 4, kQueries = Tiles::kQueries;  // of a warp
  const AttendBackwardMmaArgs& p;
  const Tiles& s;
  Sums<kRows, Tiles::kFeatures> dkc = {}, dvc = {};
  Rows<kRows> dbias = {}, bias;
  Sums<kRows, kQueries> probability, ds;  // of a tile: scores and dP first
  Operand<T, kRows, kQueries> left;       // of the product that runs
  QueryGradient<Tiles> dq;
  const int group = warpgroup_id();

  CSAT_DEVICE Walk(const AttendBackwardMmaArgs& args, const Tiles& tiles) : p(args), s(tiles) {
    for_each_row(bias, [&](float& x, int r) { x = s.bias()[group * Tiles::kGroupRows + row_of_group(r)]; });
  }
  // Scores and dP of the tile in a stage are started.
  CSAT_DEVICE void start_scores(int stage) {
    wgmma_fence(probability.at, ds.at);
    start_product_transposed(probability, s.keys(), group * Tiles::kGroupRows, s.q(stage));
    wgmma_commit();
    start_product_transposed(ds, s.values(), group * Tiles::kGroupRows, s.dz(stage));
    wgmma_commit();
  }
  // p; dvc is started; sums for the mean.
  CSAT_DEVICE void take_scores(int stage) {
    wgmma_wait<1>(probability.at);
    to_probabilities(probability, p.scale * kLog2e, bias, load_columns<kQueries>(s.lse()));
    left = to_operand<T>(probability);
    wgmma_fence(dvc.at, left.at);
    start_product(dvc, left, s.dz(stage), 0, true);
    wgmma_commit();
    wgmma_wait<1>(ds.at);
    if constexpr (kOneSlab) store_weighted_sums(s, ds, probability);
    wgmma_wait<0>(dvc.at, left.at);
  }
  // dS; dkc is started.
  CSAT_DEVICE void take_mean(int stage, int buffer) {
    Columns<kQueries> mean;
    if constexpr (kOneSlab) {
      mean = mean_of_sums(s);
    } else {
      mean = load_columns<kQueries>(s.mean(buffer));
    }
    to_score_gradients(ds, probability, mean, dbias);
    left = to_operand<T>(ds);
    wgmma_fence(dkc.at, left.at);
    start_product(dkc, left, s.q(stage), 0, true);
    wgmma_commit();
    store_score_gradients<Tiles, kRows>(s, group, left);
  }
  CSAT_DEVICE void start_query_gradient(bool accumulate) {
    wgmma_fence(dq.sums.at);
    dq.start(s, group, accumulate);
    wgmma_commit();
  }
  // dq -> shared memory or, before the last slab, the workspace.
  CSAT_DEVICE void leave_query_gradient(float* query_sums, bool last_slab) {
    if (last_slab) {
      dq.finish(s, group, p.scale);
    } else {
      dq.store(query_sums);
    }
  }
};

// One slab against all queries of the block.
template <bool kOneSlab, typename Tiles>
CSAT_DEVICE void walk_queries(const AttendBackwardMmaArgs& p, const AttendBackwardMaps& maps, const Tiles& s, int slab,
                              QueryRing& ring) {
  constexpr int kQueries = Tiles::kQueries;
  const int queries = s.block()->count;
  const bool first_slab = kOneSlab || slab == 0, last_slab = kOneSlab || slab == p.slabs - 1;
  Walk<kOneSlab, Tiles> walk(p, s);
  ComingQuery<kOneSlab> coming;
  coming.load(p, s, kQueries);
  mbarrier_wait(s.filled(ring.stage), ring.parity);
  walk.start_scores(ring.stage);
  walk.take_scores(ring.stage);
  for (int first = 0, now = 0; first < queries; first += kQueries, now ^= 1) {
    float* query_sums = s.block()->query_sums + first * Tiles::kFeatures;
    __syncthreads();
    const QueryRing next = ring.next();
    const bool more = first + kQueries < queries;
    if (more) mbarrier_wait(s.filled(next.stage), next.parity);
    if (threadIdx.x == 0 && first + 2 * kQueries < queries)
      s.fetch_queries(maps, next.next().stage, first + 2 * kQueries);
    if (last_slab && first > 0) store_query_gradient(p, s, first - kQueries);
    coming.store(s, now ^ 1);
    coming.load(p, s, first + 2 * kQueries);
    walk.take_mean(ring.stage, now);
    if (!first_slab) walk.dq.load(query_sums);
    fence_proxy_async();
    __syncthreads();

    walk.start_query_gradient(!first_slab);
    ring.stage = more ? next.stage : ring.stage;  // after the last tile the same again, against no query: p = 0
    walk.start_scores(ring.stage);
    wgmma_wait<2>(walk.dkc.at, walk.dq.sums.at);
    walk.leave_query_gradient(query_sums, last_slab);
    walk.take_scores(ring.stage);
    ring = next;
  }
  __syncthreads();
  if (last_slab) store_query_gradient(p, s, (queries - 1) / kQueries * kQueries);
  const int measurement = slab * Tiles::kRows + walk.group * Tiles::kGroupRows;
  store_group_parts(*s.block(), measurement, walk.dkc, walk.dvc, walk.dbias);
}

}  // namespace group_backward

template <typename T, int kD, int kRowBlocks, int kGroups, bool kOneSlab>
__global__ void __launch_bounds__(128 * kGroups, 3 - kGroups)
    attend_backward_wgmma_kernel(AttendBackwardMmaArgs p, const __grid_constant__ AttendBackwardMaps maps) {
  using namespace group_backward;
  using Tiles = SlabTiles<T, kD, kRowBlocks, kGroups>;
  CSAT_DYN_SMEM(T, memory);
  const Tiles s{uniform_address(memory)};
  if (threadIdx.x == 0) s.start(p);
  __syncthreads();
  QueryRing ring;
  for (int slab = 0; slab < (kOneSlab ? 1 : static_cast<int>(p.slabs)); ++slab) {
    if (threadIdx.x == 0) {
      s.fetch_measurements(p, maps, slab);
      s.fetch_queries(maps, ring.stage, 0);
      if (Tiles::kQueries < s.block()->count) s.fetch_queries(maps, ring.next().stage, Tiles::kQueries);
    }
    ComingQuery<kOneSlab> coming;
    coming.load(p, s, 0);
    coming.store(s, 0);
    s.mask_measurements(p, slab);
    fence_proxy_async();
    __syncthreads();
    walk_queries<kOneSlab>(p, maps, s, slab, ring);
  }
}

namespace group_backward {

// The shared memory of backward_mean_wgmma_kernel; limits::backward_mean_wgmma_bytes counts it. Matrices have 64 rows.
template <typename T, int kD>
struct MeanTiles {
  static constexpr int kStages = limits::kWgmmaMeanStages, kDepth = limits::kWgmmaMeanDepth;
  static constexpr int kRows = 2 * limits::kWgmmaRows;  // queries of the block
  T* base;

  CSAT_DEVICE SwizzledTile<T, kD> q(int group) const { return matrix(group); }
  CSAT_DEVICE SwizzledTile<T, kD> dz(int group) const { return matrix(2 + group); }
  CSAT_DEVICE SwizzledTile<T, kD> keys(int stage) const { return matrix(4 + stage); }
  CSAT_DEVICE SwizzledTile<T, kD> values(int stage) const { return matrix(4 + kStages + stage); }
  CSAT_DEVICE float* bias(int stage) const {
    return reinterpret_cast<float*>(matrix(4 + 2 * kStages).data) + stage * kDepth;
  }
  CSAT_DEVICE uint64_t* filled(int stage) const { return reinterpret_cast<uint64_t*>(bias(kStages)) + stage; }
  CSAT_DEVICE uint64_t* queries() const { return filled(kStages); }
  static_assert(kDepth == limits::kWgmmaRows, "matrices have the same size");
  static_assert(8 * (kStages + 1) <= limits::kWgmmaBackwardBarrierBytes, "limits.h has room for the barriers");

  CSAT_DEVICE void start() const {
    for (int i = 0; i <= kStages; ++i) mbarrier_init(filled(i), 1);
    fence_mbarrier_init();
  }
  CSAT_DEVICE void fetch_queries(const AttendBackwardMaps& maps, int64_t first, int head, int batch) const {
    mbarrier_arrive_expect_bytes(queries(), 2 * kRows * kD * sizeof(T));
    for (int group = 0; group < 2; ++group) {
      maps.q.copy(q(group), batch, head, static_cast<int>(first + group * limits::kWgmmaRows), queries());
      maps.dz.copy(dz(group), batch, head, static_cast<int>(first + group * limits::kWgmmaRows), queries());
    }
  }
  CSAT_DEVICE void fetch_measurements(const AttendBackwardMmaArgs& p, const AttendBackwardMaps& maps, int stage, int m,
                                      int64_t pair) const {
    const int batch = static_cast<int>(pair / p.heads), head = static_cast<int>(pair % p.heads / p.group);
    mbarrier_arrive_expect_bytes(filled(stage), 2 * kDepth * kD * sizeof(T) + kDepth * sizeof(float));
    maps.kc.copy(keys(stage), batch, head, static_cast<int>(m), filled(stage));
    maps.vc.copy(values(stage), batch, head, static_cast<int>(m), filled(stage));
    bulk_copy_to_shared(bias(stage), p.bias.data + pair * p.bias.matrix + m, kDepth * sizeof(float), filled(stage));
  }

 private:
  CSAT_DEVICE SwizzledTile<T, kD> matrix(int i) const { return {base + i * kDepth * kD, kDepth}; }
};

// What this lane holds of the sums of p dP and of p over measurements, added to `sum`, `mass`. Measurements whose bias
// is -inf count for nothing, whatever kc and vc hold.
template <int kDepth>
CSAT_DEVICE void add_to_sums(Rows<16>& sum, Rows<16>& mass, const Sums<16, kDepth>& s, const Sums<16, kDepth>& dp,
                             float scale, const Columns<kDepth>& bias, const Rows<16>& lse) {
#pragma unroll
  for (int j = 0; j < kDepth / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float b = bias.at[j][e % 2];
      const bool masked = b == -INFINITY;
      const float p = masked ? 0.f : exp2_approx(scale * s.at[0][j][e] + (kLog2e * b - lse.at[0][e / 2]));
      sum.at[0][e / 2] += masked ? 0.f : p * dp.at[0][j][e];
      mass.at[0][e / 2] += p;
    }
}

}  // namespace group_backward

// The mean of 128 queries of one head: a warpgroup has 64 of them and goes through all measurements.
template <typename T, int kD>
__global__ void __launch_bounds__(limits::kMmaThreads, kD == 64 ? 2 : 1)
    backward_mean_wgmma_kernel(AttendBackwardMmaArgs p, const __grid_constant__ AttendBackwardMaps maps) {
  using namespace group_backward;
  using Tiles = MeanTiles<T, kD>;
  constexpr int kDepth = Tiles::kDepth;
  CSAT_DYN_SMEM(T, memory);
  const Tiles s{uniform_address(memory)};
  const int64_t tiles = (p.queries + Tiles::kRows - 1) / Tiles::kRows, pair = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * Tiles::kRows;
  const int group = warpgroup_id(), batch = static_cast<int>(pair / p.heads), head = static_cast<int>(pair % p.heads);
  const int measurements = static_cast<int>(p.measurements);
  if (threadIdx.x == 0) {
    s.start();
    s.fetch_queries(maps, first, head, batch);
    for (int i = 0; i < Tiles::kStages && i * kDepth < measurements; ++i)
      s.fetch_measurements(p, maps, i, i * kDepth, pair);
  }
  Rows<16> lse, sum = {}, mass = {};
  const int64_t own = first + group * limits::kWgmmaRows + warp_id() % 4 * 16;
  for_each_row(lse, [&](float& x, int r) {
    x = own + r < p.queries ? finite_or_above(*at<const float>(p.lse, batch, head, own + r)) : INFINITY;
  });
  __syncthreads();  // the barriers are there
  mbarrier_wait(s.queries(), 0);

  Ring<Tiles::kStages> ring;
  for (int m = 0; m < measurements; m += kDepth, ring = ring.next()) {
    mbarrier_wait(s.filled(ring.stage), ring.parity);
    Sums<16, kDepth> scores, dp;
    wgmma_fence(scores.at, dp.at);
    start_product_transposed(scores, s.q(group), 0, s.keys(ring.stage));
    start_product_transposed(dp, s.dz(group), 0, s.values(ring.stage));
    wgmma_commit();
    wgmma_wait<0>(scores.at, dp.at);
    add_to_sums(sum, mass, scores, dp, p.scale * kLog2e, load_columns<kDepth>(s.bias(ring.stage)), lse);
    __syncthreads();
    const int coming = m + Tiles::kStages * kDepth;
    if (threadIdx.x == 0 && coming < measurements) s.fetch_measurements(p, maps, ring.stage, coming, pair);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float top = quad_sum(sum.at[0][h]), total = quad_sum(mass.at[0][h]);
    const int64_t query = own + 8 * h + lane_id() / 4;
    if (lane_id() % 4 == 0 && query < p.queries)
      p.shift[pair * p.queries + query] = total == 0.f ? 0.f : divide_approx(top, total);
  }
}

template <typename T, int kD, int kRowBlocks, int kGroups, bool kOneSlab>
int launch_attend_backward_wgmma(const AttendBackwardMmaArgs& p, const AttendBackwardMaps& maps, int64_t blocks,
                                 void* stream) {
  constexpr int kWarps = 4 * kGroups;
  auto kernel = attend_backward_wgmma_kernel<T, kD, kRowBlocks, kGroups, kOneSlab>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(32 * kWarps),
              static_cast<size_t>(limits::attend_backward_wgmma_bytes(kWarps, kD, kRowBlocks)), stream, p, maps);
  return last_error();
}
template <typename T, int kD>
int launch_backward_mean_wgmma(const AttendBackwardMmaArgs& p, const AttendBackwardMaps& maps, int64_t blocks,
                               void* stream) {
  auto kernel = backward_mean_wgmma_kernel<T, kD>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kMmaThreads),
              static_cast<size_t>(limits::backward_mean_wgmma_bytes(kD)), stream, p, maps);
  return last_error();
}

// csrc/kernels/instances/attend_backward_wgmma_<feature>.cu instantiate these; limits::plan_wgmma says which are
// needed.
#define CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, kD, row_blocks, groups, one_slab)          \
  prefix template int launch_attend_backward_wgmma<T, kD, row_blocks, groups, one_slab>( \
      const AttendBackwardMmaArgs&, const AttendBackwardMaps&, int64_t, void*);
#define CSAT_BACKWARD_MEAN_WGMMA(prefix, T, kD)                                                                  \
  prefix template int launch_backward_mean_wgmma<T, kD>(const AttendBackwardMmaArgs&, const AttendBackwardMaps&, \
                                                        int64_t, void*);
#define CSAT_ATTEND_BACKWARD_WGMMA_64(prefix, T)         \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 64, 1, 1, true)  \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 64, 2, 1, true)  \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 64, 2, 1, false) \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 64, 2, 2, true)  \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 64, 2, 2, false) \
  CSAT_BACKWARD_MEAN_WGMMA(prefix, T, 64)
#define CSAT_ATTEND_BACKWARD_WGMMA_128(prefix, T)         \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 128, 1, 1, true)  \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 128, 1, 2, true)  \
  CSAT_ATTEND_BACKWARD_WGMMA(prefix, T, 128, 1, 2, false) \
  CSAT_BACKWARD_MEAN_WGMMA(prefix, T, 128)
#define CSAT_ATTEND_BACKWARD_WGMMA_INSTANCE(T, kD) CSAT_ATTEND_BACKWARD_WGMMA_##kD(, T)
#ifndef CSAT_INSTANTIATE
CSAT_ATTEND_BACKWARD_WGMMA_64(extern, bf16)
CSAT_ATTEND_BACKWARD_WGMMA_64(extern, f16)
CSAT_ATTEND_BACKWARD_WGMMA_128(extern, bf16)
CSAT_ATTEND_BACKWARD_WGMMA_128(extern, f16)
#endif

}  // namespace csat
