// attend, alone and with the decoder fused, on Hopper's warpgroup products (wgmma, sm_90a), for bf16 and fp16 and head
// dimensions of 64 and 128: the formulas of forward_mma.cuh, twice its rate of products.
//
// Two warpgroups take turns (FlashAttention-3, section 3.1): while one has its products running, the other computes its
// softmax; two named barriers pass the turn. Within a unit the scores of a chunk and z of the chunk before run
// together.
//
// Data flow: kc, vc, S, B, psi -> shared under the 128-byte swizzle (cp.async), resident for all units of a pair; a
// warp's 16 rows of q -> its own shared tile, one unit ahead (cp.async) -> left operand in registers. Scores, z, the
// iterates and B z are accumulators; every left operand is in registers, so that only the resident matrices are read by
// the asynchronous proxy.
//
// Budget of a row: as forward_mma.cuh, but B z once where B is tied. Registers: 64 rows x (128 scores + 2 D) over 128
// threads, under 255; shared memory: limits::plan_wgmma. Limits: what is resident must fit: M <= 512 at D = 64.
#pragma once
#include "csat/forward_mma.cuh"
#include "csat/warpgroup.cuh"

namespace csat {

// What stands in shared memory for all units of a pair: measurements padded to whole chunks, weights padded to kD
// features and kP coefficients (0: no decoder), all matrices under the swizzle; then theta, step and bias in float32.
// Where each lies is computed, not kept in registers.
template <typename T, int kD, int kP>
struct Resident {
  T* base;
  const ForwardMmaArgs& p;

  CSAT_DEVICE SwizzledTile<T, kD> keys() const { return {base, padded()}; }
  CSAT_DEVICE SwizzledTile<T, kD> values() const { return {base + padded() * kD, padded()}; }
  CSAT_DEVICE auto S(int t) const {
    return SwizzledTile<T, kAtoms>{weights() + (p.decoder.s_layers == 1 ? 0 : t) * (kP * kP), kP};
  }
  CSAT_DEVICE SwizzledTile<T, kD> B(int t) const {
    return {weights() + p.decoder.s_layers * (kP * kP) + (p.decoder.b_layers == 1 ? 0 : t) * (kP * kD), kP};
  }
  CSAT_DEVICE auto psi() const {
    return SwizzledTile<T, kAtoms>{weights() + p.decoder.s_layers * (kP * kP) + p.decoder.b_layers * (kP * kD), kD};
  }
  CSAT_DEVICE float* theta() const { return reinterpret_cast<float*>(kP ? psi().data + kD * kP : weights()); }
  CSAT_DEVICE float* step() const { return theta() + (kP ? p.decoder.layers * kP : 0); }
  CSAT_DEVICE float* bias() const { return step() + (kP ? (p.decoder.layers + 3) / 4 * 4 : 0); }
  // The tile of a warp's rows of q, of z, of c.
  CSAT_DEVICE Tile<T, kD> rows(int warp, int stage) const {
    return {reinterpret_cast<T*>(bias() + padded()) + (warp * 2 + stage) * tile_elements(16, kD)};
  }

