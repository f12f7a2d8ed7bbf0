// attend_prefix on tensor cores, bf16 and fp16, in chunks of 128 tokens, with the decoder (lista.cuh) behind it where
// both are fused. The formulas of attend_prefix.cuh, with what a chunk finds given as means, so that 16 bits hold it:
//
//   K = Kp / g_p, V = Vp / g_p (rows of measurements without mass: 0),  g = g_p + L phi
//   s = scale (g_p o q K^T + (L o q k^T) phi),  u = s / g + bias + log2 g,  e = exp2(u - peak),  y = e / g
//   z = ((y o g_p) V + (L o y phi^T) v) / sum e
//
// (signed: g the root of the number of tokens, alike for all measurements, and no logarithm). In the sums a float32 phi
// goes in two parts, its rounding to T and 2^11 times the rest, and they have float32's accuracy; inside a chunk it is
// rounded to T, in weights and masses alike, so that a mean of values that are alike is what they are.
//
//   prefix_sums_mma     phi^T k, phi^T v and the sum of phi over a chunk: a block 64 measurements, a warp 32 of keys or
//                       of values (prefix_scan.cuh: masses, then means before each chunk)
//   attend_prefix_mma   z, lse of a chunk a block; a warp owns 32 queries (16 above 64 features or coefficients)
//
// A warp takes 32 measurements at a time against the tokens up to its last query, 16 tokens at a time: their products
// with q, masked, are at once the left operand of the next product with phi, whose right operand also serves L phi;
// those of y with phi that of the product with v. Blocks are persistent, over consecutive chunks of one head.
//
// Data flow: q, k, v of the chunk and, one or two stretches of 32 measurements at a time, phi, K, V -> shared
// (cp.async); q -> left operand in registers (D <= 64); s, g, z in accumulators -> z, a, c as in forward_mma. Budget of
// a query: 2 M (D + R) + (M / 32) 2 (64 + rows / 2) (D + R + 3 * 32) FLOP; of a chunk in global memory q, k, v, phi, z
// and M (D + R) states of 2 bytes here, k, v, phi and 4 bytes a state in the sums, 6 in the scan. Shared memory:
// limits::attend_prefix_mma_bytes; registers: 255 a thread, two blocks a multiprocessor where a warp owns 32 queries.
// Limits: limits::plan_prefix_mma. The host goes over batch elements and key heads in parts (prefix_parts.h).
#pragma once
#include "csat/forward_mma.cuh"
#include "csat/tile.cuh"

namespace csat {

struct PrefixMmaArgs {
  ForwardMmaArgs rows;            // kc, vc and group are not read; a unit is a chunk
  View k, v, phi;                 // vector rows, zeros where tokens are masked; phi (1 or B, 1 or Hs, N, M)
  View state_keys, state_values;  // K, V: (B, Hs, chunks * padded measurements, feature)
  Panel masses;                   // g_p: (B Hs chunks)(1, padded measurements)
  const unsigned char* keep;
  int key_group, state_group;  // H / Hk, H / Hs
  int run;                     // chunks of a block
  bool is_signed;
};

struct PrefixSumsMmaArgs {
  View k, v;
  View phi;  // float32 as it comes, or T with vector rows and zeros where tokens are masked
  int64_t state_heads, key_group, chunks, tokens, measurements, padded;  // key_group: Hs / Hk
  int head_dim, features;
  float *keys, *values, *masses;  // (B Hs chunks) (padded, feature), the same, (1, padded)
  const unsigned char* keep;
  bool is_signed;
};

// ---- sums over a chunk

// The rows of phi of a chunk, and 2^11 times what rounding them has left where phi is float32.
template <typename T>
struct PhiTiles {
  static constexpr int kColumns = limits::kPrefixSumRows, kRows = limits::kPrefixMmaChunk;
  static constexpr float kFactor = 2048.f;
  Tile<T, kColumns> high, low;
  bool has_low;

  CSAT_DEVICE PhiTiles(T* shared, DType dtype)
      : high{shared}, low(high.from_row(kRows)), has_low(dtype == DType::f32) {}
  CSAT_DEVICE T* end() const { return low.row(kRows); }

