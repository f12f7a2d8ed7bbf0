// Backward of attend on tensor cores, bf16 and fp16, for D and R up to 128: the formulas of attend_backward.cuh.
//
//   p = exp(s - lse), dP = dz vc^T, centre = rowsum(dz z), shift = sum p (dP - centre) / sum p
//   ds = p ((dP - centre) - shift), dq = scale ds kc, dkc = scale ds^T q, dvc = p^T dz, dbias = colsum ds
//
// A block owns one head, a slab of measurements and a range of queries, which it walks in tiles of 32. Scores are
// computed transposed: warp w holds S^T and dP^T of its 32 (features <= 64: every right operand that ldmatrix brings
// then serves two row blocks, whatever M is) or 16 measurements against the 32 queries, so that P^T and dS^T become
// left operands without leaving their lanes and dvc, dkc of these measurements stay in registers, in float32, over the
// whole range. Only dS^T, rounded to T, crosses warps, for dq. A block has as many warps as the measurements need, at
// most eight: few measurements leave room for more blocks on an SM.
//
// Data flow: kc, vc of the slab -> shared once; q, dz -> shared, the next tile in flight while one is computed; rows of
// z and dz -> registers for the centre of the next tile. Two barriers a tile:
//   before the first    this tile's rows, lse and centre have come, dS^T of the last tile is written
//   between them        dq of the last tile from dS^T -> shared; S^T, p, dvc, dP^T, this warp's sums for the shift
//   after the second    dq of the last tile -> global in vectors; shift from the sums of all warps in the order of the
//                       warps; dS^T -> registers and shared, dkc
// With several slabs no block sees all measurements of a query: backward_shift_mma_kernel writes centre and shift
// before (two products more), and dq goes as float32 partials a slab to reduce(). dkc, dvc and dbias always go there:
// partials of the ranges, and of the heads of a group, are added in a fixed order.
//
// Budget: 2 M (3 D + 2 R) FLOP a query, 2 M (D + R) more with several slabs; limits::attend_backward_mma_bytes of
// shared memory (119 KiB for 256 measurements of 64 features, 125 KiB for 128 of 128); up to 255 registers, of which
// dkc and dvc take 128 for 64 or 128 features: two blocks of four warps share an SM there, or one of eight. Limits:
// limits::plan_mma. p and ds are rounded to T before the products with them, dbias and shift take them unrounded. In
// fp16 a ds under 6e-5 is subnormal and one over 65504 infinite, as fp16 training knows it: scale the loss. Rows with
// lse = -inf have p = ds = 0, whatever vc holds.
#pragma once
#include "csat/fragments.cuh"
#include "csat/tile.cuh"

namespace csat {

struct AttendBackwardMmaArgs {
  int warps;  // of a block: a slab has warps * backward_warp_rows measurements
  int64_t heads, queries, group, measurements;
  int head_dim, features;
  View q, z, dz, kc, vc;  // with vector rows
  View lse, dq;
  bool vector_dq;  // rows of dq may be written 16 bytes at a time
  Panel bias;      // (B H)(1, M), -inf in the padding
  float scale;
  int64_t slabs, chunks, chunk_queries;         // a chunk is a multiple of a tile's queries
  float *key_parts, *value_parts, *bias_parts;  // (B H chunks)(M, kD), (M, kD), (M), M padded to slabs
  // Several slabs: (B H)(Nq) each, wgmma knows the mean gradient of the probabilities as shift alone; dq of the slabs
  // (B H slabs)(Nq, kD) or, with wgmma, of those that have been walked (B H chunks)(chunk_queries, kD).
  float *centre, *shift, *query_parts;
};

namespace slab_backward {

constexpr int kQueries = limits::kBackwardQueries;

template <typename T>
CSAT_DEVICE GlobalRows<T> rows_of(const View& v, int64_t batch, int64_t head, int64_t rows, int columns) {
  return {at<T>(v, batch, head, 0), v.stride[2], rows, columns};
}

// Where the rows of a block's queries begin in global memory, and how many there are.
template <typename T>
struct QueryRows {
  const T *q, *dz, *z;
  T* dq;
  const float* lse;
  float *centre, *shift;  // several slabs
  int count;

