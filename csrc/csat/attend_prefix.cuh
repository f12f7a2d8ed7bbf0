// attend_prefix and its backward: attention over measurements of the tokens up to the query's own, in chunks of 64
// tokens. With (Kp, Vp, g_p) the state before a chunk and L the lower triangle with its diagonal,
//
//   s = q Kp^T + (L o q k^T) phi,   g = g_p + cumsum phi,   u = scale s / g,
//   w = e / sum(g e)  with  e = exp(u + bias),              z = w Vp + (L o w phi^T) v
//
// (signed: g is the square root of the number of tokens, w = e / (g sum e)). Backward, with dw = dz Vp^T +
// (L o dz v^T) phi, dp = dw / g, delta = sum(g w dp) and dK, dV the gradients of the state behind a chunk:
// a = scale w (dp - delta), dg = -w (delta + u (dp - delta)), and
//
//   prefix_sums           sums of outer products of the tokens of each chunk: phi^T k, phi^T v; backward a^T q, w^T dz
//                         (prefix_scan.cuh: the same of phi alone, of dg; then the state before, or the gradient
//                         behind, each chunk)
//   attend_prefix         z, lse of a tile of queries
//   prefix_query_backward dq of a tile of queries; leaves w, a, dg and the four triangles of its chunk to
//   prefix_token_backward 64 x 64 of dk = (L o a phi^T)^T q + phi dK, dv = (L o w phi^T)^T dz + phi dV or dphi =
//                         (L o q k^T)^T a + k dK^T + (L o dz v^T)^T w + v dV^T + (sum over later rows of dg)
//
// Data flow: rows of queries -> shared; panels of tokens and states (tile.cuh) stream from global memory against them,
// 128 measurements at a time; products of tokens with tokens, and of sums, go through 32 rows of both in shared memory
// (as in panel.cuh). Budget of a query: 2 M (D + R) + 128 (D + R + 2 M) FLOP at most, in prefix_query_backward
// 2 M (2 D + R) + 128 (2 D + R + 4 M); shared memory limits::attend_prefix_row and limits::prefix_query_backward_row
// floats; of a chunk M (D + R) floats of state. Limits: D, R up to 1024. The host goes over batch elements and key
// heads in parts, so that the workspace stays within limits::kWorkspaceCap or that of one key head.
#pragma once
#include "csat/forward.cuh"

namespace csat {

// Panels of the tokens, zeros where they are masked, and of the states before the chunks. Matrices are counted by
// (batch element, key head), by state head, by head of phi; states by (state head, chunk).
struct PrefixArgs {
  ForwardArgs rows;  // q, z, lse, the bias and the softmax of a tile
  int64_t chunks, state_heads, key_heads, phi_batch, phi_heads;
  Panel keys_t, values;  // (D, N), (N, R)
  Panel phi, phi_t;      // (N, M), (M, N)
  Panel state_keys_t;    // (D, M)
  Panel state_values;    // (M, R)
  Panel masses;          // (1, M) before each chunk: sums of phi, or numbers of tokens
  const unsigned char* keep;
  bool is_signed;
};
struct PrefixBackwardArgs {
  PrefixArgs forward;
  View dz, dq;
  Panel values_t, keys;              // (R, N), (N, D)
  Panel state_keys, state_values_t;  // (M, D), (R, M)
  // Of each query head (N, 64): lower triangles of the chunks, row by row.
  Panel query_keys, value_grads;           // q k^T, dz v^T
  Panel key_weights, value_weights;        // a phi^T, w phi^T
  Panel weights, score_grads, mass_grads;  // (N, M): w, a, dg
  float* bias_parts;                       // (tiles)(M), null: not wanted
  int dz_pitch, dq_pitch;
};

// Where a tile of queries lies.
struct PrefixPlace {
  RowTile tile;
  int64_t start;                  // of its chunk
  int offset;                     // of its first row in the chunk
  int64_t pair, key, phi, state;  // numbers of matrices

  CSAT_DEVICE explicit PrefixPlace(const PrefixArgs& p)
      : tile(row_tile_at(blockIdx.x, p.rows.heads, p.rows.queries, p.rows.rows)) {
    const int64_t chunk = tile.first / limits::kPrefixChunk, state_head = tile.head / (p.rows.heads / p.state_heads);
    start = chunk * limits::kPrefixChunk;
    offset = static_cast<int>(tile.first - start);
    pair = tile.batch * p.rows.heads + tile.head;
    key = tile.batch * p.key_heads + tile.head / (p.rows.heads / p.key_heads);
    phi = (p.phi_batch == 1 ? 0 : tile.batch) * p.phi_heads + (p.phi_heads == 1 ? 0 : state_head);
    state = (tile.batch * p.state_heads + state_head) * p.chunks + chunk;
  }
  // How many tokens of the chunk the tile's last row sees, with those of the rows that do not exist: panels end with
  // a whole chunk.
  CSAT_DEVICE int depth(int rows) const { return offset + rows; }
};

// g of one measurement, row after row of a tile.
class RunningMass {
 public:
  CSAT_DEVICE RunningMass(const PrefixArgs& p, const PrefixPlace& place, int64_t column)
      : phi_(p.phi.data + place.phi * p.phi.matrix + place.start * p.phi.pitch + column),
        keep_(p.keep ? p.keep + place.tile.batch * p.rows.queries + place.start : nullptr),
        pitch_(p.phi.pitch),
        mass_(p.masses.data[place.state * p.masses.matrix + column]),
        is_signed_(p.is_signed) {
    for (int i = 0; i < place.offset; ++i) add();
  }
  CSAT_DEVICE float next() {
    add();
    return is_signed_ ? sqrt_f32(mass_) : mass_;
  }