 private:
  static constexpr int kAtoms = kP ? kP : 64;
  CSAT_DEVICE int padded() const { return p.chunks * limits::kWgmmaChunk; }
  CSAT_DEVICE T* weights() const { return base + 2 * padded() * kD; }
};

template <typename T, int kD, int kP>
CSAT_DEVICE void load_measurements(const Resident<T, kD, kP>& to, int pair) {
  const ForwardMmaArgs& p = to.p;
  const int batch = pair / p.heads, head = pair % p.heads, key_head = head / p.group, rows = to.keys().rows;
  const auto source = [&](const View& v, int columns) {
    return GlobalRows<const T>{at<const T>(v, batch, key_head, 0), v.stride[2], p.measurements, columns};
  };
  load_rows_async(to.keys(), source(p.kc, p.head_dim), rows, threadIdx.x, limits::kMmaThreads);
  load_rows_async(to.values(), source(p.vc, p.features), rows, threadIdx.x, limits::kMmaThreads);
  for (int m = threadIdx.x; m < rows; m += limits::kMmaThreads) to.bias()[m] = bias_of(p, batch, head, m);
}

template <typename T, int kD, int kP>
CSAT_DEVICE void load_decoder(const Resident<T, kD, kP>& to, int64_t head) {
  const DecoderWeights& w = to.p.decoder;
  const int thread = threadIdx.x, threads = limits::kMmaThreads;
  for (int t = 0; t < w.s_layers; ++t)
    load_rows_async(to.S(t), weight_rows<T>(w, w.S, head, t, w.coefficients, w.coefficients), kP, thread, threads);
  for (int t = 0; t < w.b_layers; ++t)
    load_rows_async(to.B(t), weight_rows<T>(w, w.B, head, t, w.coefficients, w.features), kP, thread, threads);
  load_rows_async(to.psi(), weight_rows<T>(w, w.psi, head, 0, w.outputs, w.coefficients), kD, thread, threads);
  load_thresholds<kP>(to.theta(), to.step(), w, head, thread, threads);
}

// Who may start products. Each warpgroup waits at its own barrier until the other has passed the turn on.
struct Turn {
  int group;
  CSAT_DEVICE void wait() const { named_barrier_sync(1 + group, limits::kMmaThreads); }
  CSAT_DEVICE void pass() const { named_barrier_arrive(2 - group, limits::kMmaThreads); }
};

// What a unit carries from chunk to chunk.
template <typename T, int kD>
struct UnitState {
  Operand<T, 16, kD> q;
  Sums<16, kD> z;
  Softmax<16> softmax;
  Operand<T, 16, limits::kWgmmaChunk> probabilities;
};

// The scores of chunk c, z of the chunk before, then the softmax of chunk c.
template <bool kFirst, typename T, int kD, int kP>
CSAT_DEVICE void attend_chunk(const Resident<T, kD, kP>& resident, const Turn& turn, int c, UnitState<T, kD>& unit) {
  constexpr int kChunk = limits::kWgmmaChunk;
  Sums<16, kChunk> s;
  turn.wait();
  wgmma_fence(s.at[0], unit.z.at[0], unit.q.at[0], unit.probabilities.at[0]);
  start_product_transposed(s, unit.q, resident.keys(), c * kChunk, false);
  if constexpr (!kFirst) start_product(unit.z, unit.probabilities, resident.values(), (c - 1) * kChunk, true);
  wgmma_commit();
  turn.pass();
  wgmma_wait<0>(s.at[0], unit.z.at[0]);
  add_bias(s, resident.bias() + c * kChunk, resident.p.scale * kLog2e);
  online_softmax(unit.softmax, unit.z, s);
  unit.probabilities = to_operand<T>(s);
}

// z and the softmax of one unit over all chunks.
template <typename T, int kD, int kP>
CSAT_DEVICE void attend_unit(const Resident<T, kD, kP>& resident, const Turn& turn, UnitState<T, kD>& unit) {
  const int last = resident.p.chunks - 1;
  attend_chunk<true>(resident, turn, 0, unit);
  for (int c = 1; c <= last; ++c) attend_chunk<false>(resident, turn, c, unit);
  wgmma_fence(unit.z.at[0], unit.probabilities.at[0]);
  start_product(unit.z, unit.probabilities, resident.values(), last * limits::kWgmmaChunk, true);
  wgmma_commit();
  wgmma_wait<0>(unit.z.at[0]);
}

// sums (+)= a w^T, waited for.
template <typename T, int kColumns, int kDepth>
CSAT_DEVICE void product_transposed(Sums<16, kColumns>& sums, Operand<T, 16, kDepth>& a, SwizzledTile<T, kDepth> w,
                                    bool accumulate) {
  wgmma_fence(sums.at[0], a.at[0]);
  start_product_transposed(sums, a, w, 0, accumulate);
  wgmma_commit();
  wgmma_wait<0>(sums.at[0]);
}

// psi a_T from z: the layers of lista.cuh, each one product of all coefficients. B z of a tied B is kept where
// registers hold it beside u.
template <typename T, int kD, int kP>
CSAT_DEVICE Sums<16, kD> decode_rows(Operand<T, 16, kD> z, const Resident<T, kD, kP>& resident) {
  constexpr bool kKeep = kP <= 64 && kD <= 64;
  const DecoderWeights& w = resident.p.decoder;
  Operand<T, 16, kP> a = {};
  Sums<16, kKeep ? kP : 16> bz = {};
#pragma unroll 1
  for (int t = 0; t < w.layers; ++t) {
    Sums<16, kP> u;
    if constexpr (kKeep) {
      if (t < w.b_layers) product_transposed(bz, z, resident.B(t), false);
      u = bz;
    } else {
      product_transposed(u, z, resident.B(t), false);
    }
    if (t > 0) product_transposed(u, a, resident.S(t), true);
    shrink(u, a, 0, resident.theta() + t * kP, resident.step()[t]);
    a = to_operand<T>(u);
  }
  Sums<16, kD> c;
  product_transposed(c, a, resident.psi(), false);
  return c;
}

// One unit of this warpgroup, whose queries stand in `tile`. One that does not exist is computed from zeros and writes
// nothing: products under a condition that threads decide would be serialised by the compiler, and turns must be taken.
template <typename T, int kD, int kP>
CSAT_DEVICE void run_unit(const Resident<T, kD, kP>& resident, const Turn& turn, int pair, int64_t row,
                          Tile<T, kD> tile) {
  const ForwardMmaArgs& p = resident.p;
  UnitState<T, kD> unit = {};
  unit.q = load_operand<16>(tile);
  for_each_row(unit.softmax.peak, [](float& peak, int) { peak = -INFINITY; });
  attend_unit(resident, turn, unit);
  sync_warp();  // every lane has read its queries
  write_softmax(p, pair, row, unit.softmax, unit.z, tile);
  if constexpr (kP > 0) {
    const Sums<16, kD> c = decode_rows(to_operand<T>(unit.z), resident);
    sync_warp();  // z has been stored
    store_tile(tile, 0, c);
    sync_warp();
    store_rows(rows_of<T>(p.out, p, pair, p.decoder.outputs), row, 16, tile, p.out_vectors);
  }
}

template <typename T, int kD, int kP>
CSAT_DEVICE void attend_run(const Resident<T, kD, kP>& resident, const Turn& turn, const UnitRun& run) {
  const ForwardMmaArgs& p = resident.p;
  // This warp's 16 of a unit's 64 rows; past the last query where there is no such unit.
  const auto first_row = [&](int unit) {
    return unit < run.count ? int64_t(run.first + unit) * limits::kWgmmaRows + warp_id() % 4 * 16 : p.queries;
  };
  const auto fetch = [&](int stage, int unit) {
    load_rows_async(resident.rows(warp_id(), stage), rows_of<const T>(p.q, p, run.pair, p.head_dim), first_row(unit),
                    16, lane_id(), 32);
    cp_async_commit();
  };
  fetch(0, turn.group);
  for (int first = 0, stage = 0; first < run.count; first += 2, stage ^= 1) {
    const int unit = first + turn.group;
    fetch(stage ^ 1, unit + 2);
    cp_async_wait<1>();
    sync_warp();
    run_unit(resident, turn, run.pair, first_row(unit), resident.rows(warp_id(), stage));
    sync_warp();  // before the tile is filled again
  }
  cp_async_wait<0>();
}

template <typename T, int kD, int kP>
__global__ void __launch_bounds__(limits::kMmaThreads, 1) forward_wgmma_kernel(ForwardMmaArgs p) {
  CSAT_DYN_SMEM(T, shared);
  const Resident<T, kD, kP> resident{shared, p};
  const Turn turn{static_cast<int>(threadIdx.x) / 128};
  if (turn.group == 1) turn.pass();  // the first turn is the first warpgroup's
  for_each_run(p, [&](const UnitRun& run) {
    __syncthreads();  // nobody reads the run before
    load_measurements(resident, run.pair);
    if constexpr (kP > 0) load_decoder(resident, run.pair % p.heads);
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    __syncthreads();
    attend_run(resident, turn, run);
  });
  if (turn.group == 0) turn.wait();  // takes the last turn that was passed
}

template <typename T, int kD, int kP>
int launch_forward_wgmma(const ForwardMmaArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = forward_wgmma_kernel<T, kD, kP>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kMmaThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}

// csrc/kernels/forward_wgmma_<dtype>_<feature>.cu instantiate these; limits::wgmma_atoms_limit says why 128 has less.
#define CSAT_FORWARD_WGMMA_64(prefix, T)                                                               \
  prefix template int launch_forward_wgmma<T, 64, 0>(const ForwardMmaArgs&, int64_t, int64_t, void*);  \
  prefix template int launch_forward_wgmma<T, 64, 64>(const ForwardMmaArgs&, int64_t, int64_t, void*); \
  prefix template int launch_forward_wgmma<T, 64, 128>(const ForwardMmaArgs&, int64_t, int64_t, void*);
#define CSAT_FORWARD_WGMMA_128(prefix, T)                                                              \
  prefix template int launch_forward_wgmma<T, 128, 0>(const ForwardMmaArgs&, int64_t, int64_t, void*); \
  prefix template int launch_forward_wgmma<T, 128, 64>(const ForwardMmaArgs&, int64_t, int64_t, void*);
#define CSAT_FORWARD_WGMMA_INSTANCE(T, kD) CSAT_FORWARD_WGMMA_##kD(, T)
#ifndef CSAT_INSTANTIATE
CSAT_FORWARD_WGMMA_64(extern, bf16)
CSAT_FORWARD_WGMMA_64(extern, f16)
CSAT_FORWARD_WGMMA_128(extern, bf16)
CSAT_FORWARD_WGMMA_128(extern, f16)
#endif

}  // namespace csat
