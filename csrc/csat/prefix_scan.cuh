// From sums over the tokens of each chunk to the states between chunks, for attend_prefix; memory bound.
//
//   prefix_column_sums  sums of the rows of a chunk, a column a thread
//   prefix_scan         exclusive scan over the chunks in their order, or back, an element of the state a thread: reads
//                       and writes M (D + R + 1) floats a chunk
//   prefix_mean_scan    the same in their order, of keys or values for the tensor cores: leaves what comes before each
//                       chunk divided by its mass, in 16 bits, 6 bytes an element in all
#pragma once
#include "csat/prefix_scan.h"

namespace csat {

CSAT_DEVICE float column_sum(const PrefixColumnSumsArgs& p, int64_t matrix, int64_t column) {
  const int64_t first = matrix % p.chunks * limits::kPrefixChunk, state = matrix / p.chunks;
  const int64_t batch = state / p.state_heads, state_head = state % p.state_heads;
  const int64_t end = first + limits::kPrefixChunk < p.tokens ? first + limits::kPrefixChunk : p.tokens;
  float sum = 0.f;
  if (p.counts) {
    for (int64_t t = first; t < end; ++t) sum += !p.keep || p.keep[batch * p.tokens + t] ? 1.f : 0.f;
    return sum;
  }
  for (int64_t head = state_head * p.heads; column < p.columns && head < (state_head + 1) * p.heads; ++head)
    for (int64_t t = first; t < end; ++t)
      sum += at<const float>(p.x, batch, head / p.x_share, t)[column * p.x.stride[3]];
  return sum;
}

__global__ void __launch_bounds__(limits::kThreads) prefix_column_sums_kernel(PrefixColumnSumsArgs p) {
  const int64_t matrix = blockIdx.x / p.blocks, column = blockIdx.x % p.blocks * limits::kThreads + threadIdx.x;
  if (column < p.target.pitch) p.target.data[matrix * p.target.matrix + column] = column_sum(p, matrix, column);
}

__global__ void __launch_bounds__(limits::kThreads) prefix_scan_kernel(PrefixScanArgs p) {
  const int64_t index = int64_t(blockIdx.x) * limits::kThreads + threadIdx.x;
  const int64_t state = index / p.sums.matrix, element = index % p.sums.matrix;
  if (state >= p.states) return;
  const int64_t row = element / p.sums.pitch, column = element % p.sums.pitch;
  const int64_t batch = state / p.state_heads, head = state % p.state_heads;
  const bool exists = row < p.rows && column < p.columns;
  float running = exists ? at<const float>(p.start, batch, head, row)[column * p.start.stride[3]] : 0.f;
  float* sums = p.sums.data + state * p.chunks * p.sums.matrix + element;
  for (int64_t i = 0; i < p.chunks; ++i) {
    float& place = sums[(p.reverse ? p.chunks - 1 - i : i) * p.sums.matrix];
    const float own = place;
    place = running;
    running += own;
  }
  if (p.end.data && exists && head < p.end_heads && column < p.end_columns)
    at<float>(p.end, batch, head, row)[column * p.end.stride[3]] = running;
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads) prefix_mean_scan_kernel(PrefixMeanScanArgs p) {
  const int64_t matrix = p.padded_rows * p.padded_columns, index = int64_t(blockIdx.x) * limits::kThreads + threadIdx.x;
  const int64_t state = index / matrix, element = index % matrix;
  if (state >= p.states) return;
  const int64_t row = element / p.padded_columns, column = element % p.padded_columns;
  const int64_t batch = state / p.state_heads, head = state % p.state_heads;
  const bool exists = row < p.rows && column < p.columns;
  const float* mass = p.masses.data + state * p.chunks * p.masses.matrix + row;
  const int64_t first = state * p.chunks * matrix + element;
  float running = exists ? at<const float>(p.start, batch, head, row)[column * p.start.stride[3]] : 0.f;
#pragma unroll 4
  for (int64_t c = 0; c < p.chunks; ++c) {
    const float g = p.is_signed ? sqrt_f32(mass[c * p.masses.matrix]) : mass[c * p.masses.matrix];
    static_cast<T*>(p.means)[first + c * matrix] = from_float<T>(g > 0.f ? running / g : 0.f);
    running += p.sums[first + c * matrix];
  }
  if (exists && p.end.data) at<float>(p.end, batch, head, row)[column * p.end.stride[3]] = running;
}

}  // namespace csat
