// attend and its backward pass. Saved from the forward pass are z and the log-sum-exp of each row; probabilities are
// recomputed per row tile: P = exp(scale q kc^T + bias - lse), dP = dz vc^T, ds = P * (dP - rowsum(P * dP)),
// dvc = P^T dz, dq = scale ds kc, dkc = scale ds^T q, dbias = colsum(ds).
#include "torch/cpu/attend.h"

#include "torch/cpu/kernels.h"

namespace csat::cpu {
namespace {

constexpr int64_t kBackwardRows = 48;  // the backward tile holds two score blocks

template <class R>
void forward(const AttendOperands<R>& operands, const Array& q, const Array& z, R* lse) {
  const AttendSizes& n = operands.n;
  const int64_t tiles = divide_up(n.Nq, kAttendRows);
  parallel(n.B * n.H * tiles, kAttendRows * n.M * (n.D + n.R), [&](int64_t first, int64_t last) {
    Stack<R> queries(1, kAttendRows, n.D), scores(1, kAttendRows, n.M), out(1, kAttendRows, n.R);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t row = unit % tiles * kAttendRows, head = unit / tiles, b = head / n.H, h = head % n.H;
      const int64_t rows = std::min(kAttendRows, n.Nq - row);
      const View target = z.matrix(b, h, row);
      const Block<R> left = left_factor(q.matrix(b, h, row), rows, n.D, queries[0]), sum = sum_of(target, n.R, out[0]);
      attend_tile(operands, b, h, rows, left, scores[0], sum, lse + head * n.Nq + row);
      store(sum, rows, n.R, target);
    }
  });
}

template <class R>
struct BackwardTile {
  Stack<R> q, dz, dq, probabilities, dscores;
  explicit BackwardTile(const AttendSizes& n)
      : q(1, kBackwardRows, n.D),
        dz(1, kBackwardRows, n.R),
        dq(1, kBackwardRows, n.D),
        probabilities(1, kBackwardRows, n.M),
        dscores(1, kBackwardRows, n.M) {}
};

// Turns the q and dz of a tile into dq and adds to the gradients of keys, values and bias.
template <class R>
void backward_tile(const AttendOperands<R>& operands, Block<R> keys, Block<R> values_t, const R* bias, Block<R> keys_t,
                   int64_t rows, const R* lse, Block<R> q, Block<R> dz, const BackwardTile<R>& tile, Block<R> dq,
                   const KeyGradients<R>& sum, int64_t slot) {
  const AttendSizes& n = operands.n;
  const Block<R> p = tile.probabilities[0], ds = tile.dscores[0];
  multiply(rows, n.M, n.D, as_is(q), keys_t, p);
  multiply(rows, n.M, n.R, as_is(dz), values_t, ds);
  R* dbias = sum.bias[slot].data;
  for (int64_t i = 0; i < rows; ++i) {
    if (lse[i] == -std::numeric_limits<R>::infinity()) {  // an empty row: z = 0 whatever the inputs are
      std::fill_n(p.row(i), n.M, R(0));
      std::fill_n(ds.row(i), n.M, R(0));
      continue;
    }
    micro_kernels<R>().probability_row(p.row(i), bias, operands.scale, lse[i], padded<R>(n.M));
    micro_kernels<R>().score_gradient_row(p.row(i), operands.scale, padded<R>(n.M), ds.row(i), dbias);
  }
  multiply(rows, n.D, n.M, as_is(ds), keys, dq);
  multiply_add(n.M, n.D, rows, transposed(ds), q, sum.keys[slot]);
  multiply_add(n.M, n.R, rows, transposed(p), dz, sum.values[slot]);
}

struct BackwardArrays {
  Array dz, q, dq, dkc, dvc;
};

template <class R>
void backward(const AttendOperands<R>& operands, const Tensor& kc, const Tensor& vc, const BackwardArrays& arrays,
              const Array& lse, const Tensor* dbias) {
  const AttendSizes& n = operands.n;
  const Groups groups(divide_up(n.Nq, kBackwardRows), n.B * n.H);
  const AttendTransposes<R> transposes(n, kc, vc);
  const KeyGradients<R> partial(n, n.B * n.H * groups.count);
  const int64_t rows_per_group = divide_up(n.Nq, groups.count);
  parallel(n.B * n.H * groups.count, rows_per_group * n.M * (n.D + n.R) * 3, [&](int64_t first, int64_t last) {
    const BackwardTile<R> tile(n);
    Stack<R> row_lse(1, 1, kBackwardRows);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t group = unit % groups.count, head = unit / groups.count, b = head / n.H, h = head % n.H;
      const int64_t key = operands.key_index(b, h);
      for (int64_t item = groups.begin(group); item < groups.end(group); ++item) {
        const int64_t row = item * kBackwardRows, rows = std::min(kBackwardRows, n.Nq - row);
        const View target = arrays.dq.matrix(b, h, row);
        const Block<R> q = right_factor(arrays.q.matrix(b, h, row), rows, n.D, tile.q[0]);
        const Block<R> dz = right_factor(arrays.dz.matrix(b, h, row), rows, n.R, tile.dz[0]);
        const Block<R> dq = sum_of(target, n.D, tile.dq[0]);
        View lse_view = lse.row(b, h);
        lse_view.data = address(lse_view.data, lse_view.type, row * lse_view.col);
        load(lse_view, 1, rows, row_lse[0]);
        backward_tile(operands, transposes.keys[key], transposes.values_t[key], operands.bias.of(b, h),
                      operands.keys_t[key], rows, row_lse[0].data, q, dz, tile, dq, partial, unit);
        store(dq, rows, n.D, target);
      }
    }
  });

