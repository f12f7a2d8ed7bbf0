// attend_prefix and its backward pass, a chunk of tokens at a time. With (Kp, Vp, g_p) the state before a chunk and L
// the lower triangle with its diagonal,
//
//   s = q Kp^T + (L o q k^T) phi,   g = g_p + cumsum phi,   w = softmax(u + log g + bias) / g  with  u = scale s / g,
//   z = w Vp + (L o w phi^T) v;     the next chunk has Kp + phi^T k, Vp + phi^T v, g_p + sum phi.
//
// No logarithm is taken: w = exp(u + bias - lse), and what sums to 1 over a row is g w. signed: g is the square root of
// the number of tokens, and adds nothing to the score.
//
// The backward pass walks the chunks from the last to the first with the gradient of the state behind each. With dz the
// gradient of a row, dw = dz Vp^T + (L o dz v^T) phi, a = scale w (dw / g - delta) the gradient of s, and dK, dV, dg
// that of the state behind the chunk:
//   dq = a Kp + (L o a phi^T) k,   dk = (L o a phi^T)^T q + phi dK,   dv = (L o w phi^T)^T dz + phi dV,
//   dphi = (L o q k^T)^T a + k dK^T + (L o dz v^T)^T w + v dV^T + (sum over later rows of the gradient of g);
//   the chunk before gets dK + a^T q, dV + w^T dz.
#include <vector>

#include "torch/cpu/attend.h"
#include "torch/cpu/kernels.h"

namespace csat::cpu {
namespace {

constexpr int64_t kChunk = 96;     // tokens from one state to the next
constexpr int64_t kTriangle = 24;  // rows that share the columns of a triangle; both multiples of 6 and 12

template <class R>
void transpose(Block<R> from, int64_t rows, int64_t columns, Block<R> to) {
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) to.row(j)[i] = from.row(i)[j];
}

template <class R>
Block<R> rows_from(Block<R> block, int64_t row) {
  return {block.row(row), block.ld};
}

// Calls f(row, rows) for the stretches of rows of a triangle, which has rows + row columns there.
template <class F>
void for_each_stretch(int64_t n, const F& f) {
  for (int64_t row = 0; row < n; row += kTriangle) f(row, std::min(kTriangle, n - row));
}

// c (n, n) = the lower triangle of a (n, k) b (k, n), zeros above it as far as the functions below read.
template <class R>
void multiply_to_lower(int64_t n, int64_t k, Block<R> a, Block<R> b, Block<R> c) {
  for_each_stretch(n, [&](int64_t row, int64_t rows) {
    multiply(rows, row + rows, k, as_is(rows_from(a, row)), b, rows_from(c, row));
    for (int64_t t = row; t < row + rows; ++t) std::fill(c.row(t) + t + 1, c.row(t) + row + rows, R(0));
  });
}

// c (n, columns) += a b with a lower triangle a (n, n).
template <class R>
void multiply_add_lower(int64_t n, int64_t columns, Block<R> a, Block<R> b, Block<R> c) {
  for_each_stretch(n, [&](int64_t row, int64_t rows) {
    multiply_add(rows, columns, row + rows, as_is(rows_from(a, row)), b, rows_from(c, row));
  });
}

// c (n, columns) += a^T b.
template <class R>
void multiply_add_lower_transposed(int64_t n, int64_t columns, Block<R> a, Block<R> b, Block<R> c) {
  for_each_stretch(n, [&](int64_t row, int64_t rows) {
    const Block<R> below{a.row(row) + row, a.ld};
    multiply_add(rows, columns, n - row, transposed(below), rows_from(b, row), rows_from(c, row));
  });
}

// What both passes read.
template <class R>
struct PrefixOperands {
  PrefixSizes n;
  Array q, k, v, phi, kc, vc, mass;
  BiasRows<R> bias;
  R scale;
  bool is_signed;
  const bool* keep;
  int64_t keep_batch, keep_token;

