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

struct Task {
  ImplicitSizes n;
  Ensemble ensemble;
  const int32_t* counts;  // (1 or B, N + 1) contiguous, or null
  int64_t counts_batch;
  RandomKey key;  // its head is set where one is known

  RandomKey key_of(int64_t head) const { return {key.low, key.high, static_cast<uint32_t>(head), key.layer}; }
  int64_t group() const { return n.Hout / n.Hx; }
  int64_t phi_head(int64_t h) const { return n.Hp == 1 ? 0 : h; }
  Places places(int64_t b) const { return {counts ? counts + b * counts_batch : nullptr, n.N}; }
  double signed_scale(int64_t b) const { return 1 / std::sqrt(std::max<double>(1, places(b).total())); }
};

template <class R>
void clear_masked(const Task& t, int64_t b, int64_t first, int64_t count, int64_t columns, Block<R> rows) {
  const Places places = t.places(b);
  for (int64_t i = 0; i < count; ++i)
    if (!places.kept(first + i)) std::fill_n(rows.row(i), columns, R(0));
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
          clear_masked(t, pairs.b(q), s, count, n.D, tokens[0]);
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
        clear_masked(t, pairs.b(q), s, count, n.D, sum[q - share]);
        store(sum[q - share], count, n.D, dx.matrix(pairs.b(q), pairs.h(q), s));
      }
    }
  });
}

// ---- srht

constexpr int64_t kTransform = 1024;  // tokens of one transform; what lies above its index is a sign of the whole block

// Columns c0 .. of a matrix.
template <class R>
View columns_from(View view, int64_t c0) {
  view.data = address(view.data, view.type, c0 * view.col);
  return view;
}

// rows (size, panel) = H rows, H (size, size) the Hadamard matrix (-1)^popcount(i & k), size a power of two.
template <class R>
void hadamard(int64_t size, Block<R> rows) {
  for (int64_t half = 1; half < size; half *= 2)
    for (int64_t i = 0; i < size; i += 2 * half)
      for (int64_t k = i; k < i + half; ++k) {
        R *a = rows.row(k), *b = rows.row(k + half);
        for (int64_t c = 0; c < kPanel<R>; ++c) {
          const R sum = a[c] + b[c], difference = a[c] - b[c];
          a[c] = sum;
          b[c] = difference;
        }
      }
}

// One panel of columns of one head. The Hadamard matrix of N is the product of one over blocks of tokens and one within
// them: the second is a fast transform, of the first only the rows that Phi has are summed.
struct Transform {
  int64_t size;
  explicit Transform(int64_t tokens) : size(1) {
    while (size < kTransform && size < tokens) size *= 2;
  }
  // Calls f(row of the measurement, row of the block's transform, its sign) for every measurement.
  template <class F>
  void for_each_row(const HadamardRows& rows, int64_t count, int64_t first_token, F f) const {
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t row = rows(j);
      f(j, static_cast<int64_t>(row & (size - 1)), parity(row & static_cast<uint32_t>(first_token)) != 0);
    }
  }
};

template <class R>
void hadamard_forward(const Task& t, const Array& x, const Array& y) {
  const ImplicitSizes& n = t.n;
  const Transform transform(n.N);
  const int64_t panels = divide_up(n.D, kPanel<R>);
  parallel(n.B * n.Hout * panels, n.N * 16 * kPanel<R>, [&](int64_t first, int64_t last) {
    Stack<R> block(1, transform.size, kPanel<R>), signs(1, 1, transform.size), sum(1, n.M, kPanel<R>);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t c0 = unit % panels * kPanel<R>, h = unit / panels % n.Hout, b = unit / panels / n.Hout;
      const int64_t columns = std::min(kPanel<R>, n.D - c0);
      const RandomKey key = t.key_of(t.phi_head(h));
      const HadamardRows rows = hadamard_rows(key);
      const Places places = t.places(b);
      clear(sum[0], n.M, kPanel<R>);
      for (int64_t s = 0; s < n.N; s += transform.size) {
        const int64_t count = std::min(transform.size, n.N - s);
        clear(block[0], transform.size, kPanel<R>);
        load(columns_from<R>(x.matrix(b, h / t.group(), s), c0), count, columns, block[0]);
        micro_kernels<R>().signs(key, 0, 1, s, count, signs.data(), signs.ld());
        for (int64_t i = 0; i < count; ++i)
          for (int64_t c = 0; c < columns; ++c)
            block[0].row(i)[c] = places.kept(s + i) ? block[0].row(i)[c] * signs.data()[i] : R(0);
        hadamard(transform.size, block[0]);
        transform.for_each_row(rows, n.M, s, [&](int64_t j, int64_t row, bool negative) {
          const R* from = block[0].row(row);
          R* to = sum[0].row(j);
          for (int64_t c = 0; c < kPanel<R>; ++c) to[c] += negative ? -from[c] : from[c];
        });
      }
      scale_rows(sum[0], n.M, columns, t.signed_scale(b));
      store(sum[0], n.M, columns, columns_from<R>(y.matrix(b, h, n.A), c0));
    }
  });
}

