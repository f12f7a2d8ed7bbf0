// Launches of prefix_scan.cuh.
#include "csat/dispatch.h"
#include "csat/prefix_scan.cuh"

namespace csat {
namespace {

template <typename Kernel, typename Args>
int launch(Kernel kernel, const Args& p, int64_t blocks, void* stream) {
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  if (blocks == 0) return 0;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), 0, stream, p);
  return last_error();
}

}  // namespace

int prefix_column_sums(const PrefixColumnSumsArgs& p, int64_t matrices, void* stream) {
  return launch(prefix_column_sums_kernel, p, matrices * p.blocks, stream);
}

int prefix_scan(const PrefixScanArgs& p, void* stream) {
  return launch(prefix_scan_kernel, p, limits::ceil_div(p.states * p.sums.matrix, limits::kThreads), stream);
}

int prefix_mean_scan(const PrefixMeanScanArgs& p, void* stream) {
  const int64_t elements = p.states * p.padded_rows * p.padded_columns;
  return with_dtype(p.dtype, [&](auto element) {
    return launch(prefix_mean_scan_kernel<decltype(element)>, p, limits::ceil_div(elements, limits::kThreads), stream);
  });
}

}  // namespace csat
