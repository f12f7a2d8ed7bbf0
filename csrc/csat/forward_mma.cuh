// attend, decode and both fused on tensor cores (mma.sync m16n8k16, sm_80 and up), for bf16 and fp16.
//
//   attend:  s = scale q kc^T + bias, online softmax over chunks of measurements, z = softmax(s) vc, lse
//   decode:  c = psi a_T (lista.cuh), fused as an epilogue: z goes from accumulators to the next left operand
//
// A warp owns 32 rows, so that every right operand that ldmatrix brings serves two row blocks; a block of eight warps
// owns a contiguous range of such units over all (batch element, head) pairs, and loads the measurements and the
// decoder of a pair once for all of its units (persistent: as many blocks as multiprocessors).
//
// Data flow: kc, vc, bias, S, B, psi -> shared (cp.async), resident where they fit, else two chunks at a time while all
// warps walk in step; q rows -> the warp's own shared tile, one unit ahead -> left operand in registers (D <= 64; read
// block by block above) -> scores and z in accumulators -> z, a, c in registers -> shared tile -> global in 16-byte
// rows. Fused, z is rounded to T on the way, so that the op equals attend followed by decode bit for bit.
//
// Budget of a row: 2 M (D + R) + 2 T P (P + R) + 2 P Dv FLOP; q, z, c once through global memory. Registers: 32 rows x
// (D + chunk + D / 2) accumulators and operands, under 255 a thread; shared memory: limits::forward_mma_shared.
// A row whose scores are all -inf: z = 0, lse = -inf. Limits: limits.h.
#pragma once
#include <type_traits>

#include "csat/limits.h"
#include "csat/lista.cuh"

namespace csat {

struct ForwardMmaArgs {
  int pairs, heads, units;  // units of a pair: ceil(Nq / rows of a warp)
  int64_t queries;
  int features;  // R
  View z;        // attend: where to write it (data null: not wanted); decode alone: where to read it
  // attend
  View q, kc, vc, lse;
  View bias;  // float32 (data null: none)
  int group;  // H / Hk
  int64_t measurements;
  int head_dim, chunks, slots, stages;  // slots = chunks: resident, else 2; stages: tiles of q rows a warp
  float scale;
  // decode
  View out;
  DecoderWeights decoder;
  bool z_vectors, out_vectors;  // 16-byte stores
};

// A chunk of measurements in shared memory; bias in powers of two, -inf where there is no measurement.
template <typename T, int kD>
struct Chunk {
  static constexpr int kRows = limits::mma_chunk(kD);
  Tile<T, kD> keys, values;
  float* bias;

