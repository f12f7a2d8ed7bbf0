// What a warpgroup (four warps, 64 rows) multiplies by on Hopper: matrices in shared memory under the 128-byte swizzle,
// and the asynchronous products with them. Each warp holds 16 rows as Sums and Operand of fragments.cuh, whose layout
// wgmma shares; row block i of a taller tile is of 64 rows more, of which each warp holds 16 again. RowBoxes are rows
// in global memory, which tensor copies bring under the same swizzle.
//
// A product is started, not done: between start_product* and the wgmma_wait that names its sums, nothing may touch the
// sums, the operand or the matrix. A chain of products ends with wgmma_commit.
#pragma once
#include "csat/fragments.cuh"
#include "csat/launch.h"

namespace csat {

// `rows` rows (a multiple of 8) of kColumns elements, as panels of 64 columns: rows of 128 bytes, in which the piece of
// 16 bytes number p of row r stands at p ^ (r % 8). 1024-byte aligned.
template <typename T, int kColumns>
struct SwizzledTile {
  static_assert(kColumns % 64 == 0, "panels hold 64 columns");
  T* data;
  int rows;

  CSAT_DEVICE T* piece(int r, int c) const { return data + (c / 64 * rows + r) * 64 + ((c % 64 / 8) ^ (r % 8)) * 8; }
  // Where block k of 16 columns starts for the rows from `row` (a multiple of 8) on.
  CSAT_DEVICE const T* columns_from(int row, int k) const { return data + (k / 4 * rows + row) * 64 + k % 4 * 16; }
  // The rows from `row` on and their columns as the depth of a product; block k of it lies depth_offset(k) bytes on.
  CSAT_DEVICE uint64_t rows_of_product(int row) const { return wgmma_descriptor(columns_from(row, 0), 16, 1024); }
  CSAT_DEVICE int depth_offset(int k) const { return k / 4 * rows * 128 + k % 4 * 32; }
  // The rows from `row` on as the depth of a product, 16 to a block of 2048 bytes, and their columns from `column` on.
  CSAT_DEVICE uint64_t depth_of_product(int row, int column) const {
    return wgmma_descriptor(columns_from(row, column / 16), rows * 128, 1024);
  }
};

// load_rows_async of fragments.cuh for rows 0 .. count - 1; fence_proxy_async and a barrier before the first product.
template <typename T, int kColumns>
CSAT_DEVICE void load_rows_async(SwizzledTile<T, kColumns> tile, GlobalRows<const T> source, int count, int thread,
                                 int threads) {
  constexpr int kUnits = kColumns / 8;
  for (int i = pinned(thread); i < count * kUnits; i += threads) {
    const int r = i / kUnits, c = i % kUnits * 8;
    const bool exists = r < source.rows && c < source.columns;
    const int elements = !exists ? 0 : (source.columns - c < 8 ? source.columns - c : 8);
    cp_async16_zfill(tile.piece(r, c), exists ? source.data + r * source.stride + c : source.data, elements * 2);
  }
}

// ---- a warp's own 16 rows under the swizzle: those that a tile starts with

namespace fragment {

// Where this lane's row of 16 bytes lies for ldmatrix and stmatrix of a block of 16 columns.
template <typename T, int kColumns>
CSAT_DEVICE T* lane_of_block(SwizzledTile<T, kColumns> tile, int k) {
  const int lane = lane_id(), row = lane % 16;
  T* panel = tile.data + k / 4 * tile.rows * 64 + row * 64;
  return panel + (((lane / 16 ^ row % 8) * 8) ^ k % 4 * 16);
}

}  // namespace fragment

template <typename T, int kColumns>
CSAT_DEVICE Operand<T, 16, kColumns> load_operand(SwizzledTile<T, kColumns> tile) {
  Operand<T, 16, kColumns> x;
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) ldmatrix_x4(x.at[0][k], fragment::lane_of_block(tile, k));
  return x;
}
template <typename T, int kColumns>
CSAT_DEVICE void store_tile(SwizzledTile<T, kColumns> tile, const Operand<T, 16, kColumns>& x) {
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) stmatrix_x4(fragment::lane_of_block(tile, k), x.at[0][k]);
}

// The first rows of the tile -> all rows of the matrix (16 at most), by the lanes of one warp. `vectors`: rows start at
// multiples of 16 bytes and have a multiple of eight columns.
template <typename T, int kColumns>
CSAT_DEVICE void store_rows(GlobalRows<T> target, SwizzledTile<T, kColumns> tile, bool vectors) {
  constexpr int kUnits = kColumns / 8, kStep = 32 / kUnits;  // pieces of a row; rows that a warp stores at a time
  const int lane = lane_id(), row = lane / kUnits, column = lane % kUnits * 8;
  const int rows = column >= target.columns ? 0 : (target.rows < 16 ? static_cast<int>(target.rows) : 16);
  const T* from = tile.data + (column / 64 * tile.rows + row) * 64;
  const int piece = (column % 64 / 8 ^ row) * 8;  // of rows r with r % 8 = row
  T* out = target.data + row * target.stride + column;
  if (vectors) {
#pragma unroll
    for (int i = 0; i < 16; i += kStep, out += kStep * target.stride)
      if (row + i < rows)
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from + i * 64 + (piece ^ i % 8 * 8));
    return;
  }