template <class R>
void hadamard_backward(const Task& t, const Array& dy, const Array& dx) {
  const ImplicitSizes& n = t.n;
  const Transform transform(n.N);
  const int64_t panels = divide_up(n.D, kPanel<R>), group = t.group();
  parallel(n.B * n.Hx * panels, n.N * 16 * kPanel<R> * group, [&](int64_t first, int64_t last) {
    Stack<R> block(1, transform.size, kPanel<R>), sum(1, transform.size, kPanel<R>), signs(1, 1, transform.size),
        grad(group, n.M, kPanel<R>);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t c0 = unit % panels * kPanel<R>, hx = unit / panels % n.Hx, b = unit / panels / n.Hx;
      const int64_t columns = std::min(kPanel<R>, n.D - c0);
      for (int64_t g = 0; g < group; ++g)
        load(columns_from<R>(dy.matrix(b, hx * group + g, n.A), c0), n.M, columns, grad[g]);
      for (int64_t s = 0; s < n.N; s += transform.size) {
        const int64_t count = std::min(transform.size, n.N - s);
        clear(sum[0], count, kPanel<R>);
        for (int64_t g = 0; g < group; ++g) {
          const RandomKey key = t.key_of(t.phi_head(hx * group + g));
          clear(block[0], transform.size, kPanel<R>);
          transform.for_each_row(hadamard_rows(key), n.M, s, [&](int64_t j, int64_t row, bool negative) {
            const R* from = grad[g].row(j);
            R* to = block[0].row(row);
            for (int64_t c = 0; c < kPanel<R>; ++c) to[c] += negative ? -from[c] : from[c];
          });
          hadamard(transform.size, block[0]);
          micro_kernels<R>().signs(key, 0, 1, s, count, signs.data(), signs.ld());
          for (int64_t i = 0; i < count; ++i)
            for (int64_t c = 0; c < kPanel<R>; ++c) sum[0].row(i)[c] += block[0].row(i)[c] * signs.data()[i];
        }
        scale_rows(sum[0], count, columns, t.signed_scale(b));
        clear_masked(t, b, s, count, columns, sum[0]);
        store(sum[0], count, columns, columns_from<R>(dx.matrix(b, hx, s), c0));
      }
    }
  });
}

// ---- pool

Segments segments_of(const Task& t, int64_t b, int64_t h) {
  return {t.n.M, t.n.Hp, t.phi_head(h), t.places(b).total()};
}

template <class R>
void add_scaled(R weight, const R* from, int64_t columns, R* to) {
  for (int64_t c = 0; c < columns; ++c) to[c] += weight * from[c];
}

template <class R>
void segments_forward(const Task& t, const Array& x, const Array& y) {
  const ImplicitSizes& n = t.n;
  const int64_t row_tiles = divide_up(n.M, kRows);
  parallel(n.B * n.Hout * row_tiles, divide_up(n.N, row_tiles) * n.D, [&](int64_t first, int64_t last) {
    Stack<R> tokens(1, kTokens, n.D), sum(1, kRows, n.D);
    std::vector<int64_t> kept;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t row = unit % row_tiles * kRows, h = unit / row_tiles % n.Hout, b = unit / row_tiles / n.Hout;
      const int64_t end = std::min(row + kRows, n.M);
      const Segments segments = segments_of(t, b, h);
      const Places places = t.places(b);
      const int64_t length = segments.unit(), last_place = divide_up(segments.edge(end), length);
      int64_t place = segments.edge(row) / length, s = places.token_at(place), j = row;
      clear(sum[0], end - row, n.D);
      while (place < last_place) {
        kept.clear();
        const int64_t wanted = std::min(kTokens, last_place - place);
        for (; s < n.N && static_cast<int64_t>(kept.size()) < wanted; ++s)
          if (places.kept(s)) kept.push_back(s);
        const auto count = static_cast<int64_t>(kept.size());
        if (count == 0) break;
        View view = x.matrix(b, h / t.group());
        view.row_index = kept.data();
        load(view, count, n.D, tokens[0]);
        for (int64_t i = 0; i < count; ++i, ++place) {
          while (j + 1 < end && segments.edge(j + 1) <= place * length) ++j;
          for (int64_t k = j; k < end && segments.edge(k) < (place + 1) * length; ++k)
            add_scaled(static_cast<R>(segments.overlap(place, k)) / static_cast<R>(length), tokens[0].row(i), n.D,
                       sum[0].row(k - row));
        }
      }
      for (int64_t k = row; k < end; ++k) {
        const int64_t mass = segments.edge(k + 1) - segments.edge(k);
        if (mass == 0) continue;
        const R factor = static_cast<R>(length) / static_cast<R>(mass);
        for (int64_t c = 0; c < n.D; ++c) sum[0].row(k - row)[c] *= factor;
      }
      store(sum[0], end - row, n.D, y.matrix(b, h, n.A + row));
    }
  });
}