 private:
  CSAT_DEVICE void add() {
    mass_ += !is_signed_ ? *phi_ : (!keep_ || *keep_) ? 1.f : 0.f;
    phi_ += pitch_;
    if (keep_) ++keep_;
  }
  const float* phi_;
  const unsigned char* keep_;
  int64_t pitch_;
  float mass_;
  bool is_signed_;
};

// near (rows, 64) = the lower triangle of x (rows, depth) times the chunk's tokens, columns of the panel `tokens`.
CSAT_DEVICE void multiply_to_lower(const PrefixPlace& place, int rows, float* near, const float* x, int x_pitch,
                                   const float* tokens, int64_t token_pitch, int depth, bool first) {
  constexpr int kSpan = limits::kPrefixChunk;
  for_each_micro_tile(rows, kSpan, [&](int row, int) {
    float* out = near + row * kSpan + lane_id();
    Accumulator acc = {};
    if (!first) {
#pragma unroll
      for (int r = 0; r < limits::kMicroRows; ++r) acc[r][0] = out[r * kSpan], acc[r][1] = out[r * kSpan + 32];
    }
    multiply(acc, x + row * x_pitch, x_pitch, tokens + place.start + lane_id(), token_pitch, depth);
#pragma unroll
    for (int r = 0; r < limits::kMicroRows; ++r) {
      const int last = place.offset + row + r;
      out[r * kSpan] = lane_id() <= last ? acc[r][0] : 0.f;
      out[r * kSpan + 32] = lane_id() + 32 <= last ? acc[r][1] : 0.f;
    }
  });
}

// out (rows, columns) = x (rows, depth) times a state, plus a triangle times the chunk's tokens, both from column m0.
CSAT_DEVICE void multiply_state_and_tokens(const PrefixPlace& place, int rows, int columns, float* out, int out_pitch,
                                           const float* x, int x_pitch, int depth, const float* state,
                                           int64_t state_pitch, const float* near, const float* tokens,
                                           int64_t token_pitch) {
  constexpr int kSpan = limits::kPrefixChunk;
  for_each_micro_tile(rows, columns, [&](int row, int column) {
    const int c = column + lane_id();
    Accumulator acc = {};
    multiply(acc, x + row * x_pitch, x_pitch, state + c, state_pitch, depth);
    multiply(acc, near + row * kSpan, kSpan, tokens + c, token_pitch, place.depth(rows));
#pragma unroll
    for (int r = 0; r < limits::kMicroRows; ++r)
      out[(row + r) * out_pitch + c] = acc[r][0], out[(row + r) * out_pitch + c + 32] = acc[r][1];
  });
}

// out (rows, columns) += x (rows, depth) w (depth, columns).
CSAT_DEVICE void multiply_add_rows(int rows, int columns, float* out, int out_pitch, const float* x, int x_pitch,
                                   const float* w, int64_t w_pitch, int depth) {
  for_each_micro_tile(rows, columns, [&](int row, int column) {
    float* to = out + row * out_pitch + column + lane_id();
    Accumulator acc;
#pragma unroll
    for (int r = 0; r < limits::kMicroRows; ++r) acc[r][0] = to[r * out_pitch], acc[r][1] = to[r * out_pitch + 32];
    multiply(acc, x + row * x_pitch, x_pitch, w + column + lane_id(), w_pitch, depth);
#pragma unroll
    for (int r = 0; r < limits::kMicroRows; ++r) to[r * out_pitch] = acc[r][0], to[r * out_pitch + 32] = acc[r][1];
  });
}

CSAT_DEVICE const float* matrix_of(const Panel& panel, int64_t number) { return panel.data + number * panel.matrix; }

// ---- forward

struct PrefixRows {
  SoftmaxRows softmax;
  float *near, *key_weights, *g;  // L o q k^T, w phi^T, the masses of a stretch of columns

