// Kernels that the emulator is timed on. Each returns the FLOPs it did, 0 if its result is wrong.
#pragma once

#include "selftest/case.h"

namespace emulator::selftest {

double run_tensor_product(int blocks, int repeats);
double run_plain_product(int blocks, int repeats);

}  // namespace emulator::selftest
