// Host side of attend_backward_mma.cuh and attend_backward_wgmma.cuh: attend's backward where limits::plan_backward has
// a plan.
#pragma once
#include "csat/limits.h"

namespace csat {

int64_t attend_backward_mma_workspace(const limits::AttendBackwardPlan& sizes, const AttendBackwardParams& p);
int attend_backward_mma(const limits::AttendBackwardPlan& sizes, const AttendBackwardParams& p, void* workspace,
                        void* stream);

}  // namespace csat
