// attend, alone and with the decoder fused, on Hopper's warpgroup products (wgmma, sm_90a), for bf16 and fp16 and head
// dimensions of 64 and 128: the formulas of forward_mma.cuh, twice its rate of products.
//
// A block is three or four warpgroups (limits::wgmma_groups), each with units of 64 queries of its own; nothing but the
// hardware's scheduling makes one's products run beside another's softmax. Within a unit z of a chunk of measurements
// runs beside the softmax of the next. The softmax costs 4.5 instructions an element: one multiply-add (bias and
// padding: one more), maximum, exp2, sum, half a conversion; z is rescaled only where the maximum has grown by more
// than a factor of 2^8 since its scale was chosen, which float32 sums and 16-bit probabilities hold.
//
// Data flow: kc, vc -> shared by tensor copies under the 128-byte swizzle, S, B, psi the same by cp.async, resident for
// all units of a pair. Measurements that do not fit (kStream) go through a ring of three or four chunks, once for
// each round of units, one a warpgroup: each warp tells when z of a chunk is done, and the first thread of the block
// then fetches what the slot holds next, which may be the first chunk of the next round. A warp's 16 rows of q -> its
// own shared tile by a tensor copy, a unit ahead -> left operand in registers. Scores, z, the iterates and B z are
// accumulators; every left operand is in registers, so that only the resident matrices are read by the asynchronous
// proxy. z and c -> the warp's other tile -> global in 16-byte pieces.
//
// Budget of a row: as forward_mma.cuh, but B z once where B is tied. Registers: 64 rows x (64 scores + D + half as many
// for probabilities and q) over 128 threads, under 128 with four warpgroups, 168 with three; shared memory:
// limits::plan_wgmma. Limits: what is resident must fit: with a decoder M <= 512 at D = 64; else the biases, M floats.
#pragma once
#include "csat/forward_mma.cuh"
#include "csat/warpgroup.cuh"

namespace csat {

struct ForwardWgmmaArgs {
  ForwardMmaArgs shapes;
  RowBoxes q, keys, values;
  int plain_chunks;  // the first ones, whose scores a positive scale alone makes exponents of: no bias, no padding
};

// What stands in shared memory for all units of a pair: measurements padded to whole chunks (or a ring of them),
// weights padded to kD features and kP coefficients (0: no decoder), all matrices under the swizzle; each warp's tiles;
// then theta, step and bias in float32 and the mbarriers. Where each lies is computed, not kept in registers.
template <typename T, int kD, int kP, bool kStream>
struct Resident {
  static constexpr int kGroups = limits::wgmma_groups(kD, kP, kStream), kWarps = 4 * kGroups, kThreads = 128 * kGroups;
  static constexpr int kChunk = limits::kWgmmaChunk, kRing = limits::kWgmmaRing;
  static constexpr int kMbarriers = kWarps + (kStream ? 2 * kRing : 1);
  T* base;
  const ForwardWgmmaArgs& args;