  PrefixOperands(const PrefixSizes& n, const PrefixInputs& in)
      : n(n),
        q(in.q),
        k(in.k),
        v(in.v),
        phi(in.phi),
        kc(in.kc),
        vc(in.vc),
        mass(in.mass),
        bias(in.score_bias, n.Bb, n.Hb, n.M),
        scale(static_cast<R>(in.scale)),
        is_signed(in.is_signed),
        keep(in.key_mask && in.key_mask->numel() > 0 ? static_cast<const bool*>(in.key_mask->data_ptr()) : nullptr),
        keep_batch(keep ? in.key_mask->stride(0) : 0),
        keep_token(keep ? in.key_mask->stride(1) : 0) {}

  int64_t chunks() const { return divide_up(n.N, kChunk); }
  int64_t heads_per_state() const { return n.H / n.Hs; }
  int64_t states_per_key() const { return n.Hs / n.Hk; }
  int64_t masses() const { return is_signed ? 1 : n.M; }
  bool kept(int64_t b, int64_t token) const { return !keep || keep[b * keep_batch + token * keep_token]; }
};

// The tokens of one chunk, row by row and, where a product asks for it, transposed; zeros for masked ones.
template <class R>
struct ChunkTokens {
  Stack<R> k, v, phi, k_t, phi_t;
  int64_t first = 0, count = 0;

  explicit ChunkTokens(const PrefixSizes& n)
      : k(1, kChunk, n.D), v(1, kChunk, n.R), phi(1, kChunk, n.M), k_t(1, n.D, kChunk), phi_t(1, n.M, kChunk) {}

  void load(const PrefixOperands<R>& of, int64_t b, int64_t state_head, int64_t chunk) {
    const PrefixSizes& n = of.n;
    const int64_t key_head = state_head / of.states_per_key();
    first = chunk * kChunk;
    count = std::min(kChunk, n.N - first);
    cpu::load(of.k.matrix(b, key_head, first), count, n.D, k[0]);
    cpu::load(of.v.matrix(b, key_head, first), count, n.R, v[0]);
    cpu::load(of.phi.matrix(b, n.Hp == 1 ? 0 : state_head, first), count, n.M, phi[0]);
    for (int64_t t = 0; of.keep && t < count; ++t) {
      if (of.kept(b, first + t)) continue;
      std::fill_n(k[0].row(t), n.D, R(0));
      std::fill_n(v[0].row(t), n.R, R(0));
      std::fill_n(phi[0].row(t), n.M, R(0));
    }
    transpose(k[0], count, n.D, k_t[0]);
    transpose(phi[0], count, n.M, phi_t[0]);
  }
};

// K^T phi (D, M), phi^T V (M, R) and the sum of phi, or the number of tokens.
template <class R>
struct StateSums {
  Stack<R> keys_t, values, mass;
  StateSums(const PrefixOperands<R>& of, int64_t count)
      : keys_t(count, of.n.D, of.n.M), values(count, of.n.M, of.n.R), mass(count, 1, of.masses()) {}

  void load(const PrefixOperands<R>& of, int64_t b, int64_t state_head) {
    cpu::load(of.kc.matrix(b, state_head).transposed(), of.n.D, of.n.M, keys_t[0]);
    cpu::load(of.vc.matrix(b, state_head), of.n.M, of.n.R, values[0]);
    cpu::load(of.mass.row(b, state_head), 1, of.masses(), mass[0]);
  }
  void add(const PrefixOperands<R>& of, int64_t slot, int64_t b, const ChunkTokens<R>& tokens) {
    const PrefixSizes& n = of.n;
    multiply_add(n.D, n.M, tokens.count, as_is(tokens.k_t[0]), tokens.phi[0], keys_t[slot]);
    multiply_add(n.M, n.R, tokens.count, as_is(tokens.phi_t[0]), tokens.v[0], values[slot]);
    for (int64_t t = 0; t < tokens.count; ++t) {
      if (of.is_signed)
        mass[slot].data[0] += of.kept(b, tokens.first + t) ? R(1) : R(0);
      else
        cpu::add(rows_from(tokens.phi[0], t), 1, n.M, mass[slot]);
    }
  }
};

// Where the state behind all tokens goes.
struct EndArrays {
  Array kc, vc, mass;
};

// What stands in `sum` comes before what `running` has, and the other way round: one step of an exclusive scan.
template <class R>
void step_scan(int64_t rows, int64_t columns, Block<R> sum, Block<R> running) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const R own = sum.row(i)[j];
      sum.row(i)[j] = running.row(i)[j];
      running.row(i)[j] += own;
    }
}