  CSAT_DEVICE PrefixRows(const ForwardArgs& p, float* shared) : softmax(p, shared, shared + p.rows * p.z_pitch) {
    near = softmax.end;
    key_weights = near + p.rows * limits::kPrefixChunk;
    g = key_weights + p.rows * limits::kPrefixChunk;
  }
};

// Products of columns m0 .. become scores; a column without mass scores -inf.
CSAT_DEVICE void score_prefixes(const PrefixArgs& p, const PrefixPlace& place, const PrefixRows& x, int64_t m0,
                                int columns) {
  const ForwardArgs& f = p.rows;
  const int span = f.measurement_tile;
  for (int c = threadIdx.x; c < columns; c += limits::kThreads) {
    RunningMass mass(p, place, m0 + c);
    const float bias = matrix_of(f.bias, place.pair)[m0 + c];
    for (int r = 0; r < f.rows; ++r) {
      float& score = x.softmax.s[r * span + c];
      const float g = r < place.tile.valid ? mass.next() : 0.f;
      score = g > 0.f ? f.scale * score / g + bias : -INFINITY;
      x.g[r * span + c] = g;
    }
  }
}

// Scores become weights for the peak so far; what was summed for another is rescaled.
CSAT_DEVICE void weigh_prefixes(const PrefixArgs& p, const PrefixRows& x, int columns) {
  const ForwardArgs& f = p.rows;
  const SoftmaxRows& t = x.softmax;
  const int span = f.measurement_tile, lane = lane_id();
  for (int r = warp_id(); r < f.rows; r += limits::kWarps) {
    float *row = t.s + r * span, *g = x.g + r * span;
    const float before = t.peak[r];
    float now = before, sum = 0.f;
    for (int c = lane; c < columns; c += 32) now = fmaxf(now, row[c]);
    now = warp_max(now);
    for (int c = lane; c < columns; c += 32) {
      const float e = row[c] == -INFINITY ? 0.f : exp_f32(row[c] - now);
      row[c] = p.is_signed && e > 0.f ? e / g[c] : e;
      sum += p.is_signed ? e : e * g[c];
    }
    sum = warp_sum(sum);
    const float decay = before == -INFINITY ? 0.f : exp_f32(before - now);
    if (before != -INFINITY) {
      for (int c = lane; c < f.z_pitch; c += 32) t.z[r * f.z_pitch + c] *= decay;
      for (int c = lane; c < limits::kPrefixChunk; c += 32) x.key_weights[r * limits::kPrefixChunk + c] *= decay;
    }
    sync_warp();  // every lane has read the old peak
    if (lane == 0) {
      t.peak[r] = now;
      t.mass[r] = t.mass[r] * decay + sum;
    }
  }
}

// Four blocks an SM leave 128 registers a thread, as in attend_causal.
template <typename T>
__global__ void __launch_bounds__(limits::kThreads, 4) attend_prefix_kernel(PrefixArgs p) {
  CSAT_DYN_SMEM(float, shared);
  constexpr int kSpan = limits::kPrefixChunk;
  const ForwardArgs& f = p.rows;
  const PrefixPlace place(p);
  const PrefixRows x(f, shared);
  const SoftmaxRows& t = x.softmax;
  const int rows = f.rows, span = f.measurement_tile;
  const float *phi = matrix_of(p.phi, place.phi) + place.start * p.phi.pitch, *phi_t = matrix_of(p.phi_t, place.phi);
  const float *keys = matrix_of(p.state_keys_t, place.state), *values = matrix_of(p.state_values, place.state);
  begin_softmax<T>(f, place.tile, t);
  multiply_to_lower(place, rows, x.near, t.q, f.q_pitch, matrix_of(p.keys_t, place.key), p.keys_t.pitch, f.q_pitch,
                    true);
  fill(x.key_weights, rows * kSpan, 0.f);
  __syncthreads();
  for (int64_t m0 = 0; m0 < p.phi.pitch; m0 += span) {
    const int columns = p.phi.pitch - m0 < span ? static_cast<int>(p.phi.pitch - m0) : span;
    multiply_state_and_tokens(place, rows, columns, t.s, span, t.q, f.q_pitch, f.q_pitch, keys + m0,
                              p.state_keys_t.pitch, x.near, phi + m0, p.phi.pitch);
    __syncthreads();
    score_prefixes(p, place, x, m0, columns);
    __syncthreads();
    weigh_prefixes(p, x, columns);
    __syncthreads();
    multiply_add_rows(rows, f.z_pitch, t.z, f.z_pitch, t.s, span, values + m0 * p.state_values.pitch,
                      p.state_values.pitch, columns);
    multiply_to_lower(place, rows, x.key_weights, t.s, span, phi_t + m0 * p.phi_t.pitch, p.phi_t.pitch, columns, false);
    __syncthreads();
  }
  multiply_add_rows(rows, f.z_pitch, t.z, f.z_pitch, x.key_weights, kSpan,
                    matrix_of(p.values, place.key) + place.start * p.values.pitch, p.values.pitch, place.depth(rows));
  __syncthreads();
  finish_softmax<T>(f, place.tile, t);
}

// ---- backward: queries

struct PrefixGradientRows {
  float *q, *dq;  // dq where q was: one is read before the other is written
  float* dz;
  float *query_keys, *value_grads;  // triangles; then, for the sums over measurements, key_weights, value_weights
  float *key_weights, *value_weights;
  float *w, *dp;  // of a stretch of columns: g w and dp; then w and a
  // A row each; delta = centre + shift. Weights are divided by their sum, the mass (then its inverse): the log-sum-exp
  // of the tensor cores has 16 bits' accuracy, and is only a place to start from.
  float *lse, *centre, *shift, *mass;

