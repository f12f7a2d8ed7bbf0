// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/forward_wgmma.cuh"

namespace csat {
CSAT_FORWARD_WGMMA_INSTANCE(bf16, 64)
CSAT_FORWARD_WGMMA_INSTANCE(f16, 64)
}  // namespace csat
