// The small kernels around the row tiles; memory bound, one pass each.
//
//   pack    strided operand of any dtype -> float32 panel, padded (tile.cuh says why). 32 x 32 tiles through shared
//           memory, read along whichever source axis has the smaller stride and written along the panel's rows: both
//           coalesced.
//   reduce  partial sums -> result. A block sums 32 columns: 4 warps take the splits s = w, w + 4, ... in order, then
//           the four sums are added in order: the same tree for every run.
//   outer   sum over k of x_k^T y_k for 64 x 64 outputs a block: 32 rows of x and y at a time -> shared (16 KiB),
//           16 x 64 outputs a warp in registers (32 accumulators a lane; 4 broadcasts and 2 loads for 32 FMA). The
//           depth is split over blocks by shape alone; each writes its own part.
#pragma once
#include "csat/panel.h"
#include "csat/tile.cuh"

namespace csat {

template <typename T>
__global__ void __launch_bounds__(limits::kThreads) pack_kernel(PackArgs p) {
  constexpr int kSide = 32, kPitch = kSide + 1;
  CSAT_DYN_SMEM(float, tile);
  const int64_t row_tiles = (p.panel_rows + kSide - 1) / kSide, column_tiles = (p.pitch + kSide - 1) / kSide;
  int64_t index = blockIdx.x;
  const int64_t c0 = index % column_tiles * kSide;
  index /= column_tiles;
  const int64_t r0 = index % row_tiles * kSide, matrix = index / row_tiles;
  const T* source = static_cast<const T*>(p.source) + matrix / p.n1 * p.stride0 + matrix % p.n1 * p.stride1;
  const bool along_rows = p.row_stride < p.column_stride;
  for (int i = warp_id(); i < kSide; i += limits::kWarps) {
    const int r = along_rows ? lane_id() : i, c = along_rows ? i : lane_id();
    float value = p.fill;
    if (r0 + r < p.rows && c0 + c < p.columns)
      value = p.source ? to_float(source[(r0 + r) * p.row_stride + (c0 + c) * p.column_stride]) : 0.f;
    tile[r * kPitch + c] = value;
  }
  __syncthreads();
  float* panel = p.panel + matrix * p.panel_rows * p.pitch;
  for (int r = warp_id(); r < kSide; r += limits::kWarps) {
    const int64_t c = c0 + lane_id();
    if (r0 + r < p.panel_rows && c < p.pitch) panel[(r0 + r) * p.pitch + c] = tile[r * kPitch + lane_id()];
  }
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads) reduce_kernel(ReduceArgs p) {
  CSAT_DYN_SMEM(float, sums);
  const int64_t column_tiles = (p.columns + 31) / 32;
  int64_t index = blockIdx.x;
  const int64_t c = index % column_tiles * 32 + lane_id();
  index /= column_tiles;
  const int64_t r = index % p.rows, batch = index / p.rows;
  const float* partial = p.partial + batch * p.batch_stride + r * p.pitch + c;
  float sum = 0.f;
  if (c < p.columns)
    for (int64_t s = warp_id(); s < p.splits; s += limits::kWarps) sum += partial[s * p.split_stride];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp_id() > 0 || c >= p.columns) return;
  for (int w = 1; w < limits::kWarps; ++w) sum += sums[w * 32 + lane_id()];
  T* target = at<T>(p.target, batch / p.n1, batch % p.n1, r) + c * p.target.stride[3];
  *target = from_float<T>((p.accumulate ? to_float(*target) : 0.f) + p.scale * sum);
}

// Arguments of one launch of the sums of outer products, with the split of the depth that outer() chose.
struct OuterSplit {
  OuterArgs args;
  int64_t splits, split_depth;  // split_depth is a multiple of kOuterDepth
  int64_t row_tiles, column_tiles;
};

__global__ void __launch_bounds__(limits::kThreads) outer_kernel(OuterSplit p) {
  constexpr int kSide = limits::kMicroColumns, kDepth = limits::kOuterDepth;
  CSAT_DYN_SMEM(float, shared);
  float *x_tile = shared, *y_tile = x_tile + kDepth * kSide;
  const OuterArgs& a = p.args;
  int64_t index = blockIdx.x;
  const int64_t c0 = index % p.column_tiles * kSide;
  index /= p.column_tiles;
  const int64_t r0 = index % p.row_tiles * kSide;
  index /= p.row_tiles;
  const int64_t split = index % p.splits, matrix = index / p.splits;
  const float* x = a.x + matrix / a.n1 * a.x_group + matrix % a.n1 * a.x_member + r0;
  const float* y = a.y + matrix / a.n1 * a.y_group + matrix % a.n1 * a.y_member + c0;
  const int64_t begin = split * p.split_depth;
  const int64_t end = begin + p.split_depth < a.depth ? begin + p.split_depth : a.depth;

  float acc[limits::kOuterRows][2] = {};
  const int m = warp_id() * limits::kOuterRows;
  for (int64_t k0 = begin; k0 < end; k0 += kDepth) {
    const int valid = end - k0 < kDepth ? static_cast<int>(end - k0) : kDepth;
    load_rows(x_tile, kSide, kDepth, x + k0 * a.x_pitch, a.x_pitch, int64_t(1), valid, kSide);
    load_rows(y_tile, kSide, kDepth, y + k0 * a.y_pitch, a.y_pitch, int64_t(1), valid, kSide);
    __syncthreads();
    multiply_outer(acc, x_tile + m, kSide, y_tile + lane_id(), kSide, kDepth);
    __syncthreads();
  }
  const int64_t pitch = p.column_tiles * kSide;
  float* out = a.partial + ((matrix * p.splits + split) * p.row_tiles * kSide + r0 + m) * pitch + c0 + lane_id();
#pragma unroll
  for (int r = 0; r < limits::kOuterRows; ++r) out[r * pitch] = acc[r][0], out[r * pitch + 32] = acc[r][1];
}

}  // namespace csat
