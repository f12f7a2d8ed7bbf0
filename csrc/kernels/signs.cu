#include "csat/dispatch.h"
#include "csat/implicit.h"
#include "csat/signs.cuh"
#include "csat/workspace.h"

namespace csat {
namespace {

// Blocks without a split of the depth.
int64_t row_blocks(SignArgs& s, bool forward) {
  const ImplicitParams& p = s.a.p;
  const int64_t chunks = p.x.dtype == DType::f32 ? kSignChunks<float> : kSignChunks<bf16>;
  const int64_t heads = forward ? s.a.heads : p.x_heads, owners = p.phi_heads == 1 ? 1 : heads;
  s.pairs = p.batch * heads / owners;
  s.chunks_per_pair = limits::ceil_div(p.head_dim, 8);
  s.column_tiles = limits::ceil_div(s.pairs * s.chunks_per_pair, chunks);
  s.row_tiles = limits::ceil_div(forward ? p.measurements : p.tokens, limits::kSignRows);
  s.depth = forward ? p.tokens : p.measurements;
  return owners * s.row_tiles * s.column_tiles;
}

template <bool kForward>
int launch(const ImplicitArgs& a, void* stream) {
  SignArgs s{};
  s.a = a;
  const int64_t blocks = row_blocks(s, kForward) * a.splits;
  if (blocks == 0) return 0;
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  s.split_depth = limits::round_up(limits::ceil_div(s.depth, a.splits), limits::kSignDepth);
  s.vectors = has_vector_rows(kForward ? a.p.x : a.p.y);
  const dim3 grid(static_cast<unsigned>(blocks)), threads(limits::kThreads);
  return with_dtype(a.p.x.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 4) {
      auto kernel = signs_f32_kernel<kForward>;
      const int64_t bytes = limits::kSignDepth * (limits::kSignColumns / 2 + 8 + limits::kSignRows) * 4;
      CSAT_LAUNCH(kernel, grid, threads, bytes, stream, s);
    } else {
      auto kernel = signs_kernel<T, kForward>;
      const int64_t bytes = 2 * kSignStage * 2;
      CSAT_LAUNCH(kernel, grid, threads, bytes, stream, s);
    }
    return last_error();
  });
}

}  // namespace

int64_t signs_splits(const ImplicitParams& p) {
  SignArgs s{};
  s.a.p = p;
  s.a.heads = p.phi_heads > p.x_heads ? p.phi_heads : p.x_heads;
  const int64_t blocks = row_blocks(s, true);
  const int64_t wanted = blocks ? limits::ceil_div(limits::kTargetBlocks, blocks) : 1;
  const int64_t useful = limits::ceil_div(s.depth, 8 * limits::kSignDepth);
  const int64_t splits = wanted < useful ? wanted : (useful > 1 ? useful : 1);
  const int64_t split_depth = limits::round_up(limits::ceil_div(s.depth, splits), limits::kSignDepth);
  return split_depth ? limits::ceil_div(s.depth, split_depth) : 1;
}

int signs_forward(const ImplicitArgs& a, void* stream) { return launch<true>(a, stream); }
int signs_backward(const ImplicitArgs& a, void* stream) { return launch<false>(a, stream); }

}  // namespace csat