  CSAT_DEVICE static Chunk at_slot(T* slots, int slot) {
    T* keys = slots + slot * (limits::mma_slot_bytes(kD) / 2);
    T* values = keys + tile_elements(kRows, kD);
    return {{keys}, {values}, reinterpret_cast<float*>(values + tile_elements(kRows, kD))};
  }
};

// In powers of two; -inf where there is no measurement.
CSAT_DEVICE float bias_of(const ForwardMmaArgs& p, int batch, int head, int64_t m) {
  if (m >= p.measurements) return -INFINITY;
  return p.bias.data ? at<const float>(p.bias, batch, head, 0)[m * p.bias.stride[3]] * kLog2e : 0.f;
}

template <typename T, int kD>
CSAT_DEVICE void load_chunk(const Chunk<T, kD>& chunk, const ForwardMmaArgs& p, int pair, int64_t first) {
  constexpr int kRows = Chunk<T, kD>::kRows;
  const int batch = pair / p.heads, head = pair % p.heads, key_head = head / p.group;
  const auto rows = [&](const View& v, int columns) {
    return GlobalRows<const T>{at<const T>(v, batch, key_head, 0), v.stride[2], p.measurements, columns};
  };
  load_rows_async(chunk.keys, rows(p.kc, p.head_dim), first, kRows, threadIdx.x, limits::kMmaThreads);
  load_rows_async(chunk.values, rows(p.vc, p.features), first, kRows, threadIdx.x, limits::kMmaThreads);
  if (threadIdx.x < kRows) chunk.bias[threadIdx.x] = bias_of(p, batch, head, first + threadIdx.x);
}

// Running maximum (in powers of two) and this lane's part of the running sum, a row.
template <int kRows>
struct Softmax {
  Rows<kRows> peak, mass;
};

template <int kRows, int kChunk>
CSAT_DEVICE void add_bias(Sums<kRows, kChunk>& s, const float* bias, float scale) {
  for_each(s, [&](float& x, int, int column) { x = scale * x + bias[column]; });
}

// Scores -> exp2(s - peak), with the peak of all chunks so far; mass and z follow it.
template <int kRows, int kChunk, int kD>
CSAT_DEVICE void online_softmax(Softmax<kRows>& state, Sums<kRows, kD>& z, Sums<kRows, kChunk>& s) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float peak = state.peak.at[i][h];
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) peak = fmaxf(peak, fmaxf(s.at[i][j][2 * h], s.at[i][j][2 * h + 1]));
      peak = quad_max(peak);
      const float centre = peak == -INFINITY ? 0.f : peak;  // a row of -inf: all probabilities 0
      const float decay = exp2_approx(state.peak.at[i][h] - centre);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s.at[i][j][2 * h + c];
          x = exp2_approx(x - centre);
          sum += x;
        }
      state.peak.at[i][h] = peak;
      state.mass.at[i][h] = state.mass.at[i][h] * decay + sum;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) z.at[i][j][2 * h] *= decay, z.at[i][j][2 * h + 1] *= decay;
    }
}

// z / mass, and the log-sum-exp in its place in `state.peak`.
template <int kRows, int kD>
CSAT_DEVICE void normalise(Softmax<kRows>& state, Sums<kRows, kD>& z) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float mass = quad_sum(state.mass.at[i][h]);
      const float inverse = 1.f / mass;
      float& peak = state.peak.at[i][h];
      peak = mass == 0.f ? -INFINITY : peak * kLn2 + log_f32(mass);
#pragma unroll
      for (int j = 0; j < kD / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& value = z.at[i][j][2 * h + c];
          value = mass == 0.f ? 0.f : value * inverse;  // nothing to look at, whatever vc holds
        }
    }
}

// What a block works on: a run of units of one pair.
struct UnitRun {
  int pair, first, count;
};

// Calls f(run) for the units of this block, pair by pair.
template <typename F>
CSAT_DEVICE void for_each_run(const ForwardMmaArgs& p, F f) {
  const int64_t total = int64_t(p.pairs) * p.units;
  const int64_t end = total / gridDim.x * (blockIdx.x + 1) + total % gridDim.x * (blockIdx.x + 1) / gridDim.x;
  int64_t unit = total / gridDim.x * blockIdx.x + total % gridDim.x * blockIdx.x / gridDim.x;
  while (unit < end) {
    const int64_t pair = unit / p.units, first = unit % p.units;
    const int64_t count = end - unit < p.units - first ? end - unit : p.units - first;
    f(UnitRun{static_cast<int>(pair), static_cast<int>(first), static_cast<int>(count)});
    unit += count;
  }
}

template <typename T>
CSAT_DEVICE GlobalRows<T> rows_of(const View& v, const ForwardMmaArgs& p, int pair, int columns) {
  return {at<T>(v, pair / p.heads, pair % p.heads, 0), v.stride[2], p.queries, columns};
}

// The warp's tile of rows, asynchronously; a unit that does not exist is not read. Always one group of copies.
template <int kRows, typename T, int kD>
CSAT_DEVICE void fetch_rows(Tile<T, kD> tile, const ForwardMmaArgs& p, const View& v, int columns, const UnitRun& run,
                            int unit) {
  if (unit < run.count)
    load_rows_async(tile, rows_of<const T>(v, p, run.pair, columns), int64_t(run.first + unit) * kRows, kRows,
                    lane_id(), 32);
  cp_async_commit();
}

