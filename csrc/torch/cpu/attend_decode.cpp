// attend and decode fused: z of a row tile goes from one to the other in scratch and is written only when asked for.
// It is rounded to the dtype of q on the way, as between the two ops: the backward pass decodes the z that was saved,
// and must meet the same coefficients on the same side of their thresholds.
#include "torch/cpu/attend.h"
#include "torch/cpu/decode.h"
#include "torch/cpu/kernels.h"

namespace csat::cpu {
namespace {

template <class R>
void forward(const AttendOperands<R>& attend, const DecodeOperands<R>& decoder, const Array& q, const Array& out,
             const Array* z, R* lse) {
  const AttendSizes& n = attend.n;
  const DecodeSizes& d = decoder.n;
  const int64_t tiles = divide_up(n.Nq, kAttendRows);
  const int64_t work = kAttendRows * (n.M * (n.D + n.R) + d.P * (d.R + d.T * d.P + d.Dv));
  parallel(n.B * n.H * tiles, work, [&](int64_t first, int64_t last) {
    Stack<R> queries(1, kAttendRows, n.D), scores(1, kAttendRows, n.M), context(1, kAttendRows, n.R),
        output(1, kAttendRows, d.Dv);
    const DecodeTile<R> tile(d, kAttendRows);
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t row = unit % tiles * kAttendRows, head = unit / tiles, b = head / n.H, h = head % n.H;
      const int64_t rows = std::min(kAttendRows, n.Nq - row);
      load(q.matrix(b, h, row), rows, n.D, queries[0]);
      attend_tile(attend, b, h, rows, queries[0], scores[0], context[0], lse + head * n.Nq + row);
      round_to(q.matrix(b, h, row).type, rows, n.R, context[0]);
      if (z) store(context[0], rows, n.R, z->matrix(b, h, row));
      decode_tile(decoder, h, rows, context[0], tile, output[0]);
      store(output[0], rows, d.Dv, out.matrix(b, h, row));
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attend_decode(const Tensor& q, const Tensor& kc, const Tensor& vc,
                                                 const MaybeTensor& score_bias, double scale, const Tensor& S,
                                                 const Tensor& B, const Tensor& theta, const MaybeTensor& psi,
                                                 const Tensor& step, bool need_z) {
  const AttendSizes n = check_attend("attend_decode", q, kc, vc, score_bias, scale);
  const DecodeSizes d = check_attend_decode("attend_decode", n, q, S, B, theta, psi, step);
  Tensor out = new_rows(q, d.Dv);
  Tensor z = need_z ? new_rows(q, n.R) : torch::stable::new_empty(q, {0});
  Tensor lse = torch::stable::new_empty(q, {n.B, n.H, n.Nq}, accumulate_dtype(q.scalar_type()));
  with_accumulator(q, [&](auto zero) {
    using R = decltype(zero);
    const Array z_array(z);
    forward(AttendOperands<R>(n, kc, vc, score_bias, scale), DecodeOperands<R>(d, S, B, theta, psi, step), Array(q),
            Array(out), need_z ? &z_array : nullptr, static_cast<R*>(lse.mutable_data_ptr()));
  });
  return {out, z, lse};
}

// One after the other: z of the few rows that a step of decoding has is in the cache anyway.
std::tuple<Tensor, Tensor, Tensor> attend_causal_decode(const Tensor& q, const Tensor& kc, const Tensor& vc,
                                                        const Tensor& k, const Tensor& v, const MaybeTensor& score_bias,
                                                        const MaybeTensor& key_mask, double scale, int64_t block_size,
                                                        int64_t window_blocks, int64_t measurements_per_block,
                                                        const Tensor& S, const Tensor& B, const Tensor& theta,
                                                        const MaybeTensor& psi, const Tensor& step, bool need_z) {
  const CausalSizes n = check_attend_causal("attend_causal_decode", q, kc, vc, k, v, score_bias, key_mask,
                                            {scale, block_size, window_blocks, measurements_per_block});
  check_attend_decode("attend_causal_decode", n.measured, q, S, B, theta, psi, step);
  const auto [z, lse] =
      attend_causal(q, kc, vc, k, v, score_bias, key_mask, scale, block_size, window_blocks, measurements_per_block);
  return {decode(z, S, B, theta, psi, step), need_z ? z : torch::stable::new_empty(q, {0}), lse};
}

// The same of the prefix form.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_prefix_decode(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi, const Tensor& kc, const Tensor& vc,
    const Tensor& mass, const MaybeTensor& score_bias, const MaybeTensor& key_mask, double scale, bool is_signed,
    const Tensor& S, const Tensor& B, const Tensor& theta, const MaybeTensor& psi, const Tensor& step, bool need_z) {
  const PrefixInputs in{q, k, v, phi, kc, vc, mass, score_bias, key_mask, scale, is_signed};
  const PrefixSizes n = check_attend_prefix("attend_prefix_decode", in);
  check_attend_decode("attend_prefix_decode", n, q, S, B, theta, psi, step);
  const auto [z, lse, kc_end, vc_end, mass_end] =
      attend_prefix(q, k, v, phi, kc, vc, mass, score_bias, key_mask, scale, is_signed);
  return {
      decode(z, S, B, theta, psi, step), need_z ? z : torch::stable::new_empty(q, {0}), lse, kc_end, vc_end, mass_end};
}

}  // namespace csat::cpu
