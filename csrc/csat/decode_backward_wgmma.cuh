// Backward of decode on Hopper's warpgroup products (wgmma, sm_90a), for bf16 and fp16, S and B tied: the formulas of
// decode_backward_mma.cuh with es_t = step_t e_t, rounded to T, as what is multiplied:
//
//   g_t = e_t - es_t + es_t S;  dz = sum_t es_t B;  dS = sum_t es_t^T a_t;  dB = sum_t es_t^T z;  dpsi = dc^T a_T,
//   where psi is the identity g_T = dc and there is no dpsi
//   dtheta_t = -colsum(e_t sign(a_{t+1}));  dstep_t = sum e_t . v_t with v_t = S a_t + B z - a_t, rounded to T
//
// A team of kP / 64 warpgroups takes a tile of 64 rows through all layers, each warpgroup with 64 of the coefficients;
// a block is two warpgroups: two teams with a tile each (kP = 64), or one team (kP = 128). Blocks are persistent: dS
// and dB (and dpsi where registers hold it: kP = kF = 64) stay in float32 accumulators over all tiles of a team, and
// every team writes them once, as one of the parts that reduce() adds in a fixed order.
//
// Data flow: S, B, psi -> shared under the 128-byte swizzle once. z, dc of a tile -> shared by tensor copies (zeros
// past the last row and column), the next tile's on their way where there is room. Every product has its left operand
// in shared memory: z, dc as they came, iterates and es_t as stmatrix writes them. v_t lies where es_t will: a warp's
// 16 rows of either are its own. dz goes back through the place of es_0 in 16-byte vectors. With kP = 128 the blocks of
// a_T and dc (blocks.cuh) go to the workspace for outer_blocks(), which makes dpsi.
//
// Order within a tile, one barrier of the team wherever a product reads what other warps wrote:
//   forward    B z; for each layer u = B z + S a_t as lista.cuh adds them up, so that [a != 0] is the forward's
//   backward   g_T = dc psi; for each layer, from the last, es_t -> shared, then es_t S into g, and, still running
//              while the next layer is at work, es_t^T a_t and es_t^T z; at last dz and dpsi
//
// Budget of a row: 2 P (F + (T - 1) P) forward, 2 P F + 2 (T - 1) P P + 2 T P F backward, 2 (T - 1) P P + 2 T P F and
// 2 P F for the sums; z, dc, dz once through memory. Registers of a lane: (kP + kF) / 2 for the sums (kF / 2 more for
// dpsi), 32 for g, 16 for an operand; shared memory: limits::decode_backward_wgmma_bytes. Limits:
// limits::why_not_wgmma.
#pragma once
#include "csat/blocks.cuh"
#include "csat/lista.cuh"
#include "csat/warpgroup.cuh"

namespace csat {

struct DecodeBackwardWgmmaArgs {
  RowBoxes z, dout;  // of 64 rows
  DecoderWeights decoder;
  int heads;
  int64_t queries;
  int query_tiles;  // ceil(Nq / 64)
  // Of a group, the tiles that share weights: tiles of this launch and of those before, blocks, teams.
  int group_tiles, first_tile, group_blocks, slots;
  int stages;  // tiles of z and dc in shared memory: 2 if the next one is on its way
  View dz;
  bool dz_vectors;
  // Workspace: float32 sums of every team, (groups, slots) each, and 16-bit blocks of this launch's rows for dpsi.
  float *S_parts, *B_parts, *psi_parts;  // (P, P), (P, F), (F, P), padded to kP, kF
  float *theta_parts, *step_parts;       // (T, P), (T)
  uint32_t *iterates, *dout_rows;        // (groups, group_tiles * 64, P), (.., F)
};

namespace row_backward {

constexpr int kRows = limits::kWgmmaRows, kOwn = 64;  // rows of a tile, coefficients of a warpgroup

// Shared memory of a block; limits::decode_backward_wgmma_bytes counts it.
template <typename T, int kP, int kF>
struct Layout {
  static_assert(kP == kF, "a warpgroup owns as many columns of dz as it owns coefficients");
  static constexpr int kTeams = 2 * kOwn / kP;
  static constexpr bool kSumsPsi = kP == 64 && kF == 64;
  static constexpr int kWide = kRows * kP, kNarrow = kRows * kF;  // elements of a tile of iterates, of z
  T* base;
  const DecodeBackwardWgmmaArgs& p;