  CSAT_DEVICE QueryRows(const AttendBackwardMmaArgs& p, int64_t pair, int64_t first, int64_t rows)
      : QueryRows(p, pair / p.heads, pair % p.heads, first, rows) {}
  CSAT_DEVICE QueryRows(const AttendBackwardMmaArgs& p, int64_t batch, int64_t head, int64_t first, int64_t rows) {
    const int64_t pair = batch * p.heads + head;
    q = at<const T>(p.q, batch, head, first);
    dz = at<const T>(p.dz, batch, head, first);
    z = at<const T>(p.z, batch, head, first);
    dq = at<T>(p.dq, batch, head, first);
    lse = at<const float>(p.lse, batch, head, first);
    centre = p.centre ? p.centre + pair * p.queries + first : nullptr;
    shift = p.centre ? p.shift + pair * p.queries + first : nullptr;
    count = static_cast<int>(p.queries - first < rows ? p.queries - first : rows);
  }
};

// Eight elements of a row in global memory from `column` on, zeros from `columns` on.
template <typename T>
CSAT_DEVICE uint4 load_unit(const T* row, int column, int columns) {
  if (column + 8 <= columns) return *reinterpret_cast<const uint4*>(row + column);
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int c = column + 2 * i;
    pair[i] = pack2<T>(c < columns ? to_float(row[c]) : 0.f, c + 1 < columns ? to_float(row[c + 1]) : 0.f);
  }
  return {pair[0], pair[1], pair[2], pair[3]};
}

// What is known of a query before its scores: lse in units of log 2, centre = dz z and, where a kernel before has found
// them, centre and shift. Eight lanes share a query; load() asks for everything, centre() waits for it.
template <typename T, int kD>
struct QueryRow {
  static constexpr int kUnits = (kD / 8 + 7) / 8;
  uint4 z[kUnits], dz[kUnits];
  float lse, known_centre, shift;

  CSAT_DEVICE void load(const AttendBackwardMmaArgs& p, const QueryRows<T>& rows, int query, bool known) {
    const bool exists = query < rows.count;
    const int64_t r = exists ? query : 0;
    lse = exists ? rows.lse[r * p.lse.stride[2]] * kLog2e : -INFINITY;
    known_centre = known ? rows.centre[r] : 0.f;
    shift = known ? rows.shift[r] : 0.f;
    const int columns = exists && !known ? p.features : 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int column = (lane_id() % 8 + 8 * u) * 8;
      z[u] = load_unit(rows.z + r * p.z.stride[2], column, columns);
      dz[u] = load_unit(rows.dz + r * p.dz.stride[2], column, columns);
    }
  }
  CSAT_DEVICE float centre() const {
    float sum = 0.f;
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      sum += dot(z[u].x, dz[u].x) + dot(z[u].y, dz[u].y) + dot(z[u].z, dz[u].z) + dot(z[u].w, dz[u].w);
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) sum += shfl_xor(sum, mask);
    return known_centre + sum;
  }
  static CSAT_DEVICE float dot(uint32_t x, uint32_t y) {
    const float2 a = unpack2<T>(x), b = unpack2<T>(y);
    return a.x * b.x + a.y * b.y;
  }
};

// Which part of the problem a block has; blocks count (b, h, chunk, slab).
struct Place {
  int64_t slab, pair, first;  // first query
  CSAT_DEVICE explicit Place(const AttendBackwardMmaArgs& p)
      : slab(blockIdx.x % p.slabs),
        pair(blockIdx.x / p.slabs / p.chunks),
        first(blockIdx.x / p.slabs % p.chunks * p.chunk_queries) {}
};

