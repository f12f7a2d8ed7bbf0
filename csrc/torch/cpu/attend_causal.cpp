// attend_causal and its backward pass: per row tile, the scores of the measurements that its last row sees and, behind
// them, of the tokens from its first row's window on. Of both a row sees a range (csat/window.h); outside of it the
// bias is -inf. Otherwise as in attend.cpp: probabilities are recomputed from the saved log-sum-exp.
#include <vector>

#include "torch/cpu/attend.h"
#include "torch/cpu/kernels.h"

namespace csat::cpu {
namespace {

constexpr int64_t kBackwardRows = 48;

// Operands of both, masked tokens zero under a bias of -inf.
template <class R>
struct CausalOperands {
  CausalSizes n;
  AttendOperands<R> measured, tokens;

  CausalOperands(const CausalSizes& n, const Tensor& kc, const Tensor& vc, const Tensor& k, const Tensor& v,
                 const MaybeTensor& score_bias, const MaybeTensor& key_mask, double scale)
      : n(n), measured(n.measured, kc, vc, score_bias, scale), tokens(n.tokens, k, v, std::nullopt, scale) {
    for_each_masked(key_mask, n.tokens, [&](int64_t b, int64_t s) {
      for (int64_t h = 0; h < n.tokens.Hk; ++h) {
        const int64_t key = b * n.tokens.Hk + h;
        for (int64_t d = 0; d < n.tokens.D; ++d) tokens.keys_t[key].row(d)[s] = R(0);
        std::fill_n(tokens.values[key].row(s), n.tokens.R, R(0));
      }
      tokens.bias.rows[b].data[s] = -std::numeric_limits<R>::infinity();
    });
  }

  template <class F>
  static void for_each_masked(const MaybeTensor& key_mask, const AttendSizes& n, const F& f) {
    if (!key_mask || key_mask->numel() == 0) return;
    const bool* keep = static_cast<const bool*>(key_mask->data_ptr());
    for (int64_t b = 0; b < n.B; ++b)
      for (int64_t s = 0; s < n.M; ++s)
        if (!keep[b * key_mask->stride(0) + s * key_mask->stride(1)]) f(b, s);
  }
};

// Which columns the rows of a tile see: measurements 0 .., padded to `far` columns, then tokens low .. .
template <class R>
struct CausalTile {
  Range measurements, tokens;
  int64_t far, low, near;

  CausalTile(const CausalWindow& window, int64_t first, int64_t rows)
      : measurements(window.measurements_of(first + rows - 1)),
        tokens{window.tokens_of(first).begin, window.tokens_of(first + rows - 1).end},
        far(padded<R>(measurements.end)),
        low(tokens.begin / kPanel<R> * kPanel<R>),
        near(padded<R>(tokens.end - low)) {}
  // Columns that no tile of so many rows exceeds.
  static int64_t most(const CausalSizes& n, int64_t rows) { return padded<R>(n.measured.M) + most_near(n, rows); }
  static int64_t most_near(const CausalSizes& n, int64_t rows) {
    const int64_t reach = (n.window.blocks + 1) * n.window.block_size + rows;
    return std::min(padded<R>(reach) + kPanel<R>, padded<R>(n.tokens.M));
  }
};

// The bias of one row of a tile after the other. Ranges only move on, so that a row costs the columns it adds or drops.
template <class R>
class RowBias {
 public:
  RowBias(const CausalWindow& window, const CausalTile<R>& tile, const R* measured, const R* tokens, R* bias)
      : window_(window), tile_(tile), measured_(measured), tokens_(tokens), bias_(bias) {
    std::fill_n(bias, tile.far + tile.near, -std::numeric_limits<R>::infinity());
    seen_ = {0, 0};
    near_ = {tile.tokens.begin, tile.tokens.begin};
  }
  const R* advance(int64_t query) {
    const int64_t seen = window_.measurements_of(query).end;
    const Range near = window_.tokens_of(query);
    std::copy(measured_ + seen_.end, measured_ + seen, bias_ + seen_.end);
    R* column = bias_ + tile_.far - tile_.low;
    std::copy(tokens_ + near_.end, tokens_ + near.end, column + near_.end);
    std::fill(column + near_.begin, column + near.begin, -std::numeric_limits<R>::infinity());
    seen_.end = seen;
    near_ = near;
    return bias_;
  }

