#include "csat/dispatch.h"
#include "csat/rows.cuh"

namespace csat {

int renormalise_rows(const RowsParams& p, void* stream) {
  const int64_t masks = p.phi_batch == 1 ? p.batch : 1;
  const int64_t blocks =
      (p.batch ? p.phi_batch : 0) * p.heads * p.measurements * limits::ceil_div(masks, limits::kMaskTile);
  if (blocks == 0) return 0;
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  return with_dtype(p.phi.dtype, [&](auto element) {
    auto kernel = renormalise_rows_kernel<decltype(element)>;
    CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads),
                limits::kWarps * RowSums::kCount * sizeof(float), stream, p);
    return last_error();
  });
}

}  // namespace csat