  CSAT_DEVICE const ForwardMmaArgs& shapes() const { return args.shapes; }
  // Slot number c holds chunk number c, or is one of the ring.
  CSAT_DEVICE int slots() const { return args.shapes.slots; }
  CSAT_DEVICE SwizzledTile<T, kD> keys(int slot) const { return {base + slot * 2 * kChunk * kD, kChunk}; }
  CSAT_DEVICE SwizzledTile<T, kD> values(int slot) const { return {keys(slot).data + kChunk * kD, kChunk}; }
  CSAT_DEVICE auto S(int t) const {
    return SwizzledTile<T, kAtoms>{weights() + (decoder().s_layers == 1 ? 0 : t) * (kP * kP), kP};
  }
  CSAT_DEVICE SwizzledTile<T, kD> B(int t) const {
    return {weights() + decoder().s_layers * (kP * kP) + (decoder().b_layers == 1 ? 0 : t) * (kP * kD), kP};
  }
  CSAT_DEVICE auto psi() const {
    return SwizzledTile<T, kAtoms>{weights() + decoder().s_layers * (kP * kP) + decoder().b_layers * (kP * kD), kD};
  }
  // A warp's rows of q; of z, then of c.
  CSAT_DEVICE SwizzledTile<T, kD> queries(int warp) const { return {tiles() + warp * 2 * 16 * kD, 16}; }
  CSAT_DEVICE SwizzledTile<T, kD> results(int warp) const { return {queries(warp).data + 16 * kD, 16}; }
  CSAT_DEVICE uint64_t* queries_arrived(int warp) const {
    return reinterpret_cast<uint64_t*>(queries(kWarps).data) + warp;
  }
  // One for all chunks, or one a slot of the ring.
  CSAT_DEVICE uint64_t* measurements_arrived(int slot = 0) const { return queries_arrived(kWarps + slot); }
  CSAT_DEVICE uint64_t* slot_free(int slot) const { return measurements_arrived(kRing + slot); }
  CSAT_DEVICE float* bias() const { return reinterpret_cast<float*>(queries_arrived(kMbarriers)); }
  CSAT_DEVICE float* theta() const { return bias() + args.shapes.chunks * kChunk; }
  CSAT_DEVICE float* step() const { return theta() + decoder().layers * kP; }

 private:
  static constexpr int kAtoms = kP ? kP : 64;
  CSAT_DEVICE const DecoderWeights& decoder() const { return args.shapes.decoder; }
  CSAT_DEVICE T* weights() const { return keys(slots()).data; }
  CSAT_DEVICE T* tiles() const { return kP ? psi().data + kD * kP : weights(); }
};

// Where a warp is in a ring of `slots`, 4 at most, in one register: the slot of its next chunk, and the parity of the
// phases of this lap.
struct RingPlace {
  static_assert(limits::kWgmmaRing <= 4, "two bits hold a slot");
  int bits = 0;
  CSAT_DEVICE int slot() const { return bits & 3; }
  CSAT_DEVICE uint32_t parity() const { return bits >> 2; }
  CSAT_DEVICE RingPlace next(int slots) const { return {slot() == slots - 1 ? (bits & 4) ^ 4 : bits + 1}; }
  CSAT_DEVICE RingPlace before(int slots) const { return {slot() == 0 ? (bits ^ 4) + slots - 1 : bits - 1}; }
};

// One thread fetches chunk c.
template <typename T, int kD, int kP, bool kStream>
CSAT_DEVICE void fetch_chunk(const Resident<T, kD, kP, kStream>& to, int batch, int head, int c, int slot,
                             uint64_t* arrived) {
  to.args.keys.copy(to.keys(slot), batch, head / to.shapes().group, c * to.kChunk, arrived);
  to.args.values.copy(to.values(slot), batch, head / to.shapes().group, c * to.kChunk, arrived);
}
template <typename T, int kD, int kP, bool kStream>
CSAT_DEVICE void fetch_into_ring(const Resident<T, kD, kP, kStream>& to, int batch, int head, int c, int slot) {
  mbarrier_arrive_expect_bytes(to.measurements_arrived(slot), 2 * to.kChunk * kD * sizeof(T));
  fetch_chunk(to, batch, head, c, slot, to.measurements_arrived(slot));
}

// Keys and values by one thread, the bias by all; `measurements_arrived` and a barrier tell that they are there. Of a
// ring, all of whose slots are free, the first chunks, from the place of the next on.
template <typename T, int kD, int kP, bool kStream>
CSAT_DEVICE void load_measurements(const Resident<T, kD, kP, kStream>& to, int batch, int head, RingPlace next) {
  const ForwardMmaArgs& p = to.shapes();
  const int rows = p.chunks * to.kChunk;
  if (threadIdx.x == 0) {
    if constexpr (kStream) {
      for (int c = 0; c < to.slots(); ++c, next = next.next(to.slots()))
        fetch_into_ring(to, batch, head, c, next.slot());
    } else {
      uint64_t* arrived = to.measurements_arrived();
      mbarrier_arrive_expect_bytes(arrived, rows * kD * 2 * sizeof(T));
#pragma unroll 1
      for (int c = 0; c < p.chunks; ++c) fetch_chunk(to, batch, head, c, c, arrived);
    }
  }
  for (int m = threadIdx.x; m < rows; m += to.kThreads) to.bias()[m] = bias_of(p, batch, head, m);
}

template <typename T, int kD, int kP, bool kStream>
CSAT_DEVICE void load_decoder(const Resident<T, kD, kP, kStream>& to, int64_t head) {
  const DecoderWeights& w = to.shapes().decoder;
  const int thread = threadIdx.x, threads = to.kThreads;
  for (int t = 0; t < w.s_layers; ++t)
    load_rows_async(to.S(t), weight_rows<T>(w, w.S, head, t, w.coefficients, w.coefficients), kP, thread, threads);
  for (int t = 0; t < w.b_layers; ++t)
    load_rows_async(to.B(t), weight_rows<T>(w, w.B, head, t, w.coefficients, w.features), kP, thread, threads);
  if (w.synthesises())
    load_rows_async(to.psi(), weight_rows<T>(w, w.psi, head, 0, w.outputs, w.coefficients), kD, thread, threads);
  load_thresholds<kP>(to.theta(), to.step(), w, head, thread, threads);
}

// How far, in powers of two, probabilities may grow before z is rescaled.
constexpr float kSoftmaxSlack = 8.f;

// The maximum of what this lane has of one of its two rows, by two chains.
template <int kChunk>
CSAT_DEVICE float largest_of(const Sums<16, kChunk>& s, int h) {
  float largest[2];
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j) {
    const float pair = fmaxf(s.at[0][j][2 * h], s.at[0][j][2 * h + 1]);
    largest[j % 2] = j < 2 ? pair : fmaxf(largest[j % 2], pair);
  }
  return fmaxf(largest[0], largest[1]);
}

