// Host side of attend_prefix_mma.cuh: operands with vector rows, sums and means of the chunks, grid, choice of the
// compiled instance; batch elements and key heads in parts (prefix_parts.h).
#include "csat/attend_prefix_mma.cuh"
#include "csat/attend_prefix_mma.h"
#include "csat/decoder_weights.h"
#include "csat/prefix_parts.h"
#include "csat/prefix_scan.h"

namespace csat {
namespace {

using limits::ceil_div;
using limits::round_up;

struct FusedParams {
  PrefixParams attend;
  DecodeParams decode;
  bool decodes;

  const DecodeParams* decoder() const { return decodes ? &decode : nullptr; }
};

const PrefixParams& forward_of(const FusedParams& p) { return p.attend; }

FusedParams part_of(FusedParams p, const Part& part) {
  const int64_t first = part.key_head * (p.attend.heads / p.attend.key_heads);
  p.attend = part_of(p.attend, part);
  if (!p.decodes) return p;
  DecodeParams& d = p.decode;
  d.out = from(d.out, part.batch, first);
  d.batch = p.attend.batch;
  d.heads = p.attend.heads;
  if (d.decoder.heads == 1) return p;
  d.decoder.heads = d.heads;
  for (View* weight : {&d.decoder.S, &d.decoder.B, &d.decoder.theta, &d.decoder.psi, &d.decoder.step})
    *weight = from(*weight, first, 0);
  return p;
}

using SumsLaunch = int (*)(const PrefixSumsMmaArgs&, int64_t, void*);
using Launch = int (*)(const PrefixMmaArgs&, int64_t, int64_t, void*);

template <typename T>
SumsLaunch sums_instance(const limits::ForwardMmaPlan& plan) {
  return plan.feature == 64 ? launch_prefix_sums_mma<T, 64> : launch_prefix_sums_mma<T, 128>;
}
template <typename T>
Launch instance(const limits::ForwardMmaPlan& plan) {
  if (plan.feature == 128)
    return plan.atoms == 0 ? launch_attend_prefix_mma<T, 128, 0> : launch_attend_prefix_mma<T, 128, 64>;
  if (plan.atoms == 0) return launch_attend_prefix_mma<T, 64, 0>;
  return plan.atoms == 64 ? launch_attend_prefix_mma<T, 64, 64> : launch_attend_prefix_mma<T, 64, 128>;
}

struct MmaPlan {
  limits::ForwardMmaPlan plan;
  PrefixMmaArgs args{};
  PrefixSumsMmaArgs sums{};

  int take(const FusedParams& f, Carver& carver, void* stream) {
    const PrefixParams& p = f.attend;
    if (limits::plan_prefix_mma(plan, p, f.decoder(), shared_memory_limit())) return kUnsupported;
    take_rows(p);
    CSAT_TRY(take_tokens(p, carver, stream));
    take_states(p, carver);
    if (!f.decodes) return 0;
    args.rows.out = f.decode.out;
    args.rows.out_vectors = vector_stores(f.decode.out, f.decode.decoder.outputs);
    return take_decoder(args.rows.decoder, f.decode.decoder, p.q.dtype, carver, stream);
  }

  int run(const FusedParams& f, void* stream) const {
    const PrefixParams& p = f.attend;
    const bool in_bf16 = p.q.dtype == DType::bf16;
    const int64_t states = p.batch * p.state_heads, slabs = sums.padded / limits::kPrefixSumRows;
    const SumsLaunch launch_sums = in_bf16 ? sums_instance<bf16>(plan) : sums_instance<f16>(plan);
    CSAT_TRY(launch_sums(sums, states * sums.chunks * slabs, stream));
    CSAT_TRY(scan(p, stream));
    const int64_t units = int64_t(args.rows.pairs) * args.rows.units;
    const int64_t most = limits::prefix_mma_blocks(plan.feature, plan.atoms) * int64_t(multiprocessors());
    const Launch launch = in_bf16 ? instance<bf16>(plan) : instance<f16>(plan);
    PrefixMmaArgs own = args;
    own.run = static_cast<int>(ceil_div(units, most));
    return launch(own, ceil_div(units, own.run), plan.shared_bytes, stream);
  }

