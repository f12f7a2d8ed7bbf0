// What the SIMT kernels of attend take from the workspace: panels of the operands, partial sums. Host code only.
#pragma once
#include "csat/attend_backward.cuh"
#include "csat/forward.cuh"
#include "csat/workspace.h"

namespace csat {

// `columns`: the most that one softmax goes over, of which a tile is scored at a time.
inline int take_attend(ForwardArgs& args, const AttendParams& p, int64_t columns, Carver& carver, void* stream) {
  using limits::column_pad;
  args.heads = p.heads;
  args.queries = p.queries;
  args.features = static_cast<int>(p.features);
  args.z_pitch = column_pad(p.features);
  args.z = p.z;
  args.q = p.q;
  args.lse = p.lse;
  args.group = p.heads / p.key_heads;
  args.head_dim = static_cast<int>(p.head_dim);
  args.q_pitch = limits::depth_pad(p.head_dim);
  args.measurement_tile = limits::measurement_tile(columns);
  args.scale = p.scale;
  const int64_t panel = column_pad(p.measurements);
  const PackArgs keys = operand(p.kc, p.batch, p.key_heads, p.measurements, p.head_dim);
  const PackArgs values = operand(p.vc, p.batch, p.key_heads, p.measurements, p.features);
  CSAT_TRY(take_panel(args.keys, carver, transposed(keys), args.q_pitch, panel, stream));
  CSAT_TRY(take_panel(args.values, carver, values, panel, args.z_pitch, stream));
  return take_panel(args.bias, carver, bias_operand(p), 1, panel, stream);
}

// Everything attend_backward needs from its workspace; with a null base only sizes.
struct BackwardPlan {
  AttendBackwardArgs args{};
  int query_rows = 0, measurement_rows = 0;
  int64_t query_floats = 0, measurement_floats = 0;  // of shared memory a row

  // `scored`: the most columns that one softmax goes over; `more`: floats of a row beyond those of attend; `wanted`:
  // the blocks that chunks of queries are to give measurement_backward.
  int take(const AttendBackwardParams& p, int64_t scored, int64_t more, int64_t wanted, Carver& carver, void* stream) {
    using limits::ceil_div;
    using limits::column_pad;
    using limits::depth_pad;
    const AttendParams& f = p.forward;
    args.heads = f.heads;
    args.queries = f.queries;
    args.group = f.heads / f.key_heads;
    args.head_dim = static_cast<int>(f.head_dim);
    args.features = static_cast<int>(f.features);
    args.q = f.q;
    args.z = f.z;
    args.dz = p.dz;
    args.lse = f.lse;
    args.dq = p.dq;
    args.q_pitch = depth_pad(f.head_dim);
    args.dz_pitch = depth_pad(f.features);
    args.dq_pitch = column_pad(f.head_dim);
    args.measurement_tile = limits::measurement_tile(scored);
    args.scale = f.scale;
    const int64_t limit = shared_memory_limit();
    query_floats = limits::query_backward_row(scored, f.head_dim, f.features) + more;
    measurement_floats = limits::measurement_backward_row(f.head_dim, f.features) + more;
    query_rows = limits::row_tile(query_floats, limit);
    measurement_rows = limits::row_tile(measurement_floats, limit);
    if (query_rows == 0 || measurement_rows == 0) return kUnsupported;

    const int64_t columns = column_pad(f.measurements), pairs = f.batch * f.heads;
    const PackArgs keys = operand(f.kc, f.batch, f.key_heads, f.measurements, f.head_dim);
    const PackArgs values = operand(f.vc, f.batch, f.key_heads, f.measurements, f.features);
    CSAT_TRY(take_panel(args.keys_t, carver, transposed(keys), args.q_pitch, columns, stream));
    CSAT_TRY(take_panel(args.values_t, carver, transposed(values), args.dz_pitch, columns, stream));
    CSAT_TRY(take_panel(args.keys, carver, keys, columns, args.dq_pitch, stream));
    CSAT_TRY(take_panel(args.bias, carver, bias_operand(f), 1, columns, stream));
    args.centre = carver.take(pairs * f.queries);
    args.shift = carver.take(pairs * f.queries);
    const int64_t blocks = pairs * columns / limits::kMicroColumns;
    const int64_t tiles = ceil_div(f.queries, measurement_rows);
    int64_t chunks = blocks ? ceil_div(wanted, blocks) : 1;
    if (chunks > ceil_div(tiles, 8)) chunks = ceil_div(tiles, 8);
    args.chunk_queries = chunks ? ceil_div(tiles, chunks) * measurement_rows : 0;
    args.chunks = chunks ? ceil_div(f.queries, args.chunk_queries) : 0;
    args.key_parts = carver.take(pairs * args.chunks * columns * args.dq_pitch);
    args.value_parts = carver.take(pairs * args.chunks * columns * column_pad(f.features));
    args.bias_parts = p.dbias.data ? carver.take(pairs * args.chunks * columns) : nullptr;
    return 0;
  }

  int64_t measurement_blocks(const AttendParams& f) const {
    return f.batch * f.heads * args.chunks * (args.keys_t.pitch / limits::kMicroColumns);
  }
  // dkc, dvc and dbias from the partial sums.
  int reduce_measurements(const AttendBackwardParams& p, void* stream) const {
    const AttendParams& f = p.forward;
    const int64_t columns = args.keys_t.pitch;
    const int64_t splits = args.group * args.chunks, d_pitch = args.dq_pitch, r_pitch = limits::column_pad(f.features);
    CSAT_TRY(reduce({args.key_parts, splits, splits * columns * d_pitch, columns * d_pitch, d_pitch, f.batch,
                     f.key_heads, f.measurements, f.head_dim, p.dkc, f.scale, false},
                    stream));
    CSAT_TRY(reduce({args.value_parts, splits, splits * columns * r_pitch, columns * r_pitch, r_pitch, f.batch,
                     f.key_heads, f.measurements, f.features, p.dvc, 1.f, false},
                    stream));
    if (!p.dbias.data) return 0;
    return reduce({args.bias_parts, args.chunks, args.chunks * columns, columns, columns, f.batch, f.heads, 1,
                   f.measurements, p.dbias, 1.f, false},
                  stream);
  }
};

}  // namespace csat