// The state before every chunk of every state head: sums of chunks side by side, then a scan of each head in order.
template <class R>
StateSums<R> states_before_chunks(const PrefixOperands<R>& of, const EndArrays* end) {
  const PrefixSizes& n = of.n;
  const int64_t chunks = of.chunks(), work = n.M * (n.D + n.R);
  StateSums<R> states(of, n.B * n.Hs * chunks);
  parallel(n.B * n.Hs * chunks, kChunk * work, [&](int64_t first, int64_t last) {
    ChunkTokens<R> tokens(n);
    for (int64_t slot = first; slot < last; ++slot) {
      const int64_t b = slot / chunks / n.Hs;
      tokens.load(of, b, slot / chunks % n.Hs, slot % chunks);
      states.add(of, slot, b, tokens);
    }
  });
  parallel(n.B * n.Hs, (chunks + 1) * work, [&](int64_t first, int64_t last) {
    StateSums<R> running(of, 1);
    Stack<R> keys(1, n.M, n.D);
    for (int64_t i = first; i < last; ++i) {
      running.load(of, i / n.Hs, i % n.Hs);
      for (int64_t slot = i * chunks; slot < (i + 1) * chunks; ++slot) {
        step_scan(n.D, n.M, states.keys_t[slot], running.keys_t[0]);
        step_scan(n.M, n.R, states.values[slot], running.values[0]);
        step_scan(1, of.masses(), states.mass[slot], running.mass[0]);
      }
      if (!end) continue;
      transpose(running.keys_t[0], n.D, n.M, keys[0]);
      store(keys[0], n.M, n.D, end->kc.matrix(i / n.Hs, i % n.Hs));
      store(running.values[0], n.M, n.R, end->vc.matrix(i / n.Hs, i % n.Hs));
      if (!of.is_signed || i % n.Hs == 0) store(running.mass[0], 1, of.masses(), end->mass.row(i / n.Hs, i % n.Hs));
    }
  });
  return states;
}

// ---- forward
// ---------------------------------------------------------------------------------------------------------

// Rows of s become weights, each times sums[t]; `mass`, the masses before the chunk, moves behind it.
template <class R>
void weigh(const PrefixOperands<R>& of, int64_t b, int64_t h, const ChunkTokens<R>& tokens, R* mass, Block<R> s,
           R* sums, R* lse) {
  const R* bias = of.bias.of(b, h);
  const int64_t width = padded<R>(of.n.M);
  for (int64_t t = 0; t < tokens.count; ++t) {
    R max = R(0), sum = R(0), root = R(1);
    if (!of.is_signed) {
      micro_kernels<R>().mean_weight_row(s.row(t), tokens.phi[0].row(t), bias, of.scale, width, mass, &max, &sum);
    } else {
      mass[0] += of.kept(b, tokens.first + t) ? R(1) : R(0);
      root = std::sqrt(mass[0]);
      if (root > R(0)) micro_kernels<R>().exponentiate_row(s.row(t), bias, of.scale / root, width, &max, &sum);
    }
    sums[t] = sum * root;
    lse[t] = sum == R(0) ? -std::numeric_limits<R>::infinity() : max + std::log(sum);
  }
}

