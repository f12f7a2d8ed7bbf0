// Backward of attend_causal on tensor cores, bf16 and fp16, for D and R up to 128: the formulas of attend_backward.cuh
// over two stretches of columns, measurements and tokens (window.h).
//
//   p = exp(s - lse), dP = dz vc^T, centre = rowsum(dz z), shift = sum p (dP - centre) / sum p
//   ds = p ((dP - centre) - shift), dq = scale ds k, dk = scale ds^T q, dv = p^T dz, dbias = colsum ds
//
//   query_backward    centre, shift and dq: a warp owns 16 queries, a block 128, and walks the chunks of columns that
//                     they see, as attend_causal_mma.cuh does
//   column_backward   dkc, dvc, dbias, then dk, dv: a warp owns 32 (features <= 64) or 16 columns, a block of four
//   warps
//                     a slab of them, and walks the queries that see it in tiles of 32
//
// dq has a kernel of its own because a slab knows it only in part. Parts in float32 would take 4 n D bytes for every
// slab, of which there are (E + n) / 128: for E = 1024 the measurements alone take 16 times as much as q, and to write
// and read them more time than the product that they save. So there are eight products where attend's backward with
// slabs has seven, and no memory beyond two floats a query. In one pass, because ds is linear in the shift:
//
//   dq = scale (sum p (dP - centre) k - shift sum p k)
//
// whose two sums share every right operand: they are row blocks of one product. p (dP - centre) is rounded to T before
// the shift is known; what that adds, 2^-9 |shift| in bf16, is of second order, the shift being what rounding z left.
//
// Data flow of query_backward: rows of q, dz -> the warp's tiles -> operands; lse and z dz -> registers; chunks of k, v
// -> two shared slots (cp.async), one ahead; dq through the warp's tile -> global in vectors; centre and shift ->
// global. Of column_backward: k, v of a warp -> its tiles once; q, dz, lse, centre, shift of 32 queries -> two shared
// tiles, one ahead, one barrier a tile; P^T and dS^T become left operands without leaving their lanes; dk, dv stay in
// float32 registers. Those of tokens go to global memory in T: the block walks the queries of all heads of a group.
// Those of measurements are seen by queries without end, are float32 parts of a range of the queries and a head, and go
// to reduce(), which adds them in a fixed order. A warp skips tiles and chunks that none of its rows sees, and
// column_backward compares places only where a tile is seen in part.
//
// Budget of a query: 2 M (5 D + 3 R) FLOP, M = E_t + (w + 1) Bk / 2 seen on average and what edges of tiles add (128
// queries, a slab); limits::causal_query_backward_bytes, limits::causal_column_backward_bytes of shared memory; up to
// 255 registers. Limits: limits::why_not_mma. p and ds are rounded to T before products; rows with lse = -inf have
// p = ds = 0, and so has a column for a query that does not see it, whatever it holds.
#pragma once
#include "csat/attend_backward_mma.cuh"
#include "csat/attend_causal_mma.cuh"

namespace csat {

struct AttendCausalBackwardMmaArgs {
  AttendBackwardMmaArgs measured;  // slabs and chunks are those of column_backward; dq has no parts
  CausalTokens tokens;             // k, v with vector rows
  View dk, dv;
  bool vector_dk, vector_dv;  // rows may be written 16 bytes at a time
};

namespace causal_backward {

using slab_backward::kQueries;
using slab_backward::QueryRow;
using slab_backward::QueryRows;
using slab_backward::rows_of;

// ---- query_backward

// A warp's queries in shared memory, behind the two chunks; limits::causal_query_backward_bytes counts it.
template <typename T, int kD>
struct WarpQueries {
  static constexpr int kRows = limits::kCausalQueryRows;
  Tile<T, kD> q, dz;
  float *lse, *centre;
  CSAT_DEVICE WarpQueries(T* memory, int warp) {
    q = {memory + warp * (2 * tile_elements(kRows, kD) + 4 * kRows)};
    dz = q.from_row(kRows);
    lse = reinterpret_cast<float*>(dz.row(kRows));
    centre = lse + kRows;
  }

