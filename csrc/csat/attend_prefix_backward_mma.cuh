// The backward of attend_prefix on tensor cores, bf16 and fp16, over the chunks, means and masses of
// attend_prefix_mma.cuh; formulas in attend_prefix.cuh.
//
//   prefix_query_backward_mma   dq of a chunk; leaves a and w to the tokens, the sums of dg over later queries of the
//                               chunk, and the chunk's part of the gradients of the state: a^T q, w^T dz, the sum of dg
//                               (then, over the chunks from the last: what comes behind each, prefix_scan.cuh)
//   prefix_token_backward_mma   dk, dv of a chunk of one key head, and dphi
//
// a and w are 1 / g of what a softmax has: they are kept multiplied by a factor F between 1 and 1024 of the chunk and
// key head, so that fp16 holds them, and so is what they are added to (the gradient of the state); accumulators are
// divided by F at the end. The products with tokens are made 16 x 16 at a time and masked between two products, as in
// the forward. Queries go over the measurements twice: first for the mean of dp, whose centre is dp of the first one.
//
// Data flow: q, k, v, dz of the chunk, a stretch of 32 measurements at a time phi, the means or the gradients of the
// state, a and w -> shared; accumulators in registers; a, w -> shared (they are the right operands of the sums) and
// global; dg -> shared, added up from the last row -> global. With 72 tokens that a query sees of its chunk on average,
// FLOP of a query 2 M (4 D + 3 R) + 144 (M / 32) (3 D + 2 R + 288), of a token for each query head 4 M (D + R) +
// 144 (M / 32) (2 D + 2 R + 128). Global memory, beside the operands: 8 M bytes a query, written and read, and
// 2 M (D + R) floats a chunk. 255 registers a thread, one block a multiprocessor. Shared memory:
// limits::prefix_query_backward_mma_bytes, prefix_token_backward_mma_bytes. Limits: limits::why_not_mma.
#pragma once
#include "csat/attend_prefix_mma.cuh"

namespace csat {

// Of each query head and chunk: a, w, later (128, padded measurements), sums (padded measurements, feature).
struct PrefixGradientArgs {
  PrefixMmaArgs forward;
  View dz, dq;                                            // vector rows; rows of dq are contiguous
  void *a, *w;                                            // T
  float* later;                                           // of dg: the sum over this query and later ones of the chunk
  float *key_sums, *value_sums, *mass_sums, *bias_parts;  // the last null: not wanted
  bool dq_vectors;
};
struct PrefixTokenMmaArgs {
  PrefixGradientArgs queries;
  // Gradients of the state behind each chunk, (B Hs chunks)(padded, feature) and (1, padded), summed over query heads.
  const float *state_keys, *state_values, *masses;
  View dk, dv, dphi;  // rows of dk and dv are contiguous
  int key_heads;
  bool dk_vectors, dv_vectors;
};

// The forward's scores of this family's rows: one row block a warp.
template <typename T, int kD>
using GradientUnit = PrefixUnit<T, kD, limits::kPrefixGradientRows>;
static_assert(limits::kPrefixGradientRows == 16, "sums and operands below are those of one row block");

// F: as large as the masses before the chunk are, within its limits; by all threads of the block.
CSAT_DEVICE float gradient_factor(const PrefixMmaArgs& p, int batch, int key_head, int chunk, float* shared) {
  const int64_t state_heads = p.rows.heads / p.state_group, of_key = p.key_group / p.state_group;
  float most = 0.f;
  for (int64_t s = key_head * of_key; s < (key_head + 1) * of_key; ++s) {
    const float* masses = p.masses.data + ((batch * state_heads + s) * p.rows.units + chunk) * p.masses.matrix;
    for (int64_t m = threadIdx.x; m < p.masses.pitch; m += limits::kPrefixGradientThreads)
      most = fmaxf(most, p.is_signed ? sqrt_f32(masses[m]) : masses[m]);
  }
  most = warp_max(most);
  __syncthreads();  // nobody reads what was there
  if (lane_id() == 0) shared[warp_id()] = most;
  __syncthreads();
  for (int w = 0; w < limits::kPrefixGradientThreads / 32; ++w) most = fmaxf(most, shared[w]);
  return most + 1.f < limits::kPrefixGradientFactor ? most + 1.f : limits::kPrefixGradientFactor;
}

// Zeros where column > row + offset; kept: where column < row + offset.
template <bool kUpper>
CSAT_DEVICE void mask_triangle(Sums<16, 16>& x, int offset) {
  for_each(x, [&](float& value, int row, int column) {
    const bool kept = kUpper ? column >= row + offset : column <= row + offset;
    value = kept ? value : 0.f;
  });
}

// ---- queries

template <typename T, int kD>
struct QueryChunkTiles {
  static constexpr int kChunk = limits::kPrefixMmaChunk, kColumns = limits::kPrefixStretch;
  Tile<T, kD> q, k, v, dz;
  Stretch<T, kD> stretch;
  Tile<T, kColumns> a, w;
  float *dg, *later, *bias, *roots, *factor;

