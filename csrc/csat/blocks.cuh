// Rows of 16-bit elements in the workspace, in the order in which the tensor cores hold them, and the sums over rows of
// their outer products x_k^T y_k.
//
// Blocks: 16 rows x 16 columns are the four 8 x 8 matrices of an operand register each, 128 contiguous bytes a matrix:
// (row block, column block, register, lane) words of two elements. A warp writes and reads a register as one coalesced
// 128-byte line; an ldmatrix of a block in shared memory has its eight rows in eight different 16-byte units, hence no
// bank conflict and no padding; a copy to shared memory is a copy of contiguous bytes. Rows that do not exist are
// zeros (the writer's duty).
//
//   outer   a block of eight warps owns kM x kN outputs (64 or 128 each, the whole of dS at P = 128) over a range of
//   row
//           blocks. Data flow: 32 rows of x and y at a time -> shared by cp.async, three stages, one barrier a stage ->
//           ldmatrix.trans for both operands -> kM / 4 x kN / 2 outputs a warp in registers. The depth is split over
//           blocks by shape alone; each writes its own part and reduce() adds them in a fixed order.
//   Budget: 64 accumulators a lane at 128 x 128, 128 registers, two blocks an SM; 96 (kM + kN) x 2 bytes of shared
//           memory (48 KiB at most); x and y are read once where kM, kN cover all columns, 4 bytes an output are
//           written a split of at least limits::kOuterSplitRows rows.
#pragma once
#include "csat/blocks.h"
#include "csat/fragments.cuh"
#include "csat/limits.h"

namespace csat {

constexpr int kBlockWords = 128;  // of 16 x 16 elements

// Words of a row block of `columns` columns.
constexpr int64_t row_block_words(int64_t columns) { return columns / 16 * kBlockWords; }

// The row blocks at `words`, kPitch columns wide, columns `first` .. = x. What a lane writes is what it reads back.
template <int kPitch, typename T, int kRows, int kColumns>
CSAT_DEVICE void store_blocks(uint32_t* words, int first, const Operand<T, kRows, kColumns>& x) {
  uint32_t* out = words + first / 16 * kBlockWords + lane_id();
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r) out[i * row_block_words(kPitch) + k * kBlockWords + r * 32] = x.at[i][k][r];
}
template <typename T, int kRows, int kColumns, int kPitch>
CSAT_DEVICE Operand<T, kRows, kColumns> load_blocks(const uint32_t* words, int first = 0) {
  const uint32_t* in = words + first / 16 * kBlockWords + lane_id();
  Operand<T, kRows, kColumns> x;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r) x.at[i][k][r] = in[i * row_block_words(kPitch) + k * kBlockWords + r * 32];
  return x;
}

// Arguments of one launch, with the split of the rows that outer_blocks() chose.
struct BlockOuterSplit {
  BlockOuterArgs args;
  int64_t splits, split_blocks;  // row blocks of a split
  int row_tiles, column_tiles;
};

namespace outer_stage {

constexpr int kDepthBlocks = 2, kStages = 3;

// The left operand x^T: block(m, k) = x(k, m). Register r holds columns 8 (r % 2) .. of x and rows 8 (r / 2) ..
CSAT_DEVICE void load_left(uint32_t (&a)[4], const uint32_t* block) {
  const int matrix = lane_id() / 8;
  ldmatrix_x4_transposed(a, block + (matrix / 2 + matrix % 2 * 2) * 32 + lane_id() % 8 * 4);
}
// The right operand y as it lies: its rows are the depth.
CSAT_DEVICE void load_right(uint32_t (&b)[4], const uint32_t* block) {
  ldmatrix_x4_transposed(b, block + lane_id() * 4);
}

// Row blocks first .. of one operand, kColumns wide -> shared, zeros from `end` on.
template <int kColumns>
CSAT_DEVICE void load(uint32_t* stage, const uint32_t* source, int64_t pitch, int64_t first, int64_t end) {
  constexpr int kUnits = kColumns / 16 * kBlockWords / 4;  // of 16 bytes in a row block
  for (int i = threadIdx.x; i < kDepthBlocks * kUnits; i += limits::kMmaThreads) {
    const int64_t block = first + i / kUnits;
    const bool exists = block < end;
    cp_async16_zfill(stage + i * 4, source + (exists ? block * pitch + i % kUnits * 4 : 0), exists ? 16 : 0);
  }
}

// sum += x^T y over the row blocks of a stage, the warp's share of the outputs.
template <typename T, int kM, int kN>
CSAT_DEVICE void multiply(Sums<kM / 4, kN / 2>& sum, const uint32_t* x, const uint32_t* y) {
  const int m = warp_id() / 2 * (kM / 64), n = warp_id() % 2 * (kN / 32);  // in blocks
#pragma unroll
  for (int k = 0; k < kDepthBlocks; ++k) {
    uint32_t left[kM / 64][1][4];
#pragma unroll
    for (int i = 0; i < kM / 64; ++i) load_left(left[i][0], x + (k * (kM / 16) + m + i) * kBlockWords);
#pragma unroll
    for (int j = 0; j < kN / 32; ++j) {
      uint32_t right[4];
      load_right(right, y + (k * (kN / 16) + n + j) * kBlockWords);
      fragment::multiply_block<T>(sum, j, left, 0, right);
    }
  }
}

}  // namespace outer_stage