  CSAT_DEVICE int layers() const { return p.decoder.layers; }
  CSAT_DEVICE SwizzledTile<T, kP> S() const { return {base, kP}; }
  CSAT_DEVICE SwizzledTile<T, kF> B() const { return {base + kP * kP, kP}; }
  CSAT_DEVICE SwizzledTile<T, kP> psi() const { return {base + kP * (kP + kF), kF}; }
  CSAT_DEVICE SwizzledTile<T, kF> z(int team, int stage) const { return {narrow(team, stage), kRows}; }
  CSAT_DEVICE SwizzledTile<T, kF> dout(int team, int stage) const { return {narrow(team, p.stages + stage), kRows}; }
  // a_{t+1}, of every layer but the last where dpsi is not made here; es_t.
  CSAT_DEVICE SwizzledTile<T, kP> iterate(int team, int t) const { return {wide(team, t), kRows}; }
  CSAT_DEVICE SwizzledTile<T, kP> error(int team, int t) const { return {wide(team, iterates() + t), kRows}; }
  CSAT_DEVICE float* theta() const { return reinterpret_cast<float*>(narrow(kTeams, 0)); }
  CSAT_DEVICE float* step() const { return theta() + layers() * kP; }
  // Sums of a warp over its tiles: (layers, 64) and (layers).
  CSAT_DEVICE float* theta_sums(int warp) const { return step() + layers() + warp * layers() * kOwn; }
  CSAT_DEVICE float* step_sums(int warp) const { return theta_sums(limits::kMmaWarps) + warp * layers(); }
  CSAT_DEVICE uint64_t* arrived(int team, int stage) const {
    const int floats = layers() * (kP + 1 + limits::kMmaWarps * (kOwn + 1));
    return reinterpret_cast<uint64_t*>(theta() + (floats + 1) / 2 * 2) + team * 2 + stage;
  }

