// attend, decode and both fused, one block a tile of queries of one (batch element, head).
//
//   attend:  s = scale q kc^T + bias, online softmax over tiles of 128 measurements, z = softmax(s) vc, lse
//   decode:  u = a + step_t (S_t a - a + B_t z), a = soft(u, theta_t), T times from a = 0;  c = psi a
//
// Data flow: q rows -> shared -> scores (micro-tiles, kc^T streamed as a panel) -> shared -> probabilities in place ->
// z (shared, rescaled as the running maximum moves). Decode keeps a (two copies) and B z in shared memory and streams
// S^T, B^T, psi^T as panels. Fused, z goes from the one to the other without leaving shared memory; it is rounded to T
// on the way, so that the fused op equals attend followed by decode bit for bit.
//
// Budget of a row: 2 M (D + R) + 2 T P (P + R or, tied, R once) + 2 P Dv FLOP in float32; shared memory
// limits::attend_row and limits::decode_row floats; global traffic is q, z, c once and the panels once a tile (from
// L2). A row whose scores are all -inf: z = 0, lse = -inf. Limits: limits.h.
#pragma once
#include "csat/tile.cuh"

namespace csat {

struct ForwardArgs {
  int rows;  // of a tile
  int64_t heads, queries;
  int features;  // R
  int z_pitch;
  View z;  // attend: where to write it (data null: not wanted); decode alone: where to read it
  // attend
  View q, lse;
  Panel keys, values, bias;  // (B Hk)(D, M), (B Hk)(M, R), (B H)(1, M) with -inf in the padding
  int64_t group;             // H / Hk
  int head_dim, q_pitch, measurement_tile;
  float scale;
  // decode
  View out;
  // Transposed S (Hd Ts), B (Hd Tb), psi (Hd; data null: the identity); theta (Hd)(T, P); step (Hd)(1, T).
  Panel S, B, psi, theta, step;
  int64_t decoder_heads;
  int layers, s_layers, b_layers, outputs;
  int a_pitch, z_depth, output_columns;
};

// A tile of rows on its way through a softmax, in shared memory.
struct SoftmaxRows {
  float *q, *s;            // queries; scores of a stretch of columns, then their probabilities
  float *z, *peak, *mass;  // sums so far, for the maximum so far
  float* end;

  CSAT_DEVICE SoftmaxRows(const ForwardArgs& p, float* z, float* rest) : z(z) {
    q = rest;
    s = q + p.rows * p.q_pitch;
    peak = s + p.rows * p.measurement_tile;
    mass = peak + p.rows;
    end = mass + p.rows;
  }
};

template <typename T>
CSAT_DEVICE void begin_softmax(const ForwardArgs& p, const RowTile& tile, const SoftmaxRows& x) {
  load_rows(x.q, p.q_pitch, p.rows, at<const T>(p.q, tile.batch, tile.head, tile.first), p.q.stride[2], p.q.stride[3],
            tile.valid, p.head_dim);
  fill(x.z, p.rows * p.z_pitch, 0.f);
  fill(x.peak, p.rows, -INFINITY);
  fill(x.mass, p.rows, 0.f);
  __syncthreads();
}

// Takes columns begin .. end - 1 of the panels of `pair` in, multiples of 64. score(row, column, product) is what the
// product of a query with a key scores.
template <typename F>
CSAT_DEVICE void attend_columns(const ForwardArgs& p, const SoftmaxRows& x, const Panel& key_panels,
                                const Panel& value_panels, int64_t pair, int64_t begin, int64_t end, F score) {
  const int rows = p.rows, span = p.measurement_tile, lane = lane_id();
  const float* keys = key_panels.data + pair * key_panels.matrix + lane;
  const float* values = value_panels.data + pair * value_panels.matrix + lane;
  for (int64_t m0 = begin; m0 < end; m0 += span) {
    const int columns = end - m0 < span ? static_cast<int>(end - m0) : span;
    for_each_micro_tile(rows, columns, [&](int row, int column) {
      Accumulator acc = {};
      multiply(acc, x.q + row * p.q_pitch, p.q_pitch, keys + m0 + column, key_panels.pitch, p.q_pitch);
      float* out = x.s + row * span + column + lane;
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r) {
        out[r * span] = score(row + r, m0 + column + lane, acc[r][0]);
        out[r * span + 32] = score(row + r, m0 + column + lane + 32, acc[r][1]);
      }
    });
    __syncthreads();

    for (int r = warp_id(); r < rows; r += limits::kWarps) {
      float* row = x.s + r * span;
      const float before = x.peak[r];
      float now = before, sum = 0.f;
      for (int c = lane; c < columns; c += 32) now = fmaxf(now, row[c]);
      now = warp_max(now);
      for (int c = lane; c < columns; c += 32) {
        const float e = row[c] == -INFINITY ? 0.f : exp_f32(row[c] - now);
        row[c] = e;
        sum += e;
      }
      sum = warp_sum(sum);
      const float decay = before == -INFINITY ? 0.f : exp_f32(before - now);
      if (before != -INFINITY)
        for (int c = lane; c < p.z_pitch; c += 32) x.z[r * p.z_pitch + c] *= decay;
      sync_warp();  // every lane has read the old peak
      if (lane == 0) {
        x.peak[r] = now;
        x.mass[r] = x.mass[r] * decay + sum;
      }
    }
    __syncthreads();

    for_each_micro_tile(rows, p.z_pitch, [&](int row, int column) {
      float* out = x.z + row * p.z_pitch + column + lane;
      Accumulator acc;
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r) acc[r][0] = out[r * p.z_pitch], acc[r][1] = out[r * p.z_pitch + 32];
      multiply(acc, x.s + row * span, span, values + m0 * value_panels.pitch + column, value_panels.pitch, columns);
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r) out[r * p.z_pitch] = acc[r][0], out[r * p.z_pitch + 32] = acc[r][1];
    });
    __syncthreads();
  }
}

