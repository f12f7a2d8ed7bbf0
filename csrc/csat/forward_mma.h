// Host side of forward_mma.cuh, forward_wgmma.cuh, decode_wgmma.cuh and attend_causal_mma.cuh: attend (decode null),
// decode (attend null) or both as one kernel, where limits::plan_forward has a plan.
#pragma once
#include "csat/limits.h"

namespace csat {

int64_t forward_mma_workspace(const limits::ForwardMmaPlan& plan, const AttendParams* attend,
                              const DecodeParams* decode);
int forward_mma(const limits::ForwardMmaPlan& plan, const AttendParams* attend, const DecodeParams* decode,
                void* workspace, void* stream);

// attend_causal, or both as one kernel, where limits::plan_causal_mma has a plan.
int64_t attend_causal_mma_workspace(const limits::ForwardMmaPlan& plan, const AttendCausalParams& p,
                                    const DecodeParams* decode);
int attend_causal_mma(const limits::ForwardMmaPlan& plan, const AttendCausalParams& p, const DecodeParams* decode,
                      void* workspace, void* stream);

}  // namespace csat
