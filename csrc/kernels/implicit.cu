// The projection by a Phi that is not in memory, and its transpose: the kernels of the ensemble, the sum of their
// parts, the rows of anchors.
#include "csat/dispatch.h"
#include "csat/implicit.cuh"
#include "csat/implicit.h"
#include "csat/workspace.h"

namespace csat {
namespace {

struct Launches {
  int64_t (*splits)(const ImplicitParams&);
  int (*forward)(const ImplicitArgs&, void*);
  int (*backward)(const ImplicitArgs&, void*);
};
Launches launches(Ensemble ensemble) {
  switch (ensemble) {
    case Ensemble::rademacher:
      return {signs_splits, signs_forward, signs_backward};
    case Ensemble::pool:
      return {segments_splits, segments_forward, segments_backward};
    case Ensemble::srht:
      return {hadamard_splits, hadamard_forward, hadamard_backward};
  }
  return {};
}

ImplicitArgs arguments(const ImplicitParams& p) {
  return {p, p.phi_heads > p.x_heads ? p.phi_heads : p.x_heads, 1, nullptr};
}

bool is_empty(const ImplicitParams& p) { return p.batch == 0 || p.x_heads == 0 || p.head_dim == 0; }

template <bool kForward>
int anchor_rows(const ImplicitArgs& a, void* stream) {
  const int64_t rows = a.p.batch * (kForward ? a.heads : a.p.x_heads) * a.p.anchor_rows;
  const int64_t blocks = limits::ceil_div(rows, limits::kWarps);
  if (blocks == 0) return 0;
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  return with_dtype(a.p.x.dtype, [&](auto element) {
    auto kernel = anchor_rows_kernel<decltype(element), kForward>;
    CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), 0, stream, a);
    return last_error();
  });
}

int forward(const ImplicitParams& p, Carver& carver, void* stream) {
  if (is_empty(p)) return 0;
  ImplicitArgs a = arguments(p);
  const Launches of = launches(p.ensemble);
  a.splits = of.splits(p);
  const int64_t part = p.measurements * p.head_dim;
  if (a.splits > 1) a.partial = carver.take<float>(p.batch * a.heads * a.splits * part);
  if (carver.sizing()) return 0;
  CSAT_TRY(of.forward(a, stream));
  if (a.partial) {
    View y = p.y;
    y.data = static_cast<char*>(y.data) + p.anchor_rows * y.stride[2] * size_of(y.dtype);
    CSAT_TRY(reduce({a.partial, a.splits, a.splits * part, part, p.head_dim, p.batch, a.heads, p.measurements,
                     p.head_dim, y, 1.f, false},
                    stream));
  }
  return anchor_rows<true>(a, stream);
}

}  // namespace

int64_t project_implicit_workspace(const ImplicitParams& p) {
  Carver carver(nullptr);
  forward(p, carver, nullptr);
  return carver.used();
}

int project_implicit_forward(const ImplicitParams& p, void* workspace, void* stream) {
  Carver carver(workspace);
  return forward(p, carver, stream);
}

int64_t project_implicit_backward_workspace(const ImplicitParams&) { return 0; }

int project_implicit_backward(const ImplicitParams& p, void*, void* stream) {
  if (is_empty(p)) return 0;
  const ImplicitArgs a = arguments(p);
  CSAT_TRY(launches(p.ensemble).backward(a, stream));
  return anchor_rows<false>(a, stream);
}

}  // namespace csat
