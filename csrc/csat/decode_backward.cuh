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
#include "csat/forward.cuh"

namespace csat {

struct DecodeBackwardArgs {
  int rows;
  int64_t heads, queries;
  int64_t groups, group_tiles, first_tile;  // groups of rows that share weights; tiles of a group in this launch
  int layers, s_layers, b_layers, features, outputs;
  int wide_pitch, a_pitch, z_depth, features_pitch, outputs_pitch;
  View z, dout, dz;
  Panel S_t, B_t, S, B, psi, theta, step;  // transposed (as in forward), then as they are; psi.data null: identity
  // Workspace of this launch; `rows_g` = group_tiles * rows rows a group.
  float* iterates;     // (groups, T + 1, rows_g, a_pitch): a_0 .. a_T
  float* errors;       // (groups, T, rows_g, a_pitch): v_t, then e'_t
  float* b_errors;     // (groups, b_layers, rows_g, a_pitch)
  float* z_rows;       // (groups, rows_g, features_pitch)
  float* dout_rows;    // (groups, rows_g, outputs_pitch)
  float* theta_parts;  // (groups, group_tiles, T, a_pitch)
  float* step_parts;   // (groups, group_tiles, T)
};

// What a block works on: its rows in shared memory and its slots of the workspace, whose places are computed, not kept.
struct BackwardTile {
  const DecodeBackwardArgs& p;
  int64_t group, index;         // of the tile, in the group
  float *wide, *a, *next, *bz;  // wide: z, then dc, then dz

  CSAT_DEVICE BackwardTile(const DecodeBackwardArgs& p, float* shared, int64_t group, int64_t index)
      : p(p),
        group(group),
        index(index),
        wide(shared),
        a(wide + p.rows * p.wide_pitch),
        next(a + size()),
        bz(next + size()) {}
  CSAT_DEVICE int size() const { return p.rows * p.a_pitch; }                 // floats of an array of coefficients
  CSAT_DEVICE int64_t slot() const { return group * p.group_tiles + index; }  // the tile in all groups
  CSAT_DEVICE float* iterate(int t) const { return p.iterates + place(p.layers + 1, t); }
  CSAT_DEVICE float* error(int t) const { return p.errors + place(p.layers, t); }
  CSAT_DEVICE float* b_error(int t) const { return p.b_errors + place(p.b_layers, t); }