 private:
  const CausalWindow& window_;
  const CausalTile<R>& tile_;
  const R *measured_, *tokens_;
  R* bias_;
  Range seen_, near_;
};

template <class R>
Block<R> columns_from(Block<R> block, int64_t column) {
  return {block.data + column, block.ld};
}

template <class R>
void forward(const CausalOperands<R>& operands, const Array& q, const Array& z, R* lse) {
  const AttendSizes& n = operands.n.measured;
  const int64_t tiles = divide_up(n.Nq, kAttendRows), most = CausalTile<R>::most(operands.n, kAttendRows);
  parallel(n.B * n.H * tiles, kAttendRows * most * (n.D + n.R), [&](int64_t first, int64_t last) {
    Stack<R> queries(1, kAttendRows, n.D), scores(1, kAttendRows, most), out(1, kAttendRows, n.R), bias(1, 1, most);
    R sums[kAttendRows];
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t row = unit % tiles * kAttendRows, head = unit / tiles, b = head / n.H, h = head % n.H;
      const int64_t rows = std::min(kAttendRows, n.Nq - row);
      const CausalTile<R> tile(operands.n.window, row, rows);
      const int64_t measured = operands.measured.key_index(b, h), token = operands.tokens.key_index(b, h);
      const Block<R> far = scores[0], near = columns_from(far, tile.far);
      load(q.matrix(b, h, row), rows, n.D, queries[0]);
      multiply(rows, tile.far, n.D, as_is(queries[0]), operands.measured.keys_t[measured], far);
      multiply(rows, tile.near, n.D, as_is(queries[0]), columns_from(operands.tokens.keys_t[token], tile.low), near);
      RowBias<R> row_bias(operands.n.window, tile, operands.measured.bias.of(b, h), operands.tokens.bias.of(b, h),
                          bias[0].data);
      for (int64_t i = 0; i < rows; ++i) {
        R max;
        micro_kernels<R>().exponentiate_row(far.row(i), row_bias.advance(row + i), operands.measured.scale,
                                            tile.far + tile.near, &max, &sums[i]);
        lse[head * n.Nq + row + i] = sums[i] == R(0) ? -std::numeric_limits<R>::infinity() : max + std::log(sums[i]);
      }
      multiply(rows, n.R, tile.measurements.end, as_is(far), operands.measured.values[measured], out[0]);
      multiply_add(rows, n.R, tile.tokens.end - tile.low, as_is(near),
                   Block<R>{operands.tokens.values[token].row(tile.low), operands.tokens.values[token].ld}, out[0]);
      divide_rows(rows, n.R, sums, out[0]);
      store(out[0], rows, n.R, z.matrix(b, h, row));
    }
  });
}

constexpr int64_t kFewQueries = 8, kFewColumns = 256;

// The same for a few queries, as in decoding: keys and values pass once, by chunks that stay in the cache, where
// CausalOperands would lay all of them out for row tiles that never come.
template <class R>
class FewQueries {
 public:
  FewQueries(const CausalSizes& n, const MaybeTensor& score_bias, const MaybeTensor& key_mask, double scale)
      : n_(n), scale_(static_cast<R>(scale)), bias_(score_bias), keep_(key_mask) {}

