// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/attend_prefix_backward_mma.cuh"

namespace csat {
CSAT_ATTEND_PREFIX_BACKWARD_MMA_INSTANCE(bf16, 64)
CSAT_ATTEND_PREFIX_BACKWARD_MMA_INSTANCE(f16, 64)
}  // namespace csat
