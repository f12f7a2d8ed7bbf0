// Backward of attend, from the saved lse (probabilities are recomputed, never stored in global memory):
//
//   p = exp(s - lse), dP = dz vc^T, delta = rowsum(p dP) / rowsum(p), ds = p (dP - delta)
//   query_backward        delta for both kernels, dq = scale ds kc; one block a tile of queries, two passes over kc, vc
//   measurement_backward  dkc = scale ds^T q, dvc = p^T dz, dbias = colsum ds; one block a (head, chunk of queries,
//                         64 measurements), which walks its query tiles in order and adds to a partial sum of its own
//                         in the workspace; reduce() then adds chunks and the heads of a group in a fixed order
//
// delta equals rowsum(dz z), but z has been rounded to T, and where measured values are alike ds is a small difference
// that this rounding would swamp. rowsum(dz z) is therefore only the centre: dP - centre is summed against p, divided
// by the mass that a rounded lse leaves near 1, and kept apart as the shift: ds = p ((dP - centre) - shift).
//
// Data flow: rows of q and dz -> shared; kc^T and vc^T (query_backward: kc too) streamed as panels; p and ds -> shared;
// query_backward keeps dq in shared, measurement_backward adds to L2-resident partials (one read and write a 32 FMA).
// Budget of a row: 2 M (3 D + 2 R) FLOP in query_backward, 2 M (2 D + 2 R) in measurement_backward; shared memory
// limits::query_backward_row and limits::measurement_backward_row floats. Rows with lse = -inf have p = ds = 0.
#pragma once
#include "csat/tile.cuh"

namespace csat {

struct AttendBackwardArgs {
  int rows;
  int64_t heads, queries, group;
  int head_dim, features;
  View q, z, dz, lse, dq;
  Panel keys_t, values_t, keys, bias;  // (B Hk)(D, M), (B Hk)(R, M), (B Hk)(M, D), (B H)(1, M)
  float *centre, *shift;               // (B, H, Nq) each: delta = centre + shift
  int q_pitch, dz_pitch, dq_pitch, measurement_tile;
  float scale;
  // measurement_backward
  int64_t chunks, chunk_queries;                // a chunk is a multiple of `rows` queries
  float *key_parts, *value_parts, *bias_parts;  // (B H chunks)(M, D), (M, R), (M), M padded to 64
};

// Panels of one head at this lane's column, (D, M) and (R, M) of `pitch` floats a row and (M, D).
struct GradientPanels {
  const float *keys_t, *values_t, *keys;
  int64_t pitch, keys_pitch;

  CSAT_DEVICE GradientPanels(const Panel& keys_t, const Panel& values_t, const Panel& keys, int64_t pair)
      : keys_t(keys_t.data + pair * keys_t.matrix + lane_id()),
        values_t(values_t.data + pair * values_t.matrix + lane_id()),
        keys(keys.data + pair * keys.matrix + lane_id()),
        pitch(keys_t.pitch),
        keys_pitch(keys.pitch) {}
};

// The score of row `row` against measurement m, where every row sees every measurement. What stands in its place in
// attend_causal.cuh looks at the rows of a tile before.
struct BiasedScore {
  float scale;
  const float* bias;
  CSAT_DEVICE void move_to(int64_t, int) const {}
  CSAT_DEVICE float operator()(int, int64_t m, float product) const { return scale * product + bias[m]; }
};

// Calls store(r, i, p, dP - centre) for the micro-tile of rows row .. row + 7 and measurements m .. m + 63.
template <typename Score, typename F>
CSAT_DEVICE void score_gradients(const AttendBackwardArgs& p, const float* q, int q_pitch, const float* dz,
                                 int dz_pitch, const GradientPanels& of, int row, int64_t m, const Score& score,
                                 const float* lse, const float* centre, F store) {
  Accumulator s = {}, dp = {};
  multiply(s, q + row * q_pitch, q_pitch, of.keys_t + m, of.pitch, p.q_pitch);
  multiply(dp, dz + row * dz_pitch, dz_pitch, of.values_t + m, of.pitch, p.dz_pitch);
#pragma unroll
  for (int r = 0; r < limits::kMicroRows; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool empty = lse[row + r] == -INFINITY;  // no gradient, whatever vc holds
      const float of_row = score(row + r, m + lane_id() + 32 * i, s[r][i]);
      const float probability = empty ? 0.f : exp_f32(of_row - lse[row + r]);
      store(r, i, probability, empty ? 0.f : dp[r][i] - centre[row + r]);
    }
}

// The tile of query_backward in shared memory.
struct QueryGradientRows {
  float *q, *dz, *ds, *dq, *lse, *centre, *shift;
  float* sums;  // (columns of micro-tiles, rows): (p (dP - centre), p)
  float* end;
  static constexpr int kColumns = limits::kMeasurementTile / limits::kMicroColumns;