  void forward(const Array& q, const Array& kc, const Array& vc, const Array& k, const Array& v, const Array& z,
               R* lse) const {
    const AttendSizes& n = n_.measured;
    const CausalTile<R> tile(n_.window, 0, n.Nq);
    const int64_t width = tile.far + tile.near, count = tile.measurements.end, near_count = tile.tokens.end - tile.low;
    parallel(n.B * n.H, n.Nq * width * (n.D + n.R), [&](int64_t first, int64_t last) {
      Stack<R> queries_t(1, n.D, n.Nq), scores(1, n.Nq, width), out(1, n.Nq, n.R);
      Stack<R> chunk(1, kFewColumns, std::max(n.D, n.R)), products(1, kFewColumns, n.Nq), measured_bias(1, 1, n.M),
          token_bias(1, 1, n_.tokens.M), bias(1, 1, width);
      R sums[kFewQueries];
      for (int64_t head = first; head < last; ++head) {
        const int64_t b = head / n.H, h = head % n.H, of_measured = h / (n.H / n.Hk),
                      of_token = h / (n.H / n_.tokens.Hk);
        load(q.matrix(b, h).transposed(), n.D, n.Nq, queries_t[0]);
        load_biases(b, h, measured_bias[0], token_bias[0]);
        score(kc.matrix(b, of_measured), count, nullptr, queries_t[0], chunk[0], products[0], scores[0]);
        score(k.matrix(b, of_token, tile.low), near_count, token_bias[0].data + tile.low, queries_t[0], chunk[0],
              products[0], columns_from(scores[0], tile.far));
        RowBias<R> row_bias(n_.window, tile, measured_bias[0].data, token_bias[0].data, bias[0].data);
        for (int64_t i = 0; i < n.Nq; ++i) {
          R max;
          micro_kernels<R>().exponentiate_row(scores[0].row(i), row_bias.advance(i), scale_, width, &max, &sums[i]);
          lse[head * n.Nq + i] = sums[i] == R(0) ? -std::numeric_limits<R>::infinity() : max + std::log(sums[i]);
        }
        clear(out[0], n.Nq, n.R);
        add_values(vc.matrix(b, of_measured), count, nullptr, scores[0], chunk[0], out[0]);
        add_values(v.matrix(b, of_token, tile.low), near_count, token_bias[0].data + tile.low,
                   columns_from(scores[0], tile.far), chunk[0], out[0]);
        divide_rows(n.Nq, n.R, sums, out[0]);
        store(out[0], n.Nq, n.R, z.matrix(b, h));
      }
    });
  }

 private:
  void load_biases(int64_t b, int64_t h, Block<R> measured, Block<R> tokens) const {
    const AttendSizes& n = n_.measured;
    if (bias_ && n.M > 0) load(Array(*bias_).row(n.Bb == 1 ? 0 : b, n.Hb == 1 ? 0 : h), 1, n.M, measured);
    if (!keep_) return;
    const bool* keep = static_cast<const bool*>(keep_->data_ptr()) + b * keep_->stride(0);
    for (int64_t s = 0; s < n_.tokens.M; ++s)
      tokens.data[s] = keep[s * keep_->stride(1)] ? R(0) : -std::numeric_limits<R>::infinity();
  }
  // Rows `first` .. of keys or values, zeros for what is masked.
  static int64_t load_chunk(const View& from, int64_t first, int64_t rows, int64_t columns, const R* mask,
                            Block<R> chunk) {
    const int64_t count = std::min(kFewColumns, rows - first);
    load({address(from.data, from.type, first * from.row), from.type, from.row, from.col}, count, columns, chunk);
    for (int64_t i = 0; mask && i < count; ++i)
      if (mask[first + i] != R(0)) std::fill_n(chunk.row(i), columns, R(0));
    return count;
  }
  void score(const View& keys, int64_t rows, const R* mask, Block<R> queries_t, Block<R> chunk, Block<R> products,
             Block<R> scores) const {
    const AttendSizes& n = n_.measured;
    for (int64_t first = 0; first < rows; first += kFewColumns) {
      const int64_t count = load_chunk(keys, first, rows, n.D, mask, chunk);
      multiply(count, n.Nq, n.D, as_is(chunk), queries_t, products);
      for (int64_t i = 0; i < n.Nq; ++i)
        for (int64_t j = 0; j < count; ++j) scores.row(i)[first + j] = products.row(j)[i];
    }
  }
  void add_values(const View& values, int64_t rows, const R* mask, Block<R> probabilities, Block<R> chunk,
                  Block<R> out) const {
    const AttendSizes& n = n_.measured;
    for (int64_t first = 0; first < rows; first += kFewColumns) {
      const int64_t count = load_chunk(values, first, rows, n.R, mask, chunk);
      clear_padding(chunk, count, n.R);
      multiply_add(n.Nq, n.R, count, as_is(columns_from(probabilities, first)), chunk, out);
    }
  }
  // Behind features that are fewer than those of the other operand.
  static void clear_padding(Block<R> block, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) std::fill(block.row(i) + columns, block.row(i) + padded<R>(columns), R(0));
  }