  // q and dz asynchronously, lse in units of log 2, and the centre.
  CSAT_DEVICE void load(const AttendBackwardMmaArgs& p, const QueryRows<T>& rows) const {
    slab_backward::load_queries(p, rows, q, dz, 0, kRows, lane_id(), 32);
    for (int r = lane_id() / 8; r < kRows; r += 4) {
      QueryRow<T, kD> row;
      row.load(p, rows, r, false);
      const float of_row = row.centre();
      if (lane_id() % 8 != 0) continue;
      lse[r] = row.lse;
      centre[r] = of_row;
    }
  }
};

// What this lane's two rows see, in few registers: the blocks whose measurements stand for them. Rows from `count` on
// see what the last one sees, and tokens behind it: their lse is -inf.
struct SeenByLane {
  int blocks[2];

  CSAT_DEVICE SeenByLane(const CausalWindow& window, int first, int count) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane_id() / 4 + 8 * h;
      blocks[h] = static_cast<int>(window.measured_blocks(first + (row < count ? row : count - 1)));
    }
  }
  // Columns begin[h] .. end[h] - 1 of the chunk at `column`.
  CSAT_DEVICE void move_to(const CausalWindow& window, int first, bool tokens, int column, int (&begin)[2],
                           int (&end)[2]) const {
    const int token = static_cast<int>(window.first) + first + lane_id() / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int measured = static_cast<int>(window.earlier) + blocks[h] * static_cast<int>(window.measurements);
      begin[h] = tokens ? blocks[h] * static_cast<int>(window.block_size) - column : 0;
      end[h] = (tokens ? token + 8 * h + 1 : measured) - column;
    }
  }
};

template <typename T, int kD>
CSAT_DEVICE void load_measured_chunk(const Chunk<T, kD>& chunk, const AttendBackwardMmaArgs& p, int batch, int head,
                                     int first) {
  constexpr int kRows = Chunk<T, kD>::kRows;
  static_assert(limits::kBackwardColumns % kRows == 0, "the panel of biases is padded to whole chunks");
  const int key_head = head / static_cast<int>(p.group);
  load_rows_async(chunk.keys, rows_of<const T>(p.kc, batch, key_head, p.measurements, p.head_dim), first, kRows,
                  threadIdx.x, limits::kMmaThreads);
  load_rows_async(chunk.values, rows_of<const T>(p.vc, batch, key_head, p.measurements, p.features), first, kRows,
                  threadIdx.x, limits::kMmaThreads);
  const float* bias = p.bias.data + (batch * p.heads + head) * p.bias.matrix + first;
  if (threadIdx.x < kRows) chunk.bias[threadIdx.x] = bias[threadIdx.x] * kLog2e;
}

// What a warp adds up over the columns. Row block 0 of `sums` is that of p (dP - centre), 1 that of p.
template <int kD>
struct QuerySums {
  Sums<32, kD> sums = {};
  Rows<16> mean = {}, mass = {};

