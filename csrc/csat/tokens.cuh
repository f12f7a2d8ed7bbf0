// Copies of token tensors for the projection: strides, dtype and key mask in one pass. Memory bound; one warp a token
// row when the features are contiguous (coalesced), any strides otherwise.
//
//   copy_tokens   target[i, j, n, d] = keep[i, n] ? source[i, j, n, d] : 0     (a masked token is never read)
//   zero_tokens   target[i, j, n, :] = 0 where not keep[i, n]
#pragma once
#include "csat/tile.cuh"
#include "csat/tokens.h"

namespace csat {

template <typename Source, typename Target>
__global__ void __launch_bounds__(limits::kThreads) copy_tokens_kernel(TokenArgs p) {
  const int64_t total = p.batch * p.heads * p.tokens;
  const int64_t row = int64_t(blockIdx.x) * limits::kWarps + warp_id();
  if (row >= total) return;
  const int64_t n = row % p.tokens, h = row / p.tokens % p.heads, b = row / p.tokens / p.heads;
  const bool keep = !p.keep || p.keep[b * p.tokens + n];
  if (!p.source.data && keep) return;  // zero_tokens: a kept token stays as it is
  const Source* source = at<const Source>(p.source, b, h, n);
  Target* target = at<Target>(p.target, b, h, n);
  for (int64_t d = lane_id(); d < p.features; d += 32)
    target[d * p.target.stride[3]] = from_float<Target>(keep ? to_float(source[d * p.source.stride[3]]) : 0.f);
}

}  // namespace csat
