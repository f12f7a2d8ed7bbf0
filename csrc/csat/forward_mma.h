// Host side of forward_mma.cuh, forward_wgmma.cuh and decode_wgmma.cuh: attend (decode null), decode (attend null) or
// both as one kernel, where limits::plan_forward has a plan.
#pragma once
#include "csat/limits.h"

namespace csat {

int64_t forward_mma_workspace(const limits::ForwardMmaPlan& plan, const AttendParams* attend,
                              const DecodeParams* decode);
int forward_mma(const limits::ForwardMmaPlan& plan, const AttendParams* attend, const DecodeParams* decode,
                void* workspace, void* stream);

}  // namespace csat