  CSAT_DEVICE QueryGradientRows(const AttendBackwardArgs& p, float* shared) {
    q = shared;
    dz = q + p.rows * p.q_pitch;
    ds = dz + p.rows * p.dz_pitch;
    dq = ds + p.rows * p.measurement_tile;
    lse = dq + p.rows * p.dq_pitch;
    centre = lse + p.rows;
    shift = centre + p.rows;
    sums = shift + p.rows;
    end = sums + 2 * kColumns * p.rows;
  }
};

template <typename T>
CSAT_DEVICE void begin_query_gradients(const AttendBackwardArgs& p, const RowTile& tile, const QueryGradientRows& x) {
  const int lane = lane_id();
  load_rows(x.q, p.q_pitch, p.rows, at<const T>(p.q, tile.batch, tile.head, tile.first), p.q.stride[2], p.q.stride[3],
            tile.valid, p.head_dim);
  load_rows(x.dz, p.dz_pitch, p.rows, at<const T>(p.dz, tile.batch, tile.head, tile.first), p.dz.stride[2],
            p.dz.stride[3], tile.valid, p.features);
  fill(x.dq, p.rows * p.dq_pitch, 0.f);
  __syncthreads();
  for (int r = warp_id(); r < p.rows; r += limits::kWarps) {
    float sum = 0.f;
    if (r < tile.valid) {
      const T* z = at<const T>(p.z, tile.batch, tile.head, tile.first + r);
      for (int c = lane; c < p.features; c += 32) sum += x.dz[r * p.dz_pitch + c] * to_float(z[c * p.z.stride[3]]);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      x.centre[r] = sum;
      x.lse[r] = r < tile.valid ? *at<const float>(p.lse, tile.batch, tile.head, tile.first + r) : -INFINITY;
    }
  }
  fill(x.sums, 2 * QueryGradientRows::kColumns * p.rows, 0.f);
  __syncthreads();
}

// Takes measurements begin .. end - 1, multiples of 64, into the sums for the shift.
template <typename Score>
CSAT_DEVICE void sum_score_gradients(const AttendBackwardArgs& p, const QueryGradientRows& x, const GradientPanels& of,
                                     int64_t begin, int64_t end, const Score& score) {
  const int span = p.measurement_tile;
  for (int64_t m0 = begin; m0 < end; m0 += span) {
    const int columns = end - m0 < span ? static_cast<int>(end - m0) : span;
    for_each_micro_tile(p.rows, columns, [&](int row, int column) {
      float mean[limits::kMicroRows] = {}, mass[limits::kMicroRows] = {};
      score_gradients(p, x.q, p.q_pitch, x.dz, p.dz_pitch, of, row, m0 + column, score, x.lse, x.centre,
                      [&](int r, int, float probability, float dp) {
                        mean[r] += probability * dp;
                        mass[r] += probability;
                      });
      float* out = x.sums + 2 * (column / limits::kMicroColumns * p.rows + row);  // always the same warp's
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r) {
        mean[r] = warp_sum(mean[r]);
        mass[r] = warp_sum(mass[r]);
        if (lane_id() == 0) out[2 * r] += mean[r], out[2 * r + 1] += mass[r];
      }
    });
  }
}

CSAT_DEVICE void find_shift(const AttendBackwardArgs& p, const RowTile& tile, const QueryGradientRows& x) {
  const int64_t pair = tile.batch * p.heads + tile.head;
  __syncthreads();
  for (int r = threadIdx.x; r < p.rows; r += limits::kThreads) {
    float mean = 0.f, mass = 0.f;
    for (int i = 0; i < QueryGradientRows::kColumns; ++i)
      mean += x.sums[2 * (i * p.rows + r)], mass += x.sums[2 * (i * p.rows + r) + 1];
    x.shift[r] = mass == 0.f ? 0.f : mean / mass;
    if (r < tile.valid) {
      p.centre[pair * p.queries + tile.first + r] = x.centre[r];
      p.shift[pair * p.queries + tile.first + r] = x.shift[r];
    }
  }
  __syncthreads();
}

