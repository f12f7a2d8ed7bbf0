// Host side of attend_causal's backward on tensor cores: operands with vector rows, splits, choice of the compiled
// instance, reductions.
#include "csat/attend_causal_backward_mma.cuh"
#include "csat/attend_causal_backward_mma.h"
#include "csat/backward_operands.h"

namespace csat {
namespace {

using limits::ceil_div;

// What the kernels need from the workspace; with a null base only sizes.
struct Plan {
  AttendCausalBackwardMmaArgs args{};
  int feature, slab;  // the compile-time size, and columns of a block

  explicit Plan(const AttendParams& f)
      : feature(limits::mma_feature(f.head_dim > f.features ? f.head_dim : f.features)),
        slab(limits::causal_slab_rows(feature)) {}

  int64_t rows() const { return args.measured.slabs * slab; }  // measurements, padded to whole slabs
  int take(const AttendCausalBackwardParams& p, Carver& carver, void* stream) {
    AttendBackwardMmaArgs& m = args.measured;
    const AttendParams& f = p.measured.forward;
    const int64_t pairs = f.batch * f.heads;
    m.slabs = ceil_div(f.measurements, slab);
    CSAT_TRY(take_backward_rows(m, p.measured, true, rows(), carver, stream));
    args.tokens = p.tokens;
    CSAT_TRY(take_token_rows(args.tokens, carver, f, stream));
    args.dk = p.dk;
    args.dv = p.dv;
    args.vector_dk = has_vector_rows(p.dk) && f.head_dim % 8 == 0;
    args.vector_dv = has_vector_rows(p.dv) && f.features % 8 == 0;
    m.centre = carver.take(pairs * f.queries);
    m.shift = carver.take(pairs * f.queries);
    m.chunks = chunks(pairs * m.slabs, f.queries);
    m.key_parts = carver.take(pairs * m.chunks * rows() * feature);
    m.value_parts = carver.take(pairs * m.chunks * rows() * feature);
    m.bias_parts = p.measured.dbias.data ? carver.take(pairs * m.chunks * rows()) : nullptr;
    return 0;
  }

 private:
  // Ranges of the queries that see a slab of measurements.
  static int64_t chunks(int64_t blocks, int64_t queries) {
    const int64_t most = ceil_div(queries, limits::kBackwardChunk);
    const int64_t wanted = blocks ? ceil_div(limits::kTargetBlocks, blocks) : 1;
    const int64_t chunks = wanted < most ? wanted : most;
    return chunks ? chunks : 1;
  }
};

using Launch = int (*)(const AttendCausalBackwardMmaArgs&, int64_t, void*);
struct Launches {
  Launch queries, measurements, tokens;
};

template <typename T, int kD>
Launches instance() {
  return {launch_query_backward_causal_mma<T, kD>, launch_column_backward_causal_mma<T, kD, false>,
          launch_column_backward_causal_mma<T, kD, true>};
}
template <typename T>
Launches instance(int feature) {
  switch (feature) {
    case 32:
      return instance<T, 32>();
    case 64:
      return instance<T, 64>();
    case 80:
      return instance<T, 80>();
    case 96:
      return instance<T, 96>();
    default:
      return instance<T, 128>();
  }
}

}  // namespace

int64_t attend_causal_backward_mma_workspace(const AttendCausalBackwardParams& p) {
  Carver carver(nullptr);
  Plan(p.measured.forward).take(p, carver, nullptr);
  return carver.used();
}

int attend_causal_backward_mma(const AttendCausalBackwardParams& p, void* workspace, void* stream) {
  const AttendParams& f = p.measured.forward;
  Carver carver(workspace);
  Plan plan(f);
  CSAT_TRY(plan.take(p, carver, stream));
  const AttendCausalBackwardMmaArgs& args = plan.args;
  const Launches launches = f.q.dtype == DType::bf16 ? instance<bf16>(plan.feature) : instance<f16>(plan.feature);
  const auto launch = [&](Launch kernel, int64_t blocks) { return blocks ? kernel(args, blocks, stream) : 0; };
  const int64_t pairs = f.batch * f.heads, block_queries = limits::kCausalQueryRows * limits::kMmaWarps;
  CSAT_TRY(launch(launches.queries, pairs * ceil_div(f.queries, block_queries)));  // before those that read its shift
  CSAT_TRY(launch(launches.measurements, pairs * args.measured.chunks * args.measured.slabs));
  CSAT_TRY(launch(launches.tokens, f.batch * p.tokens.heads * ceil_div(p.tokens.count, plan.slab)));
  return reduce_backward_parts(args.measured, p.measured, plan.rows(), plan.feature, stream);
}

}  // namespace csat
