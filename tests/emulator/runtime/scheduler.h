// The threads of the block that runs: their state, who waits for whom.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "emulation/warpgroup.h"
#include "runtime/fiber.h"
#include "runtime/order.h"
#include "runtime/thread.h"

namespace emulator {

inline constexpr int kNamedBarriers = 16;

struct AsyncCopy {
  void* target;
  const void* source;
  int bytes, valid;
};

struct ThreadIndex {
  dim3 thread, block, block_dim, grid_dim;
};

struct Thread {
  enum class State : uint8_t { ready, waiting, exited };
  Fiber fiber;
  ThreadIndex index;
  int id, warp, lane;
  State state;
  const char* waits_for;  // what kind of thing, for messages
  uint32_t waits_with;    // mask, or barrier number
  int line;               // source line of the barrier it waits at
  uint32_t clock;
  Knowledge known;
  bool apart;                                   // knows what the other lanes of its warp may not know
  std::vector<AsyncCopy> open;                  // copies of the group being built
  std::vector<std::vector<AsyncCopy>> pending;  // committed groups, oldest first
  std::vector<WgmmaOperand> open_products;      // the same for wgmma
  std::deque<std::vector<WgmmaOperand>> products;
  uint32_t fenced;                              // its writes up to this clock are visible to the asynchronous proxy
  std::vector<struct SharedAccess> shared_log;  // since the warp's last meeting, when bank conflicts are counted
};

// The thread whose fiber runs. Null on the host.
extern Thread* running;
// The lanes of the running thread's warp.
Thread& lane_of_running_warp(int lane);
Thread& lane_of_running_warpgroup(int lane);
// Whether what `thread` wrote at `clock` is visible to the asynchronous proxy.
bool fenced(int thread, uint32_t clock);
// Makes `observer` and `running` those of a thread: collectives check the accesses of every lane in its own name.
void impersonate(Thread& thread);

}  // namespace emulator
