// Warp tiles: what the 32 lanes of a warp hold of a matrix, so that a kernel reads like its formula.
//
//   Sums<M, N>         (M, N) float32 accumulators
//   Operand<T, M, K>   (M, K) left operand of a product, 16 bits an element
//   Rows<M>            one float a row, the same in the four lanes that share the row
//   Columns<N>         one float a column, the same in the eight lanes that share the column
//   Tile<T, N>         rows of N elements in shared memory, padded so that no ldmatrix and no pair store has a bank
//                      conflict: the pitch is an odd number of 16-byte units (N is a multiple of 16)
//
// Layout (PTX ISA, "Matrix Fragments for mma.m16n8k16"), with g = lane / 4 and t = lane % 4: accumulator block (i, j)
// holds rows 16 i + g, 16 i + g + 8 and columns 8 j + 2 t, 8 j + 2 t + 1. An operand block (i, k) holds the same places
// of two accumulator blocks, j = 2 k and 2 k + 1: sums become the next left operand without leaving their lanes.
#pragma once
#include "csat/prims.cuh"

namespace csat {

template <int kRows, int kColumns>
struct Sums {
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0, "tiles are made of blocks of 16 x 16");
  float at[kRows / 16][kColumns / 8][4];
};

template <typename T, int kRows, int kDepth>
struct Operand {
  static_assert(kRows % 16 == 0 && kDepth % 16 == 0, "tiles are made of blocks of 16 x 16");
  uint32_t at[kRows / 16][kDepth / 16][4];
};

template <int kRows>
struct Rows {
  float at[kRows / 16][2];
};

template <int kColumns>
struct Columns {
  float at[kColumns / 8][2];
};

template <typename T, int kColumns>
struct Tile {
  static_assert(kColumns % 16 == 0, "the padding assumes an even number of 16-byte units");
  static constexpr int kPitch = kColumns + 8;
  T* data;
  CSAT_DEVICE T* row(int r) const { return data + r * kPitch; }
  CSAT_DEVICE Tile from_row(int r) const { return {row(r)}; }
};

// Elements of shared memory that `rows` rows of a tile of `columns` take.
constexpr int64_t tile_elements(int64_t rows, int64_t columns) { return rows * (columns + 8); }

// ---- places

// Calls f(value, row, column) for every element that this lane holds; row and column count within the tile.
template <int kRows, int kColumns, typename F>
CSAT_DEVICE void for_each(Sums<kRows, kColumns>& x, F f) {
  const int lane = pinned(lane_id()), g = lane / 4, t = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(x.at[i][j][e], 16 * i + g + e / 2 * 8, 8 * j + t + e % 2);
}

// Calls f(value, row) for every row that this lane knows.
template <int kRows, typename F>
CSAT_DEVICE void for_each_row(Rows<kRows>& x, F f) {
  const int g = pinned(lane_id()) / 4;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) f(x.at[i][h], 16 * i + 8 * h + g);
}

// One float a column from shared memory, 8-byte aligned.
template <int kColumns>
CSAT_DEVICE Columns<kColumns> load_columns(const float* x) {
  Columns<kColumns> y;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const float2 pair = *reinterpret_cast<const float2*>(x + 8 * j + lane_id() % 4 * 2);
    y.at[j][0] = pair.x;
    y.at[j][1] = pair.y;
  }
  return y;
}

// The sum over the rows of a tile for each of 4 n columns. A lane comes with the sums over its own rows for columns
// 8 (c / 2) + 2 t + c % 2, c < n, and gets the whole sum for the one with c = g n / 8. Each exchange halves the columns
// that a lane holds, while there are two, and doubles the rows that are in them.
template <int n>
CSAT_DEVICE float column_sum(float (&held)[n]) {
#pragma unroll
  for (int mask = 16, half = n / 2; mask > 2; mask /= 2, half /= 2) {
    const bool upper = lane_id() & mask;
    if (half == 0) held[0] += shfl_xor(held[0], mask);
#pragma unroll
    for (int c = 0; c < half; ++c) {
      const float keep = upper ? held[half + c] : held[c], send = upper ? held[c] : held[half + c];
      held[c] = keep + shfl_xor(send, mask);
    }
  }
  return held[0];
}