// z and lse out; z stays in shared memory, rounded to T.
template <typename T>
CSAT_DEVICE void finish_softmax(const ForwardArgs& p, const RowTile& tile, const SoftmaxRows& x) {
  const int lane = lane_id();
  for (int r = warp_id(); r < p.rows; r += limits::kWarps) {
    const float total = x.mass[r], inverse = 1.f / total;
    for (int c = lane; c < p.z_pitch; c += 32) {
      float& value = x.z[r * p.z_pitch + c];
      value = total == 0.f ? 0.f : to_float(from_float<T>(value * inverse));  // nothing to look at, whatever vc holds
      if (p.z.data && r < tile.valid && c < p.features)
        at<T>(p.z, tile.batch, tile.head, tile.first + r)[c * p.z.stride[3]] = from_float<T>(value);
    }
    if (lane == 0 && r < tile.valid)
      *at<float>(p.lse, tile.batch, tile.head, tile.first + r) = total == 0.f ? -INFINITY : x.peak[r] + log_f32(total);
  }
  __syncthreads();
}

template <typename T>
CSAT_DEVICE void attend_rows(const ForwardArgs& p, const RowTile& tile, float* z, float* rest) {
  const SoftmaxRows x(p, z, rest);
  const int64_t pair = tile.batch * p.heads + tile.head;
  const float* bias = p.bias.data + pair * p.bias.matrix;
  begin_softmax<T>(p, tile, x);
  // Hk divides H, so (b H + h) / (H / Hk) = b Hk + h / (H / Hk)
  attend_columns(p, x, p.keys, p.values, pair / p.group, 0, p.keys.pitch,
                 [&](int, int64_t m, float product) { return p.scale * product + bias[m]; });
  finish_softmax<T>(p, tile, x);
}

// Layer t of the decoder of `head`: this lane's columns of its panels.
struct DecodeLayer {
  const float *S, *B, *theta;
  int64_t S_pitch, B_pitch;
  float step;
  bool first, multiplies_z;  // a_0 = 0 is nowhere; B z of a tied B stands from the first layer

  CSAT_DEVICE DecodeLayer(const Panel& S, const Panel& B, const Panel& theta, const Panel& step, int64_t head,
                          int s_layers, int b_layers, int t)
      : S(S.data + (head * s_layers + (s_layers == 1 ? 0 : t)) * S.matrix + lane_id()),
        B(B.data + (head * b_layers + t) * B.matrix + lane_id()),
        theta(theta.data + head * theta.matrix + t * theta.pitch + lane_id()),
        S_pitch(S.pitch),
        B_pitch(B.pitch),
        step(step.data[head * step.matrix + t]),
        first(t == 0),
        multiplies_z(t < b_layers) {}
};

