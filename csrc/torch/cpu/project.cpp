// project: y = phi x along the tokens, and its two gradients dx = phi^T dy, dphi = sum over batch and heads of dy x^T;
// renormalise_rows: what a key mask makes of the rows of phi.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "torch/checks.h"
#include "torch/cpu/gemm.h"
#include "torch/cpu/kernels.h"

namespace csat::cpu {
namespace {

constexpr int64_t kTokens = 256;  // tokens summed in registers before a partial sum reaches memory
constexpr int64_t kRows = 128;    // measurements or tokens of one unit of work

// The heads of x and phi that meet in one output head.
struct Heads {
  int64_t x_group, phi_step;
  explicit Heads(const ProjectSizes& n) : x_group(n.Hout / n.Hx), phi_step(n.Hp == 1 ? 0 : 1) {}
  int64_t of_x(int64_t h) const { return h / x_group; }
  int64_t of_phi(int64_t h) const { return h * phi_step; }
};

class KeyMask {
 public:
  explicit KeyMask(const MaybeTensor& mask) {
    if (!mask || mask->numel() == 0) return;
    data_ = static_cast<const bool*>(mask->const_data_ptr());
    batch_ = mask->stride(0);
    token_ = mask->stride(1);
  }
  bool absent() const { return data_ == nullptr; }
  bool kept(int64_t b, int64_t s) const { return absent() || data_[b * batch_ + s * token_]; }
  // Tokens of [first, last) that are kept, in order.
  void gather(int64_t b, int64_t first, int64_t last, std::vector<int64_t>& tokens) const {
    tokens.clear();
    for (int64_t s = first; s < last; ++s)
      if (kept(b, s)) tokens.push_back(s);
  }

 private:
  const bool* data_ = nullptr;
  int64_t batch_ = 0, token_ = 0;
};

template <class R>
void forward(const ProjectSizes& n, const Array& x, const Array& phi, const KeyMask& mask, const Array& y) {
  const Heads heads(n);
  const int64_t row_tiles = divide_up(n.M, kRows);
  parallel(n.B * n.Hout * row_tiles, std::min(n.M, kRows) * n.N * n.D, [&](int64_t first, int64_t last) {
    Stack<R> tokens(1, kTokens, n.D), weights(1, kRows, kTokens), sum(1, kRows, n.D);
    std::vector<int64_t> kept;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t row = unit % row_tiles * kRows, h = unit / row_tiles % n.Hout, b = unit / row_tiles / n.Hout;
      const int64_t rows = std::min(kRows, n.M - row);
      const View target = y.matrix(b, h, row);
      const Block<R> total = sum_of(target, n.D, sum[0]);
      clear(total, rows, n.D);
      for (int64_t s = 0; s < n.N; s += kTokens) {
        int64_t count = std::min(kTokens, n.N - s);
        View x_view = x.matrix(b, heads.of_x(h), mask.absent() ? s : 0);
        View phi_view = phi.matrix(b, heads.of_phi(h), row);
        if (mask.absent()) {
          phi_view.data = address(phi_view.data, phi_view.type, s * phi_view.col);
        } else {
          mask.gather(b, s, s + count, kept);
          count = static_cast<int64_t>(kept.size());
          x_view.row_index = kept.data();
          phi_view.col_index = kept.data();
        }
        const Block<R> right = right_factor(x_view, count, n.D, tokens[0]);
        multiply_add(rows, n.D, count, as_is(left_factor(phi_view, rows, count, weights[0])), right, total);
      }
      store(total, rows, n.D, target);
    }
  });
}

template <class R>
void backward_x(const ProjectSizes& n, const Array& dy, const Array& phi, const KeyMask& mask, const Array& dx) {
  const Heads heads(n);
  const int64_t tiles = divide_up(n.N, kRows);
  parallel(n.B * n.Hx * tiles, kRows * n.M * n.D * heads.x_group, [&](int64_t first, int64_t last) {
    Stack<R> weights(1, kRows, kRows), grad(1, kRows, n.D), sum(1, kRows, n.D);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t s = unit % tiles * kRows, hx = unit / tiles % n.Hx, b = unit / tiles / n.Hx;
      const int64_t tokens = std::min(kRows, n.N - s);
      const View target = dx.matrix(b, hx, s);
      const Block<R> total = sum_of(target, n.D, sum[0]);
      clear(total, tokens, n.D);
      for (int64_t h = hx * heads.x_group; h < (hx + 1) * heads.x_group; ++h) {
        for (int64_t row = 0; row < n.M; row += kRows) {
          const int64_t rows = std::min(kRows, n.M - row);
          View phi_view = phi.matrix(b, heads.of_phi(h), row);
          phi_view.data = address(phi_view.data, phi_view.type, s * phi_view.col);
          load(phi_view, rows, tokens, weights[0]);  // read across: not in its place, where rows may share cache sets
          const Block<R> right = right_factor(dy.matrix(b, h, row), rows, n.D, grad[0]);
          multiply_add(tokens, n.D, rows, transposed(weights[0]), right, total);
        }
      }
      for (int64_t i = 0; i < tokens; ++i)
        if (!mask.kept(b, s + i)) std::fill_n(total.row(i), n.D, R(0));
      store(total, tokens, n.D, target);
    }
  });
}

