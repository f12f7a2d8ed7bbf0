#include "csat/blocks.cuh"
#include "csat/panel.h"

namespace csat {
namespace {

constexpr int side(int columns) { return columns % 128 ? 64 : 128; }

BlockOuterSplit split_rows(const BlockOuterArgs& p) {
  BlockOuterSplit s{p, 0, 0, p.x_columns / side(p.x_columns), p.y_columns / side(p.y_columns)};
  const int64_t outputs = p.groups * p.members * s.row_tiles * s.column_tiles;
  if (outputs == 0 || p.row_blocks == 0) return s;
  const int64_t wanted = limits::ceil_div(limits::kOuterBlocks, outputs);
  const int64_t useful = limits::ceil_div(p.row_blocks * 16, limits::kOuterSplitRows);
  s.split_blocks = limits::ceil_div(p.row_blocks, wanted < useful ? wanted : useful);
  s.splits = limits::ceil_div(p.row_blocks, s.split_blocks);
  return s;
}

template <typename T, int kM, int kN>
int launch(const BlockOuterSplit& s, int64_t blocks, void* stream) {
  auto kernel = outer_blocks_kernel<T, kM, kN>;
  const size_t bytes = outer_stage::kStages * outer_stage::kDepthBlocks * 16 * (kM + kN) * sizeof(T);
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kMmaThreads), bytes, stream, s);
  return last_error();
}
template <typename T>
int launch(const BlockOuterSplit& s, int64_t blocks, void* stream) {
  const bool wide_x = side(s.args.x_columns) == 128, wide_y = side(s.args.y_columns) == 128;
  if (wide_x) return wide_y ? launch<T, 128, 128>(s, blocks, stream) : launch<T, 128, 64>(s, blocks, stream);
  return wide_y ? launch<T, 64, 128>(s, blocks, stream) : launch<T, 64, 64>(s, blocks, stream);
}

}  // namespace

int64_t outer_blocks_workspace(const BlockOuterArgs& p) {
  return p.groups * p.members * split_rows(p).splits * p.x_columns * p.y_columns * 4;
}

int outer_blocks(const BlockOuterArgs& p, void* stream) {
  const BlockOuterSplit s = split_rows(p);
  const int64_t blocks = p.groups * p.members * s.splits * s.row_tiles * s.column_tiles;
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  if (blocks > 0) {
    const int code = p.dtype == DType::bf16 ? launch<bf16>(s, blocks, stream) : launch<f16>(s, blocks, stream);
    if (code) return code;
  }
  const int64_t matrix = int64_t(p.x_columns) * p.y_columns, splits = (p.sum_members ? p.members : 1) * s.splits;
  return reduce({p.partial, splits, splits * matrix, matrix, p.y_columns, p.groups, p.sum_members ? 1 : p.members,
                 p.rows, p.columns, p.target, 1.f, p.accumulate},
                stream);
}

}  // namespace csat
