// project_implicit: y = Phi x along the tokens, Phi never in memory, and its gradient dx = Phi^T dy. Each ensemble
// makes the rows of its Phi where they are used: signs a tile at a time, a Hadamard transform in place of the product,
// weights from the borders of segments.
#include <algorithm>
#include <cmath>
#include <vector>

#include "csat/ensembles.h"
#include "torch/checks.h"
#include "torch/cpu/gemm.h"
#include "torch/cpu/kernels.h"

namespace csat::cpu {
namespace {

constexpr int64_t kTokens = 256;  // tokens of a tile
constexpr int64_t kRows = 128;    // measurements of a tile
constexpr int64_t kShare = 8;     // (batch element, head) pairs that a tile of signs serves

// Which tokens are measured, from running counts: token s is kept where counts[s + 1] > counts[s], and is then number
// counts[s] of the kept ones. Without counts all are.
class Places {
 public:
  Places(const MaybeTensor& counts, int64_t tokens) : tokens_(tokens) {
    if (!counts) return;
    data_ = static_cast<const int32_t*>(counts->const_data_ptr());
    batch_ = counts->size(0) == 1 ? 0 : counts->stride(0);
    token_ = counts->stride(1);
  }
  bool all() const { return data_ == nullptr; }
  // How many of the first s tokens are kept.
  int64_t before(int64_t b, int64_t s) const { return all() ? s : data_[b * batch_ + s * token_]; }
  bool kept(int64_t b, int64_t s) const { return all() || before(b, s + 1) > before(b, s); }
  int64_t total(int64_t b) const { return before(b, tokens_); }
  // The first token whose place is p or more.
  int64_t find(int64_t b, int64_t p) const {
    if (all()) return p;
    int64_t low = 0, high = tokens_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (before(b, middle + 1) > p)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

 private:
  const int32_t* data_ = nullptr;
  int64_t tokens_, batch_ = 0, token_ = 0;
};

struct Task {
  ImplicitSizes n;
  Ensemble ensemble;
  Places places;
  RandomKey key;  // its head is set where one is known

  RandomKey key_of(int64_t head) const { return {key.low, key.high, static_cast<uint32_t>(head), key.layer}; }
  int64_t group() const { return n.Hout / n.Hx; }
  int64_t phi_head(int64_t h) const { return n.Hp == 1 ? 0 : h; }
  double signed_scale(int64_t b) const { return 1 / std::sqrt(std::max<double>(1, places.total(b))); }
};

template <class R>
void clear_masked(const Task& t, int64_t b, int64_t first, int64_t count, Block<R> rows) {
  if (t.places.all()) return;
  for (int64_t i = 0; i < count; ++i)
    if (!t.places.kept(b, first + i)) std::fill_n(rows.row(i), t.n.D, R(0));
}

template <class R>
void scale_rows(Block<R> block, int64_t rows, int64_t columns, double factor) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns; ++c) block.row(i)[c] *= static_cast<R>(factor);
}

// ---- rademacher

// The (batch element, head) pairs that share the signs of phi head hp: every head where Phi has one, else those of one
// head. `heads` counts the heads of the tensor that the pairs index (x, y or dx).
struct Pairs {
  int64_t batch, heads, head;  // head < 0: all of them
  int64_t count() const { return head < 0 ? batch * heads : batch; }
  int64_t b(int64_t q) const { return head < 0 ? q / heads : q; }
  int64_t h(int64_t q) const { return head < 0 ? q % heads : head; }
};

template <class R>
void signs_forward(const Task& t, const Array& x, const Array& y) {
  const ImplicitSizes& n = t.n;
  const auto pairs_of = [&](int64_t hp) { return Pairs{n.B, n.Hout, n.Hp == 1 ? -1 : hp}; };
  const int64_t row_tiles = divide_up(n.M, kRows), shares = divide_up(pairs_of(0).count(), kShare);
  parallel(n.Hp * row_tiles * shares, std::min(n.M, kRows) * n.N * n.D, [&](int64_t first, int64_t last) {
    Stack<R> tokens(1, kTokens, n.D), signs(1, kRows, kTokens), sum(kShare, kRows, n.D);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t share = unit % shares * kShare, row = unit / shares % row_tiles * kRows;
      const int64_t hp = unit / shares / row_tiles, rows = std::min(kRows, n.M - row);
      const Pairs pairs = pairs_of(hp);
      const int64_t end = std::min(share + kShare, pairs.count());
      for (int64_t q = share; q < end; ++q) clear(sum[q - share], rows, n.D);
      for (int64_t s = 0; s < n.N; s += kTokens) {
        const int64_t count = std::min(kTokens, n.N - s);
        micro_kernels<R>().signs(t.key_of(hp), row, rows, s, count, signs.data(), signs.ld());
        for (int64_t q = share; q < end; ++q) {
          load(x.matrix(pairs.b(q), pairs.h(q) / t.group(), s), count, n.D, tokens[0]);
          clear_masked(t, pairs.b(q), s, count, tokens[0]);
          multiply_add(rows, n.D, count, as_is(signs[0]), tokens[0], sum[q - share]);
        }
      }
      for (int64_t q = share; q < end; ++q) {
        scale_rows(sum[q - share], rows, n.D, t.signed_scale(pairs.b(q)));
        store(sum[q - share], rows, n.D, y.matrix(pairs.b(q), pairs.h(q), n.A + row));
      }
    }
  });
}