// What all threads of a block would hold alike; it stands in shared memory, registers being short.
template <typename T>
struct Block {
  QueryRows<T> rows;
  float* query_part;                         // several slabs
  float *key_part, *value_part, *bias_part;  // of the block's first measurement
  CSAT_DEVICE Block(const AttendBackwardMmaArgs& p, const Place& at, int feature, int slab_rows)
      : rows(p, at.pair, at.first, p.chunk_queries) {
    const int64_t m = int64_t(blockIdx.x) * slab_rows;
    query_part =
        p.slabs == 1 ? nullptr : p.query_parts + ((at.pair * p.slabs + at.slab) * p.queries + at.first) * feature;
    key_part = p.key_parts + m * feature;
    value_part = p.value_parts + m * feature;
    bias_part = p.bias_parts ? p.bias_parts + m : nullptr;
  }
};

// The shared memory of a block: what is of queries, then a share of each warp, all of the same size, so that every
// offset is a constant. limits::attend_backward_mma_bytes counts it.
template <typename T, int kD>
struct QueryTiles {
  Tile<T, kD> q, dz;            // of two tiles of queries
  Tile<T, kD> dq;               // of the last tile
  float *lse, *centre, *shift;  // of two tiles; lse in units of log 2
  Block<T>* block;
  static_assert(sizeof(Block<T>) <= limits::kBackwardBlockBytes, "limits.h has room for it");
  CSAT_DEVICE explicit QueryTiles(T* memory) {
    q = {memory};
    dz = q.from_row(2 * kQueries);
    dq = dz.from_row(2 * kQueries);
    lse = reinterpret_cast<float*>(dq.row(kQueries));
    centre = lse + 2 * kQueries;
    shift = centre + 2 * kQueries;
    block = reinterpret_cast<Block<T>*>(shift + 2 * kQueries);
  }
  CSAT_DEVICE T* end() const { return reinterpret_cast<T*>(block) + limits::kBackwardBlockBytes / 2; }
};
template <typename T, int kD>
struct WarpTiles {
  static constexpr int kRows = limits::backward_warp_rows(kD);
  static constexpr int kBytes =
      static_cast<int>(limits::attend_backward_mma_bytes(1, kD) - limits::attend_backward_mma_bytes(0, kD));
  Tile<T, kD> kc, vc;    // of the measurements of a warp
  Tile<T, kQueries> ds;  // dS^T: a row a measurement
  float* bias;           // in units of log 2
  float* sums;           // (p (dP - centre), p)(query) over these measurements
  float* shift;          // of the queries, for the warp alone
  CSAT_DEVICE WarpTiles(const QueryTiles<T, kD>& before, int warp) {
    kc = {before.end() + warp * (kBytes / 2)};
    vc = kc.from_row(kRows);
    ds = {vc.row(kRows)};
    bias = reinterpret_cast<float*>(ds.row(kRows));
    sums = bias + kRows;
    shift = sums + 2 * kQueries;
  }
};

// What is known of queries first .. first + 31: query 4 w + lane / 8 for w = warp, warp + warps, .., of which the first
// has been loaded before.
template <typename T, int kD>
CSAT_DEVICE void store_query_rows(const AttendBackwardMmaArgs& p, const QueryTiles<T, kD>& s, int buffer, int first,
                                  QueryRow<T, kD>& row) {
  const int mine = 4 * warp_id() + lane_id() / 8;
  for (int r = mine; r < kQueries; r += 4 * p.warps) {
    if (r != mine) row.load(p, s.block->rows, first + r, p.slabs > 1);
    const float centre = row.centre();
    if (lane_id() % 8 == 0) {
      s.lse[buffer * kQueries + r] = row.lse;
      s.centre[buffer * kQueries + r] = centre;
      s.shift[buffer * kQueries + r] = row.shift;
    }
  }
}

// p^T, from the scores of kRows measurements and 32 queries. -inf as lse: no gradient, whatever the scores are.
template <int kRows, int kColumns>
CSAT_DEVICE void to_probabilities(Sums<kRows, kColumns>& s, float scale, const Rows<kRows>& bias,
                                  const Columns<kColumns>& lse) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float exponent = scale * s.at[i][j][e] + bias.at[i][e / 2] - lse.at[j][e % 2];
        s.at[i][j][e] = lse.at[j][e % 2] == -INFINITY ? 0.f : exp2_approx(exponent);
      }
}

