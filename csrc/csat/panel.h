// Launches of panel.cuh: operands into panels, reduction of partial sums, sums of outer products.
#pragma once
#include "csat/launch.h"

namespace csat {

// panel[i * n1 + j][r][c] = source[i, j, r, c] as float32 for r < rows, c < columns; `fill` in the padding. A null
// source counts as zeros. The panel has (panel_rows, pitch) floats a matrix.
struct PackArgs {
  const void* source;
  DType dtype;
  int64_t n0, n1, stride0, stride1;
  int64_t rows, columns, row_stride, column_stride;
  float* panel;
  int64_t panel_rows, pitch;
  float fill;
};
int pack(const PackArgs& p, void* stream);

// target[i, j, r, c] (+)= scale * sum over s < splits of partial[i * n1 + j][s][r][c], in the order of a fixed tree.
struct ReduceArgs {
  const float* partial;
  int64_t splits, batch_stride, split_stride, pitch;
  int64_t n0, n1, rows, columns;
  View target;
  float scale;
  bool accumulate;
};
int reduce(const ReduceArgs& p, void* stream);

// target[i, j] (+)= sum over k < depth of x[i, j][k]^T y[i, j][k]: x rows of x_columns floats, y rows of y_columns
// (both padded to 64), groups i < n0, members j < n1; target contiguous (n0, n1, rows, columns). `partial` holds
// outer_workspace() bytes.
struct OuterArgs {
  const float *x, *y;
  int64_t x_group, x_member, x_pitch, y_group, y_member, y_pitch;
  int64_t n0, n1, depth, rows, columns;
  float* partial;
  float* target;
  bool accumulate;
};
int64_t outer_workspace(int64_t n0, int64_t n1, int64_t depth, int64_t rows, int64_t columns);
int outer(const OuterArgs& p, void* stream);

}  // namespace csat