// Row-major part of a matrix of `pitch` columns = scale * sum.
template <int kM, int kN>
CSAT_DEVICE void store_part(float* part, int64_t pitch, const Sums<kM, kN>& sum, float scale) {
  const int g = lane_id() / 4, t = lane_id() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kM / 16; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < kN / 8; ++j)
        *reinterpret_cast<float2*>(part + (16 * i + 8 * h + g) * pitch + 8 * j + t) = {scale * sum.at[i][j][2 * h],
                                                                                       scale * sum.at[i][j][2 * h + 1]};
}

template <typename T, int kM, int kN>
__global__ void __launch_bounds__(limits::kMmaThreads, 2) outer_blocks_kernel(BlockOuterSplit p) {
  using namespace outer_stage;
  constexpr int kXWords = kDepthBlocks * kM / 16 * kBlockWords, kWords = kDepthBlocks * (kM + kN) / 16 * kBlockWords;
  CSAT_DYN_SMEM(uint32_t, stages);
  const BlockOuterArgs& a = p.args;
  int64_t index = blockIdx.x;
  const int n0 = static_cast<int>(index % p.column_tiles) * kN;
  index /= p.column_tiles;
  const int m0 = static_cast<int>(index % p.row_tiles) * kM;
  index /= p.row_tiles;
  const int64_t split = index % p.splits, matrix = index / p.splits, group = matrix / a.members,
                member = matrix % a.members;
  const uint32_t* x = a.x + group * a.x_group + member * a.x_member + row_block_words(m0);
  const uint32_t* y = a.y + group * a.y_group + member * a.y_member + row_block_words(n0);
  const int64_t begin = split * p.split_blocks;
  const int64_t end = begin + p.split_blocks < a.row_blocks ? begin + p.split_blocks : a.row_blocks;
  const int64_t steps = (end - begin + kDepthBlocks - 1) / kDepthBlocks;

  const auto fetch = [&](int64_t step) {
    uint32_t* stage = stages + step % kStages * kWords;
    const int64_t first = begin + step * kDepthBlocks;
    if (step < steps) {
      load<kM>(stage, x, row_block_words(a.x_columns), first, end);
      load<kN>(stage + kXWords, y, row_block_words(a.y_columns), first, end);
    }
    cp_async_commit();  // an empty group keeps the count of those in flight
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  Sums<kM / 4, kN / 2> sum = {};
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage is there for all, and the one before it has been read by all
    fetch(step + kStages - 1);
    const uint32_t* stage = stages + step % kStages * kWords;
    multiply<T, kM, kN>(sum, stage, stage + kXWords);
  }
  cp_async_wait<0>();  // of empty groups: nothing is left open
  const float scale = a.scale ? a.scale[group * a.scale_group + member] : 1.f;
  const int m = m0 + warp_id() / 2 * (kM / 4), n = n0 + warp_id() % 2 * (kN / 2);
  store_part(a.partial + ((matrix * p.splits + split) * a.x_columns + m) * a.y_columns + n, a.y_columns, sum, scale);
}

}  // namespace csat