 private:
  CSAT_DEVICE int iterates() const { return layers() - (kSumsPsi ? 0 : 1); }
  CSAT_DEVICE int team_elements() const { return 2 * p.stages * kNarrow + (iterates() + layers()) * kWide; }
  CSAT_DEVICE T* narrow(int team, int i) const {
    return base + kP * (kP + 2 * kF) + team * team_elements() + i * kNarrow;
  }
  CSAT_DEVICE T* wide(int team, int i) const { return narrow(team, 2 * p.stages) + i * kWide; }
};

// The warpgroup that runs, of two: which team it belongs to, which 64 coefficients are its own.
template <int kP>
struct Place {
  static constexpr bool kAlone = kP == kOwn;
  int team, own, warp;  // the warp's number in its warpgroup
  CSAT_DEVICE Place() : team(kAlone ? warpgroup_id() : 0), own(kAlone ? 0 : warpgroup_id()), warp(warp_id() % 4) {}
  CSAT_DEVICE void team_barrier() const { named_barrier_sync(1 + team, 2 * kP); }
  CSAT_DEVICE bool leads() const { return threadIdx.x % (2 * kP) == 0; }
};

// This lane's place for stmatrix and ldmatrix in block k of 16 columns of the warp's 16 rows.
template <typename T, int kColumns>
CSAT_DEVICE T* lane_piece(SwizzledTile<T, kColumns> tile, int warp, int column) {
  const int lane = pinned(lane_id());
  return tile.piece(16 * warp + lane % 16, column + lane / 16 * 8);
}
template <typename T, int kColumns>
CSAT_DEVICE void store_own(SwizzledTile<T, kColumns> tile, int warp, int column, const Operand<T, 16, kOwn>& x) {
#pragma unroll
  for (int k = 0; k < kOwn / 16; ++k) stmatrix_x4(lane_piece(tile, warp, column + 16 * k), x.at[0][k]);
}
template <typename T, int kColumns>
CSAT_DEVICE Operand<T, 16, kOwn> load_own(SwizzledTile<T, kColumns> tile, int warp, int column) {
  Operand<T, 16, kOwn> x;
#pragma unroll
  for (int k = 0; k < kOwn / 16; ++k) ldmatrix_x4(x.at[0][k], lane_piece(tile, warp, column + 16 * k));
  return x;
}
// An operand as its lanes hold it, in the warp's 2048 bytes of 64 columns of a tile.
template <typename T, int kColumns>
CSAT_DEVICE uint4* lane_words(SwizzledTile<T, kColumns> tile, int warp, int column) {
  return reinterpret_cast<uint4*>(tile.data + (column / 64 * tile.rows + 16 * warp) * 64) + lane_id();
}
template <typename T, int kColumns>
CSAT_DEVICE void store_words(SwizzledTile<T, kColumns> tile, int warp, int column, const Operand<T, 16, kOwn>& x) {
  uint4* words = lane_words(tile, warp, column);
#pragma unroll
  for (int k = 0; k < kOwn / 16; ++k) words[32 * k] = {x.at[0][k][0], x.at[0][k][1], x.at[0][k][2], x.at[0][k][3]};
}
// ---- products, their left operands 64 rows in shared memory. All are started, not done.

// sums (+)= a w^T for the rows of w from `row` on.
template <typename T, int kColumns, int kDepth>
CSAT_DEVICE void start_rows(Sums<16, kColumns>& sums, SwizzledTile<T, kDepth> a, SwizzledTile<T, kDepth> w, int row,
                            bool accumulate) {
  const uint64_t left = a.rows_of_product(0), right = w.rows_of_product(row);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    wgmma_k16_shared<T, false, false>(sums.at[0], wgmma_advance(left, a.depth_offset(k)),
                                      wgmma_advance(right, w.depth_offset(k)), accumulate || k > 0);
}
// sums (+)= a w for the columns of w from `column` on.
template <typename T, int kColumns, int kDepth, int kWidth>
CSAT_DEVICE void start_columns(Sums<16, kColumns>& sums, SwizzledTile<T, kDepth> a, SwizzledTile<T, kWidth> w,
                               int column, bool accumulate) {
  const uint64_t left = a.rows_of_product(0), right = w.depth_of_product(0, column);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    wgmma_k16_shared<T, false, true>(sums.at[0], wgmma_advance(left, a.depth_offset(k)), wgmma_advance(right, 2048 * k),
                                     accumulate || k > 0);
}
// sums += x^T y for 64 columns of x from `x_column` on and those of y from `y_column` on, over the rows of the tiles.
template <typename T, int kColumns, int kX, int kY>
CSAT_DEVICE void start_outer(Sums<16, kColumns>& sums, SwizzledTile<T, kX> x, int x_column, SwizzledTile<T, kY> y,
                             int y_column) {
  const uint64_t left = x.depth_of_product(0, x_column), right = y.depth_of_product(0, y_column);
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k)
    wgmma_k16_shared<T, true, true>(sums.at[0], wgmma_advance(left, 2048 * k), wgmma_advance(right, 2048 * k));
}

// ---- element by element

// a_{t+1} in place of a_t, from u = S a_t + B z; returns v_t. The arithmetic of shrink (lista.cuh).
template <typename T>
CSAT_DEVICE Operand<T, 16, kOwn> shrink_keeping(Operand<T, 16, kOwn>& a, const Sums<16, kOwn>& u, const float* theta,
                                                float step) {
  Operand<T, 16, kOwn> v;
  const int t = lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < kOwn / 8; ++j) {
    const float2 threshold = *reinterpret_cast<const float2*>(theta + 8 * j + t);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t& pair = a.at[0][j / 2][j % 2 * 2 + h];
      const float2 before = unpack2<T>(pair);
      const float x = u.at[0][j][2 * h] - before.x, y = u.at[0][j][2 * h + 1] - before.y;
      pair =
          pack2<T>(soft_threshold(before.x + step * x, threshold.x), soft_threshold(before.y + step * y, threshold.y));
      v.at[0][j / 2][j % 2 * 2 + h] = pack2<T>(x, y);
    }
  }
  return v;
}