  const CausalSizes& n_;
  R scale_;
  const MaybeTensor &bias_, &keep_;
};

template <class R>
struct CausalTransposes {
  AttendTransposes<R> measured, tokens;
  CausalTransposes(const CausalSizes& n, const Tensor& kc, const Tensor& vc, const Tensor& k, const Tensor& v,
                   const MaybeTensor& key_mask)
      : measured(n.measured, kc, vc), tokens(n.tokens, k, v) {
    CausalOperands<R>::for_each_masked(key_mask, n.tokens, [&](int64_t b, int64_t s) {
      for (int64_t h = 0; h < n.tokens.Hk; ++h) {
        const int64_t key = b * n.tokens.Hk + h;
        std::fill_n(tokens.keys[key].row(s), n.tokens.D, R(0));
        for (int64_t c = 0; c < n.tokens.R; ++c) tokens.values_t[key].row(c)[s] = R(0);
      }
    });
  }
};

template <class R>
struct BackwardTile {
  Stack<R> q, dz, dq, probabilities, dscores, bias, dbias;
  BackwardTile(const AttendSizes& n, int64_t most)
      : q(1, kBackwardRows, n.D),
        dz(1, kBackwardRows, n.R),
        dq(1, kBackwardRows, n.D),
        probabilities(1, kBackwardRows, most),
        dscores(1, kBackwardRows, most),
        bias(1, 1, most),
        dbias(1, 1, most) {}
};

// Gradients of measurements, and of the stretch of tokens that a group of row tiles sees.
template <class R>
struct CausalGradients {
  KeyGradients<R> measured, tokens;
};

// Turns the loaded q and dz of a tile into dq and adds to the gradients of what it sees; `base` is the first token of
// the stretch.
template <class R>
void backward_tile(const CausalOperands<R>& operands, const CausalTransposes<R>& transposes, int64_t b, int64_t h,
                   int64_t row, int64_t rows, const R* lse, const BackwardTile<R>& scratch,
                   const CausalGradients<R>& sum, int64_t slot, int64_t base) {
  const AttendSizes& n = operands.n.measured;
  const CausalTile<R> tile(operands.n.window, row, rows);
  const int64_t measured = operands.measured.key_index(b, h), token = operands.tokens.key_index(b, h);
  const int64_t width = tile.far + tile.near, count = tile.measurements.end, near_count = tile.tokens.end - tile.low;
  const Block<R> p = scratch.probabilities[0], ds = scratch.dscores[0], q = scratch.q[0], dz = scratch.dz[0];
  const Block<R> near_p = columns_from(p, tile.far), near_ds = columns_from(ds, tile.far);
  multiply(rows, tile.far, n.D, as_is(q), operands.measured.keys_t[measured], p);
  multiply(rows, tile.near, n.D, as_is(q), columns_from(operands.tokens.keys_t[token], tile.low), near_p);
  multiply(rows, tile.far, n.R, as_is(dz), transposes.measured.values_t[measured], ds);
  multiply(rows, tile.near, n.R, as_is(dz), columns_from(transposes.tokens.values_t[token], tile.low), near_ds);
  RowBias<R> row_bias(operands.n.window, tile, operands.measured.bias.of(b, h), operands.tokens.bias.of(b, h),
                      scratch.bias[0].data);
  R* dbias = scratch.dbias[0].data;
  std::fill_n(dbias, width, R(0));
  for (int64_t i = 0; i < rows; ++i) {
    const R* bias = row_bias.advance(row + i);
    if (lse[i] == -std::numeric_limits<R>::infinity()) {  // an empty row: z = 0 whatever the inputs are
      std::fill_n(p.row(i), width, R(0));
      std::fill_n(ds.row(i), width, R(0));
      continue;
    }
    micro_kernels<R>().probability_row(p.row(i), bias, operands.measured.scale, lse[i], width);
    micro_kernels<R>().score_gradient_row(p.row(i), operands.measured.scale, width, ds.row(i), dbias);
  }
  const auto tokens_from = [](Block<R> block, int64_t s) { return Block<R>{block.row(s), block.ld}; };
  multiply(rows, n.D, count, as_is(ds), transposes.measured.keys[measured], scratch.dq[0]);
  multiply_add(rows, n.D, near_count, as_is(near_ds), tokens_from(transposes.tokens.keys[token], tile.low),
               scratch.dq[0]);
  multiply_add(count, n.D, rows, transposed(ds), q, sum.measured.keys[slot]);
  multiply_add(count, n.R, rows, transposed(p), dz, sum.measured.values[slot]);
  multiply_add(near_count, n.D, rows, transposed(near_ds), q, tokens_from(sum.tokens.keys[slot], tile.low - base));
  multiply_add(near_count, n.R, rows, transposed(near_p), dz, tokens_from(sum.tokens.values[slot], tile.low - base));
  for (int64_t m = 0; m < count; ++m) sum.measured.bias[slot].data[m] += dbias[m];
}