  // q, dz: operands, or tiles that are read block by block; lse and centre of the rows are in shared memory, registers
  // being short; columns begin[h] .. end[h] - 1 of the chunk are seen.
  template <typename T, typename Left>
  CSAT_DEVICE void add(const Left& q, const Left& dz, const Chunk<T, kD>& chunk, float scale, const float* lse_of,
                       const float* centre_of, const int (&begin)[2], const int (&end)[2]) {
    constexpr int kTogether = kD <= 96 ? Chunk<T, kD>::kRows : 16;  // columns, as registers allow
    Rows<16> lse, centre;
    for_each_row(lse, [&](float& x, int r) { x = lse_of[r]; });
    for_each_row(centre, [&](float& x, int r) { x = centre_of[r]; });
#pragma unroll 1
    for (int first = 0; first < Chunk<T, kD>::kRows; first += kTogether) {
      Sums<16, kTogether> s = {}, dp = {};
      multiply_transposed(s, q, chunk.keys.from_row(first));
      multiply_transposed(dp, dz, chunk.values.from_row(first));
      const Columns<kTogether> bias = load_columns<kTogether>(chunk.bias + first);
      const int t = first + lane_id() % 4 * 2;
      Sums<32, kTogether> left;
#pragma unroll
      for (int j = 0; j < kTogether / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int h = e / 2, column = 8 * j + t + e % 2;
          const bool counts = begin[h] <= column && column < end[h] && lse.at[0][h] != -INFINITY;
          const float exponent = scale * s.at[0][j][e] + bias.at[j][e % 2] - lse.at[0][h];
          const float p = counts ? exp2_approx(exponent) : 0.f;
          const float d = p == 0.f ? 0.f : p * (dp.at[0][j][e] - centre.at[0][h]);
          mean.at[0][h] += d;
          mass.at[0][h] += p;
          left.at[0][j][e] = d;
          left.at[1][j][e] = p;
        }
      multiply(sums, to_operand<T>(left), chunk.keys.from_row(first));
    }
  }
  CSAT_DEVICE Rows<16> shift() const {
    Rows<16> x;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = quad_sum(mass.at[0][h]), sum = quad_sum(mean.at[0][h]);
      x.at[0][h] = total == 0.f ? 0.f : sum / total;
    }
    return x;
  }
  CSAT_DEVICE Sums<16, kD> query_gradient(float scale, const Rows<16>& shift) const {
    Sums<16, kD> dq;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) dq.at[0][j][e] = scale * (sums.at[0][j][e] - shift.at[0][e / 2] * sums.at[1][j][e]);
    return dq;
  }
};

// The rows of a warp for the products with every chunk: in registers while the sums leave room for them.
template <typename T, int kD>
using LeftRows = std::conditional_t<kD <= 80, Operand<T, limits::kCausalQueryRows, kD>, Tile<T, kD>>;
template <typename T, int kD>
CSAT_DEVICE LeftRows<T, kD> left_in(Tile<T, kD> tile) {
  if constexpr (kD <= 80)
    return load_operand<limits::kCausalQueryRows>(tile);
  else
    return tile;
}

// ---- column_backward

// Two tiles of queries, in shared memory before what the warps have; limits::causal_column_backward_bytes counts both.
template <typename T, int kD>
struct QueryStages {
  Tile<T, kD> q, dz;
  float *lse, *centre, *shift;  // lse in units of log 2
  CSAT_DEVICE explicit QueryStages(T* memory) {
    q = {memory};
    dz = q.from_row(2 * kQueries);
    lse = reinterpret_cast<float*>(dz.row(2 * kQueries));
    centre = lse + 2 * kQueries;
    shift = centre + 2 * kQueries;
  }
  CSAT_DEVICE T* end() const { return reinterpret_cast<T*>(shift + 2 * kQueries); }
};

// What query_backward knows of one query, on its way to shared memory.
struct KnownRow {
  float lse, centre, shift;

  template <typename T>
  CSAT_DEVICE void load(const AttendBackwardMmaArgs& p, const QueryRows<T>& rows, int r) {
    const bool exists = r < rows.count;
    lse = exists ? rows.lse[r * p.lse.stride[2]] * kLog2e : -INFINITY;
    centre = exists ? rows.centre[r] : 0.f;
    shift = exists ? rows.shift[r] : 0.f;
  }
  template <typename T, int kD>
  CSAT_DEVICE void store(const QueryStages<T, kD>& to, int r) const {
    to.lse[r] = lse;
    to.centre[r] = centre;
    to.shift[r] = shift;
  }
};

// The columns of a warp, and which queries see each.
template <typename T, int kD>
struct WarpColumns {
  static constexpr int kRows = limits::backward_warp_rows(kD);
  Tile<T, kD> keys, values;
  float* bias;       // in units of log 2; -inf for a column that does not exist
  int *begin, *end;  // queries; neither falls from column to column
  CSAT_DEVICE WarpColumns(T* memory, int warp) {
    keys = {memory + warp * (2 * tile_elements(kRows, kD) + 6 * kRows)};
    values = keys.from_row(kRows);
    bias = reinterpret_cast<float*>(values.row(kRows));
    begin = reinterpret_cast<int*>(bias + kRows);
    end = begin + kRows;
  }

