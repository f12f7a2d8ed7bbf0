// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/decode_wgmma.cuh"

namespace csat {
CSAT_DECODE_WGMMA_INSTANCE(bf16, 128)
CSAT_DECODE_WGMMA_INSTANCE(f16, 128)
}  // namespace csat