// Adds what measurements begin .. end - 1 give to dq.
template <typename Score>
CSAT_DEVICE void add_query_gradients(const AttendBackwardArgs& p, const QueryGradientRows& x, const GradientPanels& of,
                                     int64_t begin, int64_t end, const Score& score) {
  const int span = p.measurement_tile, lane = lane_id();
  for (int64_t m0 = begin; m0 < end; m0 += span) {
    const int columns = end - m0 < span ? static_cast<int>(end - m0) : span;
    for_each_micro_tile(p.rows, columns, [&](int row, int column) {
      float* out = x.ds + row * span + column + lane;
      score_gradients(p, x.q, p.q_pitch, x.dz, p.dz_pitch, of, row, m0 + column, score, x.lse, x.centre,
                      [&](int r, int i, float probability, float dp) {
                        out[r * span + 32 * i] = probability * (dp - x.shift[row + r]);
                      });
    });
    __syncthreads();
    for_each_micro_tile(p.rows, p.dq_pitch, [&](int row, int column) {
      float* out = x.dq + row * p.dq_pitch + column + lane;
      Accumulator acc;
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r)
        acc[r][0] = out[r * p.dq_pitch], acc[r][1] = out[r * p.dq_pitch + 32];
      multiply(acc, x.ds + row * span, span, of.keys + m0 * of.keys_pitch + column, of.keys_pitch, columns);
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r)
        out[r * p.dq_pitch] = acc[r][0], out[r * p.dq_pitch + 32] = acc[r][1];
    });
    __syncthreads();
  }
}

template <typename T>
CSAT_DEVICE void store_query_gradients(const AttendBackwardArgs& p, const RowTile& tile, const QueryGradientRows& x) {
  for (int r = warp_id(); r < tile.valid; r += limits::kWarps) {
    T* out = at<T>(p.dq, tile.batch, tile.head, tile.first + r);
    for (int c = lane_id(); c < p.head_dim; c += 32)
      out[c * p.dq.stride[3]] = from_float<T>(p.scale * x.dq[r * p.dq_pitch + c]);
  }
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads) query_backward_kernel(AttendBackwardArgs p) {
  CSAT_DYN_SMEM(float, shared);
  const QueryGradientRows x(p, shared);
  const RowTile tile = row_tile_at(blockIdx.x, p.heads, p.queries, p.rows);
  const int64_t pair = tile.batch * p.heads + tile.head;
  const GradientPanels of(p.keys_t, p.values_t, p.keys, pair / p.group);
  const BiasedScore score{p.scale, p.bias.data + pair * p.bias.matrix};
  begin_query_gradients<T>(p, tile, x);
  sum_score_gradients(p, x, of, 0, p.keys_t.pitch, score);
  find_shift(p, tile, x);
  add_query_gradients(p, x, of, 0, p.keys_t.pitch, score);
  store_query_gradients<T>(p, tile, x);
}

// target (64 rows of `pitch` floats, in global memory) (+)= x (rows, 64)^T y (rows, columns), both in shared memory.
CSAT_DEVICE void add_outer(float* target, int pitch, const float* x, const float* y, int rows, int columns,
                           bool first) {
  constexpr int kGroups = limits::kMicroColumns / limits::kOuterRows;
  for (int i = warp_id(); i < kGroups * (columns / limits::kMicroColumns); i += limits::kWarps) {
    const int m = i % kGroups * limits::kOuterRows, c = i / kGroups * limits::kMicroColumns + lane_id();
    float acc[limits::kOuterRows][2];
    float* out = target + static_cast<int64_t>(m) * pitch + c;
#pragma unroll
    for (int r = 0; r < limits::kOuterRows; ++r) {
      acc[r][0] = first ? 0.f : out[static_cast<int64_t>(r) * pitch];
      acc[r][1] = first ? 0.f : out[static_cast<int64_t>(r) * pitch + 32];
    }
    multiply_outer(acc, x + m, limits::kMicroColumns, y + c, columns, rows);
#pragma unroll
    for (int r = 0; r < limits::kOuterRows; ++r) {
      out[static_cast<int64_t>(r) * pitch] = acc[r][0];
      out[static_cast<int64_t>(r) * pitch + 32] = acc[r][1];
    }
  }
}

// Where the sums of a block of measurement_backward go, those of its first measurement; bias null: not wanted.
struct MeasurementParts {
  float *keys, *values, *bias;
};