// Normalises z and writes the log-sum-exp and, where it is wanted, z; z is left in the warp's tile, rounded to T.
template <typename T, int kRows, int kD>
CSAT_DEVICE void write_softmax(const ForwardMmaArgs& p, int pair, int64_t first, Softmax<kRows>& state,
                               Sums<kRows, kD>& z, Tile<T, kD> tile) {
  normalise(state, z);
  float* lse = at<float>(p.lse, pair / p.heads, pair % p.heads, 0);
  for_each_row(state.peak, [&](float value, int row) {
    if (lane_id() % 4 == 0 && first + row < p.queries) lse[(first + row) * p.lse.stride[2]] = value;
  });
  store_tile(tile, 0, z);
  sync_warp();
  if (p.z.data) store_rows(rows_of<T>(p.z, p, pair, p.features), first, kRows, tile, p.z_vectors);
}

// The rest of a unit after its chunk loop: z out, and on through the decoder.
template <int kP, typename T, int kRows, int kD>
CSAT_DEVICE void finish_unit(const ForwardMmaArgs& p, const DecoderTiles<T, kD, kP ? kP : 16>& weights, int pair,
                             int64_t first, Softmax<kRows>& state, Sums<kRows, kD>& sums, Tile<T, kD> tile) {
  write_softmax(p, pair, first, state, sums, tile);
  if constexpr (kP > 0) {
    decode_tile<kRows>(tile, weights);
    sync_warp();
    store_rows(rows_of<T>(p.out, p, pair, p.decoder.outputs), first, kRows, tile, p.out_vectors);
  }
  sync_warp();  // before the tile is filled again
}

// The queries of a unit for the products with keys: in registers while z leaves room for them, else in their tile.
template <typename T, int kD>
using Queries = std::conditional_t<kD <= 64, Operand<T, limits::kMmaRows, kD>, Tile<T, kD>>;
template <typename T, int kD>
CSAT_DEVICE Queries<T, kD> queries_in(Tile<T, kD> tile) {
  if constexpr (kD <= 64)
    return load_operand<limits::kMmaRows>(tile);
  else
    return tile;
}

// What a unit carries from chunk to chunk.
template <typename T, int kD>
struct UnitSums {
  Sums<limits::kMmaRows, kD> z = {};
  Softmax<limits::kMmaRows> softmax = {};

  CSAT_DEVICE UnitSums() {
    for_each_row(softmax.peak, [](float& peak, int) { peak = -INFINITY; });
  }
  // hide(s): -inf for scores that do not count.
  template <typename Hide>
  CSAT_DEVICE void add(const Queries<T, kD>& q, const Chunk<T, kD>& chunk, float scale, Hide hide) {
    Sums<limits::kMmaRows, limits::mma_chunk(kD)> s = {};
    multiply_transposed(s, q, chunk.keys);
    add_bias(s, chunk.bias, scale * kLog2e);
    hide(s);
    online_softmax(softmax, z, s);
    multiply(z, to_operand<T>(s), chunk.values);
  }
  CSAT_DEVICE void add(const Queries<T, kD>& q, const Chunk<T, kD>& chunk, float scale) {
    add(q, chunk, scale, [](auto&) {});
  }
};

// The units of one run whose measurements are resident: every warp goes its own way, its next rows on their way.
template <typename T, int kD, int kP>
CSAT_DEVICE void attend_resident(const ForwardMmaArgs& p, const UnitRun& run, T* slots,
                                 const DecoderTiles<T, kD, kP ? kP : 16>& weights, T* warp_tiles) {
  constexpr int kRows = limits::kMmaRows;
  const auto tile_at = [&](int stage) { return Tile<T, kD>{warp_tiles + stage * tile_elements(kRows, kD)}; };
  const auto fetch = [&](int stage, int unit) { fetch_rows<kRows>(tile_at(stage), p, p.q, p.head_dim, run, unit); };
  if (p.stages == 2) fetch(0, warp_id());
  for (int unit = warp_id(), stage = 0; unit < run.count; unit += limits::kMmaWarps) {
    const Tile<T, kD> tile = tile_at(stage);
    if (p.stages == 2) {
      stage ^= 1;
      fetch(stage, unit + limits::kMmaWarps);
      cp_async_wait<1>();
    } else {
      fetch(0, unit);
      cp_async_wait<0>();
    }
    sync_warp();
    const Queries<T, kD> q = queries_in(tile);
    UnitSums<T, kD> sums;
    for (int c = 0; c < p.chunks; ++c) sums.add(q, Chunk<T, kD>::at_slot(slots, c), p.scale);
    sync_warp();  // every lane has read its queries
    finish_unit<kP>(p, weights, run.pair, int64_t(run.first + unit) * kRows, sums.softmax, sums.z, tile);
  }
  cp_async_wait<0>();
}