// One step of a sum over lanes that differ in bit `mask`: each keeps a half of the values, so that they halve too.
template <int kCount>
CSAT_DEVICE void fold(float* x, int mask) {
  const bool upper = lane_id() & mask;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float mine = upper ? x[i + kCount / 2] : x[i], theirs = upper ? x[i] : x[i + kCount / 2];
    x[i] = mine + shfl_xor(theirs, mask);
  }
}

// dP^T - centre in place of dP^T, 0 where p is 0 whatever vc holds, for 32 columns from `first` on; returns its sums
// over this warp's rows against p in lanes 0 .. 15, the sums of p in lanes 16 .. 31, of columns 8 (lane / 4 % 4) + 2
// (lane % 4) and the next. 14 shuffles where one sum at a time takes 48; a block of columns is folded at once,
// registers being short here.
template <int kRows, int kColumns>
CSAT_DEVICE float2 subtract_centre(Sums<kRows, kColumns>& dp, const Sums<kRows, kColumns>& p, const float* centre,
                                   int first) {
  float x[8];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 c = *reinterpret_cast<const float2*>(centre + first + 8 * j + lane_id() % 4 * 2);
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float probability = p.at[i][first / 8 + j][e];
        float& d = dp.at[i][first / 8 + j][e];
        d = probability == 0.f ? 0.f : d - (e % 2 ? c.y : c.x);
        sum[e % 2] += probability * d;
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
// The same for all columns; the sums of 32 columns go to sums[0 .. 31], those of p to the 32 places after.
template <int kRows, int kColumns>
CSAT_DEVICE void subtract_centre(Sums<kRows, kColumns>& dp, const Sums<kRows, kColumns>& p, const float* centre,
                                 float* sums) {
  const int lane = lane_id();
#pragma unroll
  for (int first = 0; first < kColumns; first += 32)
    *reinterpret_cast<float2*>(sums + 2 * first + lane / 16 * 32 + lane / 4 % 4 * 8 + lane % 4 * 2) =
        subtract_centre(dp, p, centre, first);
}

// The same without sums, where the shift is known.
template <int kRows, int kColumns>
CSAT_DEVICE void subtract_centre(Sums<kRows, kColumns>& dp, const Sums<kRows, kColumns>& p,
                                 const Columns<kColumns>& centre) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) dp.at[i][j][e] = p.at[i][j][e] == 0.f ? 0.f : dp.at[i][j][e] - centre.at[j][e % 2];
}

// dS^T in place of dP^T - centre, its sums over queries added to `dbias`.
template <int kRows, int kColumns>
CSAT_DEVICE void to_score_gradients(Sums<kRows, kColumns>& dp, const Sums<kRows, kColumns>& p,
                                    const Columns<kColumns>& shift, Rows<kRows>& dbias) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = dp.at[i][j][e];
        x = p.at[i][j][e] * (x - shift.at[j][e % 2]);
        dbias.at[i][e / 2] += x;
      }
}

// The shift of a tile from the sums of all warps, in their order, `pitch` floats from one to the next.
template <int kColumns>
CSAT_DEVICE Columns<kColumns> shift_of(const float* sums, int pitch, int warps, float* own) {
  for (int first = 0; first < kColumns; first += 32) {
    float mean = 0.f, mass = 0.f;
    for (int w = 0; w < warps; ++w) {
      const float* of_warp = sums + w * pitch + 2 * first + lane_id();
      mean += of_warp[0];
      mass += of_warp[32];
    }
    own[first + lane_id()] = mass == 0.f ? 0.f : mean / mass;
  }
  sync_warp();
  return load_columns<kColumns>(own);
}

