// Bank conflicts of shared memory: 32 banks of 4 bytes; different words of one bank take one pass (wavefront) each.
#pragma once

#include <cstdint>

namespace emulator {

struct Thread;

struct SharedAccess {
  const void* where;  // the instruction
  uint32_t offset, bytes;
};

// Merges what the lanes of a warp have logged: the k-th access of every lane at one place in the code is one
// instruction of the warp. Adds its wavefronts and those above the least possible to the counters, and empties the
// logs.
void count_bank_conflicts(Thread* lanes, int count);
// One phase of an instruction: `count` accesses of `bytes` bytes at `offsets`. Returns its wavefronts.
int wavefronts(const uint32_t* offsets, int count, uint32_t bytes);

}  // namespace emulator
