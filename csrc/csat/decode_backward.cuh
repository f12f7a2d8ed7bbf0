// Backward of decode for one tile of rows: recompute the iterates from z, walk the layers back, leave in the workspace
// what the sums over rows need.
//
//   forward    v_t = S_t a_t + B_t z - a_t,  a_{t+1} = soft(a_t + step_t v_t, theta_t)
//   backward   g_T = dc psi;  e = g_{t+1} [a_{t+1} != 0],  e'_t = step_t e
//              dtheta_t = -sum e sign(a_{t+1}),  dstep_t = sum e . v_t,  dz += e'_t B_t,  g_t = e - e'_t + e'_t S_t
//   then       dS_t = sum e'_t^T a_t,  dB_t = sum e'_t^T z,  dpsi = sum dc^T a_T   (outer(), over all rows)
//
// With B tied, e'_t is summed over the layers first: dz and dB are then one product each. The layer at which B_t is
// applied is the same t < b_layers for both cases: tied, it is t = 0, the last one that is walked.
//
// Data flow: z -> shared; a_t, v_t (later e'_t in its place) -> workspace slots of this tile, coalesced; g, e', sum of
// e', dc and dz in shared memory; weights streamed as panels. Sums over the rows of a tile (dtheta, dstep) are taken by
// one thread a column in row order; sums over tiles by reduce(). No atomics.
// Budget of a row: 6 T P (P + R) + 6 P Dv FLOP (less with B tied), the sums over rows included; shared memory
// limits::decode_backward_row floats; workspace (2 T + 1 + b_layers) P + R + Dv floats, each padded to 64.
#pragma once
#include "csat/tile.cuh"

namespace csat {

struct DecodeBackwardArgs {
  int rows;
  int64_t heads, queries;
  int64_t groups, group_tiles, first_tile;  // groups of rows that share weights; tiles of a group in this launch
  int layers, s_layers, b_layers, features, outputs;
  int wide_pitch, a_pitch, z_depth, features_pitch, outputs_pitch;
  View z, dout, dz;
  Panel S_t, B_t, S, B, psi, theta, step;  // transposed (as in forward), then as they are; theta, step
  // Workspace of this launch; `rows_g` = group_tiles * rows rows a group.
  float* iterates;     // (groups, T + 1, rows_g, a_pitch): a_0 .. a_T
  float* errors;       // (groups, T, rows_g, a_pitch): v_t, then e'_t
  float* b_errors;     // (groups, b_layers, rows_g, a_pitch)
  float* z_rows;       // (groups, rows_g, features_pitch)
  float* dout_rows;    // (groups, rows_g, outputs_pitch)
  float* theta_parts;  // (groups, group_tiles, T, a_pitch)
  float* step_parts;   // (groups, group_tiles, T)
};

template <typename T>
__global__ void __launch_bounds__(limits::kThreads) decode_backward_kernel(DecodeBackwardArgs p) {
  CSAT_DYN_SMEM(float, shared);
  const int rows = p.rows, pitch = p.a_pitch, lane = lane_id(), size = rows * pitch;
  float* wide = shared;  // z, then dc, then dz
  float* a = wide + rows * p.wide_pitch;
  float* next = a + size;
  float* bz = next + size;
  float* warp_sums = bz + size;
  const int64_t group = blockIdx.x / p.group_tiles, index = blockIdx.x % p.group_tiles;
  const RowTile tile = decoder_tile(p.first_tile + index, group, p.groups, p.heads, p.queries, rows);
  const int64_t layer_stride = p.group_tiles * size;
  float* iterates = p.iterates + group * (p.layers + 1) * layer_stride + index * size;
  float* errors = p.errors + group * p.layers * layer_stride + index * size;
  float* b_errors = p.b_errors + group * p.b_layers * layer_stride + index * size;
  const float* theta = p.theta.data + group * p.theta.matrix + lane;
  const float* step = p.step.data + group * p.step.matrix;

  load_rows(wide, p.features_pitch, rows, at<const T>(p.z, tile.batch, tile.head, tile.first), p.z.stride[2],
            p.z.stride[3], tile.valid, p.features);
  fill(iterates, size, 0.f);
  __syncthreads();
  float* z_rows = p.z_rows + (group * p.group_tiles + index) * rows * p.features_pitch;
  for (int i = threadIdx.x; i < rows * p.features_pitch; i += limits::kThreads) z_rows[i] = wide[i];

  for (int t = 0; t < p.layers; ++t) {
    const float* S = p.S_t.data + (group * p.s_layers + (p.s_layers == 1 ? 0 : t)) * p.S_t.matrix + lane;
    const float* B = p.B_t.data + (group * p.b_layers + t) * p.B_t.matrix + lane;  // read while t < b_layers
    const float* th = theta + t * p.theta.pitch;
    const float gain = step[t];
    float* v_slot = errors + t * layer_stride;
    float* a_slot = iterates + (t + 1) * layer_stride;
    for_each_micro_tile(rows, pitch, [&](int row, int column) {
      const int offset = row * pitch + column + lane;
      if (t < p.b_layers) {
        Accumulator acc = {};
        multiply(acc, wide + row * p.features_pitch, p.features_pitch, B + column, p.B_t.pitch, p.z_depth);
#pragma unroll
        for (int r = 0; r < limits::kMicroRows; ++r)
          bz[offset + r * pitch] = acc[r][0], bz[offset + r * pitch + 32] = acc[r][1];
      }
      Accumulator acc = {};
      if (t > 0) multiply(acc, a + row * pitch, pitch, S + column, p.S_t.pitch, pitch);
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int e = offset + r * pitch + 32 * i;
          const float old = t > 0 ? a[e] : 0.f, v = acc[r][i] + bz[e] - old;
          next[e] = soft_threshold(old + gain * v, th[column + 32 * i]);
          v_slot[e] = v;
          a_slot[e] = next[e];
        }
    });
    __syncthreads();
    float* swap = a;
    a = next;
    next = swap;
  }