  CSAT_DEVICE PrefixGradientRows(const PrefixBackwardArgs& p, float* shared) {
    const ForwardArgs& f = p.forward.rows;
    q = dq = shared;
    dz = q + f.rows * p.dq_pitch;
    query_keys = key_weights = dz + f.rows * p.dz_pitch;
    value_grads = value_weights = query_keys + f.rows * limits::kPrefixChunk;
    w = value_grads + f.rows * limits::kPrefixChunk;
    dp = w + f.rows * f.measurement_tile;
    lse = dp + f.rows * f.measurement_tile;
    centre = lse + f.rows;
    shift = centre + f.rows;
    mass = shift + f.rows;
  }
};

// Products s and dw of columns m0 .. become g w and dp; w, dp and u go to the places of w, a and dg.
CSAT_DEVICE void weigh_gradients(const PrefixBackwardArgs& p, const PrefixPlace& place, const PrefixGradientRows& x,
                                 int64_t m0, int columns) {
  const PrefixArgs& a = p.forward;
  const ForwardArgs& f = a.rows;
  const int span = f.measurement_tile;
  for (int c = threadIdx.x; c < columns; c += limits::kThreads) {
    RunningMass mass(a, place, m0 + c);
    const float bias = matrix_of(f.bias, place.pair)[m0 + c];
    int64_t at = place.pair * p.weights.matrix + place.tile.first * p.weights.pitch + m0 + c;
    for (int r = 0; r < f.rows; ++r, at += p.weights.pitch) {
      float &product = x.w[r * span + c], &dw = x.dp[r * span + c];
      const float g = r < place.tile.valid ? mass.next() : 0.f;
      const bool sees = g > 0.f && x.lse[r] != -INFINITY;  // else no gradient, whatever the inputs are
      const float u = sees ? f.scale * product / g : 0.f, e = sees ? exp_f32(u + bias - x.lse[r]) : 0.f;
      const float w = a.is_signed && sees ? e / g : e, dp = sees ? dw / g : 0.f;
      product = a.is_signed ? e : g * w;
      dw = dp;
      if (r < place.tile.valid) p.weights.data[at] = w, p.score_grads.data[at] = dp, p.mass_grads.data[at] = u;
    }
  }
}

// Adds a stretch of columns to the sums for the shift. The centre is dp of the first measurement: what all of dp has in
// common is taken off before the sums.
CSAT_DEVICE void add_to_shift(const PrefixBackwardArgs& p, const PrefixGradientRows& x, int columns, bool first) {
  const int span = p.forward.rows.measurement_tile, lane = lane_id();
  for (int r = warp_id(); r < p.forward.rows.rows; r += limits::kWarps) {
    const float *probability = x.w + r * span, *dp = x.dp + r * span;
    const float centre = first ? dp[0] : x.centre[r];
    float mean = 0.f, mass = 0.f;
    for (int c = lane; c < columns; c += 32) mean += probability[c] * (dp[c] - centre), mass += probability[c];
    mean = warp_sum(mean);
    mass = warp_sum(mass);
    sync_warp();  // every lane has read the centre
    if (lane == 0) {
      x.centre[r] = centre;
      x.shift[r] = first ? mean : x.shift[r] + mean;
      x.mass[r] = first ? mass : x.mass[r] + mass;
    }
  }
}

// w and a of columns m0 .. in shared memory; a and dg, the sums of the bias' gradient, to global memory.
CSAT_DEVICE void score_gradients(const PrefixBackwardArgs& p, const PrefixPlace& place, const PrefixGradientRows& x,
                                 int64_t m0, int columns) {
  const PrefixArgs& a = p.forward;
  const ForwardArgs& f = a.rows;
  const int span = f.measurement_tile;
  for (int c = threadIdx.x; c < columns; c += limits::kThreads) {
    RunningMass mass(a, place, m0 + c);
    float of_bias = 0.f;
    int64_t at = place.pair * p.weights.matrix + place.tile.first * p.weights.pitch + m0 + c;
    for (int r = 0; r < f.rows; ++r, at += p.weights.pitch) {
      float w = 0.f, d = 0.f;
      if (r < place.tile.valid) {
        const float dp = p.score_grads.data[at] - x.centre[r], u = p.mass_grads.data[at], shift = x.shift[r];
        w = p.weights.data[at] *= x.mass[r];
        d = w * (dp - shift);
        p.score_grads.data[at] = f.scale * d;
        p.mass_grads.data[at] = -(w * (x.centre[r] + shift) + u * d);
        of_bias += mass.next() * d;
      }
      x.w[r * span + c] = w;
      x.dp[r * span + c] = f.scale * d;
    }
    if (p.bias_parts) p.bias_parts[int64_t(blockIdx.x) * p.weights.pitch + m0 + c] = of_bias;
  }
}

// The rows of a triangle to global memory.
CSAT_DEVICE void store_triangle(const PrefixPlace& place, const Panel& panel, const float* near) {
  float* out = panel.data + place.pair * panel.matrix + place.tile.first * panel.pitch;
  store_rows<float>(out, panel.pitch, int64_t(1), near, limits::kPrefixChunk, place.tile.valid, limits::kPrefixChunk);
}

// q, dz and lse of the tile; the triangles of q k^T and dz v^T.
template <typename T>
CSAT_DEVICE void begin_prefix_gradients(const PrefixBackwardArgs& p, const PrefixPlace& place,
                                        const PrefixGradientRows& x) {
  const PrefixArgs& a = p.forward;
  const ForwardArgs& f = a.rows;
  const RowTile& tile = place.tile;
  load_rows(x.q, p.dq_pitch, f.rows, at<const T>(f.q, tile.batch, tile.head, tile.first), f.q.stride[2], f.q.stride[3],
            tile.valid, f.head_dim);
  load_rows(x.dz, p.dz_pitch, f.rows, at<const T>(p.dz, tile.batch, tile.head, tile.first), p.dz.stride[2],
            p.dz.stride[3], tile.valid, f.features);
  for (int r = threadIdx.x; r < f.rows; r += limits::kThreads)
    x.lse[r] = r < tile.valid ? *at<const float>(f.lse, tile.batch, tile.head, tile.first + r) : -INFINITY;
  __syncthreads();
  multiply_to_lower(place, f.rows, x.query_keys, x.q, p.dq_pitch, matrix_of(a.keys_t, place.key), a.keys_t.pitch,
                    f.q_pitch, true);
  multiply_to_lower(place, f.rows, x.value_grads, x.dz, p.dz_pitch, matrix_of(p.values_t, place.key), p.values_t.pitch,
                    p.dz_pitch, true);
  __syncthreads();
  store_triangle(place, p.query_keys, x.query_keys);
  store_triangle(place, p.value_grads, x.value_grads);
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads, 4) prefix_query_backward_kernel(PrefixBackwardArgs p) {
  CSAT_DYN_SMEM(float, shared);
  constexpr int kSpan = limits::kPrefixChunk;
  const PrefixArgs& a = p.forward;
  const ForwardArgs& f = a.rows;
  const PrefixPlace place(a);
  const PrefixGradientRows x(p, shared);
  const int rows = f.rows, span = f.measurement_tile;
  const int64_t width = a.phi.pitch;
  const float *phi = matrix_of(a.phi, place.phi) + place.start * a.phi.pitch, *phi_t = matrix_of(a.phi_t, place.phi);
  begin_prefix_gradients<T>(p, place, x);
  for (int64_t m0 = 0; m0 < width; m0 += span) {
    const int columns = width - m0 < span ? static_cast<int>(width - m0) : span;
    multiply_state_and_tokens(place, rows, columns, x.w, span, x.q, p.dq_pitch, f.q_pitch,
                              matrix_of(a.state_keys_t, place.state) + m0, a.state_keys_t.pitch, x.query_keys, phi + m0,
                              a.phi.pitch);
    multiply_state_and_tokens(place, rows, columns, x.dp, span, x.dz, p.dz_pitch, p.dz_pitch,
                              matrix_of(p.state_values_t, place.state) + m0, p.state_values_t.pitch, x.value_grads,
                              phi + m0, a.phi.pitch);
    __syncthreads();
    weigh_gradients(p, place, x, m0, columns);
    __syncthreads();
    add_to_shift(p, x, columns, m0 == 0);
    __syncthreads();
  }
  for (int r = threadIdx.x; r < rows; r += limits::kThreads) {
    x.mass[r] = width == 0 || x.mass[r] == 0.f ? 0.f : 1.f / x.mass[r];
    x.shift[r] = width == 0 ? 0.f : x.shift[r] * x.mass[r];
  }
  fill(x.dq, rows * p.dq_pitch, 0.f);
  fill(x.key_weights, 2 * rows * kSpan, 0.f);
  __syncthreads();
  for (int64_t m0 = 0; m0 < width; m0 += span) {
    const int columns = width - m0 < span ? static_cast<int>(width - m0) : span;
    score_gradients(p, place, x, m0, columns);
    __syncthreads();
    multiply_add_rows(rows, p.dq_pitch, x.dq, p.dq_pitch, x.dp, span,
                      matrix_of(p.state_keys, place.state) + m0 * p.state_keys.pitch, p.state_keys.pitch, columns);
    const float* of_tokens = phi_t + m0 * a.phi_t.pitch;
    multiply_to_lower(place, rows, x.key_weights, x.dp, span, of_tokens, a.phi_t.pitch, columns, false);
    multiply_to_lower(place, rows, x.value_weights, x.w, span, of_tokens, a.phi_t.pitch, columns, false);
    __syncthreads();
  }
  multiply_add_rows(rows, p.dq_pitch, x.dq, p.dq_pitch, x.key_weights, kSpan,
                    matrix_of(p.keys, place.key) + place.start * p.keys.pitch, p.keys.pitch, place.depth(rows));
  store_triangle(place, p.key_weights, x.key_weights);
  store_triangle(place, p.value_weights, x.value_weights);
  __syncthreads();
  store_rows<T>(at<T>(p.dq, place.tile.batch, place.tile.head, place.tile.first), p.dq.stride[2], p.dq.stride[3], x.dq,
                p.dq_pitch, place.tile.valid, f.head_dim);
}

// ---- sums of outer products: 64 x 64 a block

// A strided matrix; float32 or T.
struct OuterSide {
  const void* data;
  DType dtype;
  int64_t row, column;  // strides
  int64_t columns;      // 64 at most are taken

