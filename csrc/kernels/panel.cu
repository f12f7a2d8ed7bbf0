#include "csat/dispatch.h"
#include "csat/panel.cuh"

namespace csat {
namespace {

constexpr int kSide = limits::kMicroColumns;

OuterSplit split_outer(const OuterArgs& p) {
  OuterSplit s{p, 1, 0, limits::ceil_div(p.rows, kSide), limits::ceil_div(p.columns, kSide)};
  const int64_t outputs = p.n0 * p.n1 * s.row_tiles * s.column_tiles;
  const int64_t wanted = outputs ? limits::ceil_div(limits::kTargetBlocks, outputs) : 1;
  const int64_t useful = limits::ceil_div(p.depth, 8 * limits::kOuterDepth);
  const int64_t splits = wanted < useful ? wanted : (useful ? useful : 1);
  s.split_depth = limits::round_up(limits::ceil_div(p.depth, splits), limits::kOuterDepth);
  s.splits = s.split_depth ? limits::ceil_div(p.depth, s.split_depth) : 0;
  return s;
}

}  // namespace

int pack(const PackArgs& p, void* stream) {
  const int64_t blocks = p.n0 * p.n1 * limits::ceil_div(p.panel_rows, 32) * limits::ceil_div(p.pitch, 32);
  if (blocks == 0) return 0;
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  return with_dtype(p.dtype, [&](auto element) {
    auto kernel = pack_kernel<decltype(element)>;
    CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), 32 * 33 * sizeof(float), stream,
                p);
    return last_error();
  });
}

int reduce(const ReduceArgs& p, void* stream) {
  const int64_t blocks = p.n0 * p.n1 * p.rows * limits::ceil_div(p.columns, 32);
  if (blocks == 0) return 0;
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  return with_dtype(p.target.dtype, [&](auto element) {
    auto kernel = reduce_kernel<decltype(element)>;
    CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), limits::kThreads * sizeof(float),
                stream, p);
    return last_error();
  });
}

int64_t outer_workspace(int64_t n0, int64_t n1, int64_t depth, int64_t rows, int64_t columns) {
  OuterArgs p{};
  p.n0 = n0, p.n1 = n1, p.depth = depth, p.rows = rows, p.columns = columns;
  const OuterSplit s = split_outer(p);
  return n0 * n1 * s.splits * s.row_tiles * s.column_tiles * kSide * kSide * 4;
}

int outer(const OuterArgs& p, void* stream) {
  const OuterSplit s = split_outer(p);
  const int64_t blocks = p.n0 * p.n1 * s.splits * s.row_tiles * s.column_tiles;
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  if (blocks > 0) {
    CSAT_LAUNCH(outer_kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads),
                2 * limits::kOuterDepth * kSide * sizeof(float), stream, s);
    if (const int code = last_error()) return code;
  }
  const int64_t pitch = s.column_tiles * kSide, matrix = s.row_tiles * kSide * pitch;
  ReduceArgs r{p.partial, s.splits, s.splits * matrix, matrix, pitch, p.n0,
               p.n1,      p.rows,   p.columns,         {},     1.f,   p.accumulate};
  r.target = {p.target, DType::f32, {p.n1 * p.rows * p.columns, p.rows * p.columns, p.columns, 1}};
  return reduce(r, stream);
}

}  // namespace csat