  CSAT_DEVICE void load(const GlobalRows<const T>& k, const GlobalRows<const T>& v, int64_t first) const {
    load_rows_async(keys, k, first, kRows, lane_id(), 32);
    load_rows_async(values, v, first, kRows, lane_id(), 32);
    cp_async_commit();
  }
  CSAT_DEVICE void set(int row, float of_bias, Range queries) const {
    bias[row] = of_bias * kLog2e;
    begin[row] = static_cast<int>(queries.begin);
    end[row] = static_cast<int>(queries.end);
  }
  // Is any of the queries first .. first + 31 seeing any of these columns; do all see all?
  CSAT_DEVICE bool seen(int first) const { return begin[0] < first + kQueries && first < end[kRows - 1]; }
  CSAT_DEVICE bool seen_by_all(int first) const { return begin[kRows - 1] <= first && first + kQueries <= end[0]; }
  CSAT_DEVICE void hide(Sums<kRows, kQueries>& p, int first) const {
    for_each(p, [&](float& x, int row, int column) {
      if (first + column < begin[row] || first + column >= end[row]) x = 0.f;
    });
  }
};

// Which part of the problem a block has. Tokens: blocks count (b, head of k, slab), and one walks the heads of a group;
// measurements: (b, h, chunk, slab), a chunk being a part of the queries that see the slab.
template <int kSlab, bool kTokens>
struct ColumnPlace {
  int batch, column_head, first;  // first column
  int head, end_head;             // of the queries
  int begin, end;                 // queries

  CSAT_DEVICE explicit ColumnPlace(const AttendCausalBackwardMmaArgs& p) {
    const AttendBackwardMmaArgs& m = p.measured;
    const CausalWindow& window = p.tokens.window;
    if (kTokens) {
      const int64_t slabs = (p.tokens.count + kSlab - 1) / kSlab, pair = blockIdx.x / slabs;
      const int group = static_cast<int>(m.heads / p.tokens.heads);
      first = static_cast<int>(blockIdx.x % slabs) * kSlab;
      batch = static_cast<int>(pair / p.tokens.heads);
      column_head = static_cast<int>(pair % p.tokens.heads);
      head = column_head * group;
      end_head = head + group;
      const int64_t last = int64_t(first) + kSlab;
      const Range all = window.queries_of_tokens({first, last < p.tokens.count ? last : p.tokens.count});
      begin = static_cast<int>(all.begin);
      end = static_cast<int>(all.end);
    } else {
      const int64_t pair = blockIdx.x / m.slabs / m.chunks, chunk = blockIdx.x / m.slabs % m.chunks;
      first = static_cast<int>(blockIdx.x % m.slabs) * kSlab;
      batch = static_cast<int>(pair / m.heads);
      head = static_cast<int>(pair % m.heads);
      end_head = head + 1;
      column_head = head / static_cast<int>(m.group);
      const Range all = window.queries_of_measurements({first, int64_t(first) + kSlab});
      const int64_t tiles = (all.end - all.begin + kQueries - 1) / kQueries;
      const int64_t part = (tiles + m.chunks - 1) / m.chunks * kQueries, from = all.begin + chunk * part;
      begin = static_cast<int>(from);
      end = static_cast<int>(from + part < all.end ? from + part : all.end);
    }
  }
  CSAT_DEVICE int64_t columns(const AttendCausalBackwardMmaArgs& p) const {
    return kTokens ? p.tokens.count : p.measured.measurements;
  }
};

