// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/instances.h"

namespace csat {
CSAT_ATTEND_PREFIX_INSTANCES(, bf16)
}  // namespace csat