// One unit owns a (rows, tokens) tile of dphi and sums over all batch elements and heads that share it, in order.
template <class R>
void backward_phi(const ProjectSizes& n, const Array& dy, const Array& x, const KeyMask& mask, const Array& dphi) {
  const Heads heads(n);
  const int64_t row_tiles = divide_up(n.M, kRows), token_tiles = divide_up(n.N, kTokens);
  const int64_t shared_batch = n.Bp == 1 ? n.B : 1, shared_heads = n.Hp == 1 ? n.Hout : 1;
  parallel(n.Bp * n.Hp * row_tiles * token_tiles, kRows * kTokens * n.D * shared_batch * shared_heads,
           [&](int64_t first, int64_t last) {
             Stack<R> tokens(1, n.D, kTokens), grad(1, kRows, n.D), sum(1, kRows, kTokens);
             for (int64_t unit = first; unit < last; ++unit) {
               int64_t index = unit;
               const int64_t s = index % token_tiles * kTokens;
               index /= token_tiles;
               const int64_t row = index % row_tiles * kRows;
               index /= row_tiles;
               const int64_t hp = index % n.Hp, bp = index / n.Hp;
               const int64_t rows = std::min(kRows, n.M - row), count = std::min(kTokens, n.N - s);
               clear(sum[0], rows, count);
               for (int64_t b = bp; b < bp + shared_batch; ++b) {
                 for (int64_t h = hp; h < hp + shared_heads; ++h) {
                   load(x.matrix(b, heads.of_x(h), s).transposed(), n.D, count, tokens[0]);
                   for (int64_t i = 0; i < count; ++i)
                     if (!mask.kept(b, s + i))
                       for (int64_t c = 0; c < n.D; ++c) tokens[0].row(c)[i] = R(0);
                   load(dy.matrix(b, h, row), rows, n.D, grad[0]);
                   multiply_add(rows, count, n.D, as_is(grad[0]), tokens[0], sum[0]);
                 }
               }
               View target = dphi.matrix(bp, hp, row);
               target.data = address(target.data, target.type, s * target.col);
               store(sum[0], rows, count, target);
             }
           });
}

// What the mask of batch element b makes of one row of Phi (launch.h has the rule). Sums are in float64.
struct RowFactors {
  double factor, mass = 0;
  template <class R>
  RowFactors(const R* row, double total, bool averages, const KeyMask& mask, int64_t b, int64_t tokens) {
    int64_t kept = 0, entries = 0;
    for (int64_t s = 0; s < tokens; ++s) {
      if (!mask.kept(b, s)) continue;
      mass += row[s];
      ++kept;
      entries += row[s] != R(0);
    }
    const bool empty = entries == 0;
    if (!averages || empty) mass = 0;
    factor = empty ? 0 : averages ? total / mass : std::sqrt(static_cast<double>(tokens) / static_cast<double>(kept));
  }
};

template <class R>
void renormalise(const RowsSizes& n, const Array& phi, const KeyMask& mask, R* factor, R* mass) {
  const int64_t masks = n.Bp == 1 ? n.B : 1;
  parallel(n.Bp * n.Hp * n.M, n.N * (1 + masks), [&](int64_t first, int64_t last) {
    Stack<R> row(1, 1, n.N);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t j = unit % n.M, h = unit / n.M % n.Hp, i = unit / n.M / n.Hp;
      load(phi.matrix(i, h, j), 1, n.N, row[0]);
      const R* entries = row[0].row(0);
      const double total = std::accumulate(entries, entries + n.N, 0.0);
      const bool averages = std::none_of(entries, entries + n.N, [](R value) { return value < R(0); });
      for (int64_t b = i; b < i + masks; ++b) {
        const RowFactors found(entries, total, averages, mask, b, n.N);
        const int64_t to = (b * n.Hp + h) * n.M + j;
        factor[to] = static_cast<R>(found.factor), mass[to] = static_cast<R>(found.mass);
      }
    }
  });
}

}  // namespace

Tensor project(const Tensor& x, const Tensor& phi, const MaybeTensor& key_mask) {
  const ProjectSizes n = check_project("project", x, phi, key_mask);
  Tensor y = torch::stable::new_empty(x, {n.B, n.Hout, n.M, n.D});
  with_accumulator(x,
                   [&](auto zero) { forward<decltype(zero)>(n, Array(x), Array(phi), KeyMask(key_mask), Array(y)); });
  return y;
}

std::tuple<Tensor, Tensor> project_backward(const Tensor& dy, const Tensor& x, const Tensor& phi,
                                            const MaybeTensor& key_mask, bool need_dx, bool need_dphi) {
  const ProjectSizes n = check_project_backward("project_backward", dy, x, phi, key_mask);
  Tensor dx = need_dx ? new_rows(x, n.D) : torch::stable::new_empty(x, {0});
  Tensor dphi = need_dphi ? torch::stable::new_empty(phi, {n.Bp, n.Hp, n.M, n.N}) : torch::stable::new_empty(phi, {0});
  with_accumulator(x, [&](auto zero) {
    using R = decltype(zero);
    if (need_dx) backward_x<R>(n, Array(dy), Array(phi), KeyMask(key_mask), Array(dx));
    if (need_dphi) backward_phi<R>(n, Array(dy), Array(x), KeyMask(key_mask), Array(dphi));
  });
  return {dx, dphi};
}

std::tuple<Tensor, Tensor> renormalise_rows(const Tensor& phi, const Tensor& key_mask) {
  const RowsSizes n = check_renormalise_rows("renormalise_rows", phi, key_mask);
  const ScalarType type = accumulate_dtype(phi.scalar_type());
  Tensor factor = torch::stable::new_empty(phi, {n.B, n.Hp, n.M}, type);
  Tensor mass = torch::stable::new_empty(phi, {n.B, n.Hp, n.M}, type);
  if (factor.numel() == 0) return {factor, mass};
  with_accumulator(phi, [&](auto zero) {
    using R = decltype(zero);
    renormalise<R>(n, Array(phi), KeyMask(key_mask), static_cast<R*>(factor.data_ptr()),
                   static_cast<R*>(mass.data_ptr()));
  });
  return {factor, mass};
}

}  // namespace csat::cpu