struct BackwardArrays {
  Array dz, q, lse, dq, dkc, dvc, dk, dv;
};

// dk, dv of every token: the stretches of all groups of the heads that share it, in their order.
template <class R>
void add_stretches(const AttendSizes& n, const Groups& groups, const KeyGradients<R>& parts,
                   const std::vector<Range>& stretches, const BackwardArrays& arrays) {
  const int64_t heads_per_key = n.H / n.Hk;
  parallel(n.B * n.Hk, heads_per_key * n.M * (n.D + n.R), [&](int64_t first, int64_t last) {
    Stack<R> keys(1, n.M, n.D), values(1, n.M, n.R);
    for (int64_t key = first; key < last; ++key) {
      clear(keys[0], n.M, n.D);
      clear(values[0], n.M, n.R);
      const int64_t b = key / n.Hk, hk = key % n.Hk;
      for (int64_t i = 0; i < heads_per_key * groups.count; ++i) {
        const Range& stretch = stretches[i % groups.count];
        const int64_t slot = (b * n.H + hk * heads_per_key) * groups.count + i, length = stretch.end - stretch.begin;
        add(parts.keys[slot], length, n.D, Block<R>{keys[0].row(stretch.begin), keys[0].ld});
        add(parts.values[slot], length, n.R, Block<R>{values[0].row(stretch.begin), values[0].ld});
      }
      store(keys[0], n.M, n.D, arrays.dk.matrix(b, hk));
      store(values[0], n.M, n.R, arrays.dv.matrix(b, hk));
    }
  });
}

template <class R>
void backward(const CausalOperands<R>& operands, const CausalTransposes<R>& transposes, const BackwardArrays& arrays,
              const Tensor* dbias) {
  const CausalSizes& sizes = operands.n;
  const AttendSizes& n = sizes.measured;
  const Groups groups(divide_up(n.Nq, kBackwardRows), n.B * n.H);
  std::vector<Range> stretches;
  int64_t longest = 0;
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t begin = groups.begin(group) * kBackwardRows, end = std::min(groups.end(group) * kBackwardRows, n.Nq);
    Range stretch{0, 0};
    if (begin < end) stretch = {CausalTile<R>(sizes.window, begin, 1).low, sizes.window.tokens_of(end - 1).end};
    stretches.push_back(stretch);
    longest = std::max(longest, stretch.end - stretch.begin);
  }
  const int64_t slots = n.B * n.H * groups.count, most = CausalTile<R>::most(sizes, kBackwardRows);
  AttendSizes of_stretch = sizes.tokens;
  of_stretch.M = longest;
  const CausalGradients<R> partial{{n, slots}, {of_stretch, slots}};
  const int64_t rows_per_group = divide_up(n.Nq, groups.count);
  parallel(slots, rows_per_group * most * (n.D + n.R) * 3, [&](int64_t first, int64_t last) {
    const BackwardTile<R> tile(n, most);
    Stack<R> row_lse(1, 1, kBackwardRows);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t group = unit % groups.count, head = unit / groups.count, b = head / n.H, h = head % n.H;
      for (int64_t item = groups.begin(group); item < groups.end(group); ++item) {
        const int64_t row = item * kBackwardRows, rows = std::min(kBackwardRows, n.Nq - row);
        load(arrays.q.matrix(b, h, row), rows, n.D, tile.q[0]);
        load(arrays.dz.matrix(b, h, row), rows, n.R, tile.dz[0]);
        View lse_view = arrays.lse.row(b, h);
        lse_view.data = address(lse_view.data, lse_view.type, row * lse_view.col);
        load(lse_view, 1, rows, row_lse[0]);
        backward_tile(operands, transposes, b, h, row, rows, row_lse[0].data, tile, partial, unit,
                      stretches[group].begin);
        store(tile.dq[0], rows, n.D, arrays.dq.matrix(b, h, row));
      }
    }
  });
  add_groups(n, groups.count, partial.measured, arrays.dkc, arrays.dvc, dbias);
  add_stretches(sizes.tokens, groups, partial.tokens, stretches, arrays);
}

}  // namespace