  CSAT_DEVICE explicit QueryChunkTiles(T* shared) : q{shared} {
    k = q.from_row(kChunk);
    v = k.from_row(kChunk);
    dz = v.from_row(kChunk);
    stretch = Stretch<T, kD>::at_slot(dz.row(kChunk), 0);
    a = {reinterpret_cast<T*>(stretch.mass + kColumns)};
    w = a.from_row(kChunk);
    dg = reinterpret_cast<float*>(w.row(kChunk));
    later = dg + kChunk * limits::kPrefixFloatsPitch;
    bias = later + 8 * kColumns;
    roots = bias + 8 * kColumns;
    factor = roots + kChunk;
  }
};

// Of a stretch: p, dp and what the rest needs of both passes.
template <typename T, int kD>
struct QueryWeights {
  static constexpr int kColumns = limits::kPrefixStretch;
  using Unit = GradientUnit<T, kD>;
  Sums<16, kColumns> p, u, inverse, dp;  // u: scale s / g in powers of two

  CSAT_DEVICE QueryWeights(const QueryChunkTiles<T, kD>& x, float scale, const float* roots, const Rows<16>& lse) {
    const int first = Unit::first();
    Sums<32, kColumns> both = Unit::score(x.q.from_row(first), x.stretch, x.k, scale);
    u = Unit::template rows_of_sums<0>(both);
    Unit::weigh(both, x.stretch, roots);
    p = Unit::template rows_of_sums<0>(both);
    inverse = Unit::template rows_of_sums<16>(both);
    dp = Unit::template rows_of_sums<0>(
        Unit::multiply_prefixes(x.dz.from_row(first), x.stretch, x.stretch.values, x.v, 1.f));
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float sum = lse.at[0][e / 2], g = inverse.at[0][j][e];
        p.at[0][j][e] = sum == -INFINITY ? 0.f : exp2_approx(p.at[0][j][e] - sum);  // g w
        u.at[0][j][e] *= g;
        dp.at[0][j][e] *= g;
      }
  }
};

// The value that the first lane of a quad has.
CSAT_DEVICE float quad_first(float x) { return quad_sum(lane_id() % 4 == 0 ? x : 0.f); }

// The mean of dp, about the centre dp of the first measurement, and the inverse of the sum of p.
struct MeanGradient {
  Rows<16> centre = {}, mean = {}, mass = {};

  template <typename T, int kD>
  CSAT_DEVICE void add(const QueryWeights<T, kD>& x, bool first) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (first) centre.at[0][h] = quad_first(x.dp.at[0][0][2 * h]);
#pragma unroll
      for (int j = 0; j < limits::kPrefixStretch / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float p = x.p.at[0][j][2 * h + c];
          mean.at[0][h] += p * (x.dp.at[0][j][2 * h + c] - centre.at[0][h]);
          mass.at[0][h] += p;
        }
    }
  }
  CSAT_DEVICE void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float all = quad_sum(mass.at[0][h]);
      mass.at[0][h] = all == 0.f ? 0.f : 1.f / all;
      mean.at[0][h] = quad_sum(mean.at[0][h]) * mass.at[0][h];
    }
  }
};