// This lane's share of dstep_t, and of dtheta_t over the warp's rows: of column `column()`, and 32 columns on.
struct LayerSums {
  float step = 0.f, theta[2];
  static CSAT_DEVICE int column() {
    const int c = lane_id() / 4;
    return c / 2 * 8 + lane_id() % 4 * 2 + c % 2;
  }
};

// es_t in place of a_{t+1}, and e_t - es_t in place of g_{t+1}; v_t as store_words left it.
template <typename T>
CSAT_DEVICE LayerSums layer_errors(Sums<16, kOwn>& g, Operand<T, 16, kOwn>& x, const uint4* v, float step) {
  LayerSums sums;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float theta[8] = {};
#pragma unroll
    for (int k = 2 * half; k < 2 * half + 2; ++k) {
      const uint4 word = v[32 * k];
      const uint32_t changes[] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float2 a = unpack2<T>(x.at[0][k][r]), change = unpack2<T>(changes[r]);
        float scaled[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float value = c ? a.y : a.x;
          float& error = g.at[0][2 * k + r / 2][r % 2 * 2 + c];
          const float e = value != 0.f ? error : 0.f;
          theta[4 * (k % 2) + r / 2 * 2 + c] -= value > 0.f ? e : -e;
          sums.step += e * (c ? change.y : change.x);
          scaled[c] = step * e;
          error = e - scaled[c];
        }
        x.at[0][k][r] = pack2<T>(scaled[0], scaled[1]);
      }
    }
    sums.theta[half] = column_sum(theta);
  }
  return sums;
}

// The sums over all tiles of a team that stay in registers: this warpgroup's rows of dS and dB, columns of dpsi.
template <int kP, int kF, bool kPsi>
struct WeightSums {
  Sums<16, kP> S = {};
  Sums<16, kF> B = {};
  Sums<16, kPsi ? kOwn : 16> psi = {};
};

// ---- the pieces of a tile

template <typename T, int kP, int kF>
struct TileOfRows {
  using Shared = Layout<T, kP, kF>;
  const Shared& s;
  const Place<kP>& at;
  int stage;

  CSAT_DEVICE int column() const { return at.own * kOwn; }
  CSAT_DEVICE SwizzledTile<T, kF> z() const { return s.z(at.team, stage); }
  CSAT_DEVICE SwizzledTile<T, kF> dout() const { return s.dout(at.team, stage); }
  CSAT_DEVICE SwizzledTile<T, kP> iterate(int t) const { return s.iterate(at.team, t); }
  CSAT_DEVICE SwizzledTile<T, kP> error(int t) const { return s.error(at.team, t); }
  // Are all of a_{t+1} in shared memory?
  CSAT_DEVICE bool keeps(int t) const { return Shared::kSumsPsi || t + 1 < s.layers(); }

  // u = B z of this warpgroup's coefficients.
  CSAT_DEVICE void measure(Sums<16, kOwn>& u) const {
    wgmma_fence(u.at[0]);
    start_rows(u, z(), s.B(), column(), false);
    wgmma_commit();
    wgmma_wait<0>(u.at[0]);
  }

  // The iterates -> shared, with what es_t will replace; returns a_T. B z is computed once where registers hold it.
  CSAT_DEVICE Operand<T, 16, kOwn> recompute() const {
    constexpr bool kKeep = kP == 64;
    Operand<T, 16, kOwn> a = {};
    Sums<16, kKeep ? kOwn : 16> bz;
    if constexpr (kKeep) measure(bz);
#pragma unroll 1
    for (int t = 0; t < s.layers(); ++t) {
      Sums<16, kOwn> u;
      if constexpr (kKeep)
        u = bz;
      else
        measure(u);
      if (t > 0) {
        wgmma_fence(u.at[0]);
        start_rows(u, iterate(t - 1), s.S(), column(), true);
        wgmma_commit();
        wgmma_wait<0>(u.at[0]);
      }
      store_words(error(t), at.warp, column(), shrink_keeping(a, u, s.theta() + t * kP + column(), s.step()[t]));
      if (keeps(t)) store_own(iterate(t), at.warp, column(), a);
      fence_proxy_async();
      at.team_barrier();
    }
    return a;
  }

