// Host side of attend_backward_mma.cuh: attend's backward where limits::why_not_mma has no objection.
#pragma once
#include "csat/launch.h"

namespace csat {

int64_t attend_backward_mma_workspace(const AttendBackwardParams& p);
int attend_backward_mma(const AttendBackwardParams& p, void* workspace, void* stream);

}  // namespace csat
