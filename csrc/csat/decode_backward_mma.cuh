// Backward of decode on tensor cores (mma.sync m16n8k16, sm_80 and up), for bf16 and fp16: rows.
//
//   forward    v_t = S_t a_t + B_t z - a_t,  a_{t+1} = soft(a_t + step_t v_t, theta_t), rounded to T  (lista.cuh)
//   backward   g_T = dc psi;  e_t = g_{t+1} [a_{t+1} != 0], rounded to T
//              dtheta_t = -sum e_t sign(a_{t+1}),  dz += step_t e_t B_t,  g_t = e_t + step_t (e_t S_t - e_t)
//              dstep_t = sum e_t . v_t = sum (e_t S_t - e_t) . a_t + e_t B_t . z: no v_t is kept, nothing is divided
//   then       dS_t = sum step_t e_t^T a_t,  dB_t = sum step_t e_t^T z,  dpsi = sum dc^T a_T   (outer_blocks())
//
// Iterates come from the arithmetic of the forward pass in its order, so [a != 0] is the forward's, bit for bit, where
// that runs on tensor cores too. A warp owns 32 rows (16 where P is above 128, or R or Dv above 64) and walks the
// layers alone; a block of eight warps shares the weights of a layer.
//
// Data flow: z, dc (any strides) -> blocks in the workspace -> operands; S_t, B_t, psi -> shared by cp.async, once a
// block where they are tied, once a layer of eight tiles where they are not (between two barriers; a second copy of the
// weights has no room). psi may take the place of B. a_{t+1} and e_t -> blocks in the workspace, which the same lane
// reads back coalesced. Registers hold one operand (a_t or e_t), the sums of dz and a group of columns of a product;
// the loops over groups are not unrolled, and what belongs to a group is read from the workspace again: registers have
// no index, and unrolled, ptxas begins all groups at once (300 bytes of spills). Column sums (dtheta): over the rows by
// exchanges that halve what a lane holds; over tiles in a slot of the warp, tile after tile; over slots by reduce().
// The same order in every run.
//
// Budget of a row: 2 T P (2 P + 2 R) + 2 P Dv FLOP here and 2 T P (P + R) + 2 P Dv in outer_blocks(). 206 to 252
// registers by size, no spills; shared memory limits::decode_backward_bytes. Bytes of a row and layer through the
// workspace: 14 P + 2 R here (a written once and read three times, e once and twice, z read) and 6 P + 2 R in
// outer_blocks() (e twice, a and z once). Sums of outer products in registers of a persistent block would save the
// latter, but dS alone (P = 128) takes 64 registers of every lane; iterates and errors that stay in registers while a
// layer runs would save 6 P of the former, but that is what spills.
// Limits: limits::why_not_mma. fp16 holds e_t as it holds a gradient: below 2^-24 it is zero, above 65504 infinite.
#pragma once
#include "csat/blocks.cuh"
#include "csat/lista.cuh"

namespace csat {

struct DecodeBackwardMmaArgs {
  DecoderWeights decoder;
  int64_t heads, queries;
  // Of a group, the rows that share weights: tiles of this launch, blocks, warps that have a tile; tiles of the
  // launches before.
  int group_tiles, group_blocks, slots;
  int64_t first_tile;
  bool psi_apart;  // psi has a place of its own, else it takes that of B
  View z, dout, dz;
  // Workspace of this launch; rows_g = group_tiles * rows of a warp. Blocks of 16-bit elements, then float32.
  uint32_t *iterates, *errors;      // (groups, T, rows_g, P): a_{t+1} and e_t at t
  uint32_t *z_rows, *dout_rows;     // (groups, rows_g, F)
  float *theta_parts, *step_parts;  // (groups, slots, T, P), (groups, slots, T)
};

// What one tile of rows keeps in the workspace. Places are computed, not kept: registers are what this file is short
// of.
template <int kRows, int kP, int kF>
struct BackwardRows {
  const DecodeBackwardMmaArgs& p;
  int group, index;  // of the tile, in the group
  int slot;          // of the warp