// s -> exp2(factor s - peak), where the peak is that of the chunks so far or up to kSoftmaxSlack less; the mass
// follows. Returns whether z has to follow too, by `decay`: the same to all lanes, though most rows stay as they are.
template <bool kFirst, int kChunk>
CSAT_DEVICE bool chunk_softmax(Softmax<16>& state, float (&decay)[2], Sums<16, kChunk>& s, float factor) {
  float (&peak)[2] = state.peak.at[0], (&mass)[2] = state.mass.at[0];
  const float own[2] = {largest_of(s, 0) * factor, largest_of(s, 1) * factor};
  bool grown = false;
  if constexpr (!kFirst) grown = warp_any(own[0] > peak[0] + kSoftmaxSlack || own[1] > peak[1] + kSoftmaxSlack);
  if (kFirst || grown) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float largest = quad_max(own[h]), before = peak[h];
      const bool moves = kFirst || largest > before + kSoftmaxSlack;
      if (moves) peak[h] = largest;
      if (kFirst) continue;
      decay[h] = moves ? exp2_approx(before - largest) : 1.f;
      mass[h] *= decay[h];
    }
  }
  float sums[2][2];  // of a row: of the first and of the second columns of pairs
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float centre = peak[h] == -INFINITY ? 0.f : peak[h];  // a row of -inf: all probabilities 0
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s.at[0][j][2 * h + c];
        x = exp2_approx(x * factor - centre);
        sums[h][c] = j == 0 ? x : sums[h][c] + x;
      }
    }
#pragma unroll
  for (int h = 0; h < 2; ++h) mass[h] = kFirst ? sums[h][0] + sums[h][1] : mass[h] + (sums[h][0] + sums[h][1]);
  return grown;
}

template <int kD>
CSAT_DEVICE void scale_rows(Sums<16, kD>& z, const float (&by)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) z.at[0][j][2 * h] *= by[h], z.at[0][j][2 * h + 1] *= by[h];
}