template <bool kTokens, typename T, int kD, typename Place>
CSAT_DEVICE void load_columns_of_warp(const AttendCausalBackwardMmaArgs& p, const Place& at,
                                      const WarpColumns<T, kD>& own) {
  constexpr int kRows = WarpColumns<T, kD>::kRows;
  const AttendBackwardMmaArgs& m = p.measured;
  const int64_t count = at.columns(p), first = int64_t(at.first) + warp_id() * kRows;
  own.load(rows_of<const T>(kTokens ? p.tokens.k : m.kc, at.batch, at.column_head, count, m.head_dim),
           rows_of<const T>(kTokens ? p.tokens.v : m.vc, at.batch, at.column_head, count, m.features), first);
  const CausalWindow& window = p.tokens.window;
  for (int r = lane_id(); r < kRows; r += 32) {
    if (first >= count) {  // none of these columns exists
      own.set(r, -INFINITY, {0, 0});
      continue;
    }
    const bool exists = first + r < count;
    const int64_t c = exists ? first + r : count - 1;
    float bias = exists ? 0.f : -INFINITY;
    if (kTokens) {
      if (p.tokens.keep && !p.tokens.keep[at.batch * count + c]) bias = -INFINITY;
      own.set(r, bias, window.queries_of_tokens({c, c + 1}));
    } else {
      if (exists) bias = m.bias.data[(at.batch * m.heads + at.head) * m.bias.matrix + c];
      own.set(r, bias, window.queries_of_measurements({c, c + 1}));
    }
  }
}

// What a warp adds up over the queries.
template <typename T, int kD>
struct ColumnSums {
  static constexpr int kRows = limits::backward_warp_rows(kD);
  Sums<kRows, kD> dk = {}, dv = {};
  Rows<kRows> dbias = {};

  // The tile of queries first .. first + 31 in one of two stages.
  CSAT_DEVICE void add(const QueryStages<T, kD>& s, int stage, const WarpColumns<T, kD>& own, float scale, int first) {
    const Tile<T, kD> q = s.q.from_row(stage * kQueries), dz = s.dz.from_row(stage * kQueries);
    Sums<kRows, kQueries> p = {}, ds = {};
    multiply_transposed(p, own.keys, q);
    Rows<kRows> bias;
    for_each_row(bias, [&](float& x, int r) { x = own.bias[r]; });
    slab_backward::to_probabilities(p, scale * kLog2e, bias, load_columns<kQueries>(s.lse + stage * kQueries));
    if (!own.seen_by_all(first)) own.hide(p, first);
    multiply(dv, to_operand<T>(p), dz);
    multiply_transposed(ds, own.values, dz);
    slab_backward::subtract_centre(ds, p, load_columns<kQueries>(s.centre + stage * kQueries));
    slab_backward::to_score_gradients(ds, p, load_columns<kQueries>(s.shift + stage * kQueries), dbias);
    multiply(dk, to_operand<T>(ds), q);
  }
};

// dk and dv of a warp's tokens, through its own tiles.
template <typename T, int kD, typename Place>
CSAT_DEVICE void store_token_gradients(const AttendCausalBackwardMmaArgs& p, const Place& at,
                                       const WarpColumns<T, kD>& own, ColumnSums<T, kD>& sums) {
  constexpr int kRows = WarpColumns<T, kD>::kRows;
  const AttendBackwardMmaArgs& m = p.measured;
  const int64_t first = int64_t(at.first) + warp_id() * kRows;
  for_each(sums.dk, [&](float& x, int, int) { x *= m.scale; });
  sync_warp();  // every lane has read its columns
  store_tile(own.keys, 0, sums.dk);
  store_tile(own.values, 0, sums.dv);
  sync_warp();
  store_rows(rows_of<T>(p.dk, at.batch, at.column_head, p.tokens.count, m.head_dim), first, kRows, own.keys,
             p.vector_dk);
  store_rows(rows_of<T>(p.dv, at.batch, at.column_head, p.tokens.count, m.features), first, kRows, own.values,
             p.vector_dv);
}

}  // namespace causal_backward

