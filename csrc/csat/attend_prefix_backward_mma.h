// Host side of attend_prefix_backward_mma.cuh, where limits::why_not_mma has no reason against it.
#pragma once
#include "csat/launch.h"

namespace csat {

int64_t attend_prefix_backward_mma_workspace(const PrefixBackwardParams& p);
int attend_prefix_backward_mma(const PrefixBackwardParams& p, void* workspace, void* stream);

}  // namespace csat