 private:
  void take_rows(const PrefixParams& p) {
    ForwardMmaArgs& rows = args.rows;
    rows.heads = static_cast<int>(p.heads);
    rows.pairs = static_cast<int>(p.batch * p.heads);
    rows.queries = p.tokens;
    rows.units = static_cast<int>(ceil_div(p.tokens, limits::kPrefixMmaChunk));
    rows.features = static_cast<int>(p.features);
    rows.z = p.z;
    rows.lse = p.lse;
    rows.measurements = p.measurements;
    rows.head_dim = static_cast<int>(p.head_dim);
    rows.chunks = plan.chunks;
    rows.slots = plan.slots;
    rows.scale = p.scale;
    rows.z_vectors = vector_stores(p.z, p.features);
    args.keep = p.keep;
    args.key_group = static_cast<int>(p.heads / p.key_heads);
    args.state_group = static_cast<int>(p.heads / p.state_heads);
    args.is_signed = p.is_signed;
  }

  int take_tokens(const PrefixParams& p, Carver& carver, void* stream) {
    const DType dtype = p.q.dtype;
    args.rows.q = p.q;
    args.rows.bias = p.bias;
    args.k = p.k;
    args.v = p.v;
    args.phi = p.phi;
    const int64_t phi_batch = p.keep ? p.batch : p.phi_batch;
    CSAT_TRY(take_vector_rows(args.rows.q, carver, dtype, p.batch, p.heads, p.tokens, p.head_dim, stream));
    CSAT_TRY(take_vector_rows(args.k, carver, dtype, p.batch, p.key_heads, p.tokens, p.head_dim, stream, p.keep));
    CSAT_TRY(take_vector_rows(args.v, carver, dtype, p.batch, p.key_heads, p.tokens, p.features, stream, p.keep));
    CSAT_TRY(
        take_vector_rows(args.phi, carver, dtype, phi_batch, p.phi_heads, p.tokens, p.measurements, stream, p.keep));
    if (phi_batch == 1) args.phi.stride[0] = 0;
    if (p.phi_heads == 1) args.phi.stride[1] = 0;
    return take_float_bias(args.rows.bias, carver, p.batch, p.heads, p.measurements, stream);
  }

  void take_states(const PrefixParams& p, Carver& carver) {
    const int64_t chunks = args.rows.units, padded = round_up(p.measurements, limits::kPrefixSumRows);
    const int64_t matrices = p.batch * p.state_heads * chunks, elements = padded * plan.feature;
    sums = {args.k,
            args.v,
            p.phi.dtype == DType::f32 ? p.phi : args.phi,
            p.state_heads,
            p.state_heads / p.key_heads,
            chunks,
            p.tokens,
            p.measurements,
            padded,
            static_cast<int>(p.head_dim),
            static_cast<int>(p.features),
            carver.take(matrices * elements),
            carver.take(matrices * elements),
            carver.take(matrices * padded),
            p.keep,
            p.is_signed};
    const auto means = [&] {
      const int64_t of_state = chunks * elements;
      return View{
          carver.take<char>(matrices * elements * 2), p.q.dtype, {p.state_heads * of_state, of_state, plan.feature, 1}};
    };
    args.state_keys = means();
    args.state_values = means();
    args.masses = {sums.masses, padded, padded};
  }

  int scan(const PrefixParams& p, void* stream) const {
    const int64_t states = p.batch * p.state_heads, M = p.measurements;
    CSAT_TRY(prefix_scan({args.masses, states, p.state_heads, sums.chunks, false, p.mass, p.mass_end, 1, M,
                          p.is_signed ? 1 : p.state_heads, p.is_signed ? 1 : M},
                         stream));
    const auto scan_means = [&](const float* of, const View& means, const View& start, const View& end,
                                int64_t columns) {
      return prefix_mean_scan({of, means.data, means.dtype, args.masses, p.is_signed, states, p.state_heads,
                               sums.chunks, sums.padded, plan.feature, start, end, M, columns},
                              stream);
    };
    CSAT_TRY(scan_means(sums.keys, args.state_keys, p.kc, p.kc_end, p.head_dim));
    return scan_means(sums.values, args.state_values, p.vc, p.vc_end, p.features);
  }
};

FusedParams fused(const PrefixParams& p, const DecodeParams* decode) {
  return {p, decode ? *decode : DecodeParams{}, decode != nullptr};
}

}  // namespace

int64_t attend_prefix_mma_workspace(const PrefixParams& p, const DecodeParams* decode) {
  const FusedParams f = fused(p, decode);
  return workspace_of<MmaPlan>(part_of(f, first_part<MmaPlan>(f)));
}

int attend_prefix_mma(const PrefixParams& p, const DecodeParams* decode, void* workspace, void* stream) {
  return run_in_parts<MmaPlan>(fused(p, decode), workspace, stream);
}

}  // namespace csat
