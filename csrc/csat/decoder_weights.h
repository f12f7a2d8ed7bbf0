// How a launch function takes a decoder to the tensor cores. Host code only.
#pragma once
#include "csat/lista.cuh"
#include "csat/workspace.h"

namespace csat {

// Sizes, and S, B and psi (where it is not the identity) in the 16-bit dtype of the rows, with vector rows.
inline int take_matrices(DecoderWeights& w, const Decoder& d, DType dtype, Carver& carver, void* stream) {
  const int64_t P = d.coefficients, R = d.features;
  w = {d.S,
       d.B,
       d.psi,
       {},
       {},
       d.heads,
       static_cast<int>(d.layers),
       static_cast<int>(d.s_layers),
       static_cast<int>(d.b_layers),
       static_cast<int>(P),
       static_cast<int>(R),
       static_cast<int>(d.outputs)};
  CSAT_TRY(take_vector_rows(w.S, carver, dtype, d.heads, d.s_layers, P, P, stream));
  CSAT_TRY(take_vector_rows(w.B, carver, dtype, d.heads, d.b_layers, P, R, stream));
  if (!w.synthesises()) return 0;
  return take_vector_rows(w.psi, carver, dtype, d.heads, 1, d.outputs, P, stream);
}

// A panel of float32 rows where they lie, if elements lie side by side: without a launch; else a copy.
inline int take_floats(Panel& panel, Carver& carver, const PackArgs& p, void* stream) {
  if (p.dtype != DType::f32 || p.column_stride != 1) return take_panel(panel, carver, p, p.rows, p.columns, stream);
  panel = {const_cast<float*>(static_cast<const float*>(p.source)), p.row_stride, p.stride0};  // is only read
  return 0;
}

// theta (Hd)(T, P) and step (Hd)(1, T) as operands.
inline PackArgs theta_operand(const Decoder& d) {
  PackArgs theta = operand(d.theta, d.heads, 1, d.layers, d.coefficients);
  theta.row_stride = d.theta.stride[1];
  return theta;
}
inline PackArgs step_operand(const Decoder& d) { return operand(d.step, d.heads, 1, 1, d.layers); }

// The whole decoder; thresholds and steps in float32.
inline int take_decoder(DecoderWeights& w, const Decoder& d, DType dtype, Carver& carver, void* stream) {
  CSAT_TRY(take_matrices(w, d, dtype, carver, stream));
  CSAT_TRY(take_floats(w.theta, carver, theta_operand(d), stream));
  return take_floats(w.step, carver, step_operand(d), stream);
}

}  // namespace csat
