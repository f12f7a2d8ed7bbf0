// The decoder at warp level: a warp takes its rows of z through all layers in registers.
//
//   u = S_t a + B_t z,  a = soft(a + step_t (u - a), theta_t), T times from a = 0;  c = psi a
//
// Data flow: z is a left operand in registers; S, B, psi stand in shared memory as they are in global memory, one row
// an output coefficient, so that ldmatrix reads them as b^T. A layer goes by groups of columns: u (fp32) -> soft
// threshold -> the next a, packed to T: an iterate is a left operand and is defined as rounded to T, for the backward
// pass too. B z is computed anew in every layer: kept beside u (64 coefficients, 32 rows) it made the fused kernel
// spill 260 to 520 bytes, by nvcc 13.0.
// Budget of a row: 2 T P (P + R) + 2 P Dv FLOP, the last only where psi is not the identity; registers: 2 (P / 16) + (R
// / 16) + 8 a row block of 16, times 4.
#pragma once
#include "csat/fragments.cuh"
#include "csat/limits.h"
#include "csat/tile.cuh"

namespace csat {

// Where the weights of all heads lie: 16-bit matrices with vector rows, float32 vectors.
struct DecoderWeights {
  View S, B, psi;     // (Hd, Ts, P, P), (Hd, Tb, P, R), (Hd, 1, Dv, P); psi.data null: the identity
  Panel theta, step;  // (Hd)(T, P), (Hd)(1, T)
  int64_t heads;      // Hd
  int layers, s_layers, b_layers, coefficients, features, outputs;
  constexpr bool synthesises() const { return psi.data != nullptr; }
};

// Weights of one head in shared memory, padded with zeros to kP coefficients and kD features: S, B, psi as tiles, then
// theta and step. Where each lies is computed, not kept: registers are what this file is short of.
template <typename T, int kD, int kP>
struct DecoderTiles {
  T* base;
  const DecoderWeights& w;

  CSAT_DEVICE Tile<T, kP> S(int t) const { return {base + (w.s_layers == 1 ? 0 : t) * int(tile_elements(kP, kP))}; }
  CSAT_DEVICE Tile<T, kD> B(int t) const {
    return {after_S() + (w.b_layers == 1 ? 0 : t) * int(tile_elements(kP, kD))};
  }
  CSAT_DEVICE Tile<T, kP> psi() const { return {after_S() + w.b_layers * int(tile_elements(kP, kD))}; }
  CSAT_DEVICE float* theta() const { return reinterpret_cast<float*>(psi().data + tile_elements(kD, kP)); }
  CSAT_DEVICE float* step() const { return theta() + w.layers * kP; }
  // Behind the weights, 16-byte aligned (limits::decoder_mma_bytes).
  CSAT_DEVICE T* end() const { return psi().data + tile_elements(kD, kP) + (w.layers * (kP + 1) + 3) / 4 * 8; }

 private:
  CSAT_DEVICE T* after_S() const { return base + w.s_layers * int(tile_elements(kP, kP)); }
};

// Columns that a layer or the output computes at a time: few accumulators beside the operands that must stay.
constexpr int kColumnGroup = 16;

// u = soft(a + step (u - a), theta) for the columns of u, which are the columns `first` .. of a and the first of theta.
template <typename T, int kRows, int kColumns, int kDepth>
CSAT_DEVICE void shrink(Sums<kRows, kColumns>& u, const Operand<T, kRows, kDepth>& a, int first, const float* theta,
                        float step) {
  const int t = pinned(lane_id()) % 4 * 2;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const float threshold[2] = {theta[8 * j + t], theta[8 * j + t + 1]};
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 before = unpack2<T>(a.at[i][first / 16 + j / 2][j % 2 * 2 + h]);
        float (&value)[4] = u.at[i][j];
        value[2 * h] = soft_threshold(before.x + step * (value[2 * h] - before.x), threshold[0]);
        value[2 * h + 1] = soft_threshold(before.y + step * (value[2 * h + 1] - before.y), threshold[1]);
      }
  }
}

// u = soft(step u, theta): the same where a = 0.
template <int kRows, int kColumns>
CSAT_DEVICE void shrink(Sums<kRows, kColumns>& u, const float* theta, float step) {
  const int t = pinned(lane_id()) % 4 * 2;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) u.at[i][j][e] = soft_threshold(step * u.at[i][j][e], theta[8 * j + t + e % 2]);
}

// a = soft(a + step (u - a), theta), rounded to T, where a is whole; kFirst: from a = 0. The arithmetic of shrink.
template <bool kFirst, typename T, int kRows, int kP>
CSAT_DEVICE void next_iterate(Operand<T, kRows, kP>& a, const Sums<kRows, kP>& u, const float* theta, float step) {
  const int t = pinned(lane_id()) % 4 * 2;
#pragma unroll
  for (int j = 0; j < kP / 8; ++j) {
    const float2 threshold = *reinterpret_cast<const float2*>(theta + 8 * j + t);
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t& pair = a.at[i][j / 2][j % 2 * 2 + h];
        float2 x = {u.at[i][j][2 * h], u.at[i][j][2 * h + 1]};
        if constexpr (kFirst) {
          x = {step * x.x, step * x.y};
        } else {
          const float2 before = unpack2<T>(pair);
          x = {before.x + step * (x.x - before.x), before.y + step * (x.y - before.y)};
        }
        pair = soft_threshold_pack2<T>(x, threshold);
      }
  }
}

