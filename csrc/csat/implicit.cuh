// What the projections by an implicit Phi share: which tokens are measured, where results go, and the rows of anchors.
//
//   y[b, h, A + j] = sum over kept s of phi_js x[b, h / (H / Hx), s],    y[b, h, a] = x[b, h / (H / Hx), anchor a]
//   dx[b, hx, s]   = sum over h of hx's group and j of phi_js dy[b, h, A + j], or sum over h of dy[b, h, a]
#pragma once
#include "csat/limits.h"
#include "csat/tile.cuh"

namespace csat {

// A launch: the problem, and where its kernels write. Sums that are split over blocks go to `partial` (B H, splits, M,
// D), which reduce() adds up in a fixed order; without splits they go to y.
struct ImplicitArgs {
  ImplicitParams p;
  int64_t heads;  // H = max(Hx, Hp)
  int64_t splits;
  float* partial;  // null: no splits
};

CSAT_DEVICE int64_t x_head_of(const ImplicitArgs& a, int64_t h) { return h / (a.heads / a.p.x_heads); }
CSAT_DEVICE int64_t phi_head_of(const ImplicitArgs& a, int64_t h) { return a.p.phi_heads == 1 ? 0 : h; }

CSAT_DEVICE RandomKey key_of(const ImplicitArgs& a, int64_t phi_head) {
  return {low_word(a.p.seed), high_word(a.p.seed), static_cast<uint32_t>(phi_head), static_cast<uint32_t>(a.p.layer)};
}

CSAT_DEVICE Places places_of(const ImplicitArgs& a, int64_t b) {
  return {a.p.counts ? a.p.counts + b * a.p.counts_batch : nullptr, a.p.tokens};
}
// Entries of variance 1 / (tokens kept).
CSAT_DEVICE float signed_scale(const Places& places) {
  const int64_t kept = places.total();
  return 1.f / sqrtf(static_cast<float>(kept > 1 ? kept : 1));
}

// Row j (after the anchors) of y, or of one part of its sum.
template <typename T>
CSAT_DEVICE void emit(const ImplicitArgs& a, int64_t split, int64_t b, int64_t h, int64_t j, int64_t d, float value) {
  const ImplicitParams& p = a.p;
  if (a.partial)
    a.partial[(((b * a.heads + h) * a.splits + split) * p.measurements + j) * p.head_dim + d] = value;
  else
    at<T>(p.y, b, h, p.anchor_rows + j)[d * p.y.stride[3]] = from_float<T>(value);
}

// One warp a row of (b, head, anchor): forward copies the token to y, backward sums dy over the heads into dx. An
// anchored token takes part in no other row, so nobody else has written more than a zero to its gradient.
template <typename T, bool kForward>
__global__ void __launch_bounds__(limits::kThreads) anchor_rows_kernel(ImplicitArgs a) {
  const ImplicitParams& p = a.p;
  const int64_t heads = kForward ? a.heads : p.x_heads, group = a.heads / p.x_heads;
  const int64_t index = int64_t(blockIdx.x) * limits::kWarps + warp_id();
  if (index >= p.batch * heads * p.anchor_rows) return;
  const int64_t row = index % p.anchor_rows, h = index / p.anchor_rows % heads, b = index / p.anchor_rows / heads;
  const int64_t s = p.anchors[b * p.anchors_batch + row];
  const bool exists = s >= 0 && s < p.tokens;
  if (!kForward && !exists) return;
  for (int64_t d = lane_id(); d < p.head_dim; d += 32) {
    if (kForward) {
      const float value = exists ? to_float(at<const T>(p.x, b, h / group, s)[d * p.x.stride[3]]) : 0.f;
      at<T>(p.y, b, h, row)[d * p.y.stride[3]] = from_float<T>(value);
    } else {
      float sum = 0.f;
      for (int64_t g = 0; g < group; ++g) sum += to_float(at<const T>(p.y, b, h * group + g, row)[d * p.y.stride[3]]);
      at<T>(p.x, b, h, s)[d * p.x.stride[3]] = from_float<T>(sum);
    }
  }
}

}  // namespace csat
