// Host side of attend's backward on tensor cores: operands with vector rows, splits, choice of the compiled instance,
// reductions.
#include "csat/attend_backward_mma.cuh"
#include "csat/attend_backward_mma.h"
#include "csat/attend_backward_wgmma.cuh"
#include "csat/backward_operands.h"

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

  bool wgmma() const { return sizes.row_blocks > 0; }
  int take(const AttendBackwardParams& p, Carver& carver, void* stream) {
    args.warps = static_cast<int>(sizes.warps);
    args.slabs = sizes.slabs;
    CSAT_TRY(take_backward_rows(args, p, !wgmma(), rows, carver, stream));
    take_parts(p, carver);
    return 0;
  }

 private:
  int64_t mma_chunks(int64_t pairs, int64_t queries) const {
    const int64_t blocks = pairs * args.slabs, most = ceil_div(queries, limits::kBackwardChunk);
    const int64_t chunks = blocks ? ceil_div(limits::kTargetBlocks, blocks) : 1;
    return chunks < most ? chunks : most;
  }
  // Blocks of one warpgroup share a multiprocessor in pairs.
  int64_t wgmma_chunks(int64_t pairs, int64_t queries) const {
    const int64_t slots = multiprocessors() * (limits::kMmaWarps / sizes.warps);
    return queries ? limits::wgmma_backward_chunks(pairs, queries, slots) : 0;
  }
  void take_parts(const AttendBackwardParams& p, Carver& carver) {
    const AttendParams& f = p.forward;
    const int64_t pairs = f.batch * f.heads, tiles = ceil_div(f.queries, sizes.queries);
    const int64_t chunks = wgmma() ? wgmma_chunks(pairs, f.queries) : mma_chunks(pairs, f.queries);
    args.chunk_queries = chunks ? ceil_div(tiles, chunks) * sizes.queries : 0;
    args.chunks = chunks ? ceil_div(f.queries, args.chunk_queries) : 0;
    args.key_parts = carver.take(pairs * args.chunks * rows * feature);
    args.value_parts = carver.take(pairs * args.chunks * rows * feature);
    args.bias_parts = p.dbias.data ? carver.take(pairs * args.chunks * rows) : nullptr;
    if (args.slabs == 1) return;
    args.shift = carver.take(pairs * f.queries);
    if (wgmma()) {
      args.query_parts = carver.take(pairs * args.chunks * args.chunk_queries * feature);
    } else {
      args.centre = carver.take(pairs * f.queries);
      args.query_parts = carver.take(pairs * args.slabs * f.queries * feature);
    }
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
template <typename T>
Launches instance(const limits::AttendBackwardPlan& sizes) {
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

using WgmmaLaunch = int (*)(const AttendBackwardMmaArgs&, const AttendBackwardMaps&, int64_t, void*);
struct WgmmaLaunches {
  WgmmaLaunch mean, gradients;
};

template <typename T>
WgmmaLaunches wgmma_instance(const limits::AttendBackwardPlan& sizes) {
  const bool one_slab = sizes.slabs == 1, two_groups = sizes.warps == limits::kMmaWarps;
  if (sizes.feature == 128) {
    const WgmmaLaunch mean = launch_backward_mean_wgmma<T, 128>;
    if (!two_groups) return {mean, launch_attend_backward_wgmma<T, 128, 1, 1, true>};
    return {mean, one_slab ? launch_attend_backward_wgmma<T, 128, 1, 2, true>
                           : launch_attend_backward_wgmma<T, 128, 1, 2, false>};
  }
  const WgmmaLaunch mean = launch_backward_mean_wgmma<T, 64>;
  if (sizes.row_blocks == 1) return {mean, launch_attend_backward_wgmma<T, 64, 1, 1, true>};
  if (two_groups)
    return {mean, one_slab ? launch_attend_backward_wgmma<T, 64, 2, 2, true>
                           : launch_attend_backward_wgmma<T, 64, 2, 2, false>};
  return {mean, one_slab ? launch_attend_backward_wgmma<T, 64, 2, 1, true>
                         : launch_attend_backward_wgmma<T, 64, 2, 1, false>};
}

template <typename T>
int map_tensors(AttendBackwardMaps& maps, const AttendBackwardMmaArgs& args, const AttendParams& f, int query_rows,
                int measurement_rows) {
  CSAT_TRY(make_row_boxes<T>(&maps.q, args.q, f.batch, f.heads, f.queries, f.head_dim, query_rows));
  CSAT_TRY(make_row_boxes<T>(&maps.dz, args.dz, f.batch, f.heads, f.queries, f.features, query_rows));
  CSAT_TRY(make_row_boxes<T>(&maps.kc, args.kc, f.batch, f.key_heads, f.measurements, f.head_dim, measurement_rows));
  return make_row_boxes<T>(&maps.vc, args.vc, f.batch, f.key_heads, f.measurements, f.features, measurement_rows);
}

template <typename T>
int launch_wgmma(const limits::AttendBackwardPlan& sizes, const AttendBackwardMmaArgs& args, const AttendParams& f,
                 void* stream) {
  const WgmmaLaunches launches = wgmma_instance<T>(sizes);
  const int64_t pairs = f.batch * f.heads;
  AttendBackwardMaps maps;
  if (sizes.slabs > 1) {
    CSAT_TRY(map_tensors<T>(maps, args, f, limits::kWgmmaRows, limits::kWgmmaMeanDepth));
    CSAT_TRY(launches.mean(args, maps, pairs * ceil_div(f.queries, 2 * limits::kWgmmaRows), stream));
  }
  CSAT_TRY(map_tensors<T>(maps, args, f, sizes.queries, static_cast<int>(sizes.slab_rows)));
  return launches.gradients(args, maps, pairs * args.chunks, stream);
}
template <typename T>
int launch_mma(const limits::AttendBackwardPlan& sizes, const AttendBackwardMmaArgs& args, const AttendParams& f,
               const View& dq, void* stream) {
  const Launches launches = instance<T>(sizes);
  const int64_t pairs = f.batch * f.heads, pitch = sizes.feature;
  if (args.slabs == 1) return launches.gradients(args, pairs * args.chunks, stream);
  CSAT_TRY(launches.shift(args, pairs * ceil_div(f.queries, 16 * limits::kMmaWarps), stream));
  CSAT_TRY(launches.gradients(args, pairs * args.slabs * args.chunks, stream));
  return reduce({args.query_parts, args.slabs, args.slabs * f.queries * pitch, f.queries * pitch, pitch, f.batch,
                 f.heads, f.queries, f.head_dim, dq, f.scale, false},
                stream);
}
template <typename T>
int launch(const Plan& plan, const AttendBackwardParams& p, void* stream) {
  return plan.wgmma() ? launch_wgmma<T>(plan.sizes, plan.args, p.forward, stream)
                      : launch_mma<T>(plan.sizes, plan.args, p.forward, p.dq, stream);
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
  if (f.batch * f.heads > 0 && f.queries > 0)
    CSAT_TRY(f.q.dtype == DType::bf16 ? launch<bf16>(plan, p, stream) : launch<f16>(plan, p, stream));
  return reduce_backward_parts(plan.args, p, plan.rows, plan.feature, stream);
}

}  // namespace csat
