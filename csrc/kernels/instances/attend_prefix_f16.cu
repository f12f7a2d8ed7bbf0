// Written by generate.py.
#define CSAT_INSTANTIATE
#include "csat/instances.h"

namespace csat {
CSAT_ATTEND_PREFIX_INSTANCES(, f16)
}  // namespace csat
