// What the tensor-core kernels of attend_prefix and of its backward share: operands with vector rows, sums and means of
// the chunks. Host code only.
#pragma once
#include "csat/attend_prefix_mma.cuh"
#include "csat/prefix_scan.h"
#include "csat/workspace.h"

namespace csat {

using PrefixSumsLaunch = int (*)(const PrefixSumsMmaArgs&, int64_t, void*);

template <typename T>
PrefixSumsLaunch prefix_sums_instance(int feature) {
  return feature == 64 ? launch_prefix_sums_mma<T, 64> : launch_prefix_sums_mma<T, 128>;
}

struct PrefixStatesPlan {
  limits::ForwardMmaPlan plan;
  PrefixMmaArgs args{};
  PrefixSumsMmaArgs sums{};

  int take(const PrefixParams& p, const DecodeParams* decode, Carver& carver, void* stream) {
    if (limits::plan_prefix_mma(plan, p, decode, shared_memory_limit())) return kUnsupported;
    take_rows(p);
    CSAT_TRY(take_tokens(p, carver, stream));
    take_states(p, carver);
    return 0;
  }

  // Means and masses before each chunk; the state behind the last one where p has a place for it.
  int run(const PrefixParams& p, void* stream) const {
    const int64_t states = p.batch * p.state_heads, slabs = sums.padded / limits::kPrefixSumRows;
    const PrefixSumsLaunch launch =
        p.q.dtype == DType::bf16 ? prefix_sums_instance<bf16>(plan.feature) : prefix_sums_instance<f16>(plan.feature);
    CSAT_TRY(launch(sums, states * sums.chunks * slabs, stream));
    return scan(p, stream);
  }

 private:
  void take_rows(const PrefixParams& p) {
    ForwardMmaArgs& rows = args.rows;
    rows.heads = static_cast<int>(p.heads);
    rows.pairs = static_cast<int>(p.batch * p.heads);
    rows.queries = p.tokens;
    rows.units = static_cast<int>(limits::ceil_div(p.tokens, limits::kPrefixMmaChunk));
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
    const int64_t chunks = args.rows.units, padded = limits::round_up(p.measurements, limits::kPrefixSumRows);
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

}  // namespace csat