  CSAT_DEVICE OuterSide(const View& v, int64_t batch, int64_t head, int64_t first_row, int64_t first_column,
                        int64_t all_columns)
      : dtype(v.dtype), row(v.stride[2]), column(v.stride[3]) {
    const int64_t offset =
        batch * v.stride[0] + head * v.stride[1] + first_row * v.stride[2] + first_column * v.stride[3];
    data = static_cast<const char*>(v.data) + offset * size_of(v.dtype);
    columns = all_columns - first_column < limits::kMicroColumns ? all_columns - first_column : limits::kMicroColumns;
  }
  template <typename T>
  CSAT_DEVICE void load(float* shared, int64_t first, int valid) const {
    constexpr int kSide = limits::kMicroColumns, kDepth = limits::kOuterDepth;
    const int count = static_cast<int>(columns);
    if (dtype == DType::f32)
      load_rows(shared, kSide, kDepth, static_cast<const float*>(data) + first * row, row, column, valid, count);
    else
      load_rows(shared, kSide, kDepth, static_cast<const T*>(data) + first * row, row, column, valid, count);
  }
};

using OuterAccumulator = float[limits::kOuterRows][2];

// acc += x (depth, 64)^T y (depth, 64); a warp has 16 of x's columns.
template <typename T>
CSAT_DEVICE void add_outer_product(OuterAccumulator& acc, float* shared, const OuterSide& x, const OuterSide& y,
                                   int64_t depth) {
  constexpr int kSide = limits::kMicroColumns, kDepth = limits::kOuterDepth;
  float *left = shared, *right = shared + kDepth * kSide;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    const int valid = depth - k0 < kDepth ? static_cast<int>(depth - k0) : kDepth;
    x.load<T>(left, k0, valid);
    y.load<T>(right, k0, valid);
    __syncthreads();
    multiply_outer(acc, left + warp_id() * limits::kOuterRows, kSide, right + lane_id(), kSide, kDepth);
    __syncthreads();
  }
}