  // es_t of every layer -> shared, and their sums; from x = a_T.
  template <bool kPsi>
  CSAT_DEVICE void propagate(Operand<T, 16, kOwn> x, WeightSums<kP, kF, kPsi>& sums) const {
    const int warp = warp_id();
    Sums<16, kOwn> g;
    if (s.p.decoder.synthesises()) {
      wgmma_fence(g.at[0]);
      start_columns(g, dout(), s.psi(), column(), false);
      wgmma_commit();
      wgmma_wait<0>(g.at[0]);
    } else {
      g = to_sums<kOwn>(load_own(dout(), at.warp, column()), 0);
    }
    wgmma_fence(sums.S.at[0], sums.B.at[0]);
#pragma unroll 1
    for (int t = s.layers() - 1; t >= 0; --t) {
      const LayerSums layer = layer_errors(g, x, lane_words(error(t), at.warp, column()), s.step()[t]);
      sync_warp();  // the warp has read v_t
      store_own(error(t), at.warp, column(), x);
      fence_proxy_async();
      at.team_barrier();
      wgmma_fence(g.at[0]);
      if (t > 0) start_columns(g, error(t), s.S(), column(), true);
      wgmma_commit();
      if (t > 0) start_outer(sums.S, error(t), column(), iterate(t - 1), 0);
      start_outer(sums.B, error(t), column(), z(), 0);
      wgmma_commit();
      float* theta = s.theta_sums(warp) + t * kOwn + LayerSums::column();
      theta[0] += layer.theta[0];
      theta[32] += layer.theta[1];
      const float step = warp_sum(layer.step);
      if (lane_id() == 0) s.step_sums(warp)[t] += step;
      if (t > 0) x = load_own(iterate(t - 1), at.warp, column());
      wgmma_wait<1>(g.at[0]);
    }
    wgmma_wait<0>(sums.S.at[0], sums.B.at[0]);
  }

  // dz in this warpgroup's columns, and dpsi.
  template <bool kPsi>
  CSAT_DEVICE Sums<16, kOwn> features(WeightSums<kP, kF, kPsi>& sums) const {
    Sums<16, kOwn> dz;
    wgmma_fence(dz.at[0]);
#pragma unroll 1
    for (int t = 0; t < s.layers(); ++t) start_columns(dz, error(t), s.B(), column(), t > 0);
    wgmma_commit();
    if constexpr (kPsi) {
      if (s.p.decoder.synthesises()) {
        wgmma_fence(sums.psi.at[0]);
        start_outer(sums.psi, dout(), 0, iterate(s.layers() - 1), column());
        wgmma_commit();
        wgmma_wait<0>(sums.psi.at[0]);
      }
    }
    wgmma_wait<0>(dz.at[0]);
    return dz;
  }
};

// The rows of tile `index` of this launch.
CSAT_DEVICE RowTile rows_of(const DecodeBackwardWgmmaArgs& p, int group, int index) {
  const int tile = p.first_tile + index, pair = tile / p.query_tiles, first = tile % p.query_tiles * kRows;
  const bool shared = p.decoder.heads == 1;
  const int64_t left = p.queries - first;
  return {shared ? pair / p.heads : pair, shared ? pair % p.heads : group, first,
          left < kRows ? static_cast<int>(left) : kRows};
}

// z and dc of a tile on their way, by one thread.
template <typename T, int kP, int kF>
CSAT_DEVICE void fetch(const Layout<T, kP, kF>& s, int team, int stage, const RowTile& rows) {
  uint64_t* arrived = s.arrived(team, stage);
  mbarrier_arrive_expect_bytes(arrived, 2 * kRows * kF * 2);
  const int row = static_cast<int>(rows.first), head = static_cast<int>(rows.head),
            batch = static_cast<int>(rows.batch);
  s.p.z.copy(s.z(team, stage), batch, head, row, arrived);
  s.p.dout.copy(s.dout(team, stage), batch, head, row, arrived);
}