template <class R>
void segments_backward(const Task& t, const Array& dy, const Array& dx) {
  const ImplicitSizes& n = t.n;
  const int64_t tiles = divide_up(n.N, kRows), group = t.group();
  parallel(n.B * n.Hx * tiles, kRows * n.D * group, [&](int64_t first, int64_t last) {
    Stack<R> sum(1, kRows, n.D), grad(1, 2, n.D);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t s = unit % tiles * kRows, hx = unit / tiles % n.Hx, b = unit / tiles / n.Hx;
      const int64_t count = std::min(kRows, n.N - s);
      const Places places = t.places(b);
      clear(sum[0], count, n.D);
      for (int64_t h = hx * group; h < (hx + 1) * group; ++h) {
        const Segments segments = segments_of(t, b, h);
        int64_t loaded[2] = {-1, -1};  // two rows of dy at a time: a token lies on a border of two segments at most
        for (int64_t i = 0; i < count; ++i) {
          if (!places.kept(s + i)) continue;
          const int64_t place = places.before(s + i), right = (place + 1) * segments.unit();
          for (int64_t j = segments.at(place); j < n.M && segments.edge(j) < right; ++j) {
            if (loaded[j % 2] != j) load(dy.matrix(b, h, n.A + j), 1, n.D, Block<R>{grad[0].row(j % 2), grad.ld()});
            loaded[j % 2] = j;
            const int64_t mass = segments.edge(j + 1) - segments.edge(j);
            add_scaled(static_cast<R>(segments.overlap(place, j)) / static_cast<R>(mass), grad[0].row(j % 2), n.D,
                       sum[0].row(i));
          }
        }
      }
      store(sum[0], count, n.D, dx.matrix(b, hx, s));
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
      return hadamard_forward<R>(t, x, y);
    case Ensemble::pool:
      return segments_forward<R>(t, x, y);
  }
}

template <class R>
void backward(const Task& t, const Array& dy, const Array& dx) {
  switch (t.ensemble) {
    case Ensemble::rademacher:
      return signs_backward<R>(t, dy, dx);
    case Ensemble::srht:
      return hadamard_backward<R>(t, dy, dx);
    case Ensemble::pool:
      return segments_backward<R>(t, dy, dx);
  }
}

MaybeTensor contiguous(const MaybeTensor& t) { return t ? MaybeTensor(torch::stable::contiguous(*t)) : MaybeTensor(); }

// `counts` contiguous.
Task task(const ImplicitSizes& n, const MaybeTensor& counts, const std::string& ensemble, int64_t seed, int64_t layer) {
  const auto bits = static_cast<uint64_t>(seed);
  const RandomKey key{low_word(bits), high_word(bits), 0, static_cast<uint32_t>(layer)};
  if (!counts) return {n, *ensemble_named(ensemble), nullptr, 0, key};
  return {n, *ensemble_named(ensemble), static_cast<const int32_t*>(counts->const_data_ptr()),
          counts->size(0) == 1 ? 0 : n.N + 1, key};
}

}  // namespace

Tensor project_implicit(const Tensor& x, const MaybeTensor& counts, const MaybeTensor& anchors, std::string ensemble,
                        int64_t rows, int64_t heads, int64_t seed, int64_t layer) {
  const ImplicitSizes n = check_project_implicit("project_implicit", x, counts, anchors, ensemble, rows, heads, layer);
  Tensor y = torch::stable::new_empty(x, {n.B, n.Hout, n.A + n.M, n.D});
  if (y.numel() == 0) return y;
  const MaybeTensor places = contiguous(counts);
  with_accumulator(x, [&](auto zero) {
    forward<decltype(zero)>(task(n, places, ensemble, seed, layer), Array(x), Array(y));
    anchors_forward<decltype(zero)>(n, Anchors(anchors), Array(x), Array(y));
  });
  return y;
}

Tensor project_implicit_backward(const Tensor& dy, const MaybeTensor& counts, const MaybeTensor& anchors,
                                 std::string ensemble, int64_t heads, int64_t seed, int64_t layer, int64_t x_heads,
                                 int64_t tokens) {
  const ImplicitSizes n = check_project_implicit_backward("project_implicit_backward", dy, counts, anchors, ensemble,
                                                          heads, layer, x_heads, tokens);
  Tensor dx = new_token_rows(dy, n.B, n.Hx, n.N, n.D);
  if (dx.numel() == 0) return dx;
  const MaybeTensor places = contiguous(counts);
  with_accumulator(dy, [&](auto zero) {
    backward<decltype(zero)>(task(n, places, ensemble, seed, layer), Array(dy), Array(dx));
    anchors_backward<decltype(zero)>(n, Anchors(anchors), Array(dy), Array(dx));
  });
  return dx;
}

}  // namespace csat::cpu