// target (rows, columns) of every (batch element, state head, chunk) = sum over its `heads` heads, over the tokens of
// the chunk, of x^T y. Head i of state head h is h heads + i, and reads head (h heads + i) / x_share of x.
struct PrefixSumsArgs {
  View x, y;  // (B, .., N, rows), (B, .., N, columns)
  int64_t x_share, y_share, heads;
  int64_t batch, state_heads, chunks, tokens, rows, columns;
  Panel target;  // padded to 64 both ways
};

// Four blocks an SM, as above: left to itself ptxas takes 56 registers on sm_90a and spills.
template <typename T>
__global__ void __launch_bounds__(limits::kThreads, 4) prefix_sums_kernel(PrefixSumsArgs p) {
  constexpr int kSide = limits::kMicroColumns;
  CSAT_DYN_SMEM(float, shared);
  const int64_t column_tiles = p.target.pitch / kSide, row_tiles = p.target.matrix / p.target.pitch / kSide;
  int64_t index = blockIdx.x;
  const int64_t c0 = index % column_tiles * kSide;
  index /= column_tiles;
  const int64_t r0 = index % row_tiles * kSide, matrix = index / row_tiles;
  const int64_t chunk = matrix % p.chunks, state = matrix / p.chunks;
  const int64_t batch = state / p.state_heads, state_head = state % p.state_heads;
  const int64_t first = chunk * limits::kPrefixChunk;
  const int64_t depth = p.tokens - first < limits::kPrefixChunk ? p.tokens - first : limits::kPrefixChunk;
  OuterAccumulator acc = {};
  for (int64_t head = state_head * p.heads; head < (state_head + 1) * p.heads; ++head)
    add_outer_product<T>(acc, shared, OuterSide(p.x, batch, head / p.x_share, first, r0, p.rows),
                         OuterSide(p.y, batch, head / p.y_share, first, c0, p.columns), depth);
  float* out = p.target.data + matrix * p.target.matrix + (r0 + warp_id() * limits::kOuterRows) * p.target.pitch + c0 +
               lane_id();
#pragma unroll
  for (int r = 0; r < limits::kOuterRows; ++r)
    out[r * p.target.pitch] = acc[r][0], out[r * p.target.pitch + 32] = acc[r][1];
}

