// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/attend_causal_mma.cuh"

namespace csat {
CSAT_ATTEND_CAUSAL_MMA_INSTANCE(bf16, 80)
CSAT_ATTEND_CAUSAL_MMA_INSTANCE(f16, 80)
}  // namespace csat
