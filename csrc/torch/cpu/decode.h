// The unrolled sparse decoder for tiles of rows:
//   y_t = S_t a_t + B_t z - a_t,  u_t = a_t + step_t y_t,  a_{t+1} = soft(u_t, theta_t),  a_0 = 0,  c = psi a_T.
#pragma once

#include "torch/checks.h"
#include "torch/cpu/gemm.h"

namespace csat::cpu {

// Every matrix of the decoder in the accumulation type, one per head and layer, as right factors of row products.
template <class R>
struct DecodeOperands {
  DecodeSizes n;
  Stack<R> S_t;      // (P, P) = S^T
  Stack<R> B_t;      // (R, P) = B^T
  bool synthesises;  // psi is not the identity
  Stack<R> psi_t;    // (P, Dv) = psi^T
  Stack<R> theta;    // (T, P)
  Stack<R> step;     // (1, T)

  DecodeOperands(const DecodeSizes& n, const Tensor& S, const Tensor& B, const Tensor& theta_in, const MaybeTensor& psi,
                 const Tensor& step_in)
      : n(n),
        S_t(n.Hd * n.Ts, n.P, n.P),
        B_t(n.Hd * n.Tb, n.R, n.P),
        synthesises(psi.has_value()),
        psi_t(psi ? n.Hd : 0, n.P, n.Dv),
        theta(n.Hd, n.T, n.P),
        step(n.Hd, 1, n.T) {
    const Array S_array(S), B_array(B), theta_array(theta_in), step_array(step_in);
    for (int64_t i = 0; i < n.Hd * n.Ts; ++i) load(S_array.matrix(i / n.Ts, i % n.Ts).transposed(), n.P, n.P, S_t[i]);
    for (int64_t i = 0; i < n.Hd * n.Tb; ++i) load(B_array.matrix(i / n.Tb, i % n.Tb).transposed(), n.R, n.P, B_t[i]);
    for (int64_t i = 0; i < n.Hd; ++i) {
      if (psi) load(Array(*psi).matrix(i, 0).transposed(), n.P, n.Dv, psi_t[i]);
      load(theta_array.matrix(i, 0), n.T, n.P, theta[i]);
      load(step_array.row(i, 0), 1, n.T, step[i]);
    }
  }
  int64_t head(int64_t h) const { return n.Hd == 1 ? 0 : h; }
  int64_t S_index(int64_t hd, int64_t t) const { return hd * n.Ts + (n.Ts == 1 ? 0 : t); }
  int64_t B_index(int64_t hd, int64_t t) const { return hd * n.Tb + (n.Tb == 1 ? 0 : t); }
};

// Layer t of one tile: from `a` (all zero for t = 0) to `next`. `drive` holds B_t z and is recomputed where B differs
// between layers; `change` receives y_t. `next` may be `a`.
template <class R>
void decode_layer(const DecodeOperands<R>& operands, int64_t hd, int64_t t, int64_t rows, Block<R> z, Block<R> a,
                  Block<R> drive, Block<R> change, Block<R> next) {
  const DecodeSizes& n = operands.n;
  if (t == 0 || n.Tb > 1) multiply(rows, n.P, n.R, as_is(z), operands.B_t[operands.B_index(hd, t)], drive);
  clear(change, rows, n.P);
  if (t > 0) multiply_add(rows, n.P, n.P, as_is(a), operands.S_t[operands.S_index(hd, t)], change);
  const R step = operands.step[hd].data[t];
  const R* theta = operands.theta[hd].row(t);
  for (int64_t i = 0; i < rows; ++i)
    micro_kernels<R>().threshold_row(a.row(i), drive.row(i), theta, step, padded<R>(n.P), change.row(i), next.row(i));
}

// Scratch of a forward tile.
template <class R>
struct DecodeTile {
  Stack<R> a, drive, change;
  DecodeTile(const DecodeSizes& n, int64_t rows) : a(1, rows, n.P), drive(1, rows, n.P), change(1, rows, n.P) {}
};

// c (rows, Dv) = psi a_T of one tile of z.
template <class R>
void decode_tile(const DecodeOperands<R>& operands, int64_t h, int64_t rows, Block<R> z, const DecodeTile<R>& tile,
                 Block<R> c) {
  const DecodeSizes& n = operands.n;
  const int64_t hd = operands.head(h);
  clear(tile.a[0], rows, n.P);
  for (int64_t t = 0; t < n.T; ++t)
    decode_layer(operands, hd, t, rows, z, tile.a[0], tile.drive[0], tile.change[0], tile.a[0]);
  if (operands.synthesises)
    multiply(rows, n.Dv, n.P, as_is(tile.a[0]), operands.psi_t[hd], c);
  else
    copy(tile.a[0], rows, n.P, c);
}

}  // namespace csat::cpu