  CSAT_DEVICE RowTile tile() const {
    return decoder_tile(p.first_tile + pinned(index), group, p.decoder.heads, p.heads, p.queries, kRows);
  }
  CSAT_DEVICE uint32_t* iterate(int t) const { return p.iterates + wide(t); }  // a_{t+1}
  CSAT_DEVICE uint32_t* error(int t) const { return p.errors + wide(t); }      // e_t
  CSAT_DEVICE uint32_t* z() const { return p.z_rows + narrow(); }
  CSAT_DEVICE uint32_t* dout() const { return p.dout_rows + narrow(); }
  // The warp's share of a sum over rows: set by its first tile, added to by the others.
  CSAT_DEVICE void add_theta(int t, int column, float sum) const {
    add(p.theta_parts[(part() + t) * kP + column], sum);
  }
  CSAT_DEVICE void add_step(int t, float sum) const { add(p.step_parts[part() + t], sum); }

 private:
  CSAT_DEVICE int64_t wide(int t) const {
    return (int64_t(group * p.decoder.layers + t) * p.group_tiles + index) * (kRows / 16 * row_block_words(kP));
  }
  CSAT_DEVICE int64_t narrow() const {
    return (int64_t(group) * p.group_tiles + index) * (kRows / 16 * row_block_words(kF));
  }
  CSAT_DEVICE int64_t part() const { return (int64_t(group) * p.slots + slot) * p.decoder.layers; }
  CSAT_DEVICE void add(float& part, float sum) const { part = index == slot ? sum : part + sum; }
};

// The weights of one layer in shared memory, loaded when the layer changes them. Every thread of the block asks alike.
template <typename T, int kP, int kF>
struct LayerTiles {
  Tile<T, kP> S;
  Tile<T, kF> B;
  Tile<T, kP> psi;
  int s_held = -1, b_held = -1;  // the layer whose S, B lie there
  bool psi_held = false;

  CSAT_DEVICE LayerTiles(T* shared, bool psi_apart)
      : S{shared}, B{shared + tile_elements(kP, kP)}, psi{B.data + (psi_apart ? tile_elements(kP, kF) : 0)} {}

  // The first layer multiplies no iterate: it needs no S.
  CSAT_DEVICE void want_layer(const DecoderWeights& w, int64_t group, int t) {
    const int s = t == 0 ? s_held : (w.s_layers == 1 ? 0 : t), b = w.b_layers == 1 ? 0 : t;
    if (s == s_held && b == b_held) return;
    __syncthreads();  // the other warps have read what is replaced
    if (s != s_held) load(S, w, w.S, group, s, kP, w.coefficients, w.coefficients);
    if (b != b_held) load(B, w, w.B, group, b, kP, w.coefficients, w.features);
    s_held = s;
    b_held = b;
    psi_held = psi_held && psi.data != B.data;
    arrive();
  }
  CSAT_DEVICE void want_psi(const DecoderWeights& w, int64_t group) {
    if (psi_held || !w.synthesises()) return;
    __syncthreads();
    load(psi, w, w.psi, group, 0, kF, w.outputs, w.coefficients);
    psi_held = true;
    if (psi.data == B.data) b_held = -1;
    arrive();
  }