template <typename T, int kD>
__global__ void __launch_bounds__(limits::kMmaThreads, 1)
    query_backward_causal_mma_kernel(AttendCausalBackwardMmaArgs p) {
  using namespace causal_backward;
  constexpr int kRows = limits::kCausalQueryRows, kBlockRows = kRows * limits::kMmaWarps;
  constexpr int kChunk = Chunk<T, kD>::kRows;
  CSAT_DYN_SMEM(T, slots);
  const WarpQueries<T, kD> tiles(slots + 2 * (limits::mma_slot_bytes(kD) / 2), warp_id());
  const AttendBackwardMmaArgs& m = p.measured;
  const CausalWindow& window = p.tokens.window;
  const int blocks = static_cast<int>((m.queries + kBlockRows - 1) / kBlockRows), heads = static_cast<int>(m.heads);
  const int batch = static_cast<int>(blockIdx.x / blocks) / heads, head = static_cast<int>(blockIdx.x / blocks) % heads;
  const int64_t all_first = int64_t(blocks - 1 - blockIdx.x % blocks) * kBlockRows;  // the longest walks come first
  const int64_t all_end = all_first + kBlockRows < m.queries ? all_first + kBlockRows : m.queries;
  const bool active = all_first + warp_id() * kRows < all_end;
  const int first = static_cast<int>(active ? all_first + warp_id() * kRows : all_first);
  const QueryRows<T> rows(m, batch, head, first, kRows);
  tiles.load(m, rows);

  const SeenChunks<kChunk> chunks(SeenColumns<kChunk>(window, all_first, all_end - 1));
  SeenColumns<kChunk> own(window, first, first + rows.count - 1);
  if (!active) own.measured_end = own.token_end = 0;  // no query sees no token
  const SeenByLane by_lane(window, first, rows.count);
  const auto slot = [&](int c) { return Chunk<T, kD>::at_slot(slots, c % 2); };
  const auto load = [&](int c) {
    if (!chunks.has_tokens(c)) {
      load_measured_chunk(slot(c), m, batch, head, chunks.column(c));
    } else if (c < chunks.count) {
      load_token_chunk(slot(c), p.tokens, batch, head / (heads / static_cast<int>(p.tokens.heads)), m.head_dim,
                       m.features, chunks.column(c));
    }
    cp_async_commit();
  };
  load(0);
  LeftRows<T, kD> q, dz;
  QuerySums<kD> sums;
  for (int c = 0; c < chunks.count; ++c) {
    load(c + 1);
    cp_async_wait<1>();
    __syncthreads();
    if (c == 0) {
      q = left_in(tiles.q);
      dz = left_in(tiles.dz);
    }
    if (chunks.seen(own, c)) {
      int begin[2], end[2];
      by_lane.move_to(window, first, chunks.has_tokens(c), chunks.column(c), begin, end);
      sums.add(q, dz, slot(c), m.scale * kLog2e, tiles.lse, tiles.centre, begin, end);
    }
    __syncthreads();  // everybody is done with the slot that comes next
  }
  cp_async_wait<0>();
  if (own.token_end == 0) return;
  // Addresses anew: the loop has no registers for them.
  const QueryRows<T> target(m, batch, head, pinned(first), kRows);
  Rows<kRows> shift = sums.shift();
  store_tile(tiles.q, 0, sums.query_gradient(m.scale, shift));
  sync_warp();
  store_rows(GlobalRows<T>{target.dq, m.dq.stride[2], target.count, m.head_dim}, 0, kRows, tiles.q, m.vector_dq);
  for_each_row(shift, [&](float& x, int r) {
    if (lane_id() % 4 != 0 || r >= target.count) return;
    target.centre[r] = tiles.centre[r];
    target.shift[r] = x;
  });
}

