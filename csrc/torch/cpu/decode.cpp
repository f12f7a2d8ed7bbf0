// decode and its backward pass, which recomputes the iterates of each row tile from z:
//   g_T = dc psi, e_t = g_{t+1} * [a_{t+1} != 0], dtheta_t = -sum e_t sign(a_{t+1}), dstep_t = sum e_t . y_t,
//   dS_t = step_t e_t^T a_t, dB_t = step_t e_t^T z, dz += step_t e_t B_t, g_t = (1 - step_t) e_t + step_t e_t S_t.
#include "torch/cpu/decode.h"

#include "torch/cpu/kernels.h"

namespace csat::cpu {
namespace {

constexpr int64_t kRows = 96;
constexpr int64_t kBackwardRows = 48;  // the backward tile holds the iterates of every layer

template <class R>
void forward(const DecodeOperands<R>& operands, const Array& z, const Array& c) {
  const DecodeSizes& n = operands.n;
  const int64_t tiles = divide_up(n.Nq, kRows);
  parallel(n.B * n.H * tiles, kRows * n.P * (n.R + n.T * n.P + n.Dv), [&](int64_t first, int64_t last) {
    const DecodeTile<R> tile(n, kRows);
    Stack<R> input(1, kRows, n.R), output(1, kRows, n.Dv);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t row = unit % tiles * kRows, head = unit / tiles, b = head / n.H, h = head % n.H;
      const int64_t rows = std::min(kRows, n.Nq - row);
      load(z.matrix(b, h, row), rows, n.R, input[0]);
      decode_tile(operands, h, rows, input[0], tile, output[0]);
      store(output[0], rows, n.Dv, c.matrix(b, h, row));
    }
  });
}

// Parameter gradients summed over a group of row tiles.
template <class R>
struct ParameterGradients {
  Stack<R> S, B, theta, psi, step;
  int64_t Ts, Tb;
  ParameterGradients(const DecodeSizes& n, bool synthesises, int64_t count)
      : S(count * n.Ts, n.P, n.P),
        B(count * n.Tb, n.P, n.R),
        theta(count, n.T, n.P),
        psi(synthesises ? count : 0, n.Dv, n.P),
        step(count, 1, n.T),
        Ts(n.Ts),
        Tb(n.Tb) {}
};

// The matrices once more, untransposed: right factors of the backward products.
template <class R>
struct BackwardOperands {
  Stack<R> S, B, psi;
  BackwardOperands(const DecodeSizes& n, const Tensor& S_in, const Tensor& B_in, const MaybeTensor& psi_in)
      : S(n.Hd * n.Ts, n.P, n.P), B(n.Hd * n.Tb, n.P, n.R), psi(psi_in ? n.Hd : 0, n.Dv, n.P) {
    const Array S_array(S_in), B_array(B_in);
    for (int64_t i = 0; i < n.Hd * n.Ts; ++i) load(S_array.matrix(i / n.Ts, i % n.Ts), n.P, n.P, S[i]);
    for (int64_t i = 0; i < n.Hd * n.Tb; ++i) load(B_array.matrix(i / n.Tb, i % n.Tb), n.P, n.R, B[i]);
    for (int64_t i = 0; psi_in && i < n.Hd; ++i) load(Array(*psi_in).matrix(i, 0), n.Dv, n.P, psi[i]);
  }
};

template <class R>
struct BackwardTile {
  Stack<R> z, dc, dz, iterates, changes, drive, e, g;
  explicit BackwardTile(const DecodeSizes& n)
      : z(1, kBackwardRows, n.R),
        dc(1, kBackwardRows, n.Dv),
        dz(1, kBackwardRows, n.R),
        iterates(n.T + 1, kBackwardRows, n.P),  // a_0 .. a_T; a_0 stays zero
        changes(n.T, kBackwardRows, n.P),
        drive(1, kBackwardRows, n.P),  // B z on the way forward, its gradient on the way back
        e(1, kBackwardRows, n.P),
        g(1, kBackwardRows, n.P) {}
};

template <class R>
void backward_tile(const DecodeOperands<R>& operands, const BackwardOperands<R>& right, int64_t hd, int64_t rows,
                   const BackwardTile<R>& tile, const ParameterGradients<R>& sum, int64_t slot) {
  const DecodeSizes& n = operands.n;
  const Block<R> z = tile.z[0], e = tile.e[0], g = tile.g[0], drive = tile.drive[0];
  for (int64_t t = 0; t < n.T; ++t)
    decode_layer(operands, hd, t, rows, z, tile.iterates[t], drive, tile.changes[t], tile.iterates[t + 1]);
  if (operands.synthesises) {
    multiply(rows, n.P, n.Dv, as_is(tile.dc[0]), right.psi[hd], g);
    multiply_add(n.Dv, n.P, rows, transposed(tile.dc[0]), tile.iterates[n.T], sum.psi[slot]);
  } else {
    copy(tile.dc[0], rows, n.P, g);
  }
  clear(tile.dz[0], rows, n.R);
  clear(drive, rows, n.P);
  for (int64_t t = n.T - 1; t >= 0; --t) {
    const R step = operands.step[hd].data[t];
    R step_sum = 0;
    for (int64_t i = 0; i < rows; ++i)
      step_sum += micro_kernels<R>().threshold_backward_row(tile.iterates[t + 1].row(i), tile.changes[t].row(i), step,
                                                            padded<R>(n.P), g.row(i), e.row(i), sum.theta[slot].row(t));
    sum.step[slot].data[t] += step_sum;
    add(e, rows, n.P, drive);
    if (t == 0 || n.Tb > 1) {  // the gradient of B_t z; a tied B needs only its sum over layers
      multiply_add(n.P, n.R, rows, transposed(drive), z, sum.B[slot * n.Tb + (n.Tb == 1 ? 0 : t)]);
      multiply_add(rows, n.R, n.P, as_is(drive), right.B[operands.B_index(hd, t)], tile.dz[0]);
      clear(drive, rows, n.P);
    }
    if (t == 0) break;  // a_0 = 0 gets no gradient and gives none to S
    multiply_add(n.P, n.P, rows, transposed(e), tile.iterates[t], sum.S[slot * n.Ts + (n.Ts == 1 ? 0 : t)]);
    multiply_add(rows, n.P, n.P, as_is(e), right.S[operands.S_index(hd, t)], g);
  }
}

// Adds the partials of one decoder head into the first of them.
template <class R>
void reduce(const ParameterGradients<R>& partial, const DecodeSizes& n, bool synthesises, int64_t first,
            int64_t count) {
  for (int64_t i = first + 1; i < first + count; ++i) {
    for (int64_t t = 0; t < n.Ts; ++t) add(partial.S[i * n.Ts + t], n.P, n.P, partial.S[first * n.Ts + t]);
    for (int64_t t = 0; t < n.Tb; ++t) add(partial.B[i * n.Tb + t], n.P, n.R, partial.B[first * n.Tb + t]);
    add(partial.theta[i], n.T, n.P, partial.theta[first]);
    if (synthesises) add(partial.psi[i], n.Dv, n.P, partial.psi[first]);
    add(partial.step[i], 1, n.T, partial.step[first]);
  }
}

struct Gradients {
  Tensor dz, dS, dB, dtheta, dpsi, dstep;
};

template <class R>
void backward(const DecodeOperands<R>& operands, const BackwardOperands<R>& right, const Array& dc, const Array& z,
              const Gradients& out) {
  const DecodeSizes& n = operands.n;
  const int64_t heads = n.Hd == 1 ? n.H : 1;  // heads that share a decoder
  const int64_t tiles = divide_up(n.Nq, kBackwardRows);
  const Groups groups(n.B * heads * tiles, n.Hd);
  const ParameterGradients<R> partial(n, operands.synthesises, n.Hd * groups.count);
  const Array dz(out.dz);
  const int64_t work = divide_up(groups.items, groups.count) * kBackwardRows * n.P * (n.R + n.T * n.P) * 3;
  parallel(n.Hd * groups.count, work, [&](int64_t first, int64_t last) {
    const BackwardTile<R> tile(n);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t hd = unit / groups.count, group = unit % groups.count;
      for (int64_t item = groups.begin(group); item < groups.end(group); ++item) {
        const int64_t row = item % tiles * kBackwardRows, head = item / tiles;
        const int64_t b = head / heads, h = n.Hd == 1 ? head % heads : hd;
        const int64_t rows = std::min(kBackwardRows, n.Nq - row);
        load(z.matrix(b, h, row), rows, n.R, tile.z[0]);
        load(dc.matrix(b, h, row), rows, n.Dv, tile.dc[0]);
        backward_tile(operands, right, hd, rows, tile, partial, unit);
        store(tile.dz[0], rows, n.R, dz.matrix(b, h, row));
      }
    }
  });
  const Array dS(out.dS), dB(out.dB), dtheta(out.dtheta), dstep(out.dstep);
  parallel(n.Hd, groups.count * n.P * (n.Ts * n.P + n.Tb * n.R), [&](int64_t first, int64_t last) {
    for (int64_t hd = first; hd < last; ++hd) {
      const int64_t slot = hd * groups.count;
      reduce(partial, n, operands.synthesises, slot, groups.count);
      for (int64_t t = 0; t < n.Ts; ++t) store(partial.S[slot * n.Ts + t], n.P, n.P, dS.matrix(hd, t));
      for (int64_t t = 0; t < n.Tb; ++t) store(partial.B[slot * n.Tb + t], n.P, n.R, dB.matrix(hd, t));
      store(partial.theta[slot], n.T, n.P, dtheta.matrix(hd, 0));
      if (operands.synthesises) store(partial.psi[slot], n.Dv, n.P, Array(out.dpsi).matrix(hd, 0));
      store(partial.step[slot], 1, n.T, dstep.row(hd, 0));
    }
  });
}

}  // namespace