 private:
  template <int kColumns>
  CSAT_DEVICE static void load(Tile<T, kColumns> tile, const DecoderWeights& w, const View& v, int64_t group, int layer,
                               int tile_rows, int rows, int columns) {
    load_rows_async(tile, weight_rows<T>(w, v, group, layer, rows, columns), 0, tile_rows, threadIdx.x,
                    limits::kMmaThreads);
  }
  CSAT_DEVICE static void arrive() {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
};

// Rows of a tensor of any strides -> row blocks, zeros where it has none, and from there as a left operand. Sixteen
// columns at a time: addresses of all elements at once would take more registers than there are.
template <typename T, int kRows, int kColumns>
CSAT_DEVICE Operand<T, kRows, kColumns> load_strided(uint32_t* blocks, const View& v, const RowTile& tile,
                                                     int columns) {
  const T* source = at<const T>(v, tile.batch, tile.head, tile.first);
  const auto element = [&](int r, int c) {
    return r < tile.valid && c < columns ? to_float(source[r * v.stride[2] + c * v.stride[3]]) : 0.f;
  };
#pragma unroll 1
  for (int first = 0; first < kColumns; first += 16) {
    Sums<kRows, 16> part;
    for_each(part, [&](float& value, int row, int column) { value = element(row, first + column); });
    store_blocks<kColumns>(blocks, first, to_operand<T>(part));
  }
  return load_blocks<T, kRows, kColumns, kColumns>(blocks);
}

// e_t = g [a_{t+1} != 0] for the columns of g, and these rows' share of dtheta_t.
template <typename T, int kRows, int kP, int kF, int kColumns>
CSAT_DEVICE void store_error(const BackwardRows<kRows, kP, kF>& rows, int t, int first, Sums<kRows, kColumns>& g,
                             const Sums<kRows, kColumns>& after) {
  constexpr int kHeld = kColumns / 4;
  float theta[kHeld] = {};
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float a = after.at[i][j][e], error = a != 0.f ? g.at[i][j][e] : 0.f;
        theta[2 * j + e % 2] -= a > 0.f ? error : (a < 0.f ? -error : 0.f);
        g.at[i][j][e] = error;
      }
  store_blocks<kP>(rows.error(t), first, to_operand<T>(g));
  const float sum = column_sum(theta);
  const int c = lane_id() / 4 * kHeld / 8, column = c / 2 * 8 + lane_id() % 4 * 2 + c % 2;
  if (lane_id() / 4 % (8 / kHeld) == 0) rows.add_theta(t, first + column, sum);
}

// Columns of a product at a time: four accumulators in turn keep the tensor cores busy.
template <int kRows>
constexpr int kGroup = 512 / kRows;

// a_{t+1} from a_t, in the order of lista_layer (lista.cuh), -> workspace.
template <typename T, int kRows, int kP, int kF>
CSAT_DEVICE void recompute_layer(Operand<T, kRows, kP>& a, const Operand<T, kRows, kF>& z,
                                 const BackwardRows<kRows, kP, kF>& rows, const LayerTiles<T, kP, kF>& tiles,
                                 const float* theta, float step, int t) {
#pragma unroll 1
  for (int first = 0; first < kP; first += kGroup<kRows>) {
    Operand<T, kRows, kGroup<kRows>> own = {};
    Sums<kRows, kGroup<kRows>> u = {};
    multiply_transposed(u, z, tiles.B.from_row(first));
    if (t > 0) {
      own = load_blocks<T, kRows, kGroup<kRows>, kP>(rows.iterate(t - 1), first);
      multiply_transposed(u, a, tiles.S.from_row(first));
    }
    shrink(u, own, 0, theta + first, step);
    store_blocks<kP>(rows.iterate(t), first, to_operand<T>(u));
  }
  a = load_blocks<T, kRows, kP, kP>(rows.iterate(t));
}

// g_T = dc psi (dc where psi is the identity), then e_{T-1}.
template <typename T, int kRows, int kP, int kF>
CSAT_DEVICE void first_error(const BackwardRows<kRows, kP, kF>& rows, Tile<T, kP> psi) {
  const int last = rows.p.decoder.layers - 1;
  const auto dout = load_strided<T, kRows, kF>(rows.dout(), rows.p.dout, rows.tile(), rows.p.decoder.outputs);
#pragma unroll 1
  for (int first = 0; first < kP; first += kGroup<kRows>) {
    const auto a = load_blocks<T, kRows, kGroup<kRows>, kP>(rows.iterate(last), first);
    Sums<kRows, kGroup<kRows>> g = {};
    if (rows.p.decoder.synthesises())
      multiply(g, dout, psi, first);
    else if (first < kF)
      g = to_sums<kGroup<kRows>>(load_blocks<T, kRows, kGroup<kRows>, kF>(rows.dout(), first), 0);
    store_error<T>(rows, last, first, g, to_sums<kGroup<kRows>>(a, 0));
  }
}

// The first kCount blocks of eight columns go behind the others: registers have no index, a loop that is not unrolled
// finds its columns at the front. Unrolled, ptxas would begin all columns at once.
template <int kCount, int kRows, int kColumns>
CSAT_DEVICE void rotate_columns(Sums<kRows, kColumns>& x) {
  const Sums<kRows, kColumns> old = x;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) x.at[i][j][c] = old.at[i][(j + kCount) % (kColumns / 8)][c];
}

