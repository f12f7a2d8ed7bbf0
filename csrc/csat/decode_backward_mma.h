// decode_backward on tensor cores, for what limits::why_not_mma has nothing against.
#pragma once
#include "csat/launch.h"

namespace csat {

int64_t decode_backward_mma_workspace(const DecodeBackwardParams& p);
int decode_backward_mma(const DecodeBackwardParams& p, void* workspace, void* stream);

}  // namespace csat
