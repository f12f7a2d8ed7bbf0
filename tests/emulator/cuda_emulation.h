// CUDA C++ for g++: the names that kernels use, carried out on the CPU by the emulator in runtime/.
//
// csrc/csat/prims.cuh includes this file in place of the CUDA headers when CSAT_EMULATE is defined, so the very kernel
// sources that nvcc compiles run under CTest. Kernel files are compiled with -fsanitize=thread and linked without its
// runtime: every load and store then calls a hook of ours (runtime/access.cpp) that checks it against shadow memory.
#pragma once

#include "emulation/qualifiers.h"
#include "emulation/types.h"
// clang-format off: the parts below use those above
#include "emulation/intrinsics.h"
#include "emulation/math.h"
#include "emulation/runtime_api.h"
#include "emulation/bulk_copy.h"
#include "emulation/tensor_core.h"
#include "emulation/warpgroup.h"
// clang-format on