template <typename T, int kD, bool kTokens>
__global__ void __launch_bounds__(32 * limits::kCausalSlabWarps, 2)
    column_backward_causal_mma_kernel(AttendCausalBackwardMmaArgs p) {
  using namespace causal_backward;
  constexpr int kThreads = 32 * limits::kCausalSlabWarps, kSlab = limits::causal_slab_rows(kD);
  CSAT_DYN_SMEM(T, memory);
  const QueryStages<T, kD> s(memory);
  const WarpColumns<T, kD> own(s.end(), warp_id());
  const AttendBackwardMmaArgs& m = p.measured;
  const ColumnPlace<kSlab, kTokens> at(p);
  KnownRow known;
  // q and dz of a tile on their way; lse, centre and shift with the first warp, until store().
  const auto load = [&](int stage, int head, int first) {
    const QueryRows<T> rows(m, at.batch, head, first, at.end - first);
    slab_backward::load_queries(m, rows, s.q.from_row(stage * kQueries), s.dz.from_row(stage * kQueries), 0, kQueries,
                                threadIdx.x, kThreads);
    cp_async_commit();
    if (warp_id() == 0) known.load(m, rows, lane_id());
  };
  const auto store = [&](int stage) {
    if (warp_id() == 0) known.store(s, stage * kQueries + lane_id());
  };
  load_columns_of_warp<kTokens>(p, at, own);
  int head = at.begin < at.end ? at.head : at.end_head, first = at.begin;
  if (head < at.end_head) {
    load(0, head, first);
    store(0);
  }
  ColumnSums<T, kD> sums;
  for (int stage = 0; head < at.end_head; stage ^= 1) {
    const int now = first;
    first += kQueries;
    if (first >= at.end) first = at.begin, ++head;
    const bool more = head < at.end_head;
    cp_async_wait<0>();
    __syncthreads();
    if (more) load(stage ^ 1, head, first);
    if (own.seen(now)) sums.add(s, stage, own, m.scale, now);
    if (more) store(stage ^ 1);
  }
  cp_async_wait<0>();
  if constexpr (kTokens) {
    store_token_gradients(p, at, own, sums);
  } else {
    const int64_t row = int64_t(blockIdx.x) * kSlab;
    slab_backward::store_parts(m.key_parts + row * kD, m.value_parts + row * kD,
                               m.bias_parts ? m.bias_parts + row : nullptr, sums.dk, sums.dv, sums.dbias);
  }
}

template <typename T, int kD>
int launch_query_backward_causal_mma(const AttendCausalBackwardMmaArgs& p, int64_t blocks, void* stream) {
  auto kernel = query_backward_causal_mma_kernel<T, kD>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kMmaThreads),
              static_cast<size_t>(limits::causal_query_backward_bytes(kD)), stream, p);
  return last_error();
}
template <typename T, int kD, bool kTokens>
int launch_column_backward_causal_mma(const AttendCausalBackwardMmaArgs& p, int64_t blocks, void* stream) {
  auto kernel = column_backward_causal_mma_kernel<T, kD, kTokens>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(32 * limits::kCausalSlabWarps),
              static_cast<size_t>(limits::causal_column_backward_bytes(kD)), stream, p);
  return last_error();
}

// csrc/kernels/instances/attend_causal_backward_mma_<size>.cu instantiates these; everything else only refers to them.
#define CSAT_ATTEND_CAUSAL_BACKWARD_MMA(prefix, T, size)                                                             \
  prefix template int launch_query_backward_causal_mma<T, size>(const AttendCausalBackwardMmaArgs&, int64_t, void*); \
  prefix template int launch_column_backward_causal_mma<T, size, false>(const AttendCausalBackwardMmaArgs&, int64_t, \
                                                                        void*);                                      \
  prefix template int launch_column_backward_causal_mma<T, size, true>(const AttendCausalBackwardMmaArgs&, int64_t,  \
                                                                       void*);
#define CSAT_ATTEND_CAUSAL_BACKWARD_MMA_INSTANCE(T, size) CSAT_ATTEND_CAUSAL_BACKWARD_MMA(, T, size)

#ifndef CSAT_INSTANTIATE
#define CSAT_EXTERN_SIZE(size)                        \
  CSAT_ATTEND_CAUSAL_BACKWARD_MMA(extern, bf16, size) \
  CSAT_ATTEND_CAUSAL_BACKWARD_MMA(extern, f16, size)
CSAT_EXTERN_SIZE(32)
CSAT_EXTERN_SIZE(64)
CSAT_EXTERN_SIZE(80)
CSAT_EXTERN_SIZE(96)
CSAT_EXTERN_SIZE(128)
#undef CSAT_EXTERN_SIZE
#endif

}  // namespace csat