// z / mass. Returns the log-sum-exp of one of the lane's two rows, the second where the lane is odd.
template <int kD>
CSAT_DEVICE float finish_softmax(const Softmax<16>& state, Sums<16, kD>& z) {
  const bool odd = lane_id() % 2 != 0;
  const float (&part)[2] = state.mass.at[0];
  float mass = (odd ? part[1] : part[0]) + shfl_xor(odd ? part[0] : part[1], 1);
  mass += shfl_xor(mass, 2);
  const float inverse = mass == 0.f ? 0.f : 1.f / mass, other = shfl_xor(inverse, 1);
  const float by[2] = {odd ? other : inverse, odd ? inverse : other};
  scale_rows(z, by);
  if (by[0] == 0.f || by[1] == 0.f) {  // nothing to look at, whatever vc holds
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) z.at[0][j][e] = by[e / 2] == 0.f ? 0.f : z.at[0][j][e];
  }
  return mass == 0.f ? -INFINITY : (odd ? state.peak.at[0][1] : state.peak.at[0][0]) * kLn2 + log_f32(mass);
}

// What a unit carries from chunk to chunk. q where registers hold it beside the rest, else it is read anew.
template <typename T, int kD>
struct UnitState {
  static constexpr bool kHoldsQueries = limits::wgmma_holds_queries(kD);
  Operand<T, 16, kHoldsQueries ? kD : 16> q;
  Sums<16, kD> z;
  Softmax<16> softmax;
  Operand<T, 16, limits::kWgmmaChunk> probabilities;
};

// Where chunk c and the one before lie.
struct ChunkSlots {
  int c, own, before;
};
template <bool kStream>
CSAT_DEVICE ChunkSlots slots_of(int c, const RingPlace& place, int slots) {
  return kStream ? ChunkSlots{c, place.slot(), place.before(slots).slot()} : ChunkSlots{c, c, c - 1};
}

// z of the chunk before c, behind a fence.
template <typename T, int kD, int kP, bool kStream>
CSAT_DEVICE void start_values(const Resident<T, kD, kP, kStream>& resident, const ChunkSlots& at,
                              UnitState<T, kD>& unit) {
  start_product(unit.z, unit.probabilities, resident.values(at.before), 0, at.c > 1);
  wgmma_commit();
}

// The scores of chunk c; z of the chunk before is left running behind them, or runs while q is read anew.
template <bool kFirst, typename T, int kD, int kP, bool kStream>
CSAT_DEVICE void score_chunk(const Resident<T, kD, kP, kStream>& resident, const ChunkSlots& at, UnitState<T, kD>& unit,
                             Sums<16, limits::kWgmmaChunk>& s) {
  if constexpr (unit.kHoldsQueries) {
    wgmma_fence(s.at[0], unit.z.at[0], unit.q.at[0], unit.probabilities.at[0]);
    start_product_transposed(s, unit.q, resident.keys(at.own), 0, false);
    wgmma_commit();
    if constexpr (!kFirst) start_values(resident, at, unit);
    wgmma_wait<!kFirst>(s.at[0]);
  } else {
    wgmma_fence(unit.z.at[0], unit.probabilities.at[0]);
    if constexpr (!kFirst) start_values(resident, at, unit);
    Operand<T, 16, kD> q = load_operand(resident.queries(warp_id()));
    wgmma_wait<0>(unit.z.at[0], unit.probabilities.at[0]);
    product_transposed(s, q, resident.keys(at.own), false);
  }
}

// The probabilities of chunk c, and z of the chunks before.
template <bool kFirst, typename T, int kD, int kP, bool kStream>
CSAT_DEVICE void attend_chunk(const Resident<T, kD, kP, kStream>& resident, const ChunkSlots& at,
                              UnitState<T, kD>& unit) {
  Sums<16, limits::kWgmmaChunk> s = {};
  score_chunk<kFirst>(resident, at, unit, s);
  float factor = resident.shapes().scale * kLog2e, decay[2];
  if (at.c >= resident.args.plain_chunks) {
    const float* bias = resident.bias() + at.c * limits::kWgmmaChunk;
    for_each(s, [&](float& x, int, int column) { x = factor * x + bias[column]; });
    factor = 1.f;
  }
  const bool grown = chunk_softmax<kFirst>(unit.softmax, decay, s, factor);
  if constexpr (!kFirst) {
    // One wait before the branch would be enough, and ptxas moves it up, before the exponentials; behind a branch it
    // stays. That a warp alone enters the branch PTX leaves undefined (`.aligned` speaks of the warpgroup); what ptxas
    // makes of the wait, WARPGROUP.DEPBAR, is a warp's own, and devices have passed all tests with it.
    if (grown) {
      wgmma_wait<0>(unit.z.at[0], unit.probabilities.at[0]);
      scale_rows(unit.z, decay);
    }
    wgmma_wait<0>(unit.z.at[0], unit.probabilities.at[0]);
  }
  unit.probabilities = to_operand<T>(s);
}