template <class R>
void forward(const PrefixOperands<R>& of, const Array& z, R* lse, const EndArrays& end) {
  const PrefixSizes& n = of.n;
  const StateSums<R> states = states_before_chunks(of, &end);
  const int64_t chunks = of.chunks(), group = of.heads_per_state();
  const int64_t work = group * kChunk * (n.M + kChunk / 2) * (n.D + n.R);
  parallel(n.B * n.Hs * chunks, work, [&](int64_t first, int64_t last) {
    ChunkTokens<R> tokens(n);
    Stack<R> q(1, kChunk, n.D), near(1, kChunk, kChunk), weights(1, kChunk, n.M), out(1, kChunk, n.R),
        mass(1, 1, of.masses());
    R sums[kChunk];
    for (int64_t slot = first; slot < last; ++slot) {
      const int64_t b = slot / chunks / n.Hs, state_head = slot / chunks % n.Hs;
      tokens.load(of, b, state_head, slot % chunks);
      const int64_t count = tokens.count;
      for (int64_t h = state_head * group; h < (state_head + 1) * group; ++h) {
        load(of.q.matrix(b, h, tokens.first), count, n.D, q[0]);
        multiply_to_lower(count, n.D, q[0], tokens.k_t[0], near[0]);
        multiply(count, n.M, n.D, as_is(q[0]), states.keys_t[slot], weights[0]);
        multiply_add_lower(count, n.M, near[0], tokens.phi[0], weights[0]);
        std::copy_n(states.mass[slot].data, padded<R>(of.masses()), mass[0].data);
        weigh(of, b, h, tokens, mass[0].data, weights[0], sums, lse + (b * n.H + h) * n.N + tokens.first);
        multiply(count, n.R, n.M, as_is(weights[0]), states.values[slot], out[0]);
        multiply_to_lower(count, n.M, weights[0], tokens.phi_t[0], near[0]);
        multiply_add_lower(count, n.R, near[0], tokens.v[0], out[0]);
        divide_rows(count, n.R, sums, out[0]);
        store(out[0], count, n.R, z.matrix(b, h, tokens.first));
      }
    }
  });
}

// The same for one token, as in decoding, which looks at the state behind itself: z = softmax(..) Vc / g with
// Kc + phi^T k, Vc + phi^T v, g + phi.
template <class R>
void forward_one(const PrefixOperands<R>& of, const Array& z, R* lse, const EndArrays& end) {
  const PrefixSizes& n = of.n;
  const int64_t group = of.heads_per_state();
  parallel(n.B * n.Hs, n.M * (n.D + n.R) * (group + 1), [&](int64_t first, int64_t last) {
    ChunkTokens<R> tokens(n);
    Stack<R> q_t(1, n.D, group), keys(1, n.M, n.D), values(1, n.M, n.R), products(1, n.M, group), weights(1, 1, n.M),
        out(1, 1, n.R), mass(1, 1, of.masses());
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / n.Hs, state_head = i % n.Hs;
      tokens.load(of, b, state_head, 0);
      load(of.kc.matrix(b, state_head), n.M, n.D, keys[0]);
      load(of.vc.matrix(b, state_head), n.M, n.R, values[0]);
      multiply_add(n.M, n.D, 1, as_is(tokens.phi_t[0]), tokens.k[0], keys[0]);
      multiply_add(n.M, n.R, 1, as_is(tokens.phi_t[0]), tokens.v[0], values[0]);
      store(keys[0], n.M, n.D, end.kc.matrix(b, state_head));
      store(values[0], n.M, n.R, end.vc.matrix(b, state_head));
      for (int64_t h = 0; h < group; ++h)
        load(of.q.matrix(b, state_head * group + h).transposed(), n.D, 1, Block<R>{q_t[0].data + h, q_t[0].ld});
      multiply(n.M, group, n.D, as_is(keys[0]), q_t[0], products[0]);
      for (int64_t h = 0; h < group; ++h) {
        const int64_t head = state_head * group + h;
        R sum;
        for (int64_t j = 0; j < n.M; ++j) weights[0].data[j] = products[0].row(j)[h];
        load(of.mass.row(b, state_head), 1, of.masses(), mass[0]);
        weigh(of, b, head, tokens, mass[0].data, weights[0], &sum, lse + b * n.H + head);
        multiply(1, n.R, n.M, as_is(weights[0]), values[0], out[0]);
        divide_rows(1, n.R, &sum, out[0]);
        store(out[0], 1, n.R, z.matrix(b, head));
      }
      if (!of.is_signed || state_head == 0) store(mass[0], 1, of.masses(), end.mass.row(b, state_head));
    }
  });
}