// dz += step_t e_t B_t; returns this lane's share of e_t B_t . z.
template <typename T, int kRows, int kP, int kF>
CSAT_DEVICE float feature_gradient(Sums<kRows, kF>& dz, const Operand<T, kRows, kP>& e,
                                   const BackwardRows<kRows, kP, kF>& rows, Tile<T, kF> B, float step) {
  float product = 0.f;
#pragma unroll 1
  for (int first = 0; first < kF; first += kGroup<kRows>) {
    const auto own = load_blocks<T, kRows, kGroup<kRows>, kF>(rows.z(), first);  // on its way meanwhile
    Sums<kRows, kGroup<kRows>> eB = {};
    multiply(eB, e, B, first);
    const Sums<kRows, kGroup<kRows>> z = to_sums<kGroup<kRows>>(own, 0);
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < kGroup<kRows> / 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          product += eB.at[i][j][c] * z.at[i][j][c];
          dz.at[i][j][c] += step * eB.at[i][j][c];
        }
    rotate_columns<kGroup<kRows> / 8>(dz);
  }
  return product;
}

// g_t = e_t + step_t (e_t S_t - e_t), then e_{t-1}; returns this lane's share of (e_t S_t - e_t) . a_t.
template <typename T, int kRows, int kP, int kF>
CSAT_DEVICE float previous_error(const Operand<T, kRows, kP>& e, const BackwardRows<kRows, kP, kF>& rows, Tile<T, kP> S,
                                 float step, int t) {
  float product = 0.f;
#pragma unroll 1
  for (int first = 0; first < kP; first += kGroup<kRows>) {
    const auto own = load_blocks<T, kRows, kGroup<kRows>, kP>(rows.error(t), first);  // of e, whose place is no index
    const auto before = load_blocks<T, kRows, kGroup<kRows>, kP>(rows.iterate(t - 1), first);
    Sums<kRows, kGroup<kRows>> g = {};
    multiply(g, e, S, first);
    const Sums<kRows, kGroup<kRows>> old = to_sums<kGroup<kRows>>(own, 0), a = to_sums<kGroup<kRows>>(before, 0);
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int j = 0; j < kGroup<kRows> / 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float change = g.at[i][j][c] - old.at[i][j][c];
          product += change * a.at[i][j][c];
          g.at[i][j][c] = old.at[i][j][c] + step * change;
        }
    store_error<T>(rows, t - 1, first, g, a);
  }
  return product;
}

template <typename T, int kRows, int kP, int kF>
CSAT_DEVICE void backward_layer(Sums<kRows, kF>& dz, const BackwardRows<kRows, kP, kF>& rows,
                                const LayerTiles<T, kP, kF>& tiles, float step, int t) {
  const Operand<T, kRows, kP> e = load_blocks<T, kRows, kP, kP>(rows.error(t));
  float product = feature_gradient(dz, e, rows, tiles.B, step);
  if (t > 0) product += previous_error(e, rows, tiles.S, step, t);
  product = warp_sum(product);
  if (lane_id() == 0) rows.add_step(t, product);
}

