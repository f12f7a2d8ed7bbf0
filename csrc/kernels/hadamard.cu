#include "csat/dispatch.h"
#include "csat/hadamard.cuh"
#include "csat/implicit.h"

namespace csat {
namespace {

int64_t column_tiles(const ImplicitParams& p) { return limits::ceil_div(p.head_dim, limits::kHadamardColumns); }
int64_t row_tiles(const ImplicitParams& p) { return limits::ceil_div(p.measurements, limits::kHadamardRows); }
int64_t token_blocks(const ImplicitParams& p) { return limits::ceil_div(p.tokens, limits::kHadamardTokens); }

template <typename Kernels>
int launch(const HadamardArgs& s, int64_t blocks, Kernels kernel_of, void* stream) {
  if (blocks == 0) return 0;
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  return with_dtype(s.a.p.x.dtype, [&](auto element) {
    auto kernel = kernel_of(element);
    CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kHadamardThreads), kHadamardShared * 4,
                stream, s);
    return last_error();
  });
}

}  // namespace

int64_t hadamard_splits(const ImplicitParams& p) {
  const int64_t heads = p.phi_heads > p.x_heads ? p.phi_heads : p.x_heads;
  const int64_t blocks = p.batch * heads * column_tiles(p) * row_tiles(p);
  const int64_t wanted = blocks ? limits::ceil_div(limits::kTargetBlocks, blocks) : 1;
  const int64_t useful = token_blocks(p);
  return wanted < useful ? wanted : (useful > 1 ? useful : 1);
}

int hadamard_forward(const ImplicitArgs& a, void* stream) {
  const HadamardArgs s{a, column_tiles(a.p), row_tiles(a.p)};
  const int64_t blocks = a.p.batch * a.heads * s.column_tiles * s.row_tiles * a.splits;
  return launch(s, blocks, [](auto x) { return hadamard_forward_kernel<decltype(x)>; }, stream);
}

int hadamard_backward(const ImplicitArgs& a, void* stream) {
  const HadamardArgs s{a, column_tiles(a.p), token_blocks(a.p)};
  const int64_t blocks = a.p.batch * a.p.x_heads * s.column_tiles * s.row_tiles;
  return launch(s, blocks, [](auto x) { return hadamard_backward_kernel<decltype(x)>; }, stream);
}

}  // namespace csat
