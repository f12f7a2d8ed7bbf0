// Means of contiguous segments of the kept tokens, weighted by overlap at their borders, and the transpose.
//
//   forward    y_j  = sum over the places p of segment j of overlap(p, j) x_p / length_j
//   backward   dx_s = sum over the segments j that the place p of s has a part in of overlap(p, j) / length_j dy_j
//
// Data flow: global -> registers -> global, one warp a row (forward: one row j, or a part of it; backward: a run of
// tokens), two features a lane, 64 features a slab; nothing is multiplied by a zero of Phi. Tokens are read once, those
// on a border once for each segment they belong to, the second time from L1 or L2.
//
// Budget of a token and feature: one FMA. No shared memory. Forward, rows longer than 64 tokens are split over warps
// where there are few rows; implicit.cuh says where the parts go. A place is found by bisection of the running counts,
// once a row; a segment by one 64-bit division, once a run.
#pragma once
#include "csat/implicit.cuh"

namespace csat {

struct SegmentArgs {
  ImplicitArgs a;
  int64_t slabs;
  bool x_pairs, y_pairs;  // two neighbouring features are one aligned load or store
};

CSAT_DEVICE Segments segments_of(const ImplicitArgs& a, const Places& places, int64_t phi_head) {
  return {a.p.measurements, a.p.phi_heads, phi_head, places.total()};
}

// Features d and d + 1 of a row, 0 from `columns` on.
template <typename T>
CSAT_DEVICE float2 load_pair(const T* row, int64_t d, int64_t columns, int64_t stride, bool pairs) {
  if (d >= columns) return float2{0.f, 0.f};
  if (pairs) {
    if constexpr (sizeof(T) == 4)
      return *reinterpret_cast<const float2*>(row + d);
    else
      return unpack2<T>(*reinterpret_cast<const uint32_t*>(row + d));
  }
  return float2{to_float(row[d * stride]), d + 1 < columns ? to_float(row[(d + 1) * stride]) : 0.f};
}

template <typename T>
CSAT_DEVICE void store_pair(T* row, int64_t d, int64_t columns, int64_t stride, bool pairs, float2 value) {
  if (d >= columns) return;
  if (pairs) {
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float2*>(row + d) = value;
    else
      *reinterpret_cast<uint32_t*>(row + d) = pack2<T>(value.x, value.y);
    return;
  }
  row[d * stride] = from_float<T>(value.x);
  if (d + 1 < columns) row[(d + 1) * stride] = from_float<T>(value.y);
}

// What part of a place the segment takes: all of it, but for the first and the last one.
struct Share {
  int64_t first, last;  // places
  float of_first, of_last, inverse;
  CSAT_DEVICE Share(const Segments& segments, int64_t j) {
    const int64_t unit = segments.unit(), low = segments.edge(j), high = segments.edge(j + 1);
    first = low / unit;
    last = (high + unit - 1) / unit - 1;
    of_first = static_cast<float>(segments.overlap(first, j)) / static_cast<float>(unit);
    of_last = static_cast<float>(segments.overlap(last, j)) / static_cast<float>(unit);
    inverse = high > low ? static_cast<float>(unit) / static_cast<float>(high - low) : 0.f;
  }
  CSAT_DEVICE float of(int64_t p) const { return p == first ? of_first : p == last ? of_last : 1.f; }
};

template <typename T>
__global__ void __launch_bounds__(limits::kThreads) segments_forward_kernel(SegmentArgs s) {
  constexpr int kAhead = 4;  // tokens in flight
  const ImplicitArgs& a = s.a;
  const ImplicitParams& p = a.p;
  int64_t index = int64_t(blockIdx.x) * limits::kWarps + warp_id();
  if (index >= p.batch * a.heads * s.slabs * a.splits * p.measurements) return;
  const int64_t j = index % p.measurements;
  index /= p.measurements;
  const int64_t split = index % a.splits;
  index /= a.splits;
  const int64_t d = index % s.slabs * limits::kSegmentColumns + 2 * lane_id();
  index /= s.slabs;
  const int64_t h = index % a.heads, b = index / a.heads;

  const Places places = places_of(a, b);
  const Share share(segments_of(a, places, phi_head_of(a, h)), j);
  int64_t begin = 0, end = 0;
  if (share.last >= share.first) {
    begin = places.token_at(share.first);
    end = places.token_at(share.last) + 1;
    if (end > p.tokens) end = p.tokens;
    const int64_t part = (end - begin + a.splits - 1) / a.splits;
    begin += split * part;
    if (begin + part < end) end = begin + part;
  }
  float2 sum{0.f, 0.f};
  for (int64_t t = begin; t < end; t += kAhead) {
    float2 value[kAhead];
    float weight[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool read = t + i < end && places.kept(t + i);
      weight[i] = read ? share.of(places.before(t + i)) : 0.f;
      value[i] = float2{0.f, 0.f};
      if (read)
        value[i] = load_pair(at<const T>(p.x, b, x_head_of(a, h), t + i), d, p.head_dim, p.x.stride[3], s.x_pairs);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      sum.x += weight[i] * value[i].x;
      sum.y += weight[i] * value[i].y;
    }
  }
  if (d < p.head_dim) emit<T>(a, split, b, h, j, d, share.inverse * sum.x);
  if (d + 1 < p.head_dim) emit<T>(a, split, b, h, j, d + 1, share.inverse * sum.y);
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads, 6) segments_backward_kernel(SegmentArgs s) {
  const ImplicitArgs& a = s.a;
  const ImplicitParams& p = a.p;
  const int64_t runs = (p.tokens + limits::kSegmentRun - 1) / limits::kSegmentRun, group = a.heads / p.x_heads;
  int64_t index = int64_t(blockIdx.x) * limits::kWarps + warp_id();
  if (index >= p.batch * p.x_heads * s.slabs * runs) return;
  const int64_t begin = index % runs * limits::kSegmentRun;
  const int64_t end = begin + limits::kSegmentRun < p.tokens ? begin + limits::kSegmentRun : p.tokens;
  index /= runs;
  const int64_t d = index % s.slabs * limits::kSegmentColumns + 2 * lane_id();
  index /= s.slabs;
  const int64_t hx = index % p.x_heads, b = index / p.x_heads;
  const Places places = places_of(a, b);

  int64_t j = -1;  // the first segment of the token before; with several heads a token, each has its own
  for (int64_t t = begin; t < end; ++t) {
    float2 sum{0.f, 0.f};
    if (places.kept(t)) {
      const int64_t place = places.before(t);
      for (int64_t h = hx * group; h < (hx + 1) * group; ++h) {
        const Segments segments = segments_of(a, places, phi_head_of(a, h));
        const int64_t left = place * segments.unit(), right = left + segments.unit();
        if (j < 0 || group > 1) j = segments.at(place);
        while (j < segments.count - 1 && segments.edge(j + 1) <= left) ++j;
        for (int64_t k = j; k < segments.count && segments.edge(k) < right; ++k) {
          const float weight = static_cast<float>(segments.overlap(place, k)) /
                               static_cast<float>(segments.edge(k + 1) - segments.edge(k));
          const float2 grad =
              load_pair(at<const T>(p.y, b, h, p.anchor_rows + k), d, p.head_dim, p.y.stride[3], s.y_pairs);
          sum.x += weight * grad.x;
          sum.y += weight * grad.y;
        }
      }
    }
    store_pair(at<T>(p.x, b, hx, t), d, p.head_dim, p.x.stride[3], s.x_pairs, sum);
  }
}

}  // namespace csat
