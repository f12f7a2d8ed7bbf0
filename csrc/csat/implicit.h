// Launches of signs.cuh, hadamard.cuh and segments.cuh: the rows of one ensemble, without anchors. Forward writes y, or
// the parts of its sum to `partial` (implicit.cuh) in the number of splits that *_splits chose; backward writes dx.
#pragma once
#include "csat/launch.h"

namespace csat {

struct ImplicitArgs;

int64_t signs_splits(const ImplicitParams& p);
int signs_forward(const ImplicitArgs& a, void* stream);
int signs_backward(const ImplicitArgs& a, void* stream);

int64_t segments_splits(const ImplicitParams& p);
int segments_forward(const ImplicitArgs& a, void* stream);
int segments_backward(const ImplicitArgs& a, void* stream);

int64_t hadamard_splits(const ImplicitParams& p);
int hadamard_forward(const ImplicitArgs& a, void* stream);
int hadamard_backward(const ImplicitArgs& a, void* stream);

}  // namespace csat
