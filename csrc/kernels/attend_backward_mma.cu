// Host side of attend's backward on tensor cores: operands with vector rows, splits, choice of the compiled instance,
// reductions.
#include "csat/attend_backward_mma.cuh"
#include "csat/attend_backward_mma.h"
#include "csat/attend_backward_wgmma.cuh"
#include "csat/workspace.h"

namespace csat {
namespace {

using limits::ceil_div;

// What the kernels need from the workspace; with a null base only sizes.
struct Plan {
  AttendBackwardMmaArgs args{};
  const limits::AttendBackwardPlan& sizes;
  const int feature = sizes.feature;
  const int64_t rows = sizes.slabs * sizes.slab_rows;  // measurements, padded to whole slabs

  explicit Plan(const limits::AttendBackwardPlan& plan) : sizes(plan) {}

  int take(const AttendBackwardParams& p, Carver& carver, void* stream) {
    const AttendParams& f = p.forward;
    args.warps = static_cast<int>(sizes.warps);
    args.slabs = sizes.slabs;
    args.heads = f.heads;
    args.queries = f.queries;
    args.group = f.heads / f.key_heads;
    args.measurements = f.measurements;
    args.head_dim = static_cast<int>(f.head_dim);
    args.features = static_cast<int>(f.features);
    args.scale = f.scale;
    args.lse = f.lse;
    args.dq = p.dq;
    args.vector_dq = has_vector_rows(p.dq) && f.head_dim % 8 == 0;
    CSAT_TRY(take_rows(args.q, f.q, f, f.heads, f.queries, f.head_dim, carver, stream));
    CSAT_TRY(take_rows(args.z, f.z, f, f.heads, f.queries, f.features, carver, stream));
    CSAT_TRY(take_rows(args.dz, p.dz, f, f.heads, f.queries, f.features, carver, stream));
    CSAT_TRY(take_rows(args.kc, f.kc, f, f.key_heads, f.measurements, f.head_dim, carver, stream));
    CSAT_TRY(take_rows(args.vc, f.vc, f, f.key_heads, f.measurements, f.features, carver, stream));
    const int64_t bias_pitch = limits::round_up(rows, limits::kBackwardShiftDepth);
    CSAT_TRY(take_panel(args.bias, carver, bias_operand(f), 1, bias_pitch, stream));
    take_parts(p, carver);
    return 0;
  }

 private:
  static int take_rows(View& target, const View& source, const AttendParams& f, int64_t heads, int64_t rows,
                       int64_t columns, Carver& carver, void* stream) {
    target = source;
    return take_vector_rows(target, carver, f.q.dtype, f.batch, heads, rows, columns, stream);
  }
  void take_parts(const AttendBackwardParams& p, Carver& carver) {
    const AttendParams& f = p.forward;
    const int64_t pairs = f.batch * f.heads, blocks = pairs * args.slabs;
    const int64_t tiles = ceil_div(f.queries, sizes.queries), most = ceil_div(f.queries, limits::kBackwardChunk);
    int64_t chunks = blocks ? ceil_div(limits::kTargetBlocks, blocks) : 1;
    if (chunks > most) chunks = most;
    args.chunk_queries = chunks ? ceil_div(tiles, chunks) * sizes.queries : 0;
    args.chunks = chunks ? ceil_div(f.queries, args.chunk_queries) : 0;
    args.key_parts = carver.take(pairs * args.chunks * rows * feature);
    args.value_parts = carver.take(pairs * args.chunks * rows * feature);
    args.bias_parts = p.dbias.data ? carver.take(pairs * args.chunks * rows) : nullptr;
    if (args.slabs == 1) return;
    args.centre = carver.take(pairs * f.queries);
    args.shift = carver.take(pairs * f.queries);
    args.query_parts = carver.take(pairs * args.slabs * f.queries * feature);
  }
};

using Launch = int (*)(const AttendBackwardMmaArgs&, int64_t, void*);
struct Launches {
  Launch shift, gradients;
};

template <typename T, int kD>
Launches instance() {
  return {launch_backward_shift_mma<T, kD>, launch_attend_backward_mma<T, kD>};
}
template <typename T, int kD>
Launches wgmma_instance(const limits::AttendBackwardPlan& sizes) {
  Launch gradients = launch_attend_backward_wgmma<T, kD, 1, 2>;
  if (sizes.warps == 4) gradients = launch_attend_backward_wgmma<T, kD, 1, 1>;
  if constexpr (kD == 64)
    if (sizes.row_blocks == 2) gradients = launch_attend_backward_wgmma<T, kD, 2, 2>;
  return {launch_backward_shift_mma<T, kD>, gradients};
}
template <typename T>
Launches instance(const limits::AttendBackwardPlan& sizes) {
  if (sizes.row_blocks > 0) return sizes.feature == 64 ? wgmma_instance<T, 64>(sizes) : wgmma_instance<T, 128>(sizes);
  switch (sizes.feature) {
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

int64_t attend_backward_mma_workspace(const limits::AttendBackwardPlan& sizes, const AttendBackwardParams& p) {
  Carver carver(nullptr);
  Plan(sizes).take(p, carver, nullptr);
  return carver.used();
}

int attend_backward_mma(const limits::AttendBackwardPlan& sizes, const AttendBackwardParams& p, void* workspace,
                        void* stream) {
  const AttendParams& f = p.forward;
  Carver carver(workspace);
  Plan plan(sizes);
  CSAT_TRY(plan.take(p, carver, stream));
  const AttendBackwardMmaArgs& args = plan.args;
  const int64_t pairs = f.batch * f.heads, pitch = plan.feature, rows = plan.rows;
  const int64_t shift_blocks = args.slabs > 1 ? pairs * ceil_div(f.queries, 16 * limits::kMmaWarps) : 0;
  const int64_t blocks = pairs * args.slabs * args.chunks;
  const Launches launches = f.q.dtype == DType::bf16 ? instance<bf16>(sizes) : instance<f16>(sizes);
  if (shift_blocks > 0) CSAT_TRY(launches.shift(args, shift_blocks, stream));
  if (blocks > 0) CSAT_TRY(launches.gradients(args, blocks, stream));
  if (args.slabs > 1)
    CSAT_TRY(reduce({args.query_parts, args.slabs, args.slabs * f.queries * pitch, f.queries * pitch, pitch, f.batch,
                     f.heads, f.queries, f.head_dim, p.dq, f.scale, false},
                    stream));
  const int64_t splits = args.group * args.chunks;
  CSAT_TRY(reduce({args.key_parts, splits, splits * rows * pitch, rows * pitch, pitch, f.batch, f.key_heads,
                   f.measurements, f.head_dim, p.dkc, f.scale, false},
                  stream));
  CSAT_TRY(reduce({args.value_parts, splits, splits * rows * pitch, rows * pitch, pitch, f.batch, f.key_heads,
                   f.measurements, f.features, p.dvc, 1.f, false},
                  stream));
  if (!p.dbias.data) return 0;
  return reduce({args.bias_parts, args.chunks, args.chunks * rows, rows, rows, f.batch, f.heads, 1, f.measurements,
                 p.dbias, 1.f, false},
                stream);
}

}  // namespace csat