#pragma unroll 1
  for (int i = row; i < rows; i += kStep, out += kStep * target.stride)
#pragma unroll 1
    for (int e = 0; e < 8 && column + e < target.columns; ++e) out[e] = tile.piece(i, column)[e];
}

// ---- rows in global memory, for tensor copies

// Boxes of 64 columns of a (B, H, rows, columns) tensor, B and H broadcast or not.
struct RowBoxes {
  TensorMap map;
  int batches, heads;  // 0: the axis is one place

  // One thread copies rows from `row` on to all rows of a tile; its bytes arrive at `bar`.
  template <typename T, int kColumns>
  CSAT_DEVICE void copy(SwizzledTile<T, kColumns> tile, int batch, int head, int row, uint64_t* bar) const {
#pragma unroll
    for (int c = 0; c < kColumns; c += 64)
      tensor_copy_4d(tile.data + c * tile.rows, map, c, row, head * heads, batch * batches, bar);
  }
};

// On the host, of a view with vector rows (workspace.h); an axis of stride 0 becomes an axis of one.
template <typename T>
inline int make_row_boxes(RowBoxes* boxes, const View& v, int64_t n0, int64_t n1, int64_t rows, int64_t columns,
                          int box_rows) {
  boxes->batches = n0 > 1 && v.stride[0] != 0;
  boxes->heads = n1 > 1 && v.stride[1] != 0;
  const int64_t sizes[] = {columns, rows, boxes->heads ? n1 : 1, boxes->batches ? n0 : 1};
  const int64_t strides[] = {1, rows > 1 ? v.stride[2] : 8, boxes->heads ? v.stride[1] : 8,
                             boxes->batches ? v.stride[0] : 8};
  return make_tensor_map(&boxes->map, static_cast<const T*>(v.data), 4, sizes, strides, box_rows);
}

// ---- products

// sums (+)= a b^T, where b is the kColumns rows of the tile from `row` on.
template <typename T, int kColumns, int kDepth>
CSAT_DEVICE void start_product_transposed(Sums<16, kColumns>& sums, const Operand<T, 16, kDepth>& a,
                                          SwizzledTile<T, kDepth> b, int row, bool accumulate) {
  const uint64_t right = b.rows_of_product(row);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    wgmma_k16<T, false>(sums.at[0], a.at[0][k], wgmma_advance(right, b.depth_offset(k)), accumulate || k > 0);
}
// sums (+)= a b^T with all rows of b, waited for.
template <typename T, int kColumns, int kDepth>
CSAT_DEVICE void product_transposed(Sums<16, kColumns>& sums, Operand<T, 16, kDepth>& a, SwizzledTile<T, kDepth> b,
                                    bool accumulate) {
  wgmma_fence(sums.at[0], a.at[0]);
  start_product_transposed(sums, a, b, 0, accumulate);
  wgmma_commit();
  wgmma_wait<0>(sums.at[0]);
}
// The rows of c = psi a: a b^T with all rows of b = psi, rounded to T; a itself where psi is the identity.
template <int kColumns, typename T, int kDepth>
CSAT_DEVICE Operand<T, 16, kColumns> synthesised(Operand<T, 16, kDepth>& a, SwizzledTile<T, kDepth> psi,
                                                 bool identity) {
  if (identity) {
    Operand<T, 16, kColumns> c = {};
#pragma unroll
    for (int k = 0; k < (kDepth < kColumns ? kDepth : kColumns) / 16; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r) c.at[0][k][r] = a.at[0][k][r];
    return c;
  }
  Sums<16, kColumns> c;
  product_transposed(c, a, psi, false);
  return to_operand<T>(c);
}
// sums = a b^T, where a is the rows of its tile from `row` on, and b all of its tile.
template <int kRows, int kColumns, typename T, int kDepth>
CSAT_DEVICE void start_product_transposed(Sums<kRows, kColumns>& sums, SwizzledTile<T, kDepth> a, int row,
                                          SwizzledTile<T, kDepth> b) {
  const uint64_t left = a.rows_of_product(row), right = b.rows_of_product(0);
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k)
      wgmma_k16_shared<T, false, false>(sums.at[i], wgmma_advance(left, 64 * 128 * i + a.depth_offset(k)),
                                        wgmma_advance(right, b.depth_offset(k)), k > 0);
}
// sums (+)= a b, where b is the kDepth rows of the tile from `row` on.
template <typename T, int kRows, int kColumns, int kDepth>
CSAT_DEVICE void start_product(Sums<kRows, kColumns>& sums, const Operand<T, kRows, kDepth>& a,
                               SwizzledTile<T, kColumns> b, int row, bool accumulate) {
  const uint64_t right = b.depth_of_product(row, 0);
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k)
      wgmma_k16<T, true>(sums.at[i], a.at[i][k], wgmma_advance(right, 2048 * k), accumulate || k > 0);
}

// x^T -> shared memory, where place(column, row) holds eight rows of a column of x side by side: its 16 bytes.
template <int kDepthBlocks, typename Place>
CSAT_DEVICE void store_transposed(const uint32_t (&x)[kDepthBlocks][4], Place place) {
  const int lane = lane_id();
#pragma unroll
  for (int k = 0; k < kDepthBlocks; ++k)
    stmatrix_x4_transposed(place(16 * k + lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8), x[k]);
}

}  // namespace csat