// ---- conversions

template <typename T, int kRows, int kColumns>
CSAT_DEVICE Operand<T, kRows, kColumns> to_operand(const Sums<kRows, kColumns>& x) {
  Operand<T, kRows, kColumns> y;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        y.at[i][k][r] = pack2<T>(x.at[i][2 * k + r / 2][r % 2 * 2], x.at[i][2 * k + r / 2][r % 2 * 2 + 1]);
  return y;
}

// Columns first .. first + kColumns - 1 of an operand as floats; `first` is a constant of an unrolled loop.
template <int kColumns, typename T, int kRows, int kDepth>
CSAT_DEVICE Sums<kRows, kColumns> to_sums(const Operand<T, kRows, kDepth>& x, int first) {
  Sums<kRows, kColumns> y;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 pair = unpack2<T>(x.at[i][first / 16 + j / 2][j % 2 * 2 + h]);
        y.at[i][j][2 * h] = pair.x;
        y.at[i][j][2 * h + 1] = pair.y;
      }
  return y;
}

// Columns first .. of `x` = `part`, rounded to T; `first` is a constant of an unrolled loop.
template <typename T, int kRows, int kDepth, int kColumns>
CSAT_DEVICE void set_columns(Operand<T, kRows, kDepth>& x, int first, const Sums<kRows, kColumns>& part) {
  const Operand<T, kRows, kColumns> rounded = to_operand<T>(part);
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r) x.at[i][first / 16 + k][r] = rounded.at[i][k][r];
}

// ---- shared memory

namespace fragment {

// This lane's address for ldmatrix of the 16 x 16 blocks of a tile as a left operand, or (transposed by the
// instruction) as a right operand b whose rows are the depth. Block (i, k), rows 16 i and columns 16 k on, lies
// block_offset bytes on.
template <typename T, int kColumns>
CSAT_DEVICE SharedAddress lane_of_blocks(Tile<T, kColumns> tile) {
  return pinned_address(tile.row(lane_id() % 16) + lane_id() / 16 * 8);
}
// The same for a right operand b^T, the tile's rows being columns of the product; or (transposed by the instruction)
// for a left operand that is the tile's transpose.
template <typename T, int kColumns>
CSAT_DEVICE SharedAddress lane_of_transposed(Tile<T, kColumns> tile) {
  const int lane = lane_id();
  return pinned_address(tile.row(lane % 8 + lane / 16 * 8) + lane / 8 % 2 * 8);
}
template <typename T, int kColumns>
constexpr int block_offset(Tile<T, kColumns>, int i, int k) {
  return 2 * 16 * (i * Tile<T, kColumns>::kPitch + k);
}

}  // namespace fragment

// The rows of a tile as a left operand.
template <int kRows, typename T, int kColumns>
CSAT_DEVICE Operand<T, kRows, kColumns> load_operand(Tile<T, kColumns> tile) {
  Operand<T, kRows, kColumns> x;
  const SharedAddress from = fragment::lane_of_blocks(tile);
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) ldmatrix_x4(x.at[i][k], from + fragment::block_offset(tile, i, k));
  return x;
}

