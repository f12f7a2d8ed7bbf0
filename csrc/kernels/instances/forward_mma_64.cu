// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/forward_mma.cuh"

namespace csat {
CSAT_FORWARD_MMA_INSTANCE(bf16, 64)
CSAT_FORWARD_MMA_INSTANCE(f16, 64)
}  // namespace csat
