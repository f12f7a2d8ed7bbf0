// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/decode_backward_mma.cuh"

namespace csat {
CSAT_DECODE_BACKWARD_MMA_INSTANCE(bf16, 256)
CSAT_DECODE_BACKWARD_MMA_INSTANCE(f16, 256)
}  // namespace csat