template <class R>
void signs_backward(const Task& t, const Array& dy, const Array& dx) {
  const ImplicitSizes& n = t.n;
  const auto pairs_of = [&](int64_t hx) { return Pairs{n.B, n.Hx, n.Hp == 1 ? -1 : hx}; };
  const int64_t owners = n.Hp == 1 ? 1 : n.Hx, tiles = divide_up(n.N, kRows);
  const int64_t shares = divide_up(pairs_of(0).count(), kShare), group = n.Hp == 1 ? 1 : t.group();
  parallel(owners * tiles * shares, kRows * n.M * n.D * group, [&](int64_t first, int64_t last) {
    Stack<R> grad(1, kRows, n.D), signs(1, kRows, kRows), sum(kShare, kRows, n.D);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t share = unit % shares * kShare, s = unit / shares % tiles * kRows, owner = unit / shares / tiles;
      const int64_t count = std::min(kRows, n.N - s);
      const Pairs pairs = pairs_of(owner);
      const int64_t end = std::min(share + kShare, pairs.count());
      for (int64_t q = share; q < end; ++q) clear(sum[q - share], count, n.D);
      for (int64_t g = 0; g < group; ++g) {
        for (int64_t row = 0; row < n.M; row += kRows) {
          const int64_t rows = std::min(kRows, n.M - row), hp = t.phi_head(owner * group + g);
          micro_kernels<R>().signs(t.key_of(hp), row, rows, s, count, signs.data(), signs.ld());
          for (int64_t q = share; q < end; ++q) {
            load(dy.matrix(pairs.b(q), pairs.h(q) * group + g, n.A + row), rows, n.D, grad[0]);
            multiply_add(count, n.D, rows, transposed(signs[0]), grad[0], sum[q - share]);
          }
        }
      }
      for (int64_t q = share; q < end; ++q) {
        scale_rows(sum[q - share], count, n.D, t.signed_scale(pairs.b(q)));
        clear_masked(t, pairs.b(q), s, count, sum[q - share]);
        store(sum[q - share], count, n.D, dx.matrix(pairs.b(q), pairs.h(q), s));
      }
    }
  });
}

// ---- anchors: one-hot rows, in front of the others

class Anchors {
 public:
  explicit Anchors(const MaybeTensor& anchors) {
    if (!anchors || anchors->numel() == 0) return;
    data_ = static_cast<const int32_t*>(anchors->const_data_ptr());
    batch_ = anchors->size(0) == 1 ? 0 : anchors->stride(0);
    row_ = anchors->stride(1);
  }
  // The token of row a, -1 where there is none.
  int64_t at(int64_t b, int64_t a, int64_t tokens) const {
    const int64_t s = data_[b * batch_ + a * row_];
    return s < tokens ? s : -1;
  }

 private:
  const int32_t* data_ = nullptr;
  int64_t batch_ = 0, row_ = 0;
};