  add_groups(n, groups.count, partial, arrays.dkc, arrays.dvc, dbias);
}

}  // namespace

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& kc, const Tensor& vc, const MaybeTensor& score_bias,
                                  double scale) {
  const AttendSizes n = check_attend("attend", q, kc, vc, score_bias, scale);
  Tensor z = new_rows(q, n.R);
  Tensor lse = torch::stable::new_empty(q, {n.B, n.H, n.Nq}, accumulate_dtype(q.scalar_type()));
  with_accumulator(q, [&](auto zero) {
    using R = decltype(zero);
    const AttendOperands<R> operands(n, kc, vc, score_bias, scale);
    forward<R>(operands, Array(q), Array(z), static_cast<R*>(lse.mutable_data_ptr()));
  });
  return {z, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(const Tensor& dz, const Tensor& q, const Tensor& kc,
                                                           const Tensor& vc, const MaybeTensor& score_bias,
                                                           const Tensor& z, const Tensor& lse, double scale) {
  const AttendSizes n = check_attend_backward("attend_backward", dz, q, kc, vc, score_bias, z, lse, scale);
  Tensor dq = new_rows(q, n.D);
  Tensor dkc = torch::stable::new_empty(kc, {n.B, n.Hk, n.M, n.D});
  Tensor dvc = torch::stable::new_empty(vc, {n.B, n.Hk, n.M, n.R});
  const ScalarType accumulate = accumulate_dtype(q.scalar_type());
  Tensor dbias = score_bias ? torch::stable::new_empty(q, {n.B, n.H, n.M}, accumulate)
                            : torch::stable::new_empty(q, {0}, accumulate);
  with_accumulator(q, [&](auto zero) {
    using R = decltype(zero);
    const AttendOperands<R> operands(n, kc, vc, score_bias, scale);
    const BackwardArrays arrays{Array(dz), Array(q), Array(dq), Array(dkc), Array(dvc)};
    backward<R>(operands, kc, vc, arrays, Array(lse), score_bias ? &dbias : nullptr);
  });
  return {dq, dkc, dvc, dbias};
}

}  // namespace csat::cpu