// dkc, dvc and dbias of measurements m0 .. m0 + 63 from queries begin .. end - 1.
template <typename T, typename Score>
CSAT_DEVICE void measurement_gradients(const AttendBackwardArgs& p, float* shared, int64_t pair,
                                       const GradientPanels& of, int64_t m0, int64_t begin, int64_t end,
                                       const Score& score, const MeasurementParts& parts) {
  constexpr int kSpan = limits::kMicroColumns;
  const int rows = p.rows, d_pitch = p.dq_pitch, r_pitch = (p.features + kSpan - 1) / kSpan * kSpan;
  float* q = shared;
  float* dz = q + rows * d_pitch;
  float* probability = dz + rows * r_pitch;
  float* ds = probability + rows * kSpan;
  float* lse = ds + rows * kSpan;
  float* centre = lse + rows;
  float* shift = centre + rows;
  const int64_t batch = pair / p.heads, head = pair % p.heads;

  float bias_sum = 0.f;  // of measurement m0 + threadIdx.x
  for (int64_t first = begin; first < end; first += rows) {
    const int valid = end - first < rows ? static_cast<int>(end - first) : rows;
    load_rows(q, d_pitch, rows, at<const T>(p.q, batch, head, first), p.q.stride[2], p.q.stride[3], valid, p.head_dim);
    load_rows(dz, r_pitch, rows, at<const T>(p.dz, batch, head, first), p.dz.stride[2], p.dz.stride[3], valid,
              p.features);
    for (int r = threadIdx.x; r < rows; r += limits::kThreads) {
      lse[r] = r < valid ? *at<const float>(p.lse, batch, head, first + r) : -INFINITY;
      centre[r] = r < valid ? p.centre[pair * p.queries + first + r] : 0.f;
      shift[r] = r < valid ? p.shift[pair * p.queries + first + r] : 0.f;
    }
    score.move_to(first, valid);
    __syncthreads();
    for_each_micro_tile(rows, kSpan, [&](int row, int) {
      const int offset = row * kSpan + lane_id();
      score_gradients(p, q, d_pitch, dz, r_pitch, of, row, m0, score, lse, centre,
                      [&](int r, int i, float prob, float dp) {
                        probability[offset + r * kSpan + 32 * i] = prob;
                        ds[offset + r * kSpan + 32 * i] = prob * (dp - shift[row + r]);
                      });
    });
    __syncthreads();
    add_outer(parts.keys, d_pitch, ds, q, rows, d_pitch, first == begin);
    add_outer(parts.values, r_pitch, probability, dz, rows, r_pitch, first == begin);
    if (threadIdx.x < kSpan)
      for (int r = 0; r < rows; ++r) bias_sum += ds[r * kSpan + threadIdx.x];
    __syncthreads();
  }
  if (parts.bias && threadIdx.x < kSpan) parts.bias[threadIdx.x] = bias_sum;
}

// What a block of measurement_backward works on: blocks count (b, h, chunk of queries, 64 measurements).
struct MeasurementPlace {
  int64_t m0, pair, begin, end;  // queries begin .. end - 1
  MeasurementParts parts;

  CSAT_DEVICE explicit MeasurementPlace(const AttendBackwardArgs& p) {
    constexpr int kSpan = limits::kMicroColumns;
    const int64_t spans = p.keys_t.pitch / kSpan, slot = blockIdx.x / spans;
    m0 = blockIdx.x % spans * kSpan;
    pair = slot / p.chunks;
    begin = slot % p.chunks * p.chunk_queries;
    end = begin + p.chunk_queries < p.queries ? begin + p.chunk_queries : p.queries;
    const int64_t row = slot * p.keys_t.pitch + m0;
    parts = {p.key_parts + row * p.dq_pitch, p.value_parts + row * ((p.features + kSpan - 1) / kSpan * kSpan),
             p.bias_parts ? p.bias_parts + row : nullptr};
  }
};

// Four blocks an SM leave 128 registers a thread: left to itself ptxas takes 80 on sm_90a and spills.
template <typename T>
__global__ void __launch_bounds__(limits::kThreads, 4) measurement_backward_kernel(AttendBackwardArgs p) {
  CSAT_DYN_SMEM(float, shared);
  const MeasurementPlace place(p);
  const GradientPanels of(p.keys_t, p.values_t, p.keys, place.pair / p.group);
  measurement_gradients<T>(p, shared, place.pair, of, place.m0, place.begin, place.end,
                           BiasedScore{p.scale, p.bias.data + place.pair * p.bias.matrix}, place.parts);
}

template <typename T>
int launch_query_backward(const AttendBackwardArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = query_backward_kernel<T>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}
template <typename T>
int launch_measurement_backward(const AttendBackwardArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = measurement_backward_kernel<T>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}

}  // namespace csat