// The same where chunks of measurements come one after the other through two slots: the warps walk in step.
template <typename T, int kD, int kP>
CSAT_DEVICE void attend_streamed(const ForwardMmaArgs& p, const UnitRun& run, T* slots,
                                 const DecoderTiles<T, kD, kP ? kP : 16>& weights, Tile<T, kD> tile) {
  constexpr int kRows = limits::kMmaRows;
  const auto slot = [&](int c) { return Chunk<T, kD>::at_slot(slots, c % 2); };
  const auto load = [&](int c) {
    if (c < p.chunks) load_chunk(slot(c), p, run.pair, int64_t(c) * Chunk<T, kD>::kRows);
    cp_async_commit();
  };
  for (int group = 0; group < run.count; group += limits::kMmaWarps) {
    const int unit = group + warp_id();
    const bool active = unit < run.count;
    fetch_rows<kRows>(tile, p, p.q, p.head_dim, run, unit);
    load(0);
    Queries<T, kD> q;
    UnitSums<T, kD> sums;
    for (int c = 0; c < p.chunks; ++c) {
      load(c + 1);
      cp_async_wait<1>();
      __syncthreads();
      if (active) {
        if (c == 0) q = queries_in(tile);
        sums.add(q, slot(c), p.scale);
      }
      __syncthreads();  // everybody is done with the slot that comes next
    }
    if (active) finish_unit<kP>(p, weights, run.pair, int64_t(run.first + unit) * kRows, sums.softmax, sums.z, tile);
  }
  cp_async_wait<0>();
}

template <typename T, int kD, int kP>
__global__ void __launch_bounds__(limits::kMmaThreads, 1) forward_mma_kernel(ForwardMmaArgs p) {
  constexpr int kRows = limits::kMmaRows, kAtoms = kP ? kP : 16;
  CSAT_DYN_SMEM(T, shared);
  const DecoderTiles<T, kD, kAtoms> weights{shared, p.decoder};
  T* slots = kP > 0 ? weights.end() : shared;
  T* warp_tiles = slots + p.slots * (limits::mma_slot_bytes(kD) / 2) + warp_id() * p.stages * tile_elements(kRows, kD);
  for_each_run(p, [&](const UnitRun& run) {
    __syncthreads();  // nobody reads the run before
    if (p.slots == p.chunks)
      for (int c = 0; c < p.chunks; ++c)
        load_chunk(Chunk<T, kD>::at_slot(slots, c), p, run.pair, int64_t(c) * Chunk<T, kD>::kRows);
    if constexpr (kP > 0) load_decoder(weights, run.pair % p.heads, limits::kMmaThreads);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (p.slots == p.chunks)
      attend_resident<T, kD, kP>(p, run, slots, weights, warp_tiles);
    else
      attend_streamed<T, kD, kP>(p, run, slots, weights, {warp_tiles});
  });
}