// dq of a tile of queries from dS^T over the slab: blocks of (kRows, 16), dealt to the warps.
template <int kRows, typename T, int kD>
CSAT_DEVICE void query_gradient(const AttendBackwardMmaArgs& p, const QueryTiles<T, kD>& s, int first) {
  constexpr int kRowBlocks = kQueries / kRows;
  const int units = kRowBlocks * ((p.head_dim + 15) / 16);
  for (int unit = warp_id(); unit < units; unit += p.warps) {
    const int row = unit % kRowBlocks * kRows, column = unit / kRowBlocks * 16;
    const WarpTiles<T, kD> tiles(s, 0);
    SharedAddress ds = fragment::lane_of_transposed(Tile<T, kQueries>{tiles.ds.data + row});
    SharedAddress kc = fragment::lane_of_blocks(Tile<T, kD>{tiles.kc.data + column});
    Sums<kRows, 16> dq = {};
#pragma unroll 1
    for (int w = 0; w < p.warps; ++w, ds += WarpTiles<T, kD>::kBytes, kc += WarpTiles<T, kD>::kBytes) {
#pragma unroll
      for (int m = 0; m < WarpTiles<T, kD>::kRows / 16; ++m) {
        uint32_t left[kRows / 16][1][4], right[4];
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i)
          ldmatrix_x4_transposed(left[i][0], ds + fragment::block_offset(tiles.ds, m, i));
        ldmatrix_x4_transposed(right, kc + fragment::block_offset(tiles.kc, m, 0));
        fragment::multiply_block<T>(dq, 0, left, 0, right);
      }
    }
    if (p.slabs == 1) {
      for_each(dq, [&](float& x, int, int) { x *= p.scale; });
      store_tile(s.dq.from_row(row), column, dq);
    } else {
      store_floats(s.block->query_part + int64_t(first + row) * kD + column, kD, s.block->rows.count - first - row, dq);
    }
  }
}
template <typename T, int kD>
CSAT_DEVICE void query_gradient(const AttendBackwardMmaArgs& p, const QueryTiles<T, kD>& s, int first) {
  if constexpr (kD <= 64)
    if (p.warps >= 2 * (kD / 16)) return query_gradient<16>(p, s, first);  // more loads, but a unit for every warp
  query_gradient<32>(p, s, first);
}
// What query_gradient left in shared memory of `count` rows -> global, four rows a warp at a time.
template <typename T, int kD>
CSAT_DEVICE void store_query_gradient(const AttendBackwardMmaArgs& p, const QueryRows<T>& rows, Tile<T, kD> from,
                                      int first, int count) {
  if (p.slabs > 1) return;
  const GlobalRows<T> dq{rows.dq, p.dq.stride[2], rows.count, p.head_dim};
  for (int r = 4 * warp_id(); r < count; r += 4 * p.warps) store_rows(dq, first + r, 4, from.from_row(r), p.vector_dq);
}

// The measurements of a warp: kc, vc and bias.
template <typename T, int kD>
CSAT_DEVICE void load_measurements(const AttendBackwardMmaArgs& p, const Place& at, const WarpTiles<T, kD>& own) {
  constexpr int kRows = WarpTiles<T, kD>::kRows;
  const int64_t batch = at.pair / p.heads, head = at.pair % p.heads / p.group;
  const int64_t m = (at.slab * p.warps + warp_id()) * kRows;
  load_rows_async(own.kc, rows_of<const T>(p.kc, batch, head, p.measurements, p.head_dim), m, kRows, lane_id(), 32);
  load_rows_async(own.vc, rows_of<const T>(p.vc, batch, head, p.measurements, p.features), m, kRows, lane_id(), 32);
  for (int i = lane_id(); i < kRows; i += 32) own.bias[i] = p.bias.data[at.pair * p.bias.matrix + m + i] * kLog2e;
}

// Rows first .. first + count - 1 of q and dz, asynchronously, by `threads` threads of which this is number `thread`.
template <typename T, int kD>
CSAT_DEVICE void load_queries(const AttendBackwardMmaArgs& p, const QueryRows<T>& rows, Tile<T, kD> q_tile,
                              Tile<T, kD> dz_tile, int first, int count, int thread, int threads) {
  const GlobalRows<const T> q{rows.q, p.q.stride[2], rows.count, p.head_dim};
  const GlobalRows<const T> dz{rows.dz, p.dz.stride[2], rows.count, p.features};
  load_rows_async(q_tile, q, first, count, thread, threads);
  load_rows_async(dz_tile, dz, first, count, thread, threads);
}
// A tile of queries, by the whole block.
template <typename T, int kD>
CSAT_DEVICE void load_queries(const AttendBackwardMmaArgs& p, const QueryTiles<T, kD>& s, int buffer, int first) {
  load_queries(p, s.block->rows, s.q.from_row(buffer * kQueries), s.dz.from_row(buffer * kQueries), first, kQueries,
               threadIdx.x, 32 * p.warps);
  cp_async_commit();
}

