// Warp tiles: what every kernel of this family is made of.
//
// A block of four warps owns a tile of 8, 16 or 32 rows, kept in shared memory as float32. Products with a matrix W go
// in micro-tiles of 8 rows x 64 columns, one warp each: the rows are broadcast from shared memory (16 bytes at a time),
// W streams from global memory through L1, lane l holding columns l and l + 32 (one coalesced 128-byte load each).
// For four steps of depth a warp issues 8 loads of W, 8 broadcasts and 64 FMA per lane.
//
// W is a panel: float32, its depth padded to a multiple of 4 and its columns to a multiple of 64 with zeros, so that no
// inner loop has a bound to check (panel.cuh makes them).
#pragma once
#include "csat/limits.h"
#include "csat/prims.cuh"

namespace csat {

// A stack of equal padded matrices in the workspace.
struct Panel {
  float* data;
  int64_t pitch;   // floats a row
  int64_t matrix;  // floats a matrix
};

using Accumulator = float[limits::kMicroRows][2];

// acc (8, 64) += a (8, depth) w (depth, 64). `a` points at the first row in shared memory, `w` at this lane's column.
CSAT_DEVICE void multiply(Accumulator& acc, const float* a, int a_pitch, const float* w, int64_t w_pitch, int depth) {
  for (int k = 0; k < depth; k += 4, w += 4 * w_pitch) {
    float left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      left[i] = w[i * w_pitch];
      right[i] = w[i * w_pitch + 32];
    }
#pragma unroll
    for (int r = 0; r < limits::kMicroRows; ++r) {
      const float4 x = load4(a + r * a_pitch + k);
      acc[r][0] += x.x * left[0] + x.y * left[1] + x.z * left[2] + x.w * left[3];
      acc[r][1] += x.x * right[0] + x.y * right[1] + x.z * right[2] + x.w * right[3];
    }
  }
}

// acc (16, 64) += x (depth, 16)^T y (depth, 64), both in shared memory; `y` points at this lane's column.
CSAT_DEVICE void multiply_outer(float (&acc)[limits::kOuterRows][2], const float* x, int x_pitch, const float* y,
                                int y_pitch, int depth) {
  for (int k = 0; k < depth; ++k, x += x_pitch, y += y_pitch) {
    const float left = y[0], right = y[32];
#pragma unroll
    for (int i = 0; i < limits::kOuterRows; i += 4) {
      const float4 v = load4(x + i);
      acc[i][0] += v.x * left, acc[i][1] += v.x * right;
      acc[i + 1][0] += v.y * left, acc[i + 1][1] += v.y * right;
      acc[i + 2][0] += v.z * left, acc[i + 2][1] += v.z * right;
      acc[i + 3][0] += v.w * left, acc[i + 3][1] += v.w * right;
    }
  }
}

// Calls f(row, column) for every micro-tile of a (rows, columns) matrix, dealt to the warps in a fixed order: the same
// matrix shape always gives a micro-tile to the same warp, so what a lane wrote it may read back without a barrier.
template <typename F>
CSAT_DEVICE void for_each_micro_tile(int rows, int columns, F f) {
  const int groups = rows / limits::kMicroRows;
  const int count = groups * (columns / limits::kMicroColumns);
  for (int i = warp_id(); i < count; i += limits::kWarps)
    f(i % groups * limits::kMicroRows, i / groups * limits::kMicroColumns);
}

// shared (rows, pitch) = source (valid, columns) as float32, zero elsewhere.
template <typename T>
CSAT_DEVICE void load_rows(float* shared, int pitch, int rows, const T* source, int64_t row_stride,
                           int64_t column_stride, int valid, int columns) {
  for (int r = warp_id(); r < rows; r += limits::kWarps)
    for (int c = lane_id(); c < pitch; c += 32)
      shared[r * pitch + c] = r < valid && c < columns ? to_float(source[r * row_stride + c * column_stride]) : 0.f;
}

template <typename T>
CSAT_DEVICE void store_rows(T* target, int64_t row_stride, int64_t column_stride, const float* shared, int pitch,
                            int valid, int columns) {
  for (int r = warp_id(); r < valid; r += limits::kWarps)
    for (int c = lane_id(); c < columns; c += 32)
      target[r * row_stride + c * column_stride] = from_float<T>(shared[r * pitch + c]);
}

CSAT_DEVICE void fill(float* shared, int count, float value) {
  for (int i = threadIdx.x; i < count; i += limits::kThreads) shared[i] = value;
}

// Which rows a block owns: queries [first, first + valid) of one batch element and head.
struct RowTile {
  int64_t batch, head, first;
  int valid;
};
CSAT_DEVICE RowTile row_tile_at(int64_t index, int64_t heads, int64_t queries, int rows) {
  const int64_t tiles = (queries + rows - 1) / rows, pair = index / tiles;
  RowTile tile{pair / heads, pair % heads, index % tiles * rows, rows};
  if (queries - tile.first < rows) tile.valid = static_cast<int>(queries - tile.first);
  return tile;
}

// Tile `index` of the rows that share decoder `group` of `groups`: one decoder walks every (batch, head), else decoder
// h head h of the batch.
CSAT_DEVICE RowTile decoder_tile(int64_t index, int64_t group, int64_t groups, int64_t heads, int64_t queries,
                                 int rows) {
  if (groups == 1) return row_tile_at(index, heads, queries, rows);
  RowTile tile = row_tile_at(index, 1, queries, rows);
  tile.head = group;
  return tile;
}

template <typename T>
CSAT_DEVICE T* at(const View& v, int64_t i, int64_t j, int64_t k) {
  return static_cast<T*>(v.data) + i * v.stride[0] + j * v.stride[1] + k * v.stride[2];
}

}  // namespace csat