Tensor decode(const Tensor& z, const Tensor& S, const Tensor& B, const Tensor& theta, const MaybeTensor& psi,
              const Tensor& step) {
  const DecodeSizes n = check_decode("decode", z, S, B, theta, psi, step);
  Tensor c = new_rows(z, n.Dv);
  with_accumulator(
      z, [&](auto zero) { forward(DecodeOperands<decltype(zero)>(n, S, B, theta, psi, step), Array(z), Array(c)); });
  return c;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> decode_backward(const Tensor& dc, const Tensor& z,
                                                                           const Tensor& S, const Tensor& B,
                                                                           const Tensor& theta, const MaybeTensor& psi,
                                                                           const Tensor& step) {
  const DecodeSizes n = check_decode_backward("decode_backward", dc, z, S, B, theta, psi, step);
  const ScalarType accumulate = accumulate_dtype(z.scalar_type());
  const auto gradient = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(z, torch::headeronly::IntHeaderOnlyArrayRef(shape), accumulate);
  };
  const Gradients out{new_rows(z, n.R),
                      gradient({n.Hd, n.Ts, n.P, n.P}),
                      gradient({n.Hd, n.Tb, n.P, n.R}),
                      gradient({n.Hd, n.T, n.P}),
                      psi ? gradient({n.Hd, n.Dv, n.P}) : gradient({0}),
                      gradient({n.Hd, n.T})};
  with_accumulator(z, [&](auto zero) {
    using R = decltype(zero);
    backward(DecodeOperands<R>(n, S, B, theta, psi, step), BackwardOperands<R>(n, S, B, psi), Array(dc), Array(z), out);
  });
  return {out.dz, out.dS, out.dB, out.dtheta, out.dpsi, out.dstep};
}

}  // namespace csat::cpu
