// What the tensor-core kernels of attend's backward take from the workspace, and the sums of its parts. Host code only.
#pragma once
#include "csat/attend_backward_mma.cuh"
#include "csat/workspace.h"

namespace csat {

// Operands with vector rows, z where it is `read`; `rows`: the measurements, padded to whole slabs.
inline int take_backward_rows(AttendBackwardMmaArgs& args, const AttendBackwardParams& p, bool read_z, int64_t rows,
                              Carver& carver, void* stream) {
  const AttendParams& f = p.forward;
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
  const auto take = [&](View& target, const View& source, int64_t heads, int64_t count, int64_t columns) {
    target = source;
    return take_vector_rows(target, carver, f.q.dtype, f.batch, heads, count, columns, stream);
  };
  CSAT_TRY(take(args.q, f.q, f.heads, f.queries, f.head_dim));
  if (read_z) CSAT_TRY(take(args.z, f.z, f.heads, f.queries, f.features));
  CSAT_TRY(take(args.dz, p.dz, f.heads, f.queries, f.features));
  CSAT_TRY(take(args.kc, f.kc, f.key_heads, f.measurements, f.head_dim));
  CSAT_TRY(take(args.vc, f.vc, f.key_heads, f.measurements, f.features));
  return take_panel(args.bias, carver, bias_operand(f), 1, limits::round_up(rows, limits::kBackwardColumns), stream);
}

// dkc, dvc and dbias from the parts of `rows` padded measurements with `pitch` features: those of the heads of a group
// and of the ranges of queries in a fixed order.
inline int reduce_backward_parts(const AttendBackwardMmaArgs& args, const AttendBackwardParams& p, int64_t rows,
                                 int64_t pitch, void* stream) {
  const AttendParams& f = p.forward;
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