// Rows 0 .. of the tile, columns `column` .. = x rounded to T.
template <typename T, int kTileColumns, int kRows, int kColumns>
CSAT_DEVICE void store_tile(Tile<T, kTileColumns> tile, int column, const Sums<kRows, kColumns>& x) {
  const int lane = pinned(lane_id()), g = lane / 4, t = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<uint32_t*>(tile.row(16 * i + 8 * h + g) + column + 8 * j + t) =
            pack2<T>(x.at[i][j][2 * h], x.at[i][j][2 * h + 1]);
}
// The columns that both have.
template <typename T, int kTileColumns, int kRows, int kColumns>
CSAT_DEVICE void store_tile(Tile<T, kTileColumns> tile, const Operand<T, kRows, kColumns>& x) {
  const int lane = pinned(lane_id()), g = lane / 4, t = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int k = 0; k < (kColumns < kTileColumns ? kColumns : kTileColumns) / 16; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        *reinterpret_cast<uint32_t*>(tile.row(16 * i + r % 2 * 8 + g) + 16 * k + r / 2 * 8 + t) = x.at[i][k][r];
}

// ---- products. A right operand is read by ldmatrix, 16 columns and 16 of the depth at a time, and serves every row
// block of the left one.

namespace fragment {

// Columns 16 j .. of c += block k of a times b.
template <typename T, int kRows, int kColumns, int kDepthBlocks>
CSAT_DEVICE void multiply_block(Sums<kRows, kColumns>& c, int j, const uint32_t (&a)[kRows / 16][kDepthBlocks][4],
                                int k, const uint32_t (&b)[4]) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
    mma_m16n8k16<T>(c.at[i][2 * j], a[i][k], b[0], b[1]);
    mma_m16n8k16<T>(c.at[i][2 * j + 1], a[i][k], b[2], b[3]);
  }
}

}  // namespace fragment

// c (M, N) += a (M, K) b^T, where b has N rows of at least K columns.
template <typename T, int kRows, int kColumns, int kDepth, int kTileColumns>
CSAT_DEVICE void multiply_transposed(Sums<kRows, kColumns>& c, const Operand<T, kRows, kDepth>& a,
                                     Tile<T, kTileColumns> b) {
  static_assert(kDepth <= kTileColumns, "the depth runs along the rows of the tile");
  const SharedAddress from = fragment::lane_of_transposed(b);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      uint32_t right[4];
      ldmatrix_x4(right, from + fragment::block_offset(b, j, k));
      fragment::multiply_block<T>(c, j, a.at, k, right);
    }
}
// The same with the left operand in shared memory, read block by block.
template <typename T, int kRows, int kColumns, int kTileColumns>
CSAT_DEVICE void multiply_transposed(Sums<kRows, kColumns>& c, Tile<T, kTileColumns> a, Tile<T, kTileColumns> b) {
  const SharedAddress from = fragment::lane_of_transposed(b), left_from = fragment::lane_of_blocks(a);
#pragma unroll 2
  for (int k = 0; k < kTileColumns / 16; ++k) {
    uint32_t left[kRows / 16][1][4];
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) ldmatrix_x4(left[i][0], left_from + fragment::block_offset(a, i, k));
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      uint32_t right[4];
      ldmatrix_x4(right, from + fragment::block_offset(b, j, k));
      fragment::multiply_block<T>(c, j, left, 0, right);
    }
  }
}
// c (M, N) += a (M, K) b, where b has K rows; columns `column` .. of b.
template <typename T, int kRows, int kColumns, int kDepth, int kTileColumns>
CSAT_DEVICE void multiply(Sums<kRows, kColumns>& c, const Operand<T, kRows, kDepth>& a, Tile<T, kTileColumns> b,
                          int column = 0) {
  static_assert(kColumns <= kTileColumns, "the columns run along the rows of the tile");
  const SharedAddress from = fragment::lane_of_blocks(Tile<T, kTileColumns>{b.data + column});
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      uint32_t right[4];
      ldmatrix_x4_transposed(right, from + fragment::block_offset(b, k, j));
      fragment::multiply_block<T>(c, j, a.at, k, right);
    }
}

