// decode_backward on tensor cores, for what limits::why_not_mma and why_not_wgmma have nothing against.
#pragma once
#include "csat/launch.h"

namespace csat {

int64_t decode_backward_mma_workspace(const DecodeBackwardParams& p);
int decode_backward_mma(const DecodeBackwardParams& p, void* workspace, void* stream);

int64_t decode_backward_wgmma_workspace(const DecodeBackwardParams& p);
int decode_backward_wgmma(const DecodeBackwardParams& p, void* workspace, void* stream);

}  // namespace csat