  CSAT_DEVICE void load(const PrefixSumsMmaArgs& p, int64_t batch, int64_t head, int64_t first, int64_t m0) const {
    if (!has_low) {
      const GlobalRows<const T> rows{at<const T>(p.phi, batch, head, 0) + m0, p.phi.stride[2], p.tokens,
                                     static_cast<int>(p.measurements - m0)};
      return load_rows_async(high, rows, first, kRows, threadIdx.x, limits::kPrefixSumThreads);
    }
    for (int i = threadIdx.x; i < kRows * kColumns; i += limits::kPrefixSumThreads) {
      const int64_t t = first + i / kColumns, m = m0 + i % kColumns;
      const bool exists = t < p.tokens && m < p.measurements && (!p.keep || p.keep[batch * p.tokens + t]);
      const float x = exists ? at<const float>(p.phi, batch, head, t)[m * p.phi.stride[3]] : 0.f;
      const T rounded = from_float<T>(x);
      high.row(i / kColumns)[i % kColumns] = rounded;
      low.row(i / kColumns)[i % kColumns] = from_float<T>(kFactor * (x - to_float(rounded)));
    }
  }
  CSAT_DEVICE float at_row(int r, int column) const {
    const float rest = has_low ? to_float(low.row(r)[column]) / kFactor : 0.f;
    return to_float(high.row(r)[column]) + rest;
  }
};

// The sum of one column of phi over the chunk; signed: the number of tokens that are kept.
template <typename T>
CSAT_DEVICE float chunk_mass(const PrefixSumsMmaArgs& p, const PhiTiles<T>& phi, int64_t batch, int64_t first) {
  float sum = 0.f;
  for (int t = 0; t < PhiTiles<T>::kRows; ++t) {
    const bool kept = first + t < p.tokens && (!p.keep || p.keep[batch * p.tokens + first + t]);
    sum += !p.is_signed ? phi.at_row(t, threadIdx.x) : kept ? 1.f : 0.f;
  }
  return sum;
}

template <typename T, int kD>
__global__ void __launch_bounds__(limits::kPrefixSumThreads) prefix_sums_mma_kernel(PrefixSumsMmaArgs p) {
  constexpr int kChunk = limits::kPrefixMmaChunk, kRows = limits::kPrefixSumRows, kThreads = limits::kPrefixSumThreads;
  static_assert(kThreads == 4 * 32 && kRows == 2 * 32, "two warps for keys, two for values, 32 measurements each");
  CSAT_DYN_SMEM(T, shared);
  const PhiTiles<T> phi(shared, p.phi.dtype);
  const Tile<T, kD> k{phi.end()}, v = k.from_row(kChunk);
  const int64_t slabs = p.padded / kRows, matrix = blockIdx.x / slabs, m0 = blockIdx.x % slabs * kRows;
  const int64_t state = matrix / p.chunks, first = matrix % p.chunks * kChunk;
  const int64_t batch = state / p.state_heads, head = state % p.state_heads;
  const auto load = [&](Tile<T, kD> tile, const View& x, int columns) {
    const GlobalRows<const T> rows{at<const T>(x, batch, head / p.key_group, 0), x.stride[2], p.tokens, columns};
    load_rows_async(tile, rows, first, kChunk, threadIdx.x, kThreads);
  };
  load(k, p.k, p.head_dim);
  load(v, p.v, p.features);
  phi.load(p, batch, head, first, m0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x < kRows) p.masses[matrix * p.padded + m0 + threadIdx.x] = chunk_mass(p, phi, batch, first);
  const int row = warp_id() % 2 * 32;
  const bool of_values = warp_id() >= 2;
  Sums<32, kD> sums = {};
  if (phi.has_low) {
    multiply_of_transpose(sums, phi.low, row, of_values ? v : k, kChunk);
    for_each(sums, [](float& x, int, int) { x /= PhiTiles<T>::kFactor; });
  }
  multiply_of_transpose(sums, phi.high, row, of_values ? v : k, kChunk);
  store_floats((of_values ? p.values : p.keys) + (matrix * p.padded + m0 + row) * kD, kD, 32, sums);
}

// ---- forward

// A stretch of measurements: the means before the chunk and the chunk's own phi; bias in powers of two.
template <typename T, int kD>
struct Stretch {
  static constexpr int kColumns = limits::kPrefixStretch;
  Tile<T, kD> keys, values;
  Tile<T, kColumns> phi;
  float *bias, *mass;  // the factor of the means: of signed rows the root of their number

