// A fiber: a stack and a place in the code. One carries each CUDA thread of the block that runs.
#pragma once

#include <cstddef>

namespace emulator {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Readies the fiber to run `entry` from its start; what it ran before is forgotten. `entry` must never return.
  void prepare(void (*entry)());
  // Runs the fiber until it calls suspend().
  void resume();
  // From within the fiber: back to who resumed it.
  void suspend();

 private:
  char* stack_ = nullptr;
  void* position_ = nullptr;  // stack pointer while suspended
  void* resumer_ = nullptr;   // stack pointer of the resumer while running
};

}  // namespace emulator
