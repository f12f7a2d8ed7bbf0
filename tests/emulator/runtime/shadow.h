// Shadow memory: for every two bytes of shared and device memory, who wrote them last and who has read them since.
//
// Stamps tell who and when (runtime/order.h). Within a warp, lanes are ordered by __syncwarp and by barriers alone: a
// shuffle orders nothing. As clocks only grow, the clock of a stamp also tells whether it was made by this block, by
// another block of the launch, or before, and nothing needs clearing between blocks.
//
// Two bytes are the smallest element that kernels share: neighbouring one-byte elements would count as one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/order.h"
#include "runtime/report.h"

namespace emulator {

struct alignas(16) Cell {
  Stamp write;
  Stamp read[3];  // unordered reads since the write, one slot a warp; zero: free
};
inline constexpr size_t kGranule = 2;

// The running thread, as far as ordering concerns it.
struct Observer {
  int thread = 0, threads = 0;          // of how many in its block
  uint32_t clock = kFirstClock;         // its own
  const Knowledge* known = nullptr;     // what happened before its next access
  uint32_t block_start = kFirstClock;   // stamps below come from other blocks, or shared memory's former life
  uint32_t launch_start = kFirstClock;  // stamps below come from before the launch
  unsigned block = 0;
  bool running = false;  // false while the host runs: nothing is checked
};
extern Observer observer;

// Address ranges. Everything a kernel may touch lies in one reservation, with room around each part for stray accesses.
struct MemoryMap {
  unsigned char* reservation = nullptr;
  size_t reserved_bytes = 0;
  unsigned char *shared = nullptr, *device = nullptr;  // device: the arena of all device allocations
  unsigned char* static_shared = nullptr;              // thread-local storage of the object that holds the kernels
  size_t shared_bytes = 0, static_shared_bytes = 0;    // dynamic shared memory of the launch; size of the static block
  Cell *shared_cells = nullptr, *device_cells = nullptr, *static_shared_cells = nullptr;
};
extern MemoryMap memory_map;
void reserve_memory();  // once, before anything else
bool in_shared_window(const void* p);
bool in_device_arena(const void* p);

// Checks and records an access by `observer`; of an asynchronous read, shadow_begin_read() keeps record. False if the
// address is none of the memory that is watched here.
enum class Access { read, write, atomic, asynchronous_read };
bool shadow_access(const void* p, size_t bytes, Access access, const void* where);

// Whether a stamped access of the running block happened before what `observer` does now.
bool shadow_ordered(Stamp stamp);

// Asynchronous writes: from issue, checked as a write of the observer's, to arrival the target belongs to nobody.
void shadow_begin_write(const void* target, size_t bytes, const void* where);
void shadow_end_write(const void* target, size_t bytes, Stamp writer);
// Asynchronous reads: from issue, checked in the name of whom the caller impersonates, to their end every write is a
// race.
void shadow_begin_read(const void* source, size_t bytes, int actor);
void shadow_end_read(const void* source, size_t bytes, int actor, uint32_t clock);

// The last write at `p`; a clock before `observer.block_start` is none of the running block's.
Stamp shadow_last_write(const void* p);
// The word at `p` becomes an mbarrier: nothing but its own instructions may touch it. shadow_end_write() ends that.
void shadow_mark_mbarrier(const void* p);

// For the host: marks device memory, and finds the first byte that nobody wrote (or `bytes`).
void shadow_mark(const void* device, size_t bytes, uint32_t clock);
size_t shadow_first_unwritten(const void* device, size_t bytes);
// Brings every stamp back to "written by the host", so that clocks can start again. `used` bytes of the arena are in
// use.
void shadow_restart_clocks(size_t used);

}  // namespace emulator
