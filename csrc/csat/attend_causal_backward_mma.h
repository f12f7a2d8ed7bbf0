// Host side of attend_causal_backward_mma.cuh: attend_causal's backward where limits::why_not_mma has no reason.
#pragma once
#include "csat/launch.h"

namespace csat {

int64_t attend_causal_backward_mma_workspace(const AttendCausalBackwardParams& p);
int attend_causal_backward_mma(const AttendCausalBackwardParams& p, void* workspace, void* stream);

}  // namespace csat
