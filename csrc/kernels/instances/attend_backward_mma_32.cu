// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/attend_backward_mma.cuh"

namespace csat {
CSAT_ATTEND_BACKWARD_MMA_INSTANCE(bf16, 32)
CSAT_ATTEND_BACKWARD_MMA_INSTANCE(f16, 32)
}  // namespace csat
