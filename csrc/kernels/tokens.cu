#include "csat/dispatch.h"
#include "csat/tokens.cuh"

namespace csat {
namespace {

template <typename Source, typename Target>
int launch(const TokenArgs& p, void* stream) {
  const int64_t blocks = limits::ceil_div(p.batch * p.heads * p.tokens, limits::kWarps);
  if (blocks == 0 || p.features == 0) return 0;
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  auto kernel = copy_tokens_kernel<Source, Target>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), 0, stream, p);
  return last_error();
}

}  // namespace

int copy_tokens(const TokenArgs& p, void* stream) {
  return with_dtype(p.target.dtype, [&](auto target) {
    using Target = decltype(target);
    return p.source.dtype == p.target.dtype ? launch<Target, Target>(p, stream) : launch<float, Target>(p, stream);
  });
}

int zero_tokens(const TokenArgs& p, void* stream) {
  return with_dtype(p.target.dtype, [&](auto target) { return launch<decltype(target), decltype(target)>(p, stream); });
}

}  // namespace csat