// psi a_T of the rows of z in the warp's tile: the layers of lista.cuh. B z of a tied B is kept where registers hold it
// beside u; else z is read again.
template <typename T, int kD, int kP, bool kStream>
CSAT_DEVICE Operand<T, 16, kD> decode_rows(const Resident<T, kD, kP, kStream>& resident, SwizzledTile<T, kD> tile) {
  constexpr bool kKeep = kP <= 64;
  const DecoderWeights& w = resident.shapes().decoder;
  const auto measured = [&](Sums<16, kP>& bz, int t) {
    Operand<T, 16, kD> z = load_operand(tile);
    product_transposed(bz, z, resident.B(t), false);
  };
  Operand<T, 16, kP> a = {};
  Sums<16, kKeep ? kP : 16> bz = {};
  if (w.layers > 0) {
    Sums<16, kP> u = {};
    measured(u, 0);
    if constexpr (kKeep) bz = u;
    next_iterate<true>(a, u, resident.theta(), resident.step()[0]);
  }
#pragma unroll 1
  for (int t = 1; t < w.layers; ++t) {
    Sums<16, kP> u = {};
    if constexpr (kKeep) {
      if (t < w.b_layers) measured(bz, t);
      u = bz;
    } else {
      measured(u, t);
    }
    product_transposed(u, a, resident.S(t), true);
    next_iterate<false>(a, u, resident.theta() + t * kP, resident.step()[t]);
  }
  return synthesised<kD>(a, resident.psi(), !w.synthesises());
}

// This warp's rows of the units of a run.
template <typename T, int kD, int kP, bool kStream>
struct WarpRows {
  const Resident<T, kD, kP, kStream>& resident;
  int batch, head, first;  // unit of the pair

  CSAT_DEVICE WarpRows(const Resident<T, kD, kP, kStream>& resident, const UnitRun& run)
      : resident(resident), batch(run.pair / p().heads), head(run.pair % p().heads), first(run.first) {}
  CSAT_DEVICE const ForwardMmaArgs& p() const { return resident.shapes(); }
  CSAT_DEVICE T* pair_rows(const View& v) const { return at<T>(v, batch, head, 0); }
  CSAT_DEVICE int row(int unit) const { return (first + unit) * limits::kWgmmaRows + warp_id() % 4 * 16; }
  CSAT_DEVICE SwizzledTile<T, kD> tile() const { return resident.results(warp_id()); }