// next = soft(a + step v, theta) with v = S a + B z - a, for (rows, pitch) iterates; calls keep(place, v, next) for
// each.
template <typename F>
CSAT_DEVICE void decode_layer(const DecodeLayer& layer, int rows, int pitch, const float* a, float* next, float* bz,
                              const float* z, int z_pitch, int z_depth, F keep) {
  for_each_micro_tile(rows, pitch, [&](int row, int column) {
    const int offset = row * pitch + column + lane_id();
    if (layer.multiplies_z) {
      Accumulator acc = {};
      multiply(acc, z + row * z_pitch, z_pitch, layer.B + column, layer.B_pitch, z_depth);
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r)
        bz[offset + r * pitch] = acc[r][0], bz[offset + r * pitch + 32] = acc[r][1];
    }
    Accumulator acc = {};
    if (!layer.first) multiply(acc, a + row * pitch, pitch, layer.S + column, layer.S_pitch, pitch);
#pragma unroll
    for (int r = 0; r < limits::kMicroRows; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int e = offset + r * pitch + 32 * i;
        const float old = layer.first ? 0.f : a[e], v = acc[r][i] + bz[e] - old;
        next[e] = soft_threshold(old + layer.step * v, layer.theta[column + 32 * i]);
        keep(e, v, next[e]);
      }
  });
}

template <typename T>
CSAT_DEVICE void decode_rows(const ForwardArgs& p, const RowTile& tile, const float* z, float* rest) {
  const int rows = p.rows, pitch = p.a_pitch, lane = lane_id();
  float* a = rest;
  float* next = a + rows * pitch;
  float* bz = next + rows * pitch;
  const int64_t head = p.decoder_heads == 1 ? 0 : tile.head;
  for (int t = 0; t < p.layers; ++t) {
    const DecodeLayer layer(p.S, p.B, p.theta, p.step, head, p.s_layers, p.b_layers, t);
    decode_layer(layer, rows, pitch, a, next, bz, z, p.z_pitch, p.z_depth, [](int, float, float) {});
    __syncthreads();
    float* swap = a;
    a = next;
    next = swap;
  }

  if (!p.psi.data)
    return store_rows(at<T>(p.out, tile.batch, tile.head, tile.first), p.out.stride[2], p.out.stride[3], a, pitch,
                      tile.valid, p.outputs);
  const float* psi = p.psi.data + head * p.psi.matrix + lane;
  for_each_micro_tile(rows, p.output_columns, [&](int row, int column) {
    Accumulator acc = {};
    multiply(acc, a + row * pitch, pitch, psi + column, p.psi.pitch, pitch);
#pragma unroll
    for (int r = 0; r < limits::kMicroRows; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = column + lane + 32 * i;
        if (row + r < tile.valid && c < p.outputs)
          at<T>(p.out, tile.batch, tile.head, tile.first + row + r)[c * p.out.stride[3]] = from_float<T>(acc[r][i]);
      }
  });
}

template <typename T, bool kAttend, bool kDecode>
__global__ void __launch_bounds__(limits::kThreads) forward_kernel(ForwardArgs p) {
  CSAT_DYN_SMEM(float, shared);
  const RowTile tile = row_tile_at(blockIdx.x, p.heads, p.queries, p.rows);
  float* z = shared;
  float* rest = z + p.rows * p.z_pitch;
  if constexpr (kAttend) {
    attend_rows<T>(p, tile, z, rest);
  } else {
    load_rows(z, p.z_pitch, p.rows, at<const T>(p.z, tile.batch, tile.head, tile.first), p.z.stride[2], p.z.stride[3],
              tile.valid, p.features);
    __syncthreads();
  }
  if constexpr (kDecode) decode_rows<T>(p, tile, z, rest);
}

template <typename T, bool kAttend, bool kDecode>
int launch_forward(const ForwardArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = forward_kernel<T, kAttend, kDecode>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}

}  // namespace csat
