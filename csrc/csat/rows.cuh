// What a key mask makes of the rows of Phi (`renormalise_rows` in launch.h): one pass over them.
//
// Data flow: global -> registers -> global. A block takes one row and up to kMaskTile batch elements whose masks meet
// it: a Phi that the batch shares is read once for four of them. Its 128 threads go along the tokens side by side
// (coalesced), each with the sums of its own tokens; warps add theirs by shuffles, and the four warps theirs in order.
//
// Budget of an entry of Phi: one load, and for each mask one byte, an addition, a count and a comparison; bound by
// memory. Shared: kWarps (2 + 3 kMaskTile) floats. Counts are exact up to 2^24 tokens.
#pragma once
#include "csat/tile.cuh"

namespace csat {

// Of one row over all tokens, and over those that each mask keeps.
struct RowSums {
  static constexpr int kCount = 2 + 3 * limits::kMaskTile;
  float total = 0.f, negative = 0.f;  // the latter: how many entries are below 0
  float kept[limits::kMaskTile] = {}, tokens[limits::kMaskTile] = {},
        entries[limits::kMaskTile] = {};  // entries: not 0

  template <typename F>
  CSAT_DEVICE void for_each(F f) {
    f(total, 0), f(negative, 1);
#pragma unroll
    for (int b = 0; b < limits::kMaskTile; ++b)
      f(kept[b], 2 + 3 * b), f(tokens[b], 3 + 3 * b), f(entries[b], 4 + 3 * b);
  }
};

// Sums of the whole block in every thread; `shared` holds kWarps * RowSums::kCount floats.
CSAT_DEVICE void sum_over_block(RowSums& sums, float* shared) {
  sums.for_each([&](float& value, int i) {
    value = warp_sum(value);
    if (lane_id() == 0) shared[warp_id() * RowSums::kCount + i] = value;
  });
  __syncthreads();
  sums.for_each([&](float& value, int i) {
    value = shared[i];
    for (int w = 1; w < limits::kWarps; ++w) value += shared[w * RowSums::kCount + i];
  });
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads) renormalise_rows_kernel(RowsParams p) {
  constexpr int kTile = limits::kMaskTile;
  CSAT_DYN_SMEM(float, shared);
  const int64_t masks = p.phi_batch == 1 ? p.batch : 1, tiles = (masks + kTile - 1) / kTile;  // of one row
  int64_t index = blockIdx.x;
  const int64_t first = index % tiles * kTile;
  index /= tiles;
  const int64_t j = index % p.measurements, h = index / p.measurements % p.heads, i = index / p.measurements / p.heads;
  const int count = masks - first < kTile ? static_cast<int>(masks - first) : kTile;
  const T* row = at<const T>(p.phi, i, h, j);
  const unsigned char* keep = p.keep + (i + first) * p.tokens;

  RowSums sums;
  for (int64_t n = threadIdx.x; n < p.tokens; n += limits::kThreads) {
    const float value = to_float(row[n * p.phi.stride[3]]);
    sums.total += value;
    sums.negative += value < 0.f ? 1.f : 0.f;
#pragma unroll
    for (int b = 0; b < kTile; ++b)
      if (b < count && keep[b * p.tokens + n]) {
        sums.kept[b] += value;
        sums.tokens[b] += 1.f;
        sums.entries[b] += value != 0.f ? 1.f : 0.f;
      }
  }
  sum_over_block(sums, shared);

#pragma unroll
  for (int b = 0; b < kTile; ++b) {
    if (b >= count || threadIdx.x != b) continue;
    const bool empty = sums.entries[b] == 0.f, averages = sums.negative == 0.f && !empty;
    const int64_t at_row = ((i + first + b) * p.heads + h) * p.measurements + j;
    const float share = averages ? sums.total / sums.kept[b] : sqrt_f32(static_cast<float>(p.tokens) / sums.tokens[b]);
    p.factor[at_row] = empty ? 0.f : share;
    p.mass[at_row] = averages ? sums.kept[b] : 0.f;
  }
}

}  // namespace csat
