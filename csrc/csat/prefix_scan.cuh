// From sums over the tokens of each chunk to the states between chunks, for attend_prefix; memory bound.
//
//   prefix_column_sums  sums of the rows of a chunk, a column a thread
//   prefix_scan         exclusive scan over the chunks in their order, or back, an element of the state a thread: reads
//                       and writes M (D + R + 1) floats a chunk
#pragma once
#include "csat/tile.cuh"

namespace csat {

// target (1, M) of every (batch element, state head, chunk) = sum of x over its tokens and heads; counts: of 1 for each
// token that is kept.
struct PrefixColumnSumsArgs {
  View x;  // (B, .., N, columns), float32
  int64_t x_share, heads;
  int64_t state_heads, chunks, tokens, columns;  // columns: of x, zeros behind
  bool counts;
  const unsigned char* keep;
  Panel target;
  int64_t blocks;  // for each matrix
};

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

// sums (state heads, chunks) of a matrix become what comes before each chunk, or behind it: an exclusive scan from
// `start`, an element a thread.
struct PrefixScanArgs {
  Panel sums;
  int64_t states, state_heads, chunks;
  bool reverse;
  View start, end;        // (B, state heads, rows, columns), float32; what the last step leaves; data null: not wanted
  int64_t rows, columns;  // of both
  int64_t end_heads, end_columns;  // of the end alone
};

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

}  // namespace csat