// ---- backward
// --------------------------------------------------------------------------------------------------------

// The gradients of attend_prefix's results, then those of its arguments.
struct GradientArrays {
  Array dz, dkc_end, dvc_end, dmass_end, lse;
  Array dq, dk, dv, dphi, dkc, dvc, dmass, dbias;
  bool wants_bias;
};

// The gradient of the state behind a chunk.
template <class R>
struct StateGradient {
  Stack<R> keys, values, keys_t, values_t, mass;
  explicit StateGradient(const PrefixSizes& n)
      : keys(1, n.M, n.D), values(1, n.M, n.R), keys_t(1, n.D, n.M), values_t(1, n.R, n.M), mass(1, 1, n.M) {}
};

template <class R>
struct GradientScratch {
  Stack<R> q, dz, dq, dk, dv, dphi, v_t;
  Stack<R> keys, values_t;           // of the state before the chunk
  Stack<R> query_keys, value_grads;  // the lower triangles of q k^T and dz v^T
  Stack<R> near, weights, dweights, dmass, mass, dbias, lse;
  Stack<R> chunk_keys, chunk_values, chunk_bias;

  explicit GradientScratch(const PrefixSizes& n, int64_t masses)
      : q(1, kChunk, n.D),
        dz(1, kChunk, n.R),
        dq(1, kChunk, n.D),
        dk(1, kChunk, n.D),
        dv(1, kChunk, n.R),
        dphi(1, kChunk, n.M),
        v_t(1, n.R, kChunk),
        keys(1, n.M, n.D),
        values_t(1, n.R, n.M),
        query_keys(1, kChunk, kChunk),
        value_grads(1, kChunk, kChunk),
        near(1, kChunk, kChunk),
        weights(1, kChunk, n.M),
        dweights(1, kChunk, n.M),
        dmass(1, kChunk, n.M),
        mass(1, 1, masses),
        dbias(n.H, 1, n.M),
        lse(1, 1, kChunk),
        chunk_keys(1, n.M, n.D),
        chunk_values(1, n.M, n.R),
        chunk_bias(1, 1, n.M) {}
};

// Rows of s and dw become w and a; the gradients of g in dmass, of the bias added to chunk_bias. x.mass moves over the
// chunk.
template <class R>
void weight_gradients(const PrefixOperands<R>& of, int64_t b, int64_t h, const ChunkTokens<R>& tokens,
                      const GradientScratch<R>& x) {
  const R* bias = of.bias.of(b, h);
  const int64_t width = padded<R>(of.n.M);
  R *mass = x.mass[0].data, *dbias = x.chunk_bias[0].data;
  for (int64_t t = 0; t < tokens.count; ++t) {
    R *w = x.weights[0].row(t), *dw = x.dweights[0].row(t), *dg = x.dmass[0].row(t);
    const R lse = x.lse[0].data[t];
    if (of.is_signed) mass[0] += of.kept(b, tokens.first + t) ? R(1) : R(0);
    if (lse == -std::numeric_limits<R>::infinity()) {  // an empty row: z = 0 whatever the inputs are
      for (R* row : {w, dw, dg}) std::fill_n(row, width, R(0));
      if (!of.is_signed) add(rows_from(tokens.phi[0], t), 1, of.n.M, x.mass[0]);
    } else if (!of.is_signed) {
      micro_kernels<R>().mean_weight_gradient_row(w, tokens.phi[0].row(t), bias, of.scale, lse, width, mass, dw, dg,
                                                  dbias);
    } else {
      const R inverse = R(1) / std::sqrt(mass[0]), scale = of.scale * inverse;
      micro_kernels<R>().probability_row(w, bias, scale, lse, width);
      for (int64_t j = 0; j < width; ++j) dw[j] *= inverse;
      micro_kernels<R>().score_gradient_row(w, scale, width, dw, dbias);
      for (int64_t j = 0; j < width; ++j) w[j] *= inverse;
    }
  }
}