// decode alone: rows of z from global memory, the decoder resident.
template <typename T, int kD, int kP>
__global__ void __launch_bounds__(limits::kMmaThreads, 1) decode_mma_kernel(ForwardMmaArgs p) {
  constexpr int kRows = limits::decode_mma_rows(kP);
  CSAT_DYN_SMEM(T, shared);
  const DecoderTiles<T, kD, kP> weights{shared, p.decoder};
  const Tile<T, kD> tile{weights.end() + warp_id() * tile_elements(kRows, kD)};
  for_each_run(p, [&](const UnitRun& run) {
    __syncthreads();
    load_decoder(weights, run.pair % p.heads, limits::kMmaThreads);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int unit = warp_id(); unit < run.count; unit += limits::kMmaWarps) {
      fetch_rows<kRows>(tile, p, p.z, p.features, run, unit);
      cp_async_wait<0>();
      sync_warp();
      decode_tile<kRows>(tile, weights);
      sync_warp();
      store_rows(rows_of<T>(p.out, p, run.pair, p.decoder.outputs), int64_t(run.first + unit) * kRows, kRows, tile,
                 p.out_vectors);
      sync_warp();
    }
  });
}

template <typename T, int kD, int kP>
int launch_forward_mma(const ForwardMmaArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = forward_mma_kernel<T, kD, kP>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kMmaThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}
template <typename T, int kD, int kP>
int launch_decode_mma(const ForwardMmaArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = decode_mma_kernel<T, kD, kP>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kMmaThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}

// csrc/kernels/instances/forward_mma_<feature>.cu instantiate these; everything else refers to them. Above
// limits::kFusedMmaFeature there is no fused kernel.
#define CSAT_ATTEND_MMA(prefix, T, kD) \
  prefix template int launch_forward_mma<T, kD, 0>(const ForwardMmaArgs&, int64_t, int64_t, void*);
#define CSAT_FUSED_MMA(prefix, T, kD)                                                                \
  prefix template int launch_forward_mma<T, kD, 64>(const ForwardMmaArgs&, int64_t, int64_t, void*); \
  prefix template int launch_forward_mma<T, kD, 128>(const ForwardMmaArgs&, int64_t, int64_t, void*);
#define CSAT_DECODE_MMA(prefix, T, kD)                                                               \
  prefix template int launch_decode_mma<T, kD, 64>(const ForwardMmaArgs&, int64_t, int64_t, void*);  \
  prefix template int launch_decode_mma<T, kD, 128>(const ForwardMmaArgs&, int64_t, int64_t, void*); \
  prefix template int launch_decode_mma<T, kD, 256>(const ForwardMmaArgs&, int64_t, int64_t, void*);
#define CSAT_ALL_MMA(prefix, T, kD) \
  CSAT_ATTEND_MMA(prefix, T, kD) CSAT_FUSED_MMA(prefix, T, kD) CSAT_DECODE_MMA(prefix, T, kD)
#define CSAT_WIDE_MMA(prefix, T) CSAT_ATTEND_MMA(prefix, T, 128) CSAT_DECODE_MMA(prefix, T, 128)

#ifndef CSAT_INSTANTIATE
#define CSAT_EXTERN_MMA(T)    \
  CSAT_ALL_MMA(extern, T, 32) \
  CSAT_ALL_MMA(extern, T, 64) CSAT_ALL_MMA(extern, T, 80) CSAT_ALL_MMA(extern, T, 96) CSAT_WIDE_MMA(extern, T)
CSAT_EXTERN_MMA(bf16)
CSAT_EXTERN_MMA(f16)
#undef CSAT_EXTERN_MMA
#endif

#define CSAT_FORWARD_MMA_INSTANCE(T, kD) CSAT_FORWARD_MMA_INSTANCE_##kD(T)
#define CSAT_FORWARD_MMA_INSTANCE_32(T) CSAT_ALL_MMA(, T, 32)
#define CSAT_FORWARD_MMA_INSTANCE_64(T) CSAT_ALL_MMA(, T, 64)
#define CSAT_FORWARD_MMA_INSTANCE_80(T) CSAT_ALL_MMA(, T, 80)
#define CSAT_FORWARD_MMA_INSTANCE_96(T) CSAT_ALL_MMA(, T, 96)
#define CSAT_FORWARD_MMA_INSTANCE_128(T) CSAT_WIDE_MMA(, T)

}  // namespace csat
