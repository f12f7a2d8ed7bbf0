// What a warpgroup (four warps, 64 rows) multiplies by on Hopper: matrices in shared memory under the 128-byte swizzle,
// and the asynchronous products with them. Each warp holds 16 rows as Sums and Operand of fragments.cuh, whose layout
// wgmma shares; row block i of a taller tile is of 64 rows more, of which each warp holds 16 again.
//
// A product is started, not done: between start_product* and the wgmma_wait that names its sums, nothing may touch the
// sums, the operand or the matrix. A chain of products ends with wgmma_commit.
#pragma once
#include "csat/fragments.cuh"

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

// sums (+)= a b^T, where b is the kColumns rows of the tile from `row` on.
template <typename T, int kColumns, int kDepth>
CSAT_DEVICE void start_product_transposed(Sums<16, kColumns>& sums, const Operand<T, 16, kDepth>& a,
                                          SwizzledTile<T, kDepth> b, int row, bool accumulate) {
  const uint64_t right = b.rows_of_product(row);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    wgmma_k16<T, false>(sums.at[0], a.at[0][k], wgmma_advance(right, b.depth_offset(k)), accumulate || k > 0);
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
