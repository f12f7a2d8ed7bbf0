// Host side of attend_prefix_backward_mma.cuh: places of the gradients, sums over the query heads of a state, scan from
// the last chunk; batch elements and key heads in parts (prefix_parts.h).
#include <optional>

#include "csat/attend_prefix_backward_mma.cuh"
#include "csat/attend_prefix_backward_mma.h"
#include "csat/panel.h"
#include "csat/prefix_parts.h"
#include "csat/prefix_states.h"

namespace csat {
namespace {

using QueryLaunch = int (*)(const PrefixGradientArgs&, int64_t, void*);
using TokenLaunch = int (*)(const PrefixTokenMmaArgs&, int64_t, void*);

template <typename T>
QueryLaunch query_instance(int feature) {
  return feature == 64 ? launch_prefix_query_backward_mma<T, 64> : launch_prefix_query_backward_mma<T, 128>;
}
template <typename T>
TokenLaunch token_instance(int feature) {
  return feature == 64 ? launch_prefix_token_backward_mma<T, 64> : launch_prefix_token_backward_mma<T, 128>;
}

// Sums over the chunks of every query head, and of every state head where several share one.
struct GradientSums {
  float *of_queries, *of_states;
  int64_t rows, columns;  // of a chunk

  GradientSums(const PrefixParams& p, int64_t chunks, int64_t rows, int64_t columns, Carver& carver)
      : of_queries(carver.take(p.batch * p.heads * chunks * rows * columns)),
        of_states(p.heads == p.state_heads ? of_queries
                                           : carver.take(p.batch * p.state_heads * chunks * rows * columns)),
        rows(rows),
        columns(columns) {}

  // What comes behind each chunk, from the end of the state's gradient `end`; the gradient of the state before all.
  int scan(const PrefixParams& p, int64_t chunks, const View& end, const View& before, int64_t of_rows,
           int64_t of_columns, void* stream) const {
    const int64_t matrix = rows * columns, all = chunks * matrix, group = p.heads / p.state_heads;
    const View states{of_states, DType::f32, {p.state_heads * all, all, columns, 1}};
    if (group > 1)
      CSAT_TRY(reduce({of_queries, group, group * all, all, columns, p.batch, p.state_heads, chunks * rows, columns,
                       states, 1.f, false},
                      stream));
    return prefix_scan({{of_states, columns, matrix},
                        p.batch * p.state_heads,
                        p.state_heads,
                        chunks,
                        true,
                        end,
                        before,
                        of_rows,
                        of_columns,
                        p.state_heads,
                        of_columns},
                       stream);
  }
};

struct MmaPlan {
  PrefixStatesPlan states;
  PrefixTokenMmaArgs args{};
  std::optional<GradientSums> keys, values, masses;

  int take(const PrefixBackwardParams& p, Carver& carver, void* stream) {
    const PrefixParams& f = p.forward;
    CSAT_TRY(states.take(f, nullptr, carver, stream));
    PrefixGradientArgs& queries = args.queries;
    const int64_t chunks = states.args.rows.units, padded = states.sums.padded, feature = states.plan.feature;
    const int64_t pairs = f.batch * f.heads, rows = pairs * chunks * limits::kPrefixMmaChunk;
    queries.forward = states.args;
    queries.dz = p.dz;
    queries.dq = p.dq;
    queries.dq_vectors = vector_stores(p.dq, f.head_dim);
    CSAT_TRY(take_vector_rows(queries.dz, carver, f.q.dtype, f.batch, f.heads, f.tokens, f.features, stream));
    queries.a = carver.take<char>(rows * padded * 2);
    queries.w = carver.take<char>(rows * padded * 2);
    queries.later = carver.take(rows * padded);
    keys.emplace(f, chunks, padded, feature, carver);
    values.emplace(f, chunks, padded, feature, carver);
    masses.emplace(f, chunks, 1, padded, carver);
    queries.key_sums = keys->of_queries;
    queries.value_sums = values->of_queries;
    queries.mass_sums = masses->of_queries;
    queries.bias_parts = p.dbias.data ? carver.take(pairs * chunks * padded) : nullptr;
    args.state_keys = keys->of_states;
    args.state_values = values->of_states;
    args.masses = masses->of_states;
    args.dk = p.dk;
    args.dv = p.dv;
    args.dphi = p.dphi;
    args.key_heads = static_cast<int>(f.key_heads);
    args.dk_vectors = vector_stores(p.dk, f.head_dim);
    args.dv_vectors = vector_stores(p.dv, f.features);
    return 0;
  }

  int run(const PrefixBackwardParams& p, void* stream) const {
    PrefixParams f = p.forward;
    f.kc_end = f.vc_end = f.mass_end = {};
    CSAT_TRY(states.run(f, stream));
    const int feature = states.plan.feature;
    const bool in_bf16 = f.q.dtype == DType::bf16;
    const int64_t chunks = states.args.rows.units, padded = states.sums.padded;
    const QueryLaunch of_queries = in_bf16 ? query_instance<bf16>(feature) : query_instance<f16>(feature);
    CSAT_TRY(of_queries(args.queries, f.batch * f.heads * chunks, stream));
    CSAT_TRY(keys->scan(f, chunks, p.dkc_end, p.dkc, f.measurements, f.head_dim, stream));
    CSAT_TRY(values->scan(f, chunks, p.dvc_end, p.dvc, f.measurements, f.features, stream));
    if (!f.is_signed) CSAT_TRY(masses->scan(f, chunks, p.dmass_end, p.dmass, 1, f.measurements, stream));
    const TokenLaunch of_tokens = in_bf16 ? token_instance<bf16>(feature) : token_instance<f16>(feature);
    CSAT_TRY(of_tokens(args, f.batch * f.key_heads * chunks, stream));
    if (!p.dbias.data) return 0;
    return reduce({args.queries.bias_parts, chunks, chunks * padded, padded, padded, f.batch, f.heads, 1,
                   f.measurements, p.dbias, 1.f, false},
                  stream);
  }
};

}  // namespace

int64_t attend_prefix_backward_mma_workspace(const PrefixBackwardParams& p) {
  return workspace_of<MmaPlan>(part_of(p, first_part<MmaPlan>(p)));
}

int attend_prefix_backward_mma(const PrefixBackwardParams& p, void* workspace, void* stream) {
  return run_in_parts<MmaPlan>(p, workspace, stream);
}

}  // namespace csat