// The warp's 16 rows of dz in 64 columns from `column` on, through its own rows of a tile.
template <typename T, int kColumns>
CSAT_DEVICE void store_features(const DecodeBackwardWgmmaArgs& p, const RowTile& rows,
                                SwizzledTile<T, kColumns> through, int warp, int column, const Sums<16, kOwn>& dz) {
  store_own(through, warp, column, to_operand<T>(dz));
  sync_warp();
  const int lane = lane_id(), c = column + lane % 8 * 8, row = 16 * warp + lane / 8;
  T* out = at<T>(p.dz, rows.batch, rows.head, rows.first + row) + c;
#pragma unroll
  for (int r = 0; r < 16; r += 4) {
    if (row + r >= rows.valid || c >= p.decoder.features) continue;
    const T* piece = through.piece(row + r, c);
    if (p.dz_vectors) {
      *reinterpret_cast<uint4*>(out + r * p.dz.stride[2]) = *reinterpret_cast<const uint4*>(piece);
    } else {
      for (int e = 0; e < 8 && c + e < p.decoder.features; ++e) out[r * p.dz.stride[2] + e] = piece[e];
    }
  }
  sync_warp();  // before the rows are filled again
}

// a_T and dc -> blocks in the workspace: what outer_blocks() makes dpsi from.
template <typename T, int kP, int kF>
CSAT_DEVICE void store_for_psi(const DecodeBackwardWgmmaArgs& p, const Place<kP>& at, int64_t tile,
                               SwizzledTile<T, kF> dout, const Operand<T, 16, kOwn>& a) {
  const int64_t block = tile * (kRows / 16) + at.warp;
  store_blocks<kP>(p.iterates + block * row_block_words(kP), at.own * kOwn, a);
  store_blocks<kF>(p.dout_rows + block * row_block_words(kF), at.own * kOwn, load_own(dout, at.warp, at.own * kOwn));
}

template <typename T, int kP, int kF>
CSAT_DEVICE void load_weights(const Layout<T, kP, kF>& s, int group) {
  const DecoderWeights& w = s.p.decoder;
  const int thread = threadIdx.x, threads = limits::kMmaThreads;
  load_rows_async(s.S(), weight_rows<T>(w, w.S, group, 0, w.coefficients, w.coefficients), kP, thread, threads);
  load_rows_async(s.B(), weight_rows<T>(w, w.B, group, 0, w.coefficients, w.features), kP, thread, threads);
  if (w.synthesises())
    load_rows_async(s.psi(), weight_rows<T>(w, w.psi, group, 0, w.outputs, w.coefficients), kF, thread, threads);
  load_thresholds<kP>(s.theta(), s.step(), w, group, thread, threads);
  for (int i = thread; i < w.layers * limits::kMmaWarps * (kOwn + 1); i += threads) s.theta_sums(0)[i] = 0.f;
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();
}

// What this warpgroup has summed -> its team's parts.
template <typename T, int kP, int kF, bool kPsi>
CSAT_DEVICE void store_parts(const Layout<T, kP, kF>& s, const Place<kP>& at, int64_t part,
                             const WeightSums<kP, kF, kPsi>& sums) {
  const DecodeBackwardWgmmaArgs& p = s.p;
  const int row = at.own * kOwn + 16 * at.warp, layers = s.layers(), warps = kP / 16;
  store_floats(p.S_parts + (part * kP + row) * kP, kP, 16, sums.S.at[0]);
  store_floats(p.B_parts + (part * kP + row) * kF, kF, 16, sums.B.at[0]);
  if constexpr (kPsi)
    if (p.decoder.synthesises())
      store_floats(p.psi_parts + (part * kF + 16 * at.warp) * kP + at.own * kOwn, kP, 16, sums.psi.at[0]);
  at.team_barrier();  // the sums of all its warps
  const int first = at.team * warps, thread = threadIdx.x % (2 * kP);
  for (int i = thread; i < layers * kP; i += 2 * kP) {
    const int warp = first + i % kP / kOwn * 4, place = i / kP * kOwn + i % kOwn;
    float sum = 0.f;
    for (int w = 0; w < 4; ++w) sum += s.theta_sums(warp + w)[place];
    p.theta_parts[part * layers * kP + i] = sum;
  }
  if (thread < layers) {
    float sum = 0.f;
    for (int w = 0; w < warps; ++w) sum += s.step_sums(first + w)[thread];
    p.step_parts[part * layers + thread] = sum;
  }
}

}  // namespace row_backward