// a F and w F of this warp's rows -> their tiles, dg -> shared, the sums of the bias' gradient over them; returns
// a F times the masses before the chunk, for dq.
template <typename T, int kD>
CSAT_DEVICE Operand<T, 16, limits::kPrefixStretch> score_gradients(const QueryChunkTiles<T, kD>& x,
                                                                   QueryWeights<T, kD>& of, const MeanGradient& mean,
                                                                   float scale, float factor, bool wants_bias) {
  constexpr int kColumns = limits::kPrefixStretch;
  const int first = GradientUnit<T, kD>::first();
  float of_bias[kColumns / 4] = {};
  Sums<16, kColumns> dg;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int h = e / 2;
      float &p = of.p.at[0][j][e], &dp = of.dp.at[0][j][e];
      const float g = of.inverse.at[0][j][e], u = of.u.at[0][j][e] * kLn2;
      p *= mean.mass.at[0][h];
      const float ds = p * (dp - mean.centre.at[0][h] - mean.mean.at[0][h]), w = p * g;
      dg.at[0][j][e] = -(w * (mean.centre.at[0][h] + mean.mean.at[0][h]) + u * ds * g);
      of_bias[2 * j + e % 2] += ds;
      dp = factor * scale * ds * g;  // a
      p = factor * w;
    }
  store_tile(x.a.from_row(first), 0, of.dp);
  store_tile(x.w.from_row(first), 0, of.p);
  store_floats(x.dg + first * limits::kPrefixFloatsPitch, limits::kPrefixFloatsPitch, 16, dg);
  if (wants_bias) {
    const float sum = column_sum(of_bias);
    const int c = lane_id() / 4;
    x.bias[warp_id() * kColumns + c / 2 * 8 + lane_id() % 4 * 2 + c % 2] = sum;
  }
  GradientUnit<T, kD>::scale_columns(of.dp, load_columns<kColumns>(x.stretch.mass));
  return to_operand<T>(of.dp);
}

// dq F += (L o a phi^T) k.
template <typename T, int kD>
CSAT_DEVICE void add_near_gradients(Sums<16, kD>& dq, const QueryChunkTiles<T, kD>& x) {
  const int first = GradientUnit<T, kD>::first();
  const auto a = load_operand<16>(x.a.from_row(first));
#pragma unroll 1
  for (int t = 0; t <= first; t += 16) {
    Sums<16, 16> weights = {};
    multiply_transposed(weights, a, x.stretch.phi.from_row(t));
    mask_triangle<false>(weights, first - t);
    multiply(dq, to_operand<T>(weights), x.k.from_row(t));
  }
}

// Where the gradients of a chunk of one query head lie.
struct GradientPlace {
  int64_t matrix, padded;
  CSAT_DEVICE GradientPlace(const PrefixMmaArgs& p, int pair, int chunk)
      : matrix(int64_t(pair) * p.rows.units + chunk), padded(p.masses.pitch) {}
  CSAT_DEVICE int64_t row(int r) const { return (matrix * limits::kPrefixMmaChunk + r) * padded; }
};

// Columns m0 .. of a F, w F and the sums of dg over later rows -> global, and the sums over all rows.
template <typename T, int kD>
CSAT_DEVICE void store_stretch(const PrefixGradientArgs& p, const QueryChunkTiles<T, kD>& x, const GradientPlace& place,
                               int64_t m0) {
  constexpr int kColumns = limits::kPrefixStretch, kPart = limits::kPrefixMmaChunk / 8;
  static_assert(kColumns == 32, "a warp copies eight rows of four vectors");
  for (int i = threadIdx.x; i < limits::kPrefixMmaChunk * kColumns / 8; i += limits::kPrefixGradientThreads) {
    const int r = i / 32 * 8 + i % 8, c = i / 8 % 4 * 8;  // eight rows at a time: no bank conflict
    const int64_t at = place.row(r) + m0 + c;
    *reinterpret_cast<uint4*>(static_cast<T*>(p.a) + at) = *reinterpret_cast<const uint4*>(x.a.row(r) + c);
    *reinterpret_cast<uint4*>(static_cast<T*>(p.w) + at) = *reinterpret_cast<const uint4*>(x.w.row(r) + c);
  }
  const int part = warp_id(), column = lane_id();
  float sum = 0.f;
  for (int r = part * kPart; r < (part + 1) * kPart; ++r) sum += x.dg[r * limits::kPrefixFloatsPitch + column];
  x.later[part * kColumns + column] = sum;
  __syncthreads();
  float running = 0.f;
  for (int after = 7; after > part; --after) running += x.later[after * kColumns + column];
  for (int r = (part + 1) * kPart - 1; r >= part * kPart; --r) {
    running += x.dg[r * limits::kPrefixFloatsPitch + column];
    p.later[place.row(r) + m0 + column] = running;
  }
  const int64_t of_chunk = place.matrix * place.padded + m0 + column;
  if (part == 0) p.mass_sums[of_chunk] = running;
  if (part == 1 && p.bias_parts) {
    float of_bias = 0.f;
    for (int i = 0; i < 8; ++i) of_bias += x.bias[i * kColumns + column];
    p.bias_parts[of_chunk] = of_bias;
  }
}

