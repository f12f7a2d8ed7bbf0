// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/forward_wgmma.cuh"

namespace csat {
CSAT_FORWARD_WGMMA_INSTANCE(bf16, 128)
CSAT_FORWARD_WGMMA_INSTANCE(f16, 128)
}  // namespace csat