template <typename T, int kP, int kF>
__global__ void __launch_bounds__(limits::kMmaThreads, 1)
    decode_backward_wgmma_kernel(const __grid_constant__ DecodeBackwardWgmmaArgs p) {
  using namespace row_backward;
  using Shared = Layout<T, kP, kF>;
  CSAT_DYN_SMEM(T, memory);
  const Shared s{memory, p};
  const Place<kP> at;
  const int group = blockIdx.x / p.group_blocks, slot = blockIdx.x % p.group_blocks * Shared::kTeams + at.team;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kTeams * 2; ++i) mbarrier_init(s.arrived(0, i), 1);
    fence_mbarrier_init();
  }
  load_weights(s, group);
  __syncthreads();
  const auto request = [&](int index, int stage) {
    if (index < p.group_tiles && at.leads()) fetch(s, at.team, stage, rows_of(p, group, index));
  };
  request(slot, 0);
  WeightSums<kP, kF, Shared::kSumsPsi> sums;
#pragma unroll 1
  for (int turn = 0; slot + turn * p.slots < p.group_tiles; ++turn) {
    const int index = slot + turn * p.slots, stage = turn & (p.stages - 1);
    if (p.stages == 2) request(index + p.slots, stage ^ 1);
    mbarrier_wait(s.arrived(at.team, stage), turn >> (p.stages - 1) & 1);
    const TileOfRows<T, kP, kF> tile{s, at, stage};
    const Operand<T, 16, kOwn> last = tile.recompute();
    if constexpr (!Shared::kSumsPsi)
      if (p.decoder.synthesises())
        store_for_psi<T, kP, kF>(p, at, int64_t(group) * p.group_tiles + index, tile.dout(), last);
    tile.propagate(last, sums);
    const Sums<16, kOwn> dz = tile.features(sums);
    at.team_barrier();  // every product of this tile has read what it reads
    store_features(p, rows_of(p, group, index), tile.error(0), at.warp, tile.column(), dz);
    if (p.stages == 1) request(index + p.slots, 0);
  }
  store_parts(s, at, int64_t(group) * p.slots + slot, sums);
}

template <typename T, int kP, int kF>
int launch_decode_backward_wgmma(const DecodeBackwardWgmmaArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = decode_backward_wgmma_kernel<T, kP, kF>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kMmaThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}

// csrc/kernels/instances/decode_backward_wgmma_<size>.cu instantiate these: P, R and Dv up to 64, or up to 128.
#define CSAT_DECODE_BACKWARD_WGMMA(prefix, T, size)                                                                 \
  prefix template int launch_decode_backward_wgmma<T, size, size>(const DecodeBackwardWgmmaArgs&, int64_t, int64_t, \
                                                                  void*);
#define CSAT_DECODE_BACKWARD_WGMMA_INSTANCE(T, size) CSAT_DECODE_BACKWARD_WGMMA(, T, size)
#ifndef CSAT_INSTANTIATE
CSAT_DECODE_BACKWARD_WGMMA(extern, bf16, 64)
CSAT_DECODE_BACKWARD_WGMMA(extern, bf16, 128)
CSAT_DECODE_BACKWARD_WGMMA(extern, f16, 64)
CSAT_DECODE_BACKWARD_WGMMA(extern, f16, 128)
#endif

}  // namespace csat