  CSAT_DEVICE static Stretch at_slot(T* slots, int slot) {
    const Tile<T, kD> keys{slots + slot * (limits::prefix_slot_bytes(kD) / 2)}, values = keys.from_row(kColumns);
    const Tile<T, kColumns> phi{values.row(kColumns)};
    float* bias = reinterpret_cast<float*>(phi.row(limits::kPrefixMmaChunk));
    return {keys, values, phi, bias, bias + kColumns};
  }
};

// The chunk of one head that a block works on: two numbers, and what follows from them.
struct PrefixChunk {
  const PrefixMmaArgs& p;
  int pair, chunk;

  CSAT_DEVICE int batch() const { return pair / p.rows.heads; }
  CSAT_DEVICE int head() const { return pair % p.rows.heads; }
  CSAT_DEVICE int key_head() const { return head() / p.key_group; }
  CSAT_DEVICE int state_head() const { return head() / p.state_group; }
  CSAT_DEVICE int64_t first() const { return int64_t(chunk) * limits::kPrefixMmaChunk; }  // token
  CSAT_DEVICE const float* masses() const {
    const int64_t state_heads = p.rows.heads / p.state_group;
    return p.masses.data + ((batch() * state_heads + state_head()) * p.rows.units + chunk) * p.masses.matrix;
  }
};

template <int kThreads, typename T, int kD>
CSAT_DEVICE void load_tokens(Tile<T, kD> tile, const PrefixChunk& place, const View& x, int head, int columns) {
  const GlobalRows<const T> rows{at<const T>(x, place.batch(), head, 0), x.stride[2], place.p.rows.queries, columns};
  load_rows_async(tile, rows, place.first(), limits::kPrefixMmaChunk, threadIdx.x, kThreads);
}

template <int kThreads, typename T, int kD>
CSAT_DEVICE void load_stretch(const Stretch<T, kD>& stretch, const PrefixChunk& place, int64_t m0) {
  const PrefixMmaArgs& p = place.p;
  constexpr int kColumns = Stretch<T, kD>::kColumns;
  const int64_t padded = p.masses.pitch;
  const auto means = [&](const View& x) {
    return GlobalRows<const T>{at<const T>(x, place.batch(), place.state_head(), place.chunk * padded), kD, padded, kD};
  };
  load_rows_async(stretch.keys, means(p.state_keys), m0, kColumns, threadIdx.x, kThreads);
  load_rows_async(stretch.values, means(p.state_values), m0, kColumns, threadIdx.x, kThreads);
  const GlobalRows<const T> phi{at<const T>(p.phi, place.batch(), place.state_head(), 0) + m0, p.phi.stride[2],
                                p.rows.queries, static_cast<int>(p.rows.measurements - m0)};
  load_rows_async(stretch.phi, phi, place.first(), limits::kPrefixMmaChunk, threadIdx.x, kThreads);
  if (threadIdx.x >= kColumns) return;
  stretch.bias[threadIdx.x] = bias_of(p.rows, place.batch(), place.head(), m0 + threadIdx.x);
  const float mass = place.masses()[m0 + threadIdx.x];
  stretch.mass[threadIdx.x] = p.is_signed ? sqrt_f32(mass) : mass;
}

// Signed: the root of the number of tokens up to each of the chunk's.
template <int kThreads>
CSAT_DEVICE void count_roots(float* roots, const PrefixChunk& place) {
  const int64_t tokens = place.p.rows.queries;
  const unsigned char* keep = place.p.keep ? place.p.keep + place.batch() * tokens : nullptr;
  for (int t = threadIdx.x; t < limits::kPrefixMmaChunk; t += kThreads) {
    float count = place.masses()[0];
    for (int64_t s = place.first(); s <= place.first() + t && s < tokens; ++s) count += !keep || keep[s] ? 1.f : 0.f;
    roots[t] = sqrt_f32(count);
  }
}

// Products of queries with 16 tokens, of which row r sees columns 0 .. r + offset, and behind them the ones of L.
template <int kRows>
CSAT_DEVICE Sums<2 * kRows, 16> lower_with_ones(Sums<kRows, 16>& products, float scale, int offset) {
  Sums<2 * kRows, 16> lower;
  const int lane = pinned(lane_id()), g = lane / 4 + offset, t = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool seen = 8 * j + t + e % 2 <= 16 * i + g + e / 2 * 8;
        lower.at[i][j][e] = seen ? scale * products.at[i][j][e] : 0.f;
        lower.at[kRows / 16 + i][j][e] = seen ? 1.f : 0.f;
      }
  return lower;
}