  CSAT_DEVICE void fetch_queries(int unit) const {
    if (lane_id() != 0) return;
    uint64_t* arrived = resident.queries_arrived(warp_id());
    mbarrier_arrive_expect_bytes(arrived, 16 * kD * sizeof(T));
    resident.args.q.copy(resident.queries(warp_id()), batch, head, row(unit), arrived);
  }
  // Of a ring: this warp is done with chunk c at `place`. When all are, the first thread fetches what comes to the slot
  // next, of this round of units or, if there is `another`, the next.
  CSAT_DEVICE void hand_on(int c, const RingPlace& place, bool another) const {
    sync_warp();
    if (lane_id() == 0) mbarrier_arrive(resident.slot_free(place.slot()));
    const int ahead = c + resident.slots() - p().chunks;  // below 0: of this round
    if (threadIdx.x == 0 && (ahead < 0 || another)) {
      mbarrier_wait(resident.slot_free(place.slot()), place.parity());
      fetch_into_ring(resident, batch, head, ahead < 0 ? ahead + p().chunks : ahead, place.slot());
    }
    sync_warp();
  }
  // A round in which this warpgroup has no unit.
  CSAT_DEVICE void let_pass(RingPlace& place) const {
    for (int c = 0; c < p().chunks; ++c, place = place.next(resident.slots())) {
      mbarrier_wait(resident.measurements_arrived(place.slot()), place.parity());
      hand_on(c, place, false);
    }
  }
  // Each row's from two lanes of the four that know it, as finish_softmax leaves it.
  CSAT_DEVICE void store_lse(int unit, float value) const {
    const int lane = lane_id(), r = row(unit) + lane / 4 + lane % 2 * 8;
    if (lane % 4 < 2 && r < static_cast<int>(p().queries)) at<float>(p().lse, batch, head, r)[0] = value;
  }
  CSAT_DEVICE void fill_tile(const Operand<T, 16, kD>& x) const {
    store_tile(tile(), x);
    sync_warp();
  }
  CSAT_DEVICE void store_tile_rows(int unit, T* to, int64_t stride, int columns, bool vectors) const {
    const GlobalRows<T> all{to, stride, static_cast<int>(p().queries), columns};
    store_rows(all.from_row(row(unit)), tile(), vectors);
  }
};

// One unit of this warpgroup, whose queries arrive with the phase of this parity. Those of unit `next` follow them.
template <typename T, int kD, int kP, bool kStream>
CSAT_DEVICE void run_unit(const WarpRows<T, kD, kP, kStream>& rows, int unit, int next, int units, uint32_t parity,
                          RingPlace& place) {
  const Resident<T, kD, kP, kStream>& resident = rows.resident;
  const ForwardMmaArgs& p = rows.p();
  const auto fetch_next = [&] {
    sync_warp();  // every lane has read its queries
    if (next < units) rows.fetch_queries(next);
  };
  UnitState<T, kD> state = {};
  mbarrier_wait(resident.queries_arrived(warp_id()), parity);
  if constexpr (state.kHoldsQueries) state.q = load_operand(resident.queries(warp_id()));
  const auto arrive_at = [&](int c) {
    if constexpr (kStream) mbarrier_wait(resident.measurements_arrived(place.slot()), place.parity());
    return slots_of<kStream>(c, place, p.slots);
  };
  const auto leave = [&](int c) {  // for chunk c: z of the one before is done
    if constexpr (kStream) {
      if (c > 0) rows.hand_on(c - 1, place.before(p.slots), next < units);
      if (c < p.chunks) place = place.next(p.slots);
    }
  };
  attend_chunk<true>(resident, arrive_at(0), state);
  leave(0);
  if constexpr (state.kHoldsQueries) fetch_next();
#pragma unroll 1
  for (int c = 1; c < p.chunks; ++c) {
    attend_chunk<false>(resident, arrive_at(c), state);
    leave(c);
  }
  if constexpr (!state.kHoldsQueries) fetch_next();
  wgmma_fence(state.z.at[0], state.probabilities.at[0]);
  start_values(resident, slots_of<kStream>(p.chunks, place, p.slots), state);
  wgmma_wait<0>(state.z.at[0]);
  leave(p.chunks);
  rows.store_lse(unit, finish_softmax(state.softmax, state.z));
  rows.fill_tile(to_operand<T>(state.z));
  if (p.z.data) {
    rows.store_tile_rows(unit, rows.pair_rows(p.z), p.z.stride[2], p.features, p.z_vectors);
  }
  if constexpr (kP > 0) {
    const Operand<T, 16, kD> c = decode_rows(resident, rows.tile());
    sync_warp();  // z has been read
    rows.fill_tile(c);
    rows.store_tile_rows(unit, rows.pair_rows(p.out), p.out.stride[2], p.decoder.outputs, p.out_vectors);
  }
  sync_warp();  // before the tile is filled again
}