// Adds what head h gives to the gradients of a chunk's tokens and of the state before it; stores dq.
template <class R>
void head_gradients(const PrefixOperands<R>& of, int64_t b, int64_t h, const ChunkTokens<R>& tokens, Block<R> keys_t,
                    const R* mass, const GradientScratch<R>& x, const StateGradient<R>& state,
                    const GradientArrays& arrays) {
  const PrefixSizes& n = of.n;
  const int64_t count = tokens.count;
  const Block<R> q = x.q[0], dz = x.dz[0], w = x.weights[0], a = x.dweights[0], near = x.near[0];
  load(of.q.matrix(b, h, tokens.first), count, n.D, q);
  load(arrays.dz.matrix(b, h, tokens.first), count, n.R, dz);
  View lse = arrays.lse.row(b, h);
  lse.data = address(lse.data, lse.type, tokens.first * lse.col);
  load(lse, 1, count, x.lse[0]);
  std::copy_n(mass, padded<R>(of.masses()), x.mass[0].data);

  multiply_to_lower(count, n.D, q, tokens.k_t[0], x.query_keys[0]);
  multiply(count, n.M, n.D, as_is(q), keys_t, w);
  multiply_add_lower(count, n.M, x.query_keys[0], tokens.phi[0], w);
  multiply_to_lower(count, n.R, dz, x.v_t[0], x.value_grads[0]);
  multiply(count, n.M, n.R, as_is(dz), x.values_t[0], a);
  multiply_add_lower(count, n.M, x.value_grads[0], tokens.phi[0], a);
  clear(x.chunk_bias[0], 1, n.M);
  weight_gradients(of, b, h, tokens, x);

  multiply_to_lower(count, n.M, a, tokens.phi_t[0], near);
  multiply(count, n.D, n.M, as_is(a), x.keys[0], x.dq[0]);
  multiply_add_lower(count, n.D, near, tokens.k[0], x.dq[0]);
  store(x.dq[0], count, n.D, arrays.dq.matrix(b, h, tokens.first));
  multiply_add_lower_transposed(count, n.D, near, q, x.dk[0]);
  multiply_to_lower(count, n.M, w, tokens.phi_t[0], near);
  multiply_add_lower_transposed(count, n.R, near, dz, x.dv[0]);
  multiply_add_lower_transposed(count, n.M, x.query_keys[0], a, x.dphi[0]);
  multiply_add_lower_transposed(count, n.M, x.value_grads[0], w, x.dphi[0]);
  // Sums of a chunk first: the error of one after the other would grow with the tokens.
  multiply(n.M, n.D, count, transposed(a), q, x.chunk_keys[0]);
  multiply(n.M, n.R, count, transposed(w), dz, x.chunk_values[0]);
  add(x.chunk_keys[0], n.M, n.D, state.keys[0]);
  add(x.chunk_values[0], n.M, n.R, state.values[0]);
  add(x.chunk_bias[0], 1, n.M, x.dbias[h]);
}

// Adds to dphi of each row the gradients of g of that row and all later ones; `behind`, the sum over later chunks,
// moves before this one.
template <class R>
void add_later_rows(int64_t count, int64_t columns, Block<R> dmass, R* behind, Block<R> dphi) {
  for (int64_t t = count - 2; t >= 0; --t) add(rows_from(dmass, t + 1), 1, columns, rows_from(dmass, t));
  for (int64_t t = 0; t < count; ++t)
    for (int64_t j = 0; j < columns; ++j) dphi.row(t)[j] += dmass.row(t)[j] + behind[j];
  for (int64_t j = 0; j < columns; ++j) behind[j] += dmass.row(0)[j];
}