// What a warp carries from stretch to stretch: UnitSums for rows that see themselves and what came before.
template <typename T, int kD, int kRows>
struct PrefixUnit {
  static constexpr int kColumns = limits::kPrefixStretch;
  Sums<kRows, kD> z = {};
  Softmax<kRows> softmax = {};

  CSAT_DEVICE PrefixUnit() {
    for_each_row(softmax.peak, [](float& peak, int) { peak = -INFINITY; });
  }

  CSAT_DEVICE static int first() { return warp_id() * kRows; }  // of its queries in the chunk
  // roots: signed rows' masses; null: each measurement has its own.
  CSAT_DEVICE void add(Tile<T, kD> q, const Stretch<T, kD>& stretch, Tile<T, kD> k, Tile<T, kD> v, float scale,
                       const float* roots) {
    Sums<2 * kRows, kColumns> both = score(q, stretch, k, scale);
    weigh(both, stretch, roots);
    Sums<kRows, kColumns> s = rows_of_sums<0>(both);
    online_softmax(softmax, z, s);
    multiply_rows(s, rows_of_sums<kRows>(both));
    const Operand<T, kRows, kColumns> near = to_operand<T>(s);
    scale_columns(s, load_columns<kColumns>(stretch.mass));
    multiply(z, to_operand<T>(s), stretch.values);
    add_near(near, stretch.phi, v);
  }

  // Loaded anew for every stretch, or read block by block: beyond the scores registers are wanted for other things.
  CSAT_DEVICE static auto left_operand(Tile<T, kD> q) {
    if constexpr (kD <= 64)
      return load_operand<kRows>(q);
    else
      return q;
  }

