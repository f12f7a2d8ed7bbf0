// softmax(scale q kc^T + bias) vc for tiles of query rows, and what the backward passes share.
#pragma once

#include <cmath>

#include "torch/checks.h"
#include "torch/cpu/gemm.h"

namespace csat::cpu {

// A score bias, (1 or B, 1 or H, M), in the accumulation type: zeros where there is none, -inf in the padding.
template <class R>
struct BiasRows {
  int64_t B, H;  // 0 without a bias
  Stack<R> rows;

  BiasRows(const std::optional<Tensor>& score_bias, int64_t B, int64_t H, int64_t M)
      : B(B), H(H), rows(std::max<int64_t>(B * H, 1), 1, M) {
    for (int64_t i = 0; i < std::max<int64_t>(B * H, 1); ++i) {
      if (score_bias && score_bias->numel() > 0) load(Array(*score_bias).row(i / H, i % H), 1, M, rows[i]);
      std::fill(rows[i].data + M, rows[i].data + padded<R>(M), -std::numeric_limits<R>::infinity());
    }
  }
  const R* of(int64_t b, int64_t h) const {
    if (B == 0) return rows[0].data;
    return rows[(B == 1 ? 0 : b) * H + (H == 1 ? 0 : h)].data;
  }
};

// Keys, values and bias in the accumulation type, loaded once per call and shared by all row tiles.
template <class R>
struct AttendOperands {
  AttendSizes n;
  R scale;
  Stack<R> keys_t;  // (D, M) per (batch, key head)
  Stack<R> values;  // (M, R)
  BiasRows<R> bias;

  AttendOperands(const AttendSizes& n, const Tensor& kc, const Tensor& vc, const std::optional<Tensor>& score_bias,
                 double scale)
      : n(n),
        scale(static_cast<R>(scale)),
        keys_t(n.B * n.Hk, n.D, n.M),
        values(n.B * n.Hk, n.M, n.R),
        bias(score_bias, n.Bb, n.Hb, n.M) {
    const Array keys_array(kc), values_array(vc);
    parallel(n.B * n.Hk, n.M * (n.D + n.R), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        load(keys_array.matrix(i / n.Hk, i % n.Hk).transposed(), n.D, n.M, keys_t[i]);
        load(values_array.matrix(i / n.Hk, i % n.Hk), n.M, n.R, values[i]);
      }
    });
  }
  int64_t key_index(int64_t b, int64_t h) const { return b * n.Hk + h / (n.H / n.Hk); }
};

// Query rows of one forward tile, a multiple of the 6 and 12 of a product's; few, so that their scores stay in L1.
constexpr int64_t kAttendRows = 48;

// Rows of sums over exp(s - max) v, each divided by its sum over exp(s - max).
template <class R>
void divide_rows(int64_t rows, int64_t columns, const R* sums, Block<R> z) {
  for (int64_t i = 0; i < rows; ++i) {
    if (sums[i] == R(0)) {  // nothing to look at, whatever the values are
      std::fill_n(z.row(i), columns, R(0));
    } else {
      const R inverse = R(1) / sums[i];
      for (int64_t j = 0; j < columns; ++j) z.row(i)[j] *= inverse;
    }
  }
}

// z (rows, R) and lse of one tile of query rows; `scores` is scratch of (rows, M).
template <class R>
void attend_tile(const AttendOperands<R>& operands, int64_t b, int64_t h, int64_t rows, Block<R> q, Block<R> scores,
                 Block<R> z, R* lse) {
  const AttendSizes& n = operands.n;
  const int64_t key = operands.key_index(b, h);
  const R* bias = operands.bias.of(b, h);
  R sums[kAttendRows];
  multiply(rows, n.M, n.D, as_is(q), operands.keys_t[key], scores);
  for (int64_t i = 0; i < rows; ++i) {
    R max, sum;
    micro_kernels<R>().exponentiate_row(scores.row(i), bias, operands.scale, padded<R>(n.M), &max, &sum);
    sums[i] = sum;
    lse[i] = sum == R(0) ? -std::numeric_limits<R>::infinity() : max + std::log(sum);
  }
  multiply(rows, n.R, n.M, as_is(scores), operands.values[key], z);
  divide_rows(rows, n.R, sums, z);
}

// The other orientation of keys and values, which gradients take.
template <class R>
struct AttendTransposes {
  Stack<R> keys, values_t;  // (M, D), (R, M) per (batch, key head)

  AttendTransposes(const AttendSizes& n, const Tensor& kc, const Tensor& vc)
      : keys(n.B * n.Hk, n.M, n.D), values_t(n.B * n.Hk, n.R, n.M) {
    const Array keys_array(kc), values_array(vc);
    parallel(n.B * n.Hk, n.M * (n.D + n.R), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        load(keys_array.matrix(i / n.Hk, i % n.Hk), n.M, n.D, keys[i]);
        load(values_array.matrix(i / n.Hk, i % n.Hk).transposed(), n.R, n.M, values_t[i]);
      }
    });
  }
};

// Gradients of one head's keys, values and bias, summed over a group of row tiles.
template <class R>
struct KeyGradients {
  Stack<R> keys, values, bias;
  KeyGradients(const AttendSizes& n, int64_t count)
      : keys(count, n.M, n.D), values(count, n.M, n.R), bias(count, 1, n.M) {}
};

// dkc, dvc and dbias from the sums of all groups of all heads, in their order.
template <class R>
void add_groups(const AttendSizes& n, int64_t groups, const KeyGradients<R>& partial, const Array& dkc,
                const Array& dvc, const Tensor* dbias) {
  const int64_t heads_per_key = n.H / n.Hk;
  parallel(n.B * n.Hk, heads_per_key * groups * n.M * (n.D + n.R), [&](int64_t first, int64_t last) {
    for (int64_t key = first; key < last; ++key) {
      const int64_t b = key / n.Hk, hk = key % n.Hk, slot = (b * n.H + hk * heads_per_key) * groups;
      for (int64_t i = 1; i < heads_per_key * groups; ++i) {
        add(partial.keys[slot + i], n.M, n.D, partial.keys[slot]);
        add(partial.values[slot + i], n.M, n.R, partial.values[slot]);
      }
      store(partial.keys[slot], n.M, n.D, dkc.matrix(b, hk));
      store(partial.values[slot], n.M, n.R, dvc.matrix(b, hk));
    }
  });
  if (!dbias) return;
  const Array dbias_array(*dbias);
  for (int64_t head = 0; head < n.B * n.H; ++head) {
    const int64_t slot = head * groups;
    for (int64_t i = 1; i < groups; ++i) add(partial.bias[slot + i], 1, n.M, partial.bias[slot]);
    store(partial.bias[slot], 1, n.M, dbias_array.row(head / n.H, head % n.H));
  }
}

}  // namespace csat::cpu