// a^T q and w^T dz of the chunk, 16 measurements and half of the features a warp.
template <typename T, int kD>
CSAT_DEVICE void store_state_gradients(const PrefixGradientArgs& p, const QueryChunkTiles<T, kD>& x,
                                       const GradientPlace& place, int64_t m0, float factor) {
  const int row = warp_id() % 2 * 16, column = warp_id() / 2 % 2 * (kD / 2);
  const bool of_values = warp_id() >= 4;
  Sums<16, kD / 2> sums = {};
  const Tile<T, kD> rows = of_values ? x.dz : x.q;
  multiply_of_transpose(sums, of_values ? x.w : x.a, row, Tile<T, kD>{rows.data + column}, limits::kPrefixMmaChunk);
  for_each(sums, [&](float& value, int, int) { value /= factor; });
  float* target = (of_values ? p.value_sums : p.key_sums) + (place.matrix * place.padded + m0 + row) * kD + column;
  store_floats(target, kD, 16, sums);
}

// Measurements that only pad the sums, a stretch at most.
template <int kD>
CSAT_DEVICE void store_empty_stretch(const PrefixGradientArgs& p, const GradientPlace& place) {
  const int64_t first = int64_t(p.forward.rows.chunks) * limits::kPrefixStretch;
  for (int64_t i = threadIdx.x; i < (place.padded - first) * kD; i += limits::kPrefixGradientThreads) {
    const int64_t m = place.matrix * place.padded + first + i / kD;
    p.key_sums[m * kD + i % kD] = p.value_sums[m * kD + i % kD] = 0.f;
    if (i % kD == 0) p.mass_sums[m] = 0.f;
    if (i % kD == 0 && p.bias_parts) p.bias_parts[m] = 0.f;
  }
}

