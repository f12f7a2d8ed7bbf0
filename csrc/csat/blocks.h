// Launches of blocks.cuh: sums of outer products of 16-bit rows.
#pragma once
#include "csat/launch.h"

namespace csat {

// target[i, j] (+)= sum over rows k of scale[i, j] x[i, j][k]^T y[i, j][k], for groups i and members j; with
// `sum_members` the members are summed too and the target has one. x and y are blocks (blocks.cuh), their columns
// padded to a multiple of 64. `partial` holds outer_blocks_workspace() bytes.
struct BlockOuterArgs {
  DType dtype;
  const uint32_t *x, *y;
  int64_t x_group, x_member, y_group, y_member;  // in words
  const float* scale;                            // element (i, j) at [i * scale_group + j]; null: 1
  int64_t scale_group;
  int64_t groups, members, row_blocks;
  int x_columns, y_columns;
  bool sum_members;
  float* partial;
  View target;  // axes: group, member, row, column
  int64_t rows, columns;
  bool accumulate;
};
int64_t outer_blocks_workspace(const BlockOuterArgs& p);
int outer_blocks(const BlockOuterArgs& p, void* stream);

}  // namespace csat
