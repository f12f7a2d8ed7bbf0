// How a launch function divides its workspace. Host code only.
#pragma once
#include "csat/limits.h"
#include "csat/panel.h"
#include "csat/tile.cuh"
#include "csat/tokens.h"

namespace csat {

// Workspaces are carved by the same code that sizes them: with a null base only `used` advances.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T = float>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return p;
  }
  int64_t used() const { return used_; }
  bool sizing() const { return !base_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Carves a panel for `count` = n0 n1 matrices and, with a real base, packs it. Strides and sizes come in `p`.
inline int take_panel(Panel& panel, Carver& carver, PackArgs p, int64_t panel_rows, int64_t pitch, void* stream) {
  p.panel_rows = panel_rows;
  p.pitch = pitch;
  p.panel = carver.take(p.n0 * p.n1 * panel_rows * pitch);
  panel = {p.panel, pitch, panel_rows * pitch};
  return carver.sizing() ? 0 : pack(p, stream);
}

// The operand (n0, n1, rows, columns) of a four-axis view; `transposed` swaps the last two.
inline PackArgs operand(const View& v, int64_t n0, int64_t n1, int64_t rows, int64_t columns) {
  return {v.data,  v.dtype,     n0,          n1,      v.stride[0], v.stride[1], rows,
          columns, v.stride[2], v.stride[3], nullptr, 0,           0,           0.f};
}
inline PackArgs transposed(PackArgs p) {
  const int64_t rows = p.rows, row_stride = p.row_stride;
  p.rows = p.columns;
  p.row_stride = p.column_stride;
  p.columns = rows;
  p.column_stride = row_stride;
  return p;
}

// The bias (B H)(1, M) of attend; -inf in the padding.
inline PackArgs bias_operand(const AttendParams& p) {
  PackArgs bias{p.bias.data, p.bias.dtype,   p.batch, p.heads,          p.bias.stride[0], p.bias.stride[1],
                1,           p.measurements, 0,       p.bias.stride[3], nullptr,          0,
                0,           -INFINITY};
  return bias;
}

// Do rows start at multiples of 16 bytes, apart, elements side by side, so that vector and tensor copies read them?
inline bool has_vector_rows(const View& v) {
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.stride[3] == 1 && v.stride[0] % 8 == 0 &&
         v.stride[1] % 8 == 0 && v.stride[2] % 8 == 0 && v.stride[2] > 0;
}
// `v` (n0, n1, rows, columns) in `dtype` with vector rows: `v` as it lies or a copy of it, whose rows are
// padded to a multiple of eight elements (vector copies fill up with zeros: the padding is never read). The source is
// float32 or of `dtype`. With `keep` (n0, rows) always a copy, in which the rows that are not kept are zeros, unread.
inline int take_vector_rows(View& v, Carver& carver, DType dtype, int64_t n0, int64_t n1, int64_t rows, int64_t columns,
                            void* stream, const unsigned char* keep = nullptr) {
  if (!keep && v.dtype == dtype && has_vector_rows(v)) return 0;
  const int64_t pitch = limits::round_up(columns, 8);
  View target{
      carver.take<char>(n0 * n1 * rows * pitch * size_of(dtype)), dtype, {n1 * rows * pitch, rows * pitch, pitch, 1}};
  const View source = v;
  v = target;
  return carver.sizing() ? 0 : copy_tokens({source, target, keep, n0, n1, rows, columns}, stream);
}

// 16-byte stores of rows of `columns` elements?
inline bool vector_stores(const View& v, int64_t columns) { return has_vector_rows(v) && columns % 8 == 0; }

// The bias (batch, heads, M) in axes 0, 1, 3 of the view in float32: as it lies or a copy.
inline int take_float_bias(View& bias, Carver& carver, int64_t batch, int64_t heads, int64_t measurements,
                           void* stream) {
  if (!bias.data || bias.dtype == DType::f32) return 0;
  PackArgs source = operand(bias, batch, heads, 1, measurements);
  source.row_stride = 0;
  Panel panel;
  const int code = take_panel(panel, carver, source, 1, measurements, stream);
  bias = {panel.data, DType::f32, {heads * panel.matrix, panel.matrix, 0, 1}};
  return code;
}

// k and v of the tokens with vector rows, and zeros in place of those that are not kept.
inline int take_token_rows(CausalTokens& tokens, Carver& carver, const AttendParams& of, void* stream) {
  const auto take = [&](View& v, int64_t columns) {
    return take_vector_rows(v, carver, of.q.dtype, of.batch, tokens.heads, tokens.count, columns, stream, tokens.keep);
  };
  const int code = take(tokens.k, of.head_dim);
  return code ? code : take(tokens.v, of.features);
}

// Evaluates to the first non-zero error code of a sequence of launches.
#define CSAT_TRY(expression)                        \
  do {                                              \
    if (const int code = (expression)) return code; \
  } while (0)

}  // namespace csat