template <typename T, int kD>
__global__ void __launch_bounds__(limits::kPrefixGradientThreads, 1)
    prefix_query_backward_mma_kernel(PrefixGradientArgs p) {
  constexpr int kThreads = limits::kPrefixGradientThreads, kColumns = limits::kPrefixStretch;
  CSAT_DYN_SMEM(T, shared);
  const PrefixMmaArgs& f = p.forward;
  const QueryChunkTiles<T, kD> x(shared);
  const PrefixChunk place{f, static_cast<int>(blockIdx.x) / f.rows.units, static_cast<int>(blockIdx.x) % f.rows.units};
  const GradientPlace target(f, place.pair, place.chunk);
  const int first = GradientUnit<T, kD>::first();
  load_tokens<kThreads>(x.q, place, f.rows.q, place.head(), f.rows.head_dim);
  load_tokens<kThreads>(x.k, place, f.k, place.key_head(), f.rows.head_dim);
  load_tokens<kThreads>(x.v, place, f.v, place.key_head(), f.rows.features);
  load_tokens<kThreads>(x.dz, place, p.dz, place.head(), f.rows.features);
  if (f.is_signed) count_roots<kThreads>(x.roots, place);
  const float factor = gradient_factor(f, place.batch(), place.key_head(), place.chunk, x.factor);
  const float* roots = f.is_signed ? x.roots : nullptr;
  const float* lse_of = at<const float>(f.rows.lse, place.batch(), place.head(), 0);
  Rows<16> lse;
  for_each_row(lse, [&](float& value, int row) {
    const int64_t t = place.first() + first + row;
    value = t < f.rows.queries ? lse_of[t * f.rows.lse.stride[2]] * kLog2e : -INFINITY;
  });
  const auto load = [&](int c) {
    __syncthreads();  // nobody reads the stretch before
    load_stretch<kThreads>(x.stretch, place, int64_t(c) * kColumns);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  };
  MeanGradient mean;
#pragma unroll 1
  for (int c = 0; c < f.rows.chunks; ++c) {
    load(c);
    mean.add(QueryWeights<T, kD>(x, f.rows.scale * kLog2e, roots, lse), c == 0);
  }
  mean.finish();
  Sums<16, kD> dq = {};
#pragma unroll 1
  for (int c = 0; c < f.rows.chunks; ++c) {
    const int64_t m0 = int64_t(c) * kColumns;
    load(c);
    {
      QueryWeights<T, kD> weights(x, f.rows.scale * kLog2e, roots, lse);
      const auto far = score_gradients(x, weights, mean, f.rows.scale, factor, p.bias_parts != nullptr);
      multiply(dq, far, x.stretch.keys);
    }
    sync_warp();  // the warp's rows of a
    add_near_gradients(dq, x);
    __syncthreads();
    store_state_gradients(p, x, target, m0, factor);
    store_stretch(p, x, target, m0);
  }
  store_empty_stretch<kD>(p, target);
  __syncthreads();  // nobody reads q
  for_each(dq, [&](float& value, int, int) { value /= factor; });
  store_tile(x.q.from_row(first), 0, dq);
  sync_warp();
  const GlobalRows<T> rows{at<T>(p.dq, place.batch(), place.head(), 0), p.dq.stride[2], f.rows.queries,
                           f.rows.head_dim};
  store_rows(rows, place.first() + first, 16, x.q.from_row(first), p.dq_vectors);
}

// ---- tokens

template <typename T, int kD>
struct TokenChunkTiles {
  static constexpr int kChunk = limits::kPrefixMmaChunk, kColumns = limits::kPrefixStretch;
  Tile<T, kD> q, k, v, dz, state_keys, state_values;
  Tile<T, kColumns> phi, a, w;
  float* factor;

  CSAT_DEVICE explicit TokenChunkTiles(T* shared) : q{shared} {
    k = q.from_row(kChunk);
    v = k.from_row(kChunk);
    dz = v.from_row(kChunk);
    state_keys = dz.from_row(kChunk);
    state_values = state_keys.from_row(kColumns);
    phi = {state_values.row(kColumns)};
    a = phi.from_row(kChunk);
    w = a.from_row(kChunk);
    factor = reinterpret_cast<float*>(w.row(kChunk));
  }
};

// The gradient of a state behind the chunk, times F, columns m0 .. of the measurements.
template <typename T, int kD>
CSAT_DEVICE void load_state_gradient(Tile<T, kD> tile, const float* source, float factor) {
  for (int i = threadIdx.x; i < limits::kPrefixStretch * kD; i += limits::kPrefixGradientThreads)
    tile.row(i / kD)[i % kD] = from_float<T>(factor * source[i]);
}

// dk F, dv F and dphi F of the chunk's tokens from the queries of one head: those of the same chunk that see them.
template <typename T, int kD>
CSAT_DEVICE void add_query_head(Sums<16, kD>& dk, Sums<16, kD>& dv, Sums<16, limits::kPrefixStretch>& dphi,
                                const TokenChunkTiles<T, kD>& x) {
  using Unit = GradientUnit<T, kD>;
  const int first = Unit::first();
#pragma unroll 1
  for (int t = first; t < limits::kPrefixMmaChunk; t += 16) {
    const auto triangle = [&](const auto& left, const auto& right) {
      Sums<16, 16> products = {};
      multiply_transposed(products, left, right);
      mask_triangle<true>(products, first - t);
      return to_operand<T>(products);
    };
    {
      const auto phi = load_operand<16>(x.phi.from_row(first));
      multiply(dk, triangle(phi, x.a.from_row(t)), x.q.from_row(t));
      multiply(dv, triangle(phi, x.w.from_row(t)), x.dz.from_row(t));
    }
    multiply(dphi, triangle(Unit::left_operand(x.k.from_row(first)), x.q.from_row(t)), x.a.from_row(t));
    multiply(dphi, triangle(Unit::left_operand(x.v.from_row(first)), x.dz.from_row(t)), x.w.from_row(t));
  }
}