  template <int kFirst>
  CSAT_DEVICE static Sums<kRows, kColumns> rows_of_sums(const Sums<2 * kRows, kColumns>& both) {
    Sums<kRows, kColumns> part;
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) part.at[i][j][e] = both.at[kFirst / 16 + i][j][e];
    return part;
  }

  // s without its mass, and behind it L phi, of this chunk alone.
  CSAT_DEVICE static Sums<2 * kRows, kColumns> score(Tile<T, kD> q, const Stretch<T, kD>& stretch, Tile<T, kD> k,
                                                     float scale) {
    return multiply_prefixes(q, stretch, stretch.keys, k, scale);
  }
  // scale (g_p o x means^T + (L o x tokens^T) phi), and behind it L phi.
  CSAT_DEVICE static Sums<2 * kRows, kColumns> multiply_prefixes(Tile<T, kD> x, const Stretch<T, kD>& stretch,
                                                                 Tile<T, kD> means, Tile<T, kD> tokens, float scale) {
    const auto left = left_operand(x);
    Sums<kRows, kColumns> far = {};
    multiply_transposed(far, left, means);
    scale_columns(far, load_columns<kColumns>(stretch.mass));
    Sums<2 * kRows, kColumns> both = {};
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) both.at[i][j][e] = scale * far.at[i][j][e];
#pragma unroll 1
    for (int t = 0; t < first() + kRows; t += 16) {
      Sums<kRows, 16> products = {};
      multiply_transposed(products, left, tokens.from_row(t));
      multiply(both, to_operand<T>(lower_with_ones(products, scale, first() - t)), stretch.phi.from_row(t));
    }
    return both;
  }

  // Scores in powers of two, -inf where there is no mass, and behind them the inverse masses.
  CSAT_DEVICE static void weigh(Sums<2 * kRows, kColumns>& both, const Stretch<T, kD>& stretch, const float* roots) {
    const Columns<kColumns> before = load_columns<kColumns>(stretch.mass), bias = load_columns<kColumns>(stretch.bias);
    const float of_logarithm = roots ? 0.f : 1.f;  // a select would become a branch each
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float root = roots ? roots[first() + 16 * i + 8 * h + lane_id() / 4] : 0.f;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float &s = both.at[i][j][2 * h + c], &mass = both.at[kRows / 16 + i][j][2 * h + c];
            const float g = roots ? root : before.at[j][c] + mass;
            const bool sees = g >= kSmallestNormal;  // of less the device's logarithm is -inf, its inverse inf
            mass = sees ? divide_approx(1.f, g) : 0.f;
            s = sees ? s * mass + bias.at[j][c] + of_logarithm * log2_approx(g) : -INFINITY;
          }
      }
  }

  CSAT_DEVICE static void scale_columns(Sums<kRows, kColumns>& x, const Columns<kColumns>& factor) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) x.at[i][j][e] *= factor.at[j][e % 2];
  }
  CSAT_DEVICE static void multiply_rows(Sums<kRows, kColumns>& x, const Sums<kRows, kColumns>& y) {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) x.at[i][j][e] *= y.at[i][j][e];
  }

 private:
  // z += (L o y phi^T) v.
  CSAT_DEVICE void add_near(const Operand<T, kRows, kColumns>& y, Tile<T, kColumns> phi, Tile<T, kD> v) {
#pragma unroll 1
    for (int t = 0; t < first() + kRows; t += 16) {
      Sums<kRows, 16> weights = {};
      multiply_transposed(weights, y, phi.from_row(t));
      const int offset = first() - t;
      for_each(weights, [&](float& w, int row, int column) { w = column <= row + offset ? w : 0.f; });
      multiply(z, to_operand<T>(weights), v.from_row(t));
    }
  }
};