// One chunk of one state head: its part of x.dk and x.dv, all of dphi; `state` moves before the chunk.
template <class R>
void chunk_gradients(const PrefixOperands<R>& of, int64_t b, int64_t state_head, const ChunkTokens<R>& tokens,
                     const StateSums<R>& states, int64_t slot, const GradientScratch<R>& x,
                     const StateGradient<R>& state, Block<R> dmass, const GradientArrays& arrays) {
  const PrefixSizes& n = of.n;
  const int64_t count = tokens.count, group = of.heads_per_state();
  transpose(tokens.v[0], count, n.R, x.v_t[0]);
  transpose(states.keys_t[slot], n.D, n.M, x.keys[0]);
  transpose(states.values[slot], n.M, n.R, x.values_t[0]);
  transpose(state.keys[0], n.M, n.D, state.keys_t[0]);
  transpose(state.values[0], n.M, n.R, state.values_t[0]);
  multiply_add(count, n.D, n.M, as_is(tokens.phi[0]), state.keys[0], x.dk[0]);
  multiply_add(count, n.R, n.M, as_is(tokens.phi[0]), state.values[0], x.dv[0]);
  multiply(count, n.M, n.D, as_is(tokens.k[0]), state.keys_t[0], x.dphi[0]);
  multiply_add(count, n.M, n.R, as_is(tokens.v[0]), state.values_t[0], x.dphi[0]);
  clear(dmass, count, n.M);
  for (int64_t h = state_head * group; h < (state_head + 1) * group; ++h) {
    head_gradients(of, b, h, tokens, states.keys_t[slot], states.mass[slot].data, x, state, arrays);
    if (!of.is_signed) add(x.dmass[0], count, n.M, dmass);
  }
  if (!of.is_signed) add_later_rows(count, n.M, dmass, state.mass[0].data, x.dphi[0]);
  for (int64_t t = 0; t < count; ++t)
    if (!of.kept(b, tokens.first + t)) std::fill_n(x.dphi[0].row(t), n.M, R(0));
  store(x.dphi[0], count, n.M, arrays.dphi.matrix(b, state_head, tokens.first));
}

// Everything of one key head.
template <class R>
void backward_of_key(const PrefixOperands<R>& of, int64_t b, int64_t key_head, const StateSums<R>& states,
                     const GradientArrays& arrays) {
  const PrefixSizes& n = of.n;
  const int64_t chunks = of.chunks(), shared_by = of.states_per_key(), of_key = key_head * shared_by;
  ChunkTokens<R> tokens(n);
  const GradientScratch<R> x(n, of.masses());
  const Stack<R> dmass(1, kChunk, n.M);
  std::vector<StateGradient<R>> state;
  for (int64_t i = 0; i < shared_by; ++i) {
    const StateGradient<R>& own = state.emplace_back(n);
    load(arrays.dkc_end.matrix(b, of_key + i), n.M, n.D, own.keys[0]);
    load(arrays.dvc_end.matrix(b, of_key + i), n.M, n.R, own.values[0]);
    if (!of.is_signed) load(arrays.dmass_end.row(b, of_key + i), 1, n.M, own.mass[0]);
  }
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    for (int64_t i = 0; i < shared_by; ++i) {
      tokens.load(of, b, of_key + i, chunk);
      if (i == 0) {
        clear(x.dk[0], tokens.count, n.D);
        clear(x.dv[0], tokens.count, n.R);
      }
      chunk_gradients(of, b, of_key + i, tokens, states, (b * n.Hs + of_key + i) * chunks + chunk, x, state[i],
                      dmass[0], arrays);
    }
    store(x.dk[0], tokens.count, n.D, arrays.dk.matrix(b, key_head, tokens.first));
    store(x.dv[0], tokens.count, n.R, arrays.dv.matrix(b, key_head, tokens.first));
  }
  for (int64_t i = 0; i < shared_by; ++i) {
    store(state[i].keys[0], n.M, n.D, arrays.dkc.matrix(b, of_key + i));
    store(state[i].values[0], n.M, n.R, arrays.dvc.matrix(b, of_key + i));
    if (!of.is_signed) store(state[i].mass[0], 1, n.M, arrays.dmass.row(b, of_key + i));
  }
  const int64_t heads = n.H / n.Hk;
  for (int64_t h = key_head * heads; arrays.wants_bias && h < (key_head + 1) * heads; ++h)
    store(x.dbias[h], 1, n.M, arrays.dbias.row(b, h));
}

