// Host side of attend_prefix_mma.cuh: attend_prefix, with a decoder behind it where `decode` is not null, where
// limits::plan_prefix_mma has a plan.
#pragma once
#include "csat/launch.h"

namespace csat {

int64_t attend_prefix_mma_workspace(const PrefixParams& p, const DecodeParams* decode);
int attend_prefix_mma(const PrefixParams& p, const DecodeParams* decode, void* workspace, void* stream);

}  // namespace csat