// c (M, N) += a^T b over `depth` rows of both, a multiple of 16; columns `column` .. of a.
template <typename T, int kRows, int kColumns, int kLeftColumns, int kTileColumns>
CSAT_DEVICE void multiply_of_transpose(Sums<kRows, kColumns>& c, Tile<T, kLeftColumns> a, int column,
                                       Tile<T, kTileColumns> b, int depth) {
  SharedAddress left_from = fragment::lane_of_transposed(Tile<T, kLeftColumns>{a.data + column}),
                right_from = fragment::lane_of_blocks(b);
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    uint32_t left[kRows / 16][1][4];
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i)
      ldmatrix_x4_transposed(left[i][0], left_from + fragment::block_offset(a, 0, i));
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      uint32_t right[4];
      ldmatrix_x4_transposed(right, right_from + fragment::block_offset(b, 0, j));
      fragment::multiply_block<T>(c, j, left, 0, right);
    }
    left_from += fragment::block_offset(a, 1, 0);
    right_from += fragment::block_offset(b, 1, 0);
  }
}

// ---- rows in global memory

// Rows of a matrix in global memory: element (r, c) at data[r * stride + c]; rows from `rows` and columns from
// `columns` on do not exist. Every row starts at a multiple of 16 bytes (host code sees to it).
template <typename T>
struct GlobalRows {
  T* data;
  int64_t stride;
  int64_t rows;
  int columns;
  CSAT_DEVICE GlobalRows from_row(int64_t r) const { return {data + r * stride, stride, rows - r, columns}; }
};

// Rows first .. first + count - 1 -> rows 0 .. of the tile, zeros where the matrix has none; asynchronous, by `threads`
// threads of which this is number `thread`. Whoever reads waits for the copies and then for the other threads.
template <typename T, int kColumns>
CSAT_DEVICE void load_rows_async(Tile<T, kColumns> tile, GlobalRows<const T> source, int64_t first, int count,
                                 int thread, int threads) {
  constexpr int kUnits = kColumns / 8;  // of 16 bytes
  for (int i = pinned(thread); i < count * kUnits; i += threads) {
    const int r = i / kUnits, c = i % kUnits * 8;
    const bool exists = first + r < source.rows && c < source.columns;
    const int elements = !exists ? 0 : (source.columns - c < 8 ? source.columns - c : 8);
    cp_async16_zfill(tile.row(r) + c, exists ? source.data + (first + r) * source.stride + c : source.data,
                     elements * 2);
  }
}

// Rows 0 .. count - 1 of the tile -> rows first .. of the matrix, by the lanes of one warp. Rows that start at a
// multiple of 16 bytes and have a multiple of eight columns go in vectors.
template <typename T, int kColumns>
CSAT_DEVICE void store_rows(GlobalRows<T> target, int64_t first, int count, Tile<T, kColumns> tile, bool vectors) {
  constexpr int kUnits = kColumns / 8;
  for (int i = pinned(lane_id()); i < count * kUnits; i += 32) {
    const int r = i / kUnits, c = i % kUnits * 8;
    if (first + r >= target.rows || c >= target.columns) continue;
    T* out = target.data + (first + r) * target.stride + c;
    const T* in = tile.row(r) + c;
    if (vectors) {
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(in);
    } else {
      for (int e = 0; e < 8 && c + e < target.columns; ++e) out[e] = in[e];
    }
  }
}

// Float32 rows in global memory, of which there are `rows`, = x. Rows start at multiples of 8 bytes.
template <int kFragments>
CSAT_DEVICE void store_floats(float* target, int64_t stride, int64_t rows, const float (&x)[kFragments][4]) {
  const int g = lane_id() / 4, t = lane_id() % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = 8 * h + g;
    if (r >= rows) continue;
#pragma unroll
    for (int j = 0; j < kFragments; ++j)
      *reinterpret_cast<float2*>(target + r * stride + 8 * j + t) = float2{x[j][2 * h], x[j][2 * h + 1]};
  }
}
template <int kRows, int kColumns>
CSAT_DEVICE void store_floats(float* target, int64_t stride, int64_t rows, const Sums<kRows, kColumns>& x) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) store_floats(target + 16 * i * stride, stride, rows - 16 * i, x.at[i]);
}

}  // namespace csat