// Sums over the block's queries -> its partials in the workspace, from those of its first measurement on.
template <int kRows, int kD>
CSAT_DEVICE void store_parts(float* key_part, float* value_part, float* bias_part, const Sums<kRows, kD>& dkc,
                             const Sums<kRows, kD>& dvc, Rows<kRows>& dbias) {
  const int m = warp_id() * kRows;
  store_floats(key_part + m * kD, kD, kRows, dkc);
  store_floats(value_part + m * kD, kD, kRows, dvc);
  if (!bias_part) return;
  for_each_row(dbias, [&](float& x, int r) {
    x = quad_sum(x);
    if (lane_id() % 4 == 0) bias_part[m + r] = x;
  });
}

}  // namespace slab_backward

template <typename T, int kD>
__global__ void __launch_bounds__(limits::kMmaThreads) attend_backward_mma_kernel(AttendBackwardMmaArgs p) {
  using namespace slab_backward;
  constexpr int kRows = WarpTiles<T, kD>::kRows;
  CSAT_DYN_SMEM(T, memory);
  const QueryTiles<T, kD> s(memory);
  const WarpTiles<T, kD> own(s, warp_id());
  if (threadIdx.x == 0) *s.block = Block<T>(p, Place(p), kD, p.warps * kRows);
  load_measurements(p, Place(p), own);
  __syncthreads();
  const int queries = s.block->rows.count, row_of_lane = 4 * warp_id() + lane_id() / 8;
  load_queries(p, s, 0, 0);
  QueryRow<T, kD> row;
  row.load(p, s.block->rows, row_of_lane, p.slabs > 1);
  store_query_rows(p, s, 0, 0, row);

  Sums<kRows, kD> dkc = {}, dvc = {};
  Rows<kRows> dbias = {};
  int now = 0;
  for (int first = 0; first < queries; first += kQueries, now ^= 1) {
    const int next = first + kQueries;
    const Tile<T, kD> q_tile = s.q.from_row(now * kQueries), dz_tile = s.dz.from_row(now * kQueries);
    cp_async_wait<0>();
    __syncthreads();
    if (next < queries) {
      load_queries(p, s, now ^ 1, next);
      row.load(p, s.block->rows, next + row_of_lane, p.slabs > 1);
    }
    if (first > 0) query_gradient(p, s, first - kQueries);
    if (next < queries) store_query_rows(p, s, now ^ 1, next, row);

    const Columns<kQueries> lse = load_columns<kQueries>(s.lse + now * kQueries);
    Sums<kRows, kQueries> probability = {}, ds = {};
    multiply_transposed(probability, own.kc, q_tile);
    Rows<kRows> bias;
    for_each_row(bias, [&](float& x, int r) { x = own.bias[r]; });
    to_probabilities(probability, p.scale * kLog2e, bias, lse);
    multiply(dvc, to_operand<T>(probability), dz_tile);
    multiply_transposed(ds, own.vc, dz_tile);
    subtract_centre(ds, probability, s.centre + now * kQueries, own.sums);
    __syncthreads();

    const Columns<kQueries> shift =
        p.slabs == 1 ? shift_of<kQueries>(WarpTiles<T, kD>(s, 0).sums, WarpTiles<T, kD>::kBytes / 4, p.warps, own.shift)
                     : load_columns<kQueries>(s.shift + now * kQueries);
    to_score_gradients(ds, probability, shift, dbias);
    const Operand<T, kRows, kQueries> left = to_operand<T>(ds);
    store_tile(own.ds, left);
    multiply(dkc, left, q_tile);
    if (first > 0) store_query_gradient(p, s.block->rows, s.dq, first - kQueries, kQueries);
  }
  const int last = (queries - 1) / kQueries * kQueries;
  __syncthreads();
  query_gradient(p, s, last);
  __syncthreads();
  store_query_gradient(p, s.block->rows, s.dq, last, kQueries);

  store_parts(s.block->key_part, s.block->value_part, s.block->bias_part, dkc, dvc, dbias);
}

