// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/attend_causal_mma.cuh"

namespace csat {
CSAT_ATTEND_CAUSAL_MMA_INSTANCE(bf16, 32)
CSAT_ATTEND_CAUSAL_MMA_INSTANCE(f16, 32)
}  // namespace csat