// ---- backward: tokens

// What prefix_query_backward left, by query head; the gradients of the state behind each chunk, by state head and
// chunk.
struct PrefixTokenArgs {
  View q, dz;                                                // T
  View query_keys, value_grads, key_weights, value_weights;  // (B, H, N, 64)
  View weights, score_grads, mass_grads;                     // (B, H, N, M)
  View phi_t, keys_t, values_t;                              // (B, .., M, N), (B, Hk, D, N), (B, Hk, R, N)
  View state_keys, state_keys_t, state_values,
      state_values_t;  // (B, Hs chunks, M, D), (.., D, M), (.., M, R), (.., R, M)
  View masses;         // (B, Hs chunks, 1, M): of later chunks
  View dk, dv, dphi;
  const unsigned char* keep;
  int64_t heads, state_heads, key_heads, phi_heads, chunks, tokens, measurements;
  int head_dim, features;
  bool is_signed;

  CSAT_DEVICE int64_t tiles_of(int64_t columns) const {
    return (columns + limits::kMicroColumns - 1) / limits::kMicroColumns;
  }
};

// One chunk of one key head.
struct TokenPlace {
  int64_t batch, key_head, chunk, first, valid, tile;

  CSAT_DEVICE explicit TokenPlace(const PrefixTokenArgs& p) {
    const int64_t shared_by = p.state_heads / p.key_heads;
    const int64_t tiles = p.tiles_of(p.head_dim) + p.tiles_of(p.features) + shared_by * p.tiles_of(p.measurements);
    int64_t index = blockIdx.x;
    tile = index % tiles;
    index /= tiles;
    chunk = index % p.chunks;
    index /= p.chunks;
    key_head = index % p.key_heads;
    batch = index / p.key_heads;
    first = chunk * limits::kPrefixChunk;
    valid = p.tokens - first < limits::kPrefixChunk ? p.tokens - first : limits::kPrefixChunk;
  }
};

// dk, dv of columns c0 ..: over the heads of the key head, triangle^T rows; over its state heads, phi times the state's
// gradient.
template <typename T>
CSAT_DEVICE void add_token_gradients(OuterAccumulator& acc, float* shared, const PrefixTokenArgs& p,
                                     const TokenPlace& place, const View& triangles, const View& rows,
                                     const View& states, int64_t columns, int64_t c0) {
  const int64_t group = p.heads / p.key_heads, shared_by = p.state_heads / p.key_heads;
  for (int64_t h = place.key_head * group; h < (place.key_head + 1) * group; ++h)
    add_outer_product<T>(acc, shared, OuterSide(triangles, place.batch, h, place.first, 0, limits::kPrefixChunk),
                         OuterSide(rows, place.batch, h, place.first, c0, columns), place.valid);
  for (int64_t h = place.key_head * shared_by; h < (place.key_head + 1) * shared_by; ++h)
    add_outer_product<T>(acc, shared,
                         OuterSide(p.phi_t, place.batch, p.phi_heads == 1 ? 0 : h, 0, place.first, p.tokens),
                         OuterSide(states, place.batch, h * p.chunks + place.chunk, 0, c0, columns), p.measurements);
}