namespace slab_backward {

// The shared memory of backward_shift_mma_kernel; limits::backward_shift_mma_bytes counts it.
template <typename T, int kD>
struct ShiftTiles {
  static constexpr int kRows = 16 * limits::kMmaWarps, kDepth = limits::kBackwardShiftDepth;
  Tile<T, kD> q, dz;   // of the block's queries
  Tile<T, kD> kc, vc;  // of two tiles of measurements
  float* bias;         // of the same
  float *lse, *centre;
  CSAT_DEVICE explicit ShiftTiles(T* memory) {
    q = {memory};
    dz = q.from_row(kRows);
    kc = dz.from_row(kRows);
    vc = kc.from_row(2 * kDepth);
    bias = reinterpret_cast<float*>(vc.row(2 * kDepth));
    lse = bias + 2 * kDepth;
    centre = lse + kRows;
  }

  CSAT_DEVICE void load_queries(const AttendBackwardMmaArgs& p, const QueryRows<T>& rows) const {
    const GlobalRows<const T> from_q{rows.q, p.q.stride[2], rows.count, p.head_dim};
    const GlobalRows<const T> from_dz{rows.dz, p.dz.stride[2], rows.count, p.features};
    load_rows_async(q, from_q, 0, kRows, threadIdx.x, limits::kMmaThreads);
    load_rows_async(dz, from_dz, 0, kRows, threadIdx.x, limits::kMmaThreads);
    for (int r = 16 * warp_id() + lane_id() / 8; r < 16 * warp_id() + 16; r += 4) {
      QueryRow<T, kD> row;
      row.load(p, rows, r, false);
      const float sum = row.centre();
      if (lane_id() % 8 == 0) lse[r] = row.lse, centre[r] = sum;
    }
  }
  CSAT_DEVICE void load_measurements(const AttendBackwardMmaArgs& p, int64_t pair, int64_t m, int buffer) const {
    const int64_t batch = pair / p.heads, head = pair % p.heads / p.group;
    const int first = buffer * kDepth, thread = threadIdx.x;
    load_rows_async(kc.from_row(first), rows_of<const T>(p.kc, batch, head, p.measurements, p.head_dim), m, kDepth,
                    thread, limits::kMmaThreads);
    load_rows_async(vc.from_row(first), rows_of<const T>(p.vc, batch, head, p.measurements, p.features), m, kDepth,
                    thread, limits::kMmaThreads);
    if (thread < kDepth / 4) cp_async16(bias + first + thread * 4, p.bias.data + pair * p.bias.matrix + m + thread * 4);
    cp_async_commit();
  }
};

// What this lane holds of the sums of p (dP - centre) and of p over a tile of measurements, added to `mean`, `mass`.
template <int kDepth>
CSAT_DEVICE void add_to_sums(Rows<16>& mean, Rows<16>& mass, const Sums<16, kDepth>& s, const Sums<16, kDepth>& dp,
                             float scale, const Columns<kDepth>& bias, const Rows<16>& lse, const Rows<16>& centre) {
#pragma unroll
  for (int j = 0; j < kDepth / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int h = e / 2;
      const bool empty = lse.at[0][h] == -INFINITY;
      const float exponent = scale * s.at[0][j][e] + kLog2e * bias.at[j][e % 2] - lse.at[0][h];
      const float p = empty ? 0.f : exp2_approx(exponent);
      mean.at[0][h] += p == 0.f ? 0.f : p * (dp.at[0][j][e] - centre.at[0][h]);
      mass.at[0][h] += p;
    }
}

}  // namespace slab_backward

