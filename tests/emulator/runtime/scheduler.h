// The threads of the block that runs: their state, who waits for whom.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <vector>

#include "emulation/warpgroup.h"
#include "runtime/fiber.h"
#include "runtime/order.h"
#include "runtime/registers.h"
#include "runtime/thread.h"

namespace emulator {

inline constexpr int kNamedBarriers = 16;

struct AsyncCopy {
  void* target;
  const void* source;
  int bytes, valid;
};

// A warpgroup product of one lane.
struct Product {
  WgmmaOperand operand;
  std::array<uint32_t, 4> a;  // the lane's registers of A when it was issued
  const void* where;
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
  std::vector<Product> open_products;           // the same for wgmma
  std::deque<std::vector<Product>> products;
  WatchedRegisters registers;       // of those products
  std::vector<size_t> open_stores;  // and for bulk copies to device memory
  std::deque<std::vector<size_t>> stores;
  uint32_t fenced, fenced_mbarriers;            // up to which clock its writes, and the mbarriers that it
                                                // initialised, are visible to the asynchronous proxy
  std::vector<struct SharedAccess> shared_log;  // since the warp's last meeting, when bank conflicts are counted
};

// The thread whose fiber runs. Null on the host.
extern Thread* running;
// The lanes of the running thread's warp.
Thread& lane_of_running_warp(int lane);
Thread& lane_of_running_warpgroup(int lane);
Thread& thread_of_block(int id);
// Reports shared memory that the asynchronous proxy is about to touch and whose writer has not fenced its write.
void check_proxy_fence(const void* p, size_t bytes, const char* what, const void* where);
// Makes `observer` and `running` those of a thread: collectives check the accesses of every lane in its own name.
void impersonate(Thread& thread);

// ---- to wait for each other
// Lets others run until one of them makes the running thread ready.
void suspend(const char* what, uint32_t with, int line);
// Adds what `thread` has done, and what it knows of others, to `to`.
void release(Thread& thread, Knowledge& to);
void acquire(Thread& thread, const Knowledge& from);
uint32_t later_than(uint32_t clock);

// ---- at the end of a block: whatever is still in flight comes to its end, so that the next block starts clean
void finish_copies(Thread& thread);
void finish_products(Thread& thread);
void finish_bulk_stores();
// Reports phases left half done and bytes that nobody waited for, unless the block stood still anyway.
void finish_mbarriers(bool stood_still);

}  // namespace emulator
