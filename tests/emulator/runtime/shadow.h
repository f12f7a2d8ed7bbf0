// Shadow memory: for every two bytes of shared and device memory, who wrote them last and who has read them since.
//
// Order is kept as vector clocks of warps. Every warp has a clock that ticks at each of its barriers; an access is
// stamped with the accessing thread and its warp's clock. A barrier teaches its participants the clocks of all the
// others. An access of warp u with clock c happened before the running thread's if the running warp has learned c from
// u. Within a warp, lanes are ordered by __syncwarp and by barriers alone: a shuffle orders nothing. Clocks grow from
// block to block and from launch to launch, so the clock of a stamp also tells whether it was made by this block,
// another block of the launch, or before, and nothing needs clearing between blocks.
//
// Two bytes are the smallest element that kernels share: neighbouring one-byte elements would count as one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/report.h"

namespace emulator {

// clock (21 bits) | flag (1) | thread (10). The flag marks an atomic write, or a read by several lanes of one warp.
using Stamp = uint32_t;
inline constexpr int kThreadBits = 10;
inline constexpr Stamp kThreadMask = (1u << kThreadBits) - 1, kFlag = 1u << kThreadBits;
inline constexpr uint32_t kInFlight = (1u << 21) - 1;  // as a clock: an asynchronous copy has yet to deliver
inline constexpr uint32_t kMaxClock = kInFlight - 1;
// Clocks that no warp ever has.
inline constexpr uint32_t kRedZone = 0, kUnwritten = 1, kWrittenByHost = 2, kFirstClock = 3;
constexpr Stamp make_stamp(uint32_t clock, int thread) { return clock << (kThreadBits + 1) | Stamp(thread); }
constexpr uint32_t clock_of(Stamp stamp) { return stamp >> (kThreadBits + 1); }
constexpr int thread_of(Stamp stamp) { return int(stamp & kThreadMask); }

struct alignas(16) Cell {
  Stamp write;
  Stamp read[3];  // unordered reads since the write, one slot a warp; zero: free
};
inline constexpr size_t kGranule = 2;

// The running thread, as far as ordering concerns it.
struct Observer {
  int thread = 0, warp = 0;
  uint32_t clock = kFirstClock;         // of its warp
  uint32_t lanes_ordered = 0;           // accesses of its warp's other lanes up to this clock are ordered before it
  const uint32_t* learned = nullptr;    // [warp]: the clocks it has learned
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

// Checks and records an access by `observer`.
enum class Access { read, write, atomic };
void shadow_access(const void* p, size_t bytes, Access access, const void* where);

// Asynchronous copies: from issue to arrival the target belongs to nobody.
void shadow_issue_copy(const void* target, size_t bytes, const void* where);
void shadow_finish_copy(const void* target, size_t bytes);

// The thread of the running block that last wrote shared memory at `p`, and the clock of its write; thread -1 if none
// did.
int shadow_last_writer(const void* p);
uint32_t shadow_last_write_clock(const void* p);

// For the host: marks device memory, and finds the first byte that nobody wrote (or `bytes`).
void shadow_mark(const void* device, size_t bytes, uint32_t clock);
size_t shadow_first_unwritten(const void* device, size_t bytes);
// Brings every stamp back to "written by the host", so that clocks can start again. `used` bytes of the arena are in
// use.
void shadow_restart_clocks(size_t used);

}  // namespace emulator
