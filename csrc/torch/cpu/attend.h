// softmax(scale q kc^T + bias) vc for tiles of query rows.
#pragma once

#include <cmath>

#include "torch/checks.h"
#include "torch/cpu/gemm.h"

namespace csat::cpu {

// Keys, values and bias in the accumulation type, loaded once per call and shared by all row tiles.
template <class R>
struct AttendOperands {
  AttendSizes n;
  R scale;
  Stack<R> keys_t;  // (D, M) per (batch, key head)
  Stack<R> values;  // (M, R)
  Stack<R> bias;    // one row of M, -inf in the padding

  AttendOperands(const AttendSizes& n, const Tensor& kc, const Tensor& vc, const std::optional<Tensor>& score_bias,
                 double scale)
      : n(n),
        scale(static_cast<R>(scale)),
        keys_t(n.B * n.Hk, n.D, n.M),
        values(n.B * n.Hk, n.M, n.R),
        bias(std::max<int64_t>(n.Bb * n.Hb, 1), 1, n.M) {
    const Array keys_array(kc), values_array(vc);
    parallel(n.B * n.Hk, n.M * (n.D + n.R), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        load(keys_array.matrix(i / n.Hk, i % n.Hk).transposed(), n.D, n.M, keys_t[i]);
        load(values_array.matrix(i / n.Hk, i % n.Hk), n.M, n.R, values[i]);
      }
    });
    for (int64_t i = 0; i < std::max<int64_t>(n.Bb * n.Hb, 1); ++i) {
      if (score_bias && score_bias->numel() > 0) load(Array(*score_bias).row(i / n.Hb, i % n.Hb), 1, n.M, bias[i]);
      std::fill(bias[i].data + n.M, bias[i].data + padded<R>(n.M), -std::numeric_limits<R>::infinity());
    }
  }
  int64_t key_index(int64_t b, int64_t h) const { return b * n.Hk + h / (n.H / n.Hk); }
  const R* bias_row(int64_t b, int64_t h) const {
    if (n.Bb == 0) return bias[0].data;
    return bias[(n.Bb == 1 ? 0 : b) * n.Hb + (n.Hb == 1 ? 0 : h)].data;
  }
};

constexpr int64_t kAttendRows = 96;  // query rows of one forward tile, a multiple of the micro kernel's 6

// z (rows, R) and lse of one tile of query rows; `scores` is scratch of (rows, M).
template <class R>
void attend_tile(const AttendOperands<R>& operands, int64_t b, int64_t h, int64_t rows, Block<R> q, Block<R> scores,
                 Block<R> z, R* lse) {
  const AttendSizes& n = operands.n;
  const int64_t key = operands.key_index(b, h);
  const R* bias = operands.bias_row(b, h);
  R sums[kAttendRows];
  multiply(rows, n.M, n.D, as_is(q), operands.keys_t[key], scores);
  for (int64_t i = 0; i < rows; ++i) {
    R max, sum;
    micro_kernels<R>().exponentiate_row(scores.row(i), bias, operands.scale, padded<R>(n.M), &max, &sum);
    sums[i] = sum;
    lse[i] = sum == R(0) ? -std::numeric_limits<R>::infinity() : max + std::log(sum);
  }
  multiply(rows, n.R, n.M, as_is(scores), operands.values[key], z);
  for (int64_t i = 0; i < rows; ++i) {
    if (sums[i] == R(0)) {  // no measurement to look at, whatever the values are
      std::fill_n(z.row(i), n.R, R(0));
    } else {
      const R inverse = R(1) / sums[i];
      for (int64_t j = 0; j < n.R; ++j) z.row(i)[j] *= inverse;
    }
  }
}

}  // namespace csat::cpu