  // g_T = dc psi. From here on: g, e' and the sum of e' take the places of a, next and B z.
  float *g = a, *scaled = next, *sum = bz;
  load_rows(wide, p.outputs_pitch, rows, at<const T>(p.dout, tile.batch, tile.head, tile.first), p.dout.stride[2],
            p.dout.stride[3], tile.valid, p.outputs);
  __syncthreads();
  float* dout_rows = p.dout_rows + (group * p.group_tiles + index) * rows * p.outputs_pitch;
  for (int i = threadIdx.x; i < rows * p.outputs_pitch; i += limits::kThreads) dout_rows[i] = wide[i];
  const float* psi = p.psi.data + group * p.psi.matrix + lane;
  for_each_micro_tile(rows, pitch, [&](int row, int column) {
    Accumulator acc = {};
    multiply(acc, wide + row * p.outputs_pitch, p.outputs_pitch, psi + column, p.psi.pitch, p.outputs_pitch);
    float* out = g + row * pitch + column + lane;
#pragma unroll
    for (int r = 0; r < limits::kMicroRows; ++r) out[r * pitch] = acc[r][0], out[r * pitch + 32] = acc[r][1];
  });
  __syncthreads();
  fill(wide, rows * p.features_pitch, 0.f);  // dz

  for (int t = p.layers - 1; t >= 0; --t) {
    const float gain = step[t];
    float* e_slot = errors + t * layer_stride;
    const float* a_slot = iterates + (t + 1) * layer_stride;
    const bool fresh = t == p.layers - 1 || p.b_layers > 1;
    float step_sum = 0.f;
    for (int c = threadIdx.x; c < pitch; c += limits::kThreads) {
      float theta_sum = 0.f;
      for (int i = c; i < size; i += pitch) {
        const float after = a_slot[i];
        const float e = after != 0.f ? g[i] : 0.f;
        theta_sum -= after > 0.f ? e : (after < 0.f ? -e : 0.f);
        step_sum += e * e_slot[i];
        e_slot[i] = scaled[i] = gain * e;
        sum[i] = fresh ? scaled[i] : sum[i] + scaled[i];
        g[i] = e - scaled[i];
      }
      p.theta_parts[((group * p.group_tiles + index) * p.layers + t) * pitch + c] = theta_sum;
    }
    step_sum = warp_sum(step_sum);
    if (lane == 0) warp_sums[warp_id()] = step_sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0.f;
      for (int w = 0; w < limits::kWarps; ++w) total += warp_sums[w];
      p.step_parts[(group * p.group_tiles + index) * p.layers + t] = total;
    }
    if (t > 0) {
      const float* S = p.S.data + (group * p.s_layers + (p.s_layers == 1 ? 0 : t)) * p.S.matrix + lane;
      for_each_micro_tile(rows, pitch, [&](int row, int column) {
        Accumulator acc = {};
        multiply(acc, scaled + row * pitch, pitch, S + column, p.S.pitch, pitch);
        float* out = g + row * pitch + column + lane;
#pragma unroll
        for (int r = 0; r < limits::kMicroRows; ++r) out[r * pitch] += acc[r][0], out[r * pitch + 32] += acc[r][1];
      });
    }
    if (t < p.b_layers) {
      const float* B = p.B.data + (group * p.b_layers + t) * p.B.matrix + lane;
      for_each_micro_tile(rows, p.features_pitch, [&](int row, int column) {
        Accumulator acc = {};
        multiply(acc, sum + row * pitch, pitch, B + column, p.B.pitch, pitch);
        float* out = wide + row * p.features_pitch + column + lane;
#pragma unroll
        for (int r = 0; r < limits::kMicroRows; ++r) {
          out[r * p.features_pitch] += acc[r][0];
          out[r * p.features_pitch + 32] += acc[r][1];
        }
      });
      for (int i = threadIdx.x; i < size; i += limits::kThreads) b_errors[t * layer_stride + i] = sum[i];
    }
    __syncthreads();
  }
  store_rows(at<T>(p.dz, tile.batch, tile.head, tile.first), p.dz.stride[2], p.dz.stride[3], wide, p.features_pitch,
             tile.valid, p.features);
}

template <typename T>
int launch_decode_backward(const DecodeBackwardArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = decode_backward_kernel<T>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}

}  // namespace csat