// Where a block of tokens works: a chunk of one key head.
struct TokenChunk {
  int batch, key_head, chunk;
};

// dphi of this warp's tokens: what `dphi` has, divided by F, and the later sums of dg.
template <typename T, int kD>
CSAT_DEVICE void store_phi_gradients(const PrefixTokenMmaArgs& p, Sums<16, limits::kPrefixStretch>& dphi,
                                     const TokenChunk& place, int state_head, int64_t m0, float factor) {
  const PrefixMmaArgs& f = p.queries.forward;
  const int64_t state_heads = f.rows.heads / f.state_group;
  const int64_t state = (place.batch * state_heads + state_head) * f.rows.units + place.chunk;
  const int64_t first = int64_t(place.chunk) * limits::kPrefixMmaChunk + GradientUnit<T, kD>::first();
  for_each(dphi, [&](float& value, int row, int column) {
    const int64_t t = first + row, m = m0 + column;
    if (t >= f.rows.queries || m >= f.rows.measurements) return;
    float sum = value / factor;
    if (!f.is_signed) {
      sum += p.masses[state * f.masses.pitch + m];
      for (int h = state_head * f.state_group; h < (state_head + 1) * f.state_group; ++h) {
        const GradientPlace of(f, place.batch * f.rows.heads + h, place.chunk);
        sum += p.queries.later[of.row(GradientUnit<T, kD>::first() + row) + m];
      }
    }
    const bool kept = !f.keep || f.keep[place.batch * f.rows.queries + t];
    at<float>(p.dphi, place.batch, state_head, t)[m * p.dphi.stride[3]] = kept ? sum : 0.f;
  });
}

template <typename T, int kD>
__global__ void __launch_bounds__(limits::kPrefixGradientThreads, 1)
    prefix_token_backward_mma_kernel(PrefixTokenMmaArgs p) {
  constexpr int kThreads = limits::kPrefixGradientThreads, kColumns = limits::kPrefixStretch,
                kChunk = limits::kPrefixMmaChunk;
  using Unit = GradientUnit<T, kD>;
  CSAT_DYN_SMEM(T, shared);
  const PrefixMmaArgs& f = p.queries.forward;
  const TokenChunkTiles<T, kD> x(shared);
  const int units = f.rows.units, block = static_cast<int>(blockIdx.x);
  const TokenChunk place{block / units / p.key_heads, block / units % p.key_heads, block % units};
  const int first = Unit::first(), of_key = f.key_group / f.state_group;
  const auto at_head = [&](int head) { return PrefixChunk{f, place.batch * f.rows.heads + head, place.chunk}; };
  const float factor = gradient_factor(f, place.batch, place.key_head, place.chunk, x.factor);
  const int first_head = place.key_head * f.key_group;
  load_tokens<kThreads>(x.k, at_head(first_head), f.k, place.key_head, f.rows.head_dim);
  load_tokens<kThreads>(x.v, at_head(first_head), f.v, place.key_head, f.rows.features);
  const auto wait = [] {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  };
  Sums<16, kD> dk = {}, dv = {};
  for (int s = place.key_head * of_key; s < (place.key_head + 1) * of_key; ++s)
#pragma unroll 1
    for (int c = 0; c < f.rows.chunks; ++c) {
      const int64_t m0 = int64_t(c) * kColumns, padded = f.masses.pitch;
      const int64_t state = (int64_t(place.batch) * (f.rows.heads / f.state_group) + s) * units + place.chunk;
      __syncthreads();  // nobody reads the stretch before
      load_state_gradient<T, kD>(x.state_keys, p.state_keys + (state * padded + m0) * kD, factor);
      load_state_gradient<T, kD>(x.state_values, p.state_values + (state * padded + m0) * kD, factor);
      const GlobalRows<const T> phi{at<const T>(f.phi, place.batch, s, 0) + m0, f.phi.stride[2], f.rows.queries,
                                    static_cast<int>(f.rows.measurements - m0)};
      load_rows_async(x.phi, phi, int64_t(place.chunk) * kChunk, kChunk, threadIdx.x, kThreads);
      wait();
      Sums<16, kColumns> dphi = {};
      multiply_transposed(dphi, Unit::left_operand(x.k.from_row(first)), x.state_keys);
      multiply_transposed(dphi, Unit::left_operand(x.v.from_row(first)), x.state_values);
      {
        const auto own = load_operand<16>(x.phi.from_row(first));
        multiply(dk, own, x.state_keys);
        multiply(dv, own, x.state_values);
      }
#pragma unroll 1
      for (int h = s * f.state_group; h < (s + 1) * f.state_group; ++h) {
        const GradientPlace of(f, place.batch * f.rows.heads + h, place.chunk);
        const auto rows = [&](const void* data) {
          return GlobalRows<const T>{static_cast<const T*>(data) + of.row(0) + m0, padded, kChunk, kColumns};
        };
        __syncthreads();  // nobody reads the head before
        load_tokens<kThreads>(x.q, at_head(h), f.rows.q, h, f.rows.head_dim);
        load_tokens<kThreads>(x.dz, at_head(h), p.queries.dz, h, f.rows.features);
        load_rows_async(x.a, rows(p.queries.a), 0, kChunk, threadIdx.x, kThreads);
        load_rows_async(x.w, rows(p.queries.w), 0, kChunk, threadIdx.x, kThreads);
        wait();
        add_query_head(dk, dv, dphi, x);
      }
      store_phi_gradients<T, kD>(p, dphi, place, s, m0, factor);
    }
  __syncthreads();
  const auto store = [&](Sums<16, kD>& sums, Tile<T, kD> tile, const View& target, int columns, bool vectors) {
    for_each(sums, [&](float& value, int, int) { value /= factor; });
    store_tile(tile.from_row(first), 0, sums);
    sync_warp();
    const GlobalRows<T> rows{at<T>(target, place.batch, place.key_head, 0), target.stride[2], f.rows.queries, columns};
    store_rows(rows, int64_t(place.chunk) * kChunk + first, 16, tile.from_row(first), vectors);
  };
  store(dk, x.k, p.dk, f.rows.head_dim, p.dk_vectors);
  store(dv, x.v, p.dv, f.rows.features, p.dv_vectors);
}