template <typename T, int kD, int kP, bool kStream>
__global__ void __launch_bounds__(128 * limits::wgmma_groups(kD, kP, kStream), 1)
    forward_wgmma_kernel(const __grid_constant__ ForwardWgmmaArgs args) {
  CSAT_DYN_SMEM(T, shared);
  const Resident<T, kD, kP, kStream> resident{shared, args};
  const ForwardMmaArgs& p = args.shapes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < resident.kMbarriers; ++i)
      mbarrier_init(resident.queries_arrived(i), i < resident.kWarps + resident.kRing ? 1 : resident.kWarps);
    fence_mbarrier_init();
  }
  uint32_t parities = 0;  // bit 0: of the next unit's queries, bit 1: of the next measurements
  RingPlace place;
  for_each_run(p, [&](const UnitRun& run) {
    __syncthreads();  // the mbarriers are made; nobody reads the run before
    const int group = warpgroup_id();
    const WarpRows<T, kD, kP, kStream> rows(resident, run);
    load_measurements(resident, rows.batch, rows.head, place);
    if (group < run.count) rows.fetch_queries(group);
    if constexpr (kP > 0) load_decoder(resident, rows.head);
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    __syncthreads();
    if constexpr (!kStream) mbarrier_wait(resident.measurements_arrived(), parities >> 1);
    parities ^= 2;
    int unit = group;
    for (; unit < run.count; unit += resident.kGroups, parities ^= 1)
      run_unit(rows, unit, unit + resident.kGroups, run.count, parities & 1, place);
    if constexpr (kStream)
      if (unit - group < run.count) rows.let_pass(place);
  });
}

template <typename T, int kD, int kP, bool kStream>
int launch_forward_wgmma(const ForwardMmaArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  ForwardWgmmaArgs args;
  args.shapes = p;
  args.plain_chunks = p.bias.data || !(p.scale > 0.f) ? 0 : static_cast<int>(p.measurements / limits::kWgmmaChunk);
  const int64_t batch = p.pairs / p.heads, key_heads = p.heads / p.group;
  int error = make_row_boxes<T>(&args.q, p.q, batch, p.heads, p.queries, p.head_dim, 16);
  if (!error)
    error = make_row_boxes<T>(&args.keys, p.kc, batch, key_heads, p.measurements, p.head_dim, limits::kWgmmaChunk);
  if (!error)
    error = make_row_boxes<T>(&args.values, p.vc, batch, key_heads, p.measurements, p.features, limits::kWgmmaChunk);
  if (error) return error;
  auto kernel = forward_wgmma_kernel<T, kD, kP, kStream>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(128 * limits::wgmma_groups(kD, kP, kStream)),
              static_cast<size_t>(shared_bytes), stream, args);
  return last_error();
}

// csrc/kernels/instances/forward_wgmma_<feature>.cu instantiate these; limits::wgmma_atoms_limit says why 128 has less.
#define CSAT_FORWARD_WGMMA(prefix, T, kD, kP, kStream) \
  prefix template int launch_forward_wgmma<T, kD, kP, kStream>(const ForwardMmaArgs&, int64_t, int64_t, void*);
#define CSAT_FORWARD_WGMMA_64(prefix, T)       \
  CSAT_FORWARD_WGMMA(prefix, T, 64, 0, false)  \
  CSAT_FORWARD_WGMMA(prefix, T, 64, 0, true)   \
  CSAT_FORWARD_WGMMA(prefix, T, 64, 64, false) \
  CSAT_FORWARD_WGMMA(prefix, T, 64, 128, false)
#define CSAT_FORWARD_WGMMA_128(prefix, T)      \
  CSAT_FORWARD_WGMMA(prefix, T, 128, 0, false) \
  CSAT_FORWARD_WGMMA(prefix, T, 128, 0, true)  \
  CSAT_FORWARD_WGMMA(prefix, T, 128, 64, false)
#define CSAT_FORWARD_WGMMA_INSTANCE(T, kD) CSAT_FORWARD_WGMMA_##kD(, T)
#ifndef CSAT_INSTANTIATE
CSAT_FORWARD_WGMMA_64(extern, bf16)
CSAT_FORWARD_WGMMA_64(extern, f16)
CSAT_FORWARD_WGMMA_128(extern, bf16)
CSAT_FORWARD_WGMMA_128(extern, f16)
#endif

}  // namespace csat