 private:
  CSAT_DEVICE int64_t place(int layers, int t) const { return ((group * layers + t) * p.group_tiles + index) * size(); }
};

// Rows of z or dc -> shared, and as float32 to the workspace for the sums over rows.
template <typename T>
CSAT_DEVICE void take_rows(const BackwardTile& b, const View& source, const RowTile& tile, int columns, int pitch,
                           float* kept) {
  load_rows(b.wide, pitch, b.p.rows, at<const T>(source, tile.batch, tile.head, tile.first), source.stride[2],
            source.stride[3], tile.valid, columns);
  __syncthreads();
  kept += b.slot() * b.p.rows * pitch;
  for (int i = threadIdx.x; i < b.p.rows * pitch; i += limits::kThreads) kept[i] = b.wide[i];
}

// out (rows, columns) = or += left (rows, depth) w, `w` one matrix of a panel.
template <bool kAdd>
CSAT_DEVICE void multiply_rows(float* out, int out_pitch, const float* left, int left_pitch, const Panel& panel,
                               int64_t matrix, int rows) {
  const float* w = panel.data + matrix * panel.matrix + lane_id();
  for_each_micro_tile(rows, out_pitch, [&](int row, int column) {
    Accumulator acc = {};
    multiply(acc, left + row * left_pitch, left_pitch, w + column, panel.pitch, left_pitch);
    float* place = out + row * out_pitch + column + lane_id();
#pragma unroll
    for (int r = 0; r < limits::kMicroRows; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& value = place[r * out_pitch + 32 * i];
        value = kAdd ? value + acc[r][i] : acc[r][i];
      }
  });
}

// a_0 .. a_T and v_0 .. v_{T-1} -> workspace.
CSAT_DEVICE void recompute_iterates(BackwardTile& b) {
  const DecodeBackwardArgs& p = b.p;
  fill(b.iterate(0), b.size(), 0.f);
  for (int t = 0; t < p.layers; ++t) {
    const DecodeLayer layer(p.S_t, p.B_t, p.theta, p.step, b.group, p.s_layers, p.b_layers, t);
    float *v_slot = b.error(t), *a_slot = b.iterate(t + 1);
    decode_layer(layer, p.rows, p.a_pitch, b.a, b.next, b.bz, b.wide, p.features_pitch, p.z_depth,
                 [&](int e, float v, float after) {
                   v_slot[e] = v;
                   a_slot[e] = after;
                 });
    __syncthreads();
    float* swap = b.a;
    b.a = b.next;
    b.next = swap;
  }
}

// e from g, in columns: e' -> workspace, `scaled` and `sum`, g = e - e'; the tile's dtheta_t and dstep_t.
CSAT_DEVICE void threshold_backward(const BackwardTile& b, int t, float* g, float* scaled, float* sum) {
  float* warp_sums = b.bz + b.size();
  const DecodeBackwardArgs& p = b.p;
  const int pitch = p.a_pitch;
  const float gain = p.step.data[b.group * p.step.matrix + t];
  const bool fresh = t == p.layers - 1 || p.b_layers > 1;  // of e' summed over the layers that share B
  float* e_slot = b.error(t);
  const float* a_slot = b.iterate(t + 1);
  float step_sum = 0.f;
  for (int c = threadIdx.x; c < pitch; c += limits::kThreads) {
    float theta_sum = 0.f;
    for (int i = c; i < b.size(); i += pitch) {
      const float after = a_slot[i];
      const float e = after != 0.f ? g[i] : 0.f;
      theta_sum -= after > 0.f ? e : (after < 0.f ? -e : 0.f);
      step_sum += e * e_slot[i];
      e_slot[i] = scaled[i] = gain * e;
      sum[i] = fresh ? scaled[i] : sum[i] + scaled[i];
      g[i] = e - scaled[i];
    }
    p.theta_parts[(b.slot() * p.layers + t) * pitch + c] = theta_sum;
  }
  step_sum = warp_sum(step_sum);
  if (lane_id() == 0) warp_sums[warp_id()] = step_sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float total = 0.f;
  for (int w = 0; w < limits::kWarps; ++w) total += warp_sums[w];
  p.step_parts[b.slot() * p.layers + t] = total;
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads) decode_backward_kernel(DecodeBackwardArgs p) {
  CSAT_DYN_SMEM(float, shared);
  const int64_t group = blockIdx.x / p.group_tiles, index = blockIdx.x % p.group_tiles;
  const RowTile tile = decoder_tile(p.first_tile + index, group, p.groups, p.heads, p.queries, p.rows);
  BackwardTile b(p, shared, group, index);
  take_rows<T>(b, p.z, tile, p.features, p.features_pitch, p.z_rows);
  recompute_iterates(b);

  // g_T = dc psi. From here on: g, e' and the sum of e' take the places of a, next and B z.
  float *g = b.a, *scaled = b.next, *sum = b.bz;
  take_rows<T>(b, p.dout, tile, p.outputs, p.outputs_pitch, p.dout_rows);
  if (p.psi.data) {
    multiply_rows<false>(g, p.a_pitch, b.wide, p.outputs_pitch, p.psi, group, p.rows);
  } else {
    for (int i = threadIdx.x; i < b.size(); i += limits::kThreads) g[i] = b.wide[i];  // rows of one pitch
  }
  __syncthreads();
  fill(b.wide, p.rows * p.features_pitch, 0.f);  // dz
  for (int t = p.layers - 1; t >= 0; --t) {
    threshold_backward(b, t, g, scaled, sum);
    if (t > 0)
      multiply_rows<true>(g, p.a_pitch, scaled, p.a_pitch, p.S, group * p.s_layers + (p.s_layers == 1 ? 0 : t), p.rows);
    if (t < p.b_layers) {
      multiply_rows<true>(b.wide, p.features_pitch, sum, p.a_pitch, p.B, group * p.b_layers + t, p.rows);
      for (int i = threadIdx.x; i < b.size(); i += limits::kThreads) b.b_error(t)[i] = sum[i];
    }
    __syncthreads();
  }
  store_rows(at<T>(p.dz, tile.batch, tile.head, tile.first), p.dz.stride[2], p.dz.stride[3], b.wide, p.features_pitch,
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