template <class R>
void anchors_forward(const ImplicitSizes& n, const Anchors& anchors, const Array& x, const Array& y) {
  Stack<R> row(1, 1, n.D);
  for (int64_t b = 0; b < n.B; ++b)
    for (int64_t h = 0; h < n.Hout; ++h)
      for (int64_t a = 0; a < n.A; ++a) {
        const int64_t s = anchors.at(b, a, n.N);
        clear(row[0], 1, n.D);
        if (s >= 0) load(x.matrix(b, h / (n.Hout / n.Hx), s), 1, n.D, row[0]);
        store(row[0], 1, n.D, y.matrix(b, h, a));
      }
}

// An anchored token takes part in no other row.
template <class R>
void anchors_backward(const ImplicitSizes& n, const Anchors& anchors, const Array& dy, const Array& dx) {
  const int64_t group = n.Hout / n.Hx;
  Stack<R> row(1, 1, n.D), sum(1, 1, n.D);
  for (int64_t b = 0; b < n.B; ++b)
    for (int64_t hx = 0; hx < n.Hx; ++hx)
      for (int64_t a = 0; a < n.A; ++a) {
        const int64_t s = anchors.at(b, a, n.N);
        if (s < 0) continue;
        clear(sum[0], 1, n.D);
        for (int64_t h = hx * group; h < (hx + 1) * group; ++h) {
          load(dy.matrix(b, h, a), 1, n.D, row[0]);
          add(row[0], 1, n.D, sum[0]);
        }
        store(sum[0], 1, n.D, dx.matrix(b, hx, s));
      }
}

template <class R>
void forward(const Task& t, const Array& x, const Array& y) {
  switch (t.ensemble) {
    case Ensemble::rademacher:
      return signs_forward<R>(t, x, y);
    case Ensemble::srht:
    case Ensemble::pool:
      throw std::logic_error("not yet");
  }
}

template <class R>
void backward(const Task& t, const Array& dy, const Array& dx) {
  switch (t.ensemble) {
    case Ensemble::rademacher:
      return signs_backward<R>(t, dy, dx);
    case Ensemble::srht:
    case Ensemble::pool:
      throw std::logic_error("not yet");
  }
}

Task task(const ImplicitSizes& n, const MaybeTensor& counts, const std::string& ensemble, int64_t seed, int64_t layer) {
  const auto bits = static_cast<uint64_t>(seed);
  return {n,
          *ensemble_named(ensemble),
          Places(counts, n.N),
          {low_word(bits), high_word(bits), 0, static_cast<uint32_t>(layer)}};
}

}  // namespace

Tensor project_implicit(const Tensor& x, const MaybeTensor& counts, const MaybeTensor& anchors, std::string ensemble,
                        int64_t rows, int64_t heads, int64_t seed, int64_t layer) {
  const ImplicitSizes n = check_project_implicit("project_implicit", x, counts, anchors, ensemble, rows, heads, layer);
  Tensor y = torch::stable::new_empty(x, {n.B, n.Hout, n.A + n.M, n.D});
  if (y.numel() == 0) return y;
  with_accumulator(x, [&](auto zero) {
    forward<decltype(zero)>(task(n, counts, ensemble, seed, layer), Array(x), Array(y));
    anchors_forward<decltype(zero)>(n, Anchors(anchors), Array(x), Array(y));
  });
  return y;
}

Tensor project_implicit_backward(const Tensor& dy, const MaybeTensor& counts, const MaybeTensor& anchors,
                                 std::string ensemble, int64_t heads, int64_t seed, int64_t layer, int64_t x_heads,
                                 int64_t tokens) {
  const ImplicitSizes n = check_project_implicit_backward("project_implicit_backward", dy, counts, anchors, ensemble,
                                                          heads, layer, x_heads, tokens);
  Tensor dx = torch::stable::new_empty(dy, {n.B, n.Hx, n.N, n.D});
  if (dx.numel() == 0) return dx;
  with_accumulator(dy, [&](auto zero) {
    backward<decltype(zero)>(task(n, counts, ensemble, seed, layer), Array(dy), Array(dx));
    anchors_backward<decltype(zero)>(n, Anchors(anchors), Array(dy), Array(dx));
  });
  return dx;
}

}  // namespace csat::cpu