// centre and shift of 128 queries of one head: a warp holds 16 of them in registers and walks all measurements.
template <typename T, int kD>
__global__ void __launch_bounds__(limits::kMmaThreads) backward_shift_mma_kernel(AttendBackwardMmaArgs p) {
  using namespace slab_backward;
  using Tiles = ShiftTiles<T, kD>;
  constexpr int kDepth = Tiles::kDepth;
  CSAT_DYN_SMEM(T, memory);
  const Tiles s(memory);
  const int64_t tiles = (p.queries + Tiles::kRows - 1) / Tiles::kRows, pair = blockIdx.x / tiles;
  const int own = 16 * warp_id();
  const QueryRows<T> rows(p, pair, blockIdx.x % tiles * Tiles::kRows, Tiles::kRows);
  s.load_queries(p, rows);
  s.load_measurements(p, pair, 0, 0);
  cp_async_wait<0>();
  __syncthreads();
  const Operand<T, 16, kD> q = load_operand<16>(s.q.from_row(own)), dz = load_operand<16>(s.dz.from_row(own));
  Rows<16> lse, centre, mean = {}, mass = {};
  for_each_row(lse, [&](float& x, int r) { x = s.lse[own + r]; });
  for_each_row(centre, [&](float& x, int r) { x = s.centre[own + r]; });

  int now = 0;
  for (int64_t m = 0; m < p.measurements; m += kDepth, now ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    if (m + kDepth < p.measurements) s.load_measurements(p, pair, m + kDepth, now ^ 1);
    Sums<16, kDepth> scores = {}, dp = {};
    multiply_transposed(scores, q, s.kc.from_row(now * kDepth));
    multiply_transposed(dp, dz, s.vc.from_row(now * kDepth));
    add_to_sums(mean, mass, scores, dp, p.scale * kLog2e, load_columns<kDepth>(s.bias + now * kDepth), lse, centre);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = quad_sum(mean.at[0][h]), total = quad_sum(mass.at[0][h]);
    const int query = own + 8 * h + lane_id() / 4;
    if (lane_id() % 4 != 0 || query >= rows.count) continue;
    rows.centre[query] = centre.at[0][h];
    rows.shift[query] = total == 0.f ? 0.f : sum / total;
  }
}

template <typename T, int kD>
int launch_attend_backward_mma(const AttendBackwardMmaArgs& p, int64_t blocks, void* stream) {
  auto kernel = attend_backward_mma_kernel<T, kD>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(32 * p.warps)),
              static_cast<size_t>(limits::attend_backward_mma_bytes(p.warps, kD)), stream, p);
  return last_error();
}
template <typename T, int kD>
int launch_backward_shift_mma(const AttendBackwardMmaArgs& p, int64_t blocks, void* stream) {
  auto kernel = backward_shift_mma_kernel<T, kD>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kMmaThreads),
              static_cast<size_t>(limits::backward_shift_mma_bytes(kD)), stream, p);
  return last_error();
}

// csrc/kernels/instances/attend_backward_mma_<size>.cu instantiates these; everything else only refers to them.
#define CSAT_ATTEND_BACKWARD_MMA(prefix, T, size)                                                        \
  prefix template int launch_attend_backward_mma<T, size>(const AttendBackwardMmaArgs&, int64_t, void*); \
  prefix template int launch_backward_shift_mma<T, size>(const AttendBackwardMmaArgs&, int64_t, void*);
#define CSAT_ATTEND_BACKWARD_MMA_INSTANCE(T, size) CSAT_ATTEND_BACKWARD_MMA(, T, size)

#ifndef CSAT_INSTANTIATE
#define CSAT_EXTERN_SIZE(size)                 \
  CSAT_ATTEND_BACKWARD_MMA(extern, bf16, size) \
  CSAT_ATTEND_BACKWARD_MMA(extern, f16, size)
CSAT_EXTERN_SIZE(32)
CSAT_EXTERN_SIZE(64)
CSAT_EXTERN_SIZE(80)
CSAT_EXTERN_SIZE(96)
CSAT_EXTERN_SIZE(128)
#undef CSAT_EXTERN_SIZE
#endif

}  // namespace csat
