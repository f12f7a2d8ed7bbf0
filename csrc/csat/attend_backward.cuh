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
  int64_t heads, queries, group, measurements;
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

// Calls store(r, i, p, dP - centre) for one micro-tile whose columns are measurements `column` .. + 63 of the panels.
template <typename F>
CSAT_DEVICE void score_gradients(const AttendBackwardArgs& p, const float* q, int q_pitch, const float* dz,
                                 int dz_pitch, const float* keys_t, const float* values_t, const float* bias,
                                 const float* lse, const float* centre, F store) {
  Accumulator s = {}, dp = {};
  multiply(s, q, q_pitch, keys_t, p.keys_t.pitch, p.q_pitch);
  multiply(dp, dz, dz_pitch, values_t, p.values_t.pitch, p.dz_pitch);
#pragma unroll
  for (int r = 0; r < limits::kMicroRows; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool empty = lse[r] == -INFINITY;  // no gradient, whatever vc holds
      const float probability = empty ? 0.f : exp_f32(p.scale * s[r][i] + bias[32 * i] - lse[r]);
      store(r, i, probability, empty ? 0.f : dp[r][i] - centre[r]);
    }
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads) query_backward_kernel(AttendBackwardArgs p) {
  CSAT_DYN_SMEM(float, shared);
  const int rows = p.rows, span = p.measurement_tile, lane = lane_id();
  float* q = shared;
  float* dz = q + rows * p.q_pitch;
  float* ds = dz + rows * p.dz_pitch;
  float* dq = ds + rows * span;
  float* lse = dq + rows * p.dq_pitch;
  float* centre = lse + rows;
  float* shift = centre + rows;
  float* sums = shift + rows;  // (columns of micro-tiles, rows): (p (dP - centre), p)
  const RowTile tile = row_tile_at(blockIdx.x, p.heads, p.queries, rows);
  const int64_t pair = tile.batch * p.heads + tile.head, key_pair = pair / p.group;
  const float* keys_t = p.keys_t.data + key_pair * p.keys_t.matrix + lane;
  const float* values_t = p.values_t.data + key_pair * p.values_t.matrix + lane;
  const float* keys = p.keys.data + key_pair * p.keys.matrix + lane;
  const float* bias = p.bias.data + pair * p.bias.matrix + lane;

  load_rows(q, p.q_pitch, rows, at<const T>(p.q, tile.batch, tile.head, tile.first), p.q.stride[2], p.q.stride[3],
            tile.valid, p.head_dim);
  load_rows(dz, p.dz_pitch, rows, at<const T>(p.dz, tile.batch, tile.head, tile.first), p.dz.stride[2], p.dz.stride[3],
            tile.valid, p.features);
  fill(dq, rows * p.dq_pitch, 0.f);
  __syncthreads();
  for (int r = warp_id(); r < rows; r += limits::kWarps) {
    float sum = 0.f;
    if (r < tile.valid) {
      const T* z = at<const T>(p.z, tile.batch, tile.head, tile.first + r);
      for (int c = lane; c < p.features; c += 32) sum += dz[r * p.dz_pitch + c] * to_float(z[c * p.z.stride[3]]);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      centre[r] = sum;
      lse[r] = r < tile.valid ? *at<const float>(p.lse, tile.batch, tile.head, tile.first + r) : -INFINITY;
    }
  }
  constexpr int kColumns = limits::kMeasurementTile / limits::kMicroColumns;
  fill(sums, 2 * kColumns * rows, 0.f);
  __syncthreads();

  for (int64_t m0 = 0; m0 < p.measurements; m0 += span) {
    const int columns = p.keys_t.pitch - m0 < span ? static_cast<int>(p.keys_t.pitch - m0) : span;
    for_each_micro_tile(rows, columns, [&](int row, int column) {
      const int64_t m = m0 + column;
      float mean[limits::kMicroRows] = {}, mass[limits::kMicroRows] = {};
      score_gradients(p, q + row * p.q_pitch, p.q_pitch, dz + row * p.dz_pitch, p.dz_pitch, keys_t + m, values_t + m,
                      bias + m, lse + row, centre + row, [&](int r, int, float probability, float dp) {
                        mean[r] += probability * dp;
                        mass[r] += probability;
                      });
      float* out = sums + 2 * (column / limits::kMicroColumns * rows + row);  // always the same warp's
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r) {
        mean[r] = warp_sum(mean[r]);
        mass[r] = warp_sum(mass[r]);
        if (lane == 0) out[2 * r] += mean[r], out[2 * r + 1] += mass[r];
      }
    });
  }
  __syncthreads();
  for (int r = threadIdx.x; r < rows; r += limits::kThreads) {
    float mean = 0.f, mass = 0.f;
    for (int i = 0; i < kColumns; ++i) mean += sums[2 * (i * rows + r)], mass += sums[2 * (i * rows + r) + 1];
    shift[r] = mass == 0.f ? 0.f : mean / mass;
    if (r < tile.valid) {
      p.centre[pair * p.queries + tile.first + r] = centre[r];
      p.shift[pair * p.queries + tile.first + r] = shift[r];
    }
  }
  __syncthreads();

  for (int64_t m0 = 0; m0 < p.measurements; m0 += span) {
    const int columns = p.keys_t.pitch - m0 < span ? static_cast<int>(p.keys_t.pitch - m0) : span;
    for_each_micro_tile(rows, columns, [&](int row, int column) {
      const int64_t m = m0 + column;
      float* out = ds + row * span + column + lane;
      score_gradients(p, q + row * p.q_pitch, p.q_pitch, dz + row * p.dz_pitch, p.dz_pitch, keys_t + m, values_t + m,
                      bias + m, lse + row, centre + row, [&](int r, int i, float probability, float dp) {
                        out[r * span + 32 * i] = probability * (dp - shift[row + r]);
                      });
    });
    __syncthreads();
    for_each_micro_tile(rows, p.dq_pitch, [&](int row, int column) {
      float* out = dq + row * p.dq_pitch + column + lane;
      Accumulator acc;
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r)
        acc[r][0] = out[r * p.dq_pitch], acc[r][1] = out[r * p.dq_pitch + 32];
      multiply(acc, ds + row * span, span, keys + m0 * p.keys.pitch + column, p.keys.pitch, columns);
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r)
        out[r * p.dq_pitch] = acc[r][0], out[r * p.dq_pitch + 32] = acc[r][1];
    });
    __syncthreads();
  }
  for (int r = warp_id(); r < tile.valid; r += limits::kWarps) {
    T* out = at<T>(p.dq, tile.batch, tile.head, tile.first + r);
    for (int c = lane; c < p.head_dim; c += 32)
      out[c * p.dq.stride[3]] = from_float<T>(p.scale * dq[r * p.dq_pitch + c]);
  }
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