// ---- launches

template <typename T, int kD>
int launch_prefix_query_backward_mma(const PrefixGradientArgs& p, int64_t blocks, void* stream) {
  auto kernel = prefix_query_backward_mma_kernel<T, kD>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kPrefixGradientThreads),
              static_cast<size_t>(limits::prefix_query_backward_mma_bytes(kD)), stream, p);
  return last_error();
}
template <typename T, int kD>
int launch_prefix_token_backward_mma(const PrefixTokenMmaArgs& p, int64_t blocks, void* stream) {
  auto kernel = prefix_token_backward_mma_kernel<T, kD>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kPrefixGradientThreads),
              static_cast<size_t>(limits::prefix_token_backward_mma_bytes(kD)), stream, p);
  return last_error();
}

// csrc/kernels/instances/attend_prefix_backward_mma_<feature>.cu instantiate these; everything else refers to them.
#define CSAT_PREFIX_BACKWARD_MMA(prefix, T, kD)                                                           \
  prefix template int launch_prefix_query_backward_mma<T, kD>(const PrefixGradientArgs&, int64_t, void*); \
  prefix template int launch_prefix_token_backward_mma<T, kD>(const PrefixTokenMmaArgs&, int64_t, void*);

#ifndef CSAT_INSTANTIATE
#define CSAT_EXTERN_PREFIX_BACKWARD_MMA(T) \
  CSAT_PREFIX_BACKWARD_MMA(extern, T, 64) CSAT_PREFIX_BACKWARD_MMA(extern, T, 128)
CSAT_EXTERN_PREFIX_BACKWARD_MMA(bf16)
CSAT_EXTERN_PREFIX_BACKWARD_MMA(f16)
#undef CSAT_EXTERN_PREFIX_BACKWARD_MMA
#endif

#define CSAT_ATTEND_PREFIX_BACKWARD_MMA_INSTANCE(T, kD) CSAT_PREFIX_BACKWARD_MMA(, T, kD)

}  // namespace csat