// a_{t+1} from a_t; the first layer starts from a = 0.
template <bool kFirst, typename T, int kRows, int kD, int kP, typename Measured>
CSAT_DEVICE void lista_layer(Operand<T, kRows, kP>& a, const Measured& z, const DecoderTiles<T, kD, kP>& w, int t) {
  Operand<T, kRows, kP> next;
#pragma unroll
  for (int first = 0; first < kP; first += kColumnGroup) {
    Sums<kRows, kColumnGroup> u = {};
    multiply_transposed(u, z, w.B(t).from_row(first));
    if constexpr (!kFirst) multiply_transposed(u, a, w.S(t).from_row(first));
    shrink(u, a, first, w.theta() + t * kP + first, w.step()[t]);
    set_columns(next, first, u);
  }
  a = next;
}

// a_T of the rows of z.
template <int kRows, typename T, int kD, int kP, typename Measured>
CSAT_DEVICE Operand<T, kRows, kP> recover(const Measured& z, const DecoderTiles<T, kD, kP>& w) {
  Operand<T, kRows, kP> a = {};
  if (w.w.layers > 0) lista_layer<true>(a, z, w, 0);
#pragma unroll 1
  for (int t = 1; t < w.w.layers; ++t) lista_layer<false>(a, z, w, t);
  return a;
}

// out = psi a, rounded to T; a itself where psi is the identity.
template <typename T, int kRows, int kD, int kP>
CSAT_DEVICE void synthesise(Tile<T, kD> out, const Operand<T, kRows, kP>& a, const DecoderTiles<T, kD, kP>& w) {
  if (!w.w.synthesises()) return store_tile(out, a);
#pragma unroll
  for (int first = 0; first < kD; first += kColumnGroup) {
    Sums<kRows, kColumnGroup> c = {};
    multiply_transposed(c, a, w.psi().from_row(first));
    store_tile(out, first, c);
  }
}

// Rows of z -> rows of c, in place in the warp's own tile; as many at a time as registers hold.
template <int kRows, typename T, int kD, int kP>
CSAT_DEVICE void decode_tile(Tile<T, kD> tile, const DecoderTiles<T, kD, kP>& w) {
  constexpr int kTogether = limits::recover_rows(kD, kP) < kRows ? limits::recover_rows(kD, kP) : kRows;
#pragma unroll 1
  for (int row = 0; row < kRows; row += kTogether) {
    const Tile<T, kD> part = tile.from_row(row);
    if constexpr (kP > 128) {
      const auto a = recover<kTogether>(part, w);
      sync_warp();  // every lane has read its z
      synthesise(part, a, w);
    } else {
      const auto z = load_operand<kTogether>(part);
      sync_warp();
      synthesise(part, recover<kTogether>(z, w), w);
    }
  }
}

// Rows of one layer's matrix of a head.
template <typename T>
CSAT_DEVICE GlobalRows<const T> weight_rows(const DecoderWeights& w, const View& v, int64_t head, int layer, int rows,
                                            int columns) {
  return {at<const T>(v, w.heads == 1 ? 0 : head, layer, 0), v.stride[2], rows, columns};
}
template <int kP>
CSAT_DEVICE void load_thresholds(float* theta, float* step, const DecoderWeights& w, int64_t head, int thread,
                                 int threads) {
  const int64_t own = w.heads == 1 ? 0 : head;
  const float* from = w.theta.data + own * w.theta.matrix;
  for (int i = thread; i < w.layers * kP; i += threads)
    theta[i] = i % kP < w.coefficients ? from[i / kP * w.theta.pitch + i % kP] : 0.f;
  for (int i = thread; i < w.layers; i += threads) step[i] = w.step.data[own * w.step.matrix + i];
}

// The weights of one head -> shared memory, by a whole block of `threads`. Asynchronous, but for theta and step. A
// kernel without a register to spare pins `thread`, so that no address is kept for the next head.
template <typename T, int kD, int kP>
CSAT_DEVICE void load_decoder(const DecoderTiles<T, kD, kP>& to, int64_t head, int threads, int thread) {
  const DecoderWeights& w = to.w;
  for (int t = 0; t < w.s_layers; ++t)
    load_rows_async(to.S(t), weight_rows<T>(w, w.S, head, t, w.coefficients, w.coefficients), 0, kP, thread, threads);
  for (int t = 0; t < w.b_layers; ++t)
    load_rows_async(to.B(t), weight_rows<T>(w, w.B, head, t, w.coefficients, w.features), 0, kP, thread, threads);
  if (w.synthesises())
    load_rows_async(to.psi(), weight_rows<T>(w, w.psi, head, 0, w.outputs, w.coefficients), 0, kD, thread, threads);
  load_thresholds<kP>(to.theta(), to.step(), w, head, thread, threads);
}
template <typename T, int kD, int kP>
CSAT_DEVICE void load_decoder(const DecoderTiles<T, kD, kP>& to, int64_t head, int threads) {
  load_decoder(to, head, threads, static_cast<int>(threadIdx.x));
}

}  // namespace csat