template <class R>
void backward(const PrefixOperands<R>& of, const GradientArrays& arrays) {
  const PrefixSizes& n = of.n;
  const StateSums<R> states = states_before_chunks<R>(of, nullptr);
  parallel(n.B * n.Hk, n.N * n.H / n.Hk * (n.M + kChunk) * (n.D + n.R) * 3, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) backward_of_key(of, i / n.Hk, i % n.Hk, states, arrays);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_prefix(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                 const Tensor& phi, const Tensor& kc, const Tensor& vc,
                                                                 const Tensor& mass, const MaybeTensor& score_bias,
                                                                 const MaybeTensor& key_mask, double scale,
                                                                 bool is_signed) {
  const PrefixInputs in{q, k, v, phi, kc, vc, mass, score_bias, key_mask, scale, is_signed};
  const PrefixSizes n = check_attend_prefix("attend_prefix", in);
  const ScalarType accumulate = accumulate_dtype(q.scalar_type());
  Tensor z = new_rows(q, n.R);
  Tensor lse = torch::stable::new_empty(q, {n.B, n.H, n.N}, accumulate);
  Tensor kc_end = torch::stable::new_empty(kc, {n.B, n.Hs, n.M, n.D});
  Tensor vc_end = torch::stable::new_empty(vc, {n.B, n.Hs, n.M, n.R});
  Tensor mass_end = torch::stable::new_empty(mass, {n.B, mass.size(1), mass.size(2)});
  with_accumulator(q, [&](auto zero) {
    using R = decltype(zero);
    const PrefixOperands<R> operands(n, in);
    const EndArrays end{Array(kc_end), Array(vc_end), Array(mass_end)};
    R* rows = static_cast<R*>(lse.mutable_data_ptr());
    n.N == 1 ? forward_one(operands, Array(z), rows, end) : forward(operands, Array(z), rows, end);
  });
  return {z, lse, kc_end, vc_end, mass_end};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_prefix_backward(
    const Tensor& dz, const Tensor& dkc_end, const Tensor& dvc_end, const Tensor& dmass_end, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& phi, const Tensor& kc, const Tensor& vc, const Tensor& mass,
    const MaybeTensor& score_bias, const MaybeTensor& key_mask, const Tensor& lse, double scale, bool is_signed) {
  const PrefixInputs in{q, k, v, phi, kc, vc, mass, score_bias, key_mask, scale, is_signed};
  const PrefixSizes n =
      check_attend_prefix_backward("attend_prefix_backward", in, {dz, dkc_end, dvc_end, dmass_end, lse});
  Tensor dq = new_rows(q, n.D);
  Tensor dk = new_rows(k, n.D), dv = new_rows(v, n.R);
  Tensor dkc = torch::stable::new_empty(kc, {n.B, n.Hs, n.M, n.D});
  Tensor dvc = torch::stable::new_empty(vc, {n.B, n.Hs, n.M, n.R});
  const ScalarType accumulate = accumulate_dtype(q.scalar_type());
  Tensor dphi = torch::stable::new_empty(q, {n.B, n.Hs, n.N, n.M}, accumulate);
  Tensor dmass = is_signed ? torch::stable::new_empty(q, {0}, accumulate)
                           : torch::stable::new_empty(q, {n.B, n.Hs, n.M}, accumulate);
  Tensor dbias = score_bias ? torch::stable::new_empty(q, {n.B, n.H, n.M}, accumulate)
                            : torch::stable::new_empty(q, {0}, accumulate);
  with_accumulator(q, [&](auto zero) {
    using R = decltype(zero);
    backward(PrefixOperands<R>(n, in),
             {Array(dz), Array(dkc_end), Array(dvc_end), Array(dmass_end), Array(lse), Array(dq), Array(dk), Array(dv),
              Array(dphi), Array(dkc), Array(dvc), Array(dmass), Array(dbias), score_bias.has_value()});
  });
  return {dq, dk, dv, dphi, dkc, dvc, dmass, dbias};
}

}  // namespace csat::cpu
