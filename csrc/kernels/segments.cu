#include "csat/dispatch.h"
#include "csat/implicit.h"
#include "csat/segments.cuh"

namespace csat {
namespace {

bool has_pairs(const View& v, int64_t columns) {
  const bool even = v.stride[0] % 2 == 0 && v.stride[1] % 2 == 0 && v.stride[2] % 2 == 0 && columns % 2 == 0;
  return even && v.stride[3] == 1 && reinterpret_cast<uintptr_t>(v.data) % (2 * size_of(v.dtype)) == 0;
}

int64_t slabs(const ImplicitParams& p) { return limits::ceil_div(p.head_dim, limits::kSegmentColumns); }

template <typename Kernels>
int launch(const ImplicitArgs& a, int64_t warps, Kernels kernel_of, void* stream) {
  const int64_t blocks = limits::ceil_div(warps, limits::kWarps);
  if (blocks == 0) return 0;
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  const SegmentArgs s{a, slabs(a.p), has_pairs(a.p.x, a.p.head_dim), has_pairs(a.p.y, a.p.head_dim)};
  return with_dtype(a.p.x.dtype, [&](auto element) {
    auto kernel = kernel_of(element);
    CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), 0, stream, s);
    return last_error();
  });
}

}  // namespace

int64_t segments_splits(const ImplicitParams& p) {
  const int64_t heads = p.phi_heads > p.x_heads ? p.phi_heads : p.x_heads;
  const int64_t warps = p.batch * heads * slabs(p) * p.measurements;
  const int64_t wanted = warps ? limits::ceil_div(limits::kTargetBlocks * limits::kWarps, warps) : 1;
  const int64_t useful = limits::ceil_div(p.tokens, p.measurements * limits::kSegmentPart);
  return wanted < useful ? wanted : (useful > 1 ? useful : 1);
}

int segments_forward(const ImplicitArgs& a, void* stream) {
  const int64_t warps = a.p.batch * a.heads * slabs(a.p) * a.splits * a.p.measurements;
  return launch(a, warps, [](auto x) { return segments_forward_kernel<decltype(x)>; }, stream);
}

int segments_backward(const ImplicitArgs& a, void* stream) {
  const int64_t runs = limits::ceil_div(a.p.tokens, limits::kSegmentRun);
  const int64_t warps = a.p.batch * a.p.x_heads * slabs(a.p) * runs;
  return launch(a, warps, [](auto x) { return segments_backward_kernel<decltype(x)>; }, stream);
}

}  // namespace csat