std::tuple<Tensor, Tensor> attend_causal(const Tensor& q, const Tensor& kc, const Tensor& vc, const Tensor& k,
                                         const Tensor& v, const MaybeTensor& score_bias, const MaybeTensor& key_mask,
                                         double scale, int64_t block_size, int64_t window_blocks,
                                         int64_t measurements_per_block) {
  const CausalSizes n = check_attend_causal("attend_causal", q, kc, vc, k, v, score_bias, key_mask,
                                            {scale, block_size, window_blocks, measurements_per_block});
  Tensor z = new_rows(q, n.measured.R);
  Tensor lse =
      torch::stable::new_empty(q, {n.measured.B, n.measured.H, n.measured.Nq}, accumulate_dtype(q.scalar_type()));
  with_accumulator(q, [&](auto zero) {
    using R = decltype(zero);
    R* rows = static_cast<R*>(lse.mutable_data_ptr());
    if (n.measured.Nq <= kFewQueries)
      FewQueries<R>(n, score_bias, key_mask, scale)
          .forward(Array(q), Array(kc), Array(vc), Array(k), Array(v), Array(z), rows);
    else
      forward(CausalOperands<R>(n, kc, vc, k, v, score_bias, key_mask, scale), Array(q), Array(z), rows);
  });
  return {z, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_causal_backward(
    const Tensor& dz, const Tensor& q, const Tensor& kc, const Tensor& vc, const Tensor& k, const Tensor& v,
    const MaybeTensor& score_bias, const MaybeTensor& key_mask, const Tensor& z, const Tensor& lse, double scale,
    int64_t block_size, int64_t window_blocks, int64_t measurements_per_block) {
  const CausalSizes n =
      check_attend_causal_backward("attend_causal_backward", dz, q, kc, vc, k, v, score_bias, key_mask, z, lse,
                                   {scale, block_size, window_blocks, measurements_per_block});
  const AttendSizes &m = n.measured, &s = n.tokens;
  Tensor dq = new_rows(q, m.D);
  Tensor dkc = torch::stable::new_empty(q, {m.B, m.Hk, m.M, m.D}), dk = new_rows(k, s.D);
  Tensor dvc = torch::stable::new_empty(q, {m.B, m.Hk, m.M, m.R}), dv = new_rows(v, s.R);
  const ScalarType accumulate = accumulate_dtype(q.scalar_type());
  Tensor dbias = score_bias ? torch::stable::new_empty(q, {m.B, m.H, m.M}, accumulate)
                            : torch::stable::new_empty(q, {0}, accumulate);
  with_accumulator(q, [&](auto zero) {
    using R = decltype(zero);
    const BackwardArrays arrays{Array(dz),  Array(q),   Array(lse), Array(dq),
                                Array(dkc), Array(dvc), Array(dk),  Array(dv)};
    backward(CausalOperands<R>(n, kc, vc, k, v, score_bias, key_mask, scale),
             CausalTransposes<R>(n, kc, vc, k, v, key_mask), arrays, score_bias ? &dbias : nullptr);
  });
  return {dq, dkc, dvc, dk, dv, dbias};
}

}  // namespace csat::cpu