// kP: coefficients; 0: no decoder.
template <typename T, int kD, int kP>
__global__ void __launch_bounds__(limits::prefix_mma_threads(kD, kP), limits::prefix_mma_blocks(kD, kP))
    attend_prefix_mma_kernel(PrefixMmaArgs p) {
  constexpr int kRows = limits::prefix_mma_rows(kD, kP), kThreads = limits::prefix_mma_threads(kD, kP),
                kChunk = limits::kPrefixMmaChunk, kColumns = limits::kPrefixStretch;
  CSAT_DYN_SMEM(T, shared);
  const Tile<T, kD> q{shared}, k = q.from_row(kChunk), v = k.from_row(kChunk);
  float* roots = reinterpret_cast<float*>(v.row(kChunk));
  T* slots = reinterpret_cast<T*>(roots + kChunk);
  const DecoderTiles<T, kD, kP ? kP : 16> weights{slots + p.rows.slots * (limits::prefix_slot_bytes(kD) / 2),
                                                  p.rows.decoder};
  for (int i = 0; i < p.run; ++i) {
    const int unit = static_cast<int>(blockIdx.x) * p.run + i;
    if (unit >= p.rows.pairs * p.rows.units) break;
    const PrefixChunk place{p, unit / p.rows.units, unit % p.rows.units};
    const auto slot = [&](int c) { return Stretch<T, kD>::at_slot(slots, p.rows.slots == 2 ? c % 2 : 0); };
    const auto load = [&](int c) {
      if (c < p.rows.chunks) load_stretch<kThreads>(slot(c), place, int64_t(c) * kColumns);
      cp_async_commit();
    };
    __syncthreads();  // nobody reads the chunk before, or its decoder
    if constexpr (kP > 0)
      if (place.chunk == 0 || i == 0) load_decoder(weights, place.head(), kThreads, pinned(threadIdx.x));
    load_tokens<kThreads>(q, place, p.rows.q, place.head(), p.rows.head_dim);
    load_tokens<kThreads>(k, place, p.k, place.key_head(), p.rows.head_dim);
    load_tokens<kThreads>(v, place, p.v, place.key_head(), p.rows.features);
    if (p.is_signed) count_roots<kThreads>(roots, place);
    load(0);
    PrefixUnit<T, kD, kRows> sums;
    const Tile<T, kD> own = q.from_row(pinned(warp_id()) * kRows);  // no address of it is kept from chunk to chunk
    for (int c = 0; c < p.rows.chunks; ++c) {
      if (p.rows.slots == 2) {
        load(c + 1);
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
      __syncthreads();
      if (place.first() + sums.first() < p.rows.queries)
        sums.add(own, slot(c), k, v, p.rows.scale * kLog2e, p.is_signed ? roots : nullptr);
      __syncthreads();  // everybody is done with the slot that comes next
      if (p.rows.slots == 1) load(c + 1);
    }
    if (place.first() + sums.first() < p.rows.queries)
      finish_unit<kP>(p.rows, weights, place.pair, place.first() + sums.first(), sums.softmax, sums.z, own);
  }
  cp_async_wait<0>();
}

// ---- launches

template <typename T, int kD>
int launch_prefix_sums_mma(const PrefixSumsMmaArgs& p, int64_t blocks, void* stream) {
  auto kernel = prefix_sums_mma_kernel<T, kD>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kPrefixSumThreads),
              static_cast<size_t>(limits::prefix_sums_mma_bytes(kD)), stream, p);
  return last_error();
}
template <typename T, int kD, int kP>
int launch_attend_prefix_mma(const PrefixMmaArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = attend_prefix_mma_kernel<T, kD, kP>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::prefix_mma_threads(kD, kP)),
              static_cast<size_t>(shared_bytes), stream, p);
  return last_error();
}

// csrc/kernels/instances/attend_prefix_mma_<feature>.cu instantiate these; everything else refers to them.
#define CSAT_PREFIX_MMA(prefix, T, kD, kP) \
  prefix template int launch_attend_prefix_mma<T, kD, kP>(const PrefixMmaArgs&, int64_t, int64_t, void*);
#define CSAT_ALL_PREFIX_MMA(prefix, T, kD)                                                     \
  prefix template int launch_prefix_sums_mma<T, kD>(const PrefixSumsMmaArgs&, int64_t, void*); \
  CSAT_PREFIX_MMA(prefix, T, kD, 0) CSAT_PREFIX_MMA(prefix, T, kD, 64)

#ifndef CSAT_INSTANTIATE
#define CSAT_EXTERN_PREFIX_MMA(T) \
  CSAT_ALL_PREFIX_MMA(extern, T, 64) CSAT_PREFIX_MMA(extern, T, 64, 128) CSAT_ALL_PREFIX_MMA(extern, T, 128)
CSAT_EXTERN_PREFIX_MMA(bf16)
CSAT_EXTERN_PREFIX_MMA(f16)
#undef CSAT_EXTERN_PREFIX_MMA
#endif

#define CSAT_ATTEND_PREFIX_MMA_INSTANCE(T, kD) CSAT_ATTEND_PREFIX_MMA_INSTANCE_##kD(T)
#define CSAT_ATTEND_PREFIX_MMA_INSTANCE_64(T) CSAT_ALL_PREFIX_MMA(, T, 64) CSAT_PREFIX_MMA(, T, 64, 128)
#define CSAT_ATTEND_PREFIX_MMA_INSTANCE_128(T) CSAT_ALL_PREFIX_MMA(, T, 128)

}  // namespace csat