// Four blocks an SM leave 128 registers a thread: left to itself ptxas takes 80 on sm_90a and spills.
template <typename T>
__global__ void __launch_bounds__(limits::kThreads, 4) measurement_backward_kernel(AttendBackwardArgs p) {
  CSAT_DYN_SMEM(float, shared);
  constexpr int kSpan = limits::kMicroColumns;
  const int rows = p.rows, lane = lane_id();
  const int d_pitch = static_cast<int>(p.keys.pitch), r_pitch = (p.features + kSpan - 1) / kSpan * kSpan;
  float* q = shared;
  float* dz = q + rows * d_pitch;
  float* probability = dz + rows * r_pitch;
  float* ds = probability + rows * kSpan;
  float* lse = ds + rows * kSpan;
  float* centre = lse + rows;
  float* shift = centre + rows;
  const int64_t spans = p.keys_t.pitch / kSpan;
  const int64_t m0 = blockIdx.x % spans * kSpan, slot = blockIdx.x / spans;  // slot: (b, h, chunk)
  const int64_t chunk = slot % p.chunks, pair = slot / p.chunks, key_pair = pair / p.group;
  const int64_t batch = pair / p.heads, head = pair % p.heads;
  const float* keys_t = p.keys_t.data + key_pair * p.keys_t.matrix + m0 + lane;
  const float* values_t = p.values_t.data + key_pair * p.values_t.matrix + m0 + lane;
  const float* bias = p.bias.data + pair * p.bias.matrix + m0 + lane;
  float* key_part = p.key_parts + (slot * p.keys_t.pitch + m0) * d_pitch;
  float* value_part = p.value_parts + (slot * p.keys_t.pitch + m0) * r_pitch;
  const int64_t begin = chunk * p.chunk_queries;
  const int64_t end = begin + p.chunk_queries < p.queries ? begin + p.chunk_queries : p.queries;

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
    __syncthreads();
    for_each_micro_tile(rows, kSpan, [&](int row, int) {
      const int offset = row * kSpan + lane;
      score_gradients(p, q + row * d_pitch, d_pitch, dz + row * r_pitch, r_pitch, keys_t, values_t, bias, lse + row,
                      centre + row, [&](int r, int i, float prob, float dp) {
                        probability[offset + r * kSpan + 32 * i] = prob;
                        ds[offset + r * kSpan + 32 * i] = prob * (dp - shift[row + r]);
                      });
    });
    __syncthreads();
    add_outer(key_part, d_pitch, ds, q, rows, d_pitch, first == begin);
    add_outer(value_part, r_pitch, probability, dz, rows, r_pitch, first == begin);
    if (threadIdx.x < kSpan)
      for (int r = 0; r < rows; ++r) bias_sum += ds[r * kSpan + threadIdx.x];
    __syncthreads();
  }
  if (p.bias_parts && threadIdx.x < kSpan) p.bias_parts[slot * p.keys_t.pitch + m0 + threadIdx.x] = bias_sum;
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