// Rows of a tensor of any strides = x, as far as it has them.
template <typename T, int kRows, int kF>
CSAT_DEVICE void store_strided(const View& v, const RowTile& tile, int columns, const Sums<kRows, kF>& x) {
  T* target = at<T>(v, tile.batch, tile.head, tile.first);
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kF / 8; ++j) {
      const int lane = pinned(lane_id());  // one place after the other, not all addresses first
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 16 * i + e / 2 * 8 + lane / 4, column = 8 * j + lane % 4 * 2 + e % 2;
        if (row < tile.valid && column < columns)
          target[row * v.stride[2] + column * v.stride[3]] = from_float<T>(x.at[i][j][e]);
      }
    }
}

template <typename T, int kP, int kF>
__global__ void __launch_bounds__(limits::kMmaThreads, 1) decode_backward_mma_kernel(DecodeBackwardMmaArgs p) {
  constexpr int kRows = limits::decode_backward_rows(kP, kF);
  CSAT_DYN_SMEM(T, shared);
  const DecoderWeights& w = p.decoder;
  LayerTiles<T, kP, kF> tiles(shared, p.psi_apart);
  const int group = blockIdx.x / p.group_blocks;
  const int slot = blockIdx.x % p.group_blocks + p.group_blocks * warp_id();
  const float* theta = w.theta.data + group * w.theta.matrix;
  const float* step = w.step.data + group * w.step.matrix;

  for (int begin = 0; begin < p.group_tiles;
       begin += p.group_blocks * limits::kMmaWarps) {  // all warps of the block walk in step
    const int index = begin + slot;
    const bool exists = index < p.group_tiles;
    const BackwardRows<kRows, kP, kF> rows{p, group, index, slot};
    Operand<T, kRows, kP> a = {};
    Operand<T, kRows, kF> z;
    if (exists) z = load_strided<T, kRows, kF>(rows.z(), p.z, rows.tile(), w.features);
    for (int t = 0; t < w.layers; ++t) {
      tiles.want_layer(w, group, t);
      if (exists) recompute_layer(a, z, rows, tiles, theta + t * w.theta.pitch, step[t], t);
    }
    tiles.want_psi(w, group);
    if (exists) first_error(rows, tiles.psi);
    Sums<kRows, kF> dz = {};
    for (int t = w.layers - 1; t >= 0; --t) {
      tiles.want_layer(w, group, t);
      if (exists) backward_layer(dz, rows, tiles, step[t], t);
    }
    if (exists) store_strided<T>(p.dz, rows.tile(), w.features, dz);
  }
}

template <typename T, int kP, int kF>
int launch_decode_backward_mma(const DecodeBackwardMmaArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = decode_backward_mma_kernel<T, kP, kF>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kMmaThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}

// csrc/kernels/instances/decode_backward_mma_<P>.cu instantiate these; everything else refers to them.
#define CSAT_DECODE_BACKWARD_MMA_INSTANCES(prefix, T, kP)                                                           \
  prefix template int launch_decode_backward_mma<T, kP, 64>(const DecodeBackwardMmaArgs&, int64_t, int64_t, void*); \
  prefix template int launch_decode_backward_mma<T, kP, 128>(const DecodeBackwardMmaArgs&, int64_t, int64_t, void*);
#define CSAT_DECODE_BACKWARD_MMA_INSTANCE(T, kP) CSAT_DECODE_BACKWARD_MMA_INSTANCES(, T, kP)
#ifndef CSAT_INSTANTIATE
#define CSAT_EXTERN_MMA(kP)                            \
  CSAT_DECODE_BACKWARD_MMA_INSTANCES(extern, bf16, kP) \
  CSAT_DECODE_BACKWARD_MMA_INSTANCES(extern, f16, kP)
CSAT_EXTERN_MMA(64)
CSAT_EXTERN_MMA(128)
CSAT_EXTERN_MMA(256)
#undef CSAT_EXTERN_MMA
#endif

}  // namespace csat
