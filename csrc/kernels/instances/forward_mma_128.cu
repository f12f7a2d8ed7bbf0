// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/forward_mma.cuh"

namespace csat {
CSAT_FORWARD_MMA_INSTANCE(bf16, 128)
CSAT_FORWARD_MMA_INSTANCE(f16, 128)
}  // namespace csat
