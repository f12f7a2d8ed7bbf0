// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/forward_wgmma.cuh"

namespace csat {
CSAT_FORWARD_WGMMA_INSTANCE(bf16, 64)
}