// Adds the gradients of g, summed over the heads of the state head, over each row and all later ones.
CSAT_DEVICE void add_later_rows(OuterAccumulator& acc, float* shared, const PrefixTokenArgs& p, const TokenPlace& place,
                                int64_t state_head, int64_t c0) {
  constexpr int kSide = limits::kMicroColumns;
  const int64_t group = p.heads / p.state_heads, column = c0 + threadIdx.x;
  if (threadIdx.x < kSide) {
    const int64_t state = state_head * p.chunks + place.chunk;
    float later = column < p.measurements ? at<const float>(p.masses, place.batch, state, 0)[column] : 0.f;
    for (int t = kSide - 1; t >= 0; --t) {
      for (int64_t h = state_head * group; t < place.valid && column < p.measurements && h < (state_head + 1) * group;
           ++h)
        later += at<const float>(p.mass_grads, place.batch, h, place.first + t)[column];
      shared[t * kSide + threadIdx.x] = later;
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < limits::kOuterRows; ++r) {
    const float* row = shared + (warp_id() * limits::kOuterRows + r) * kSide + lane_id();
    acc[r][0] += row[0];
    acc[r][1] += row[32];
  }
}

template <typename T>
CSAT_DEVICE void add_phi_gradients(OuterAccumulator& acc, float* shared, const PrefixTokenArgs& p,
                                   const TokenPlace& place, int64_t state_head, int64_t c0) {
  const int64_t group = p.heads / p.state_heads, M = p.measurements;
  const int64_t state = state_head * p.chunks + place.chunk;
  for (int64_t h = state_head * group; h < (state_head + 1) * group; ++h) {
    add_outer_product<T>(acc, shared, OuterSide(p.query_keys, place.batch, h, place.first, 0, limits::kPrefixChunk),
                         OuterSide(p.score_grads, place.batch, h, place.first, c0, M), place.valid);
    add_outer_product<T>(acc, shared, OuterSide(p.value_grads, place.batch, h, place.first, 0, limits::kPrefixChunk),
                         OuterSide(p.weights, place.batch, h, place.first, c0, M), place.valid);
  }
  add_outer_product<T>(acc, shared, OuterSide(p.keys_t, place.batch, place.key_head, 0, place.first, p.tokens),
                       OuterSide(p.state_keys_t, place.batch, state, 0, c0, M), p.head_dim);
  add_outer_product<T>(acc, shared, OuterSide(p.values_t, place.batch, place.key_head, 0, place.first, p.tokens),
                       OuterSide(p.state_values_t, place.batch, state, 0, c0, M), p.features);
  if (!p.is_signed) add_later_rows(acc, shared, p, place, state_head, c0);
}

// Stores the rows of the chunk that exist; `keep`, where not null, says which are no zeros.
template <typename T>
CSAT_DEVICE void store_token_gradients(const OuterAccumulator& acc, const TokenPlace& place, const View& target,
                                       int64_t head, int64_t columns, int64_t c0, const unsigned char* keep) {
#pragma unroll
  for (int r = 0; r < limits::kOuterRows; ++r) {
    const int t = warp_id() * limits::kOuterRows + r;
    if (t >= place.valid) continue;
    const bool kept = !keep || keep[place.first + t];
    T* out = at<T>(target, place.batch, head, place.first + t);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t c = c0 + lane_id() + 32 * i;
      if (c < columns) out[c * target.stride[3]] = from_float<T>(kept ? acc[r][i] : 0.f);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads, 4) prefix_token_backward_kernel(PrefixTokenArgs p) {
  CSAT_DYN_SMEM(float, shared);
  constexpr int kSide = limits::kMicroColumns;
  const TokenPlace place(p);
  const int64_t of_keys = p.tiles_of(p.head_dim), of_values = p.tiles_of(p.features),
                of_phi = p.tiles_of(p.measurements);
  OuterAccumulator acc = {};
  if (place.tile < of_keys) {
    const int64_t c0 = place.tile * kSide;
    add_token_gradients<T>(acc, shared, p, place, p.key_weights, p.q, p.state_keys, p.head_dim, c0);
    store_token_gradients<T>(acc, place, p.dk, place.key_head, p.head_dim, c0, nullptr);
  } else if (place.tile < of_keys + of_values) {
    const int64_t c0 = (place.tile - of_keys) * kSide;
    add_token_gradients<T>(acc, shared, p, place, p.value_weights, p.dz, p.state_values, p.features, c0);
    store_token_gradients<T>(acc, place, p.dv, place.key_head, p.features, c0, nullptr);
  } else {
    const int64_t tile = place.tile - of_keys - of_values, c0 = tile % of_phi * kSide;
    const int64_t state_head = place.key_head * (p.state_heads / p.key_heads) + tile / of_phi;
    add_phi_gradients<T>(acc, shared, p, place, state_head, c0);
    store_token_gradients<float>(acc, place, p.dphi, state_head, p.measurements, c0,
                                 p.keep ? p.keep + place.batch * p.tokens : nullptr);
  }
}

// ---- launches

template <typename Kernel, typename Args>
int launch_prefix(Kernel kernel, const Args& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  if (blocks == 0) return 0;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}
template <typename T>
int launch_attend_prefix(const PrefixArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  return launch_prefix(attend_prefix_kernel<T>, p, blocks, shared_bytes, stream);
}
template <typename T>
int launch_prefix_query_backward(const PrefixBackwardArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  return launch_prefix(prefix_query_backward_kernel<T>, p, blocks, shared_bytes, stream);
}
template <typename T>
int launch_prefix_token_backward(const PrefixTokenArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  return launch_prefix(prefix_token_backward_kernel<T>, p, blocks, shared_bytes, stream);
}
template <typename T>
int launch_prefix_sums(const PrefixSumsArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  return launch_prefix(prefix_sums_kernel<T>, p, blocks, shared_bytes, stream);
}

}  // namespace csat
