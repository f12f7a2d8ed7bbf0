// What is ordered before what: vector clocks.
//
// An actor is who touches memory: a CUDA thread, an mbarrier (in whose name bulk copies write), or a warpgroup (in
// whose name its products read). A thread's clock ticks whenever it lets others know what it has done: at barriers, at
// __syncwarp, at an arrival. An access is stamped with its actor and that actor's clock, and a thread knows of every
// actor up to which clock its accesses happened before. Clocks grow from block to block and from launch to launch.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "runtime/thread.h"

namespace emulator {

inline constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarpSize;
inline constexpr int kMaxWarpgroups = kMaxThreads / kWarpgroupSize, kMaxMbarriers = 64;
// Actors: threads by their number, then mbarriers, then warpgroups.
inline constexpr int kFirstMbarrier = kMaxThreads, kFirstWarpgroup = kFirstMbarrier + kMaxMbarriers;

// clock (20 bits) | flag (1) | actor (11). The flag marks an atomic write, or a read by several lanes of one warp.
using Stamp = uint32_t;
inline constexpr int kActorBits = 11;
inline constexpr Stamp kActorMask = (1u << kActorBits) - 1, kFlag = 1u << kActorBits;
static_assert(kFirstWarpgroup + kMaxWarpgroups <= int(kActorMask));
// As clocks: an asynchronous operation is under way; the word is an mbarrier.
inline constexpr uint32_t kInFlight = (1u << 20) - 1, kMbarrier = kInFlight - 1, kMaxClock = kMbarrier - 1;
// Clocks that no actor ever has.
inline constexpr uint32_t kRedZone = 0, kUnwritten = 1, kWrittenByHost = 2, kFirstClock = 3;
constexpr Stamp make_stamp(uint32_t clock, int actor) { return clock << (kActorBits + 1) | Stamp(actor); }
constexpr uint32_t clock_of(Stamp stamp) { return stamp >> (kActorBits + 1); }
constexpr int actor_of(Stamp stamp) { return int(stamp & kActorMask); }

// Up to which clocks accesses happened before.
struct Knowledge {
  uint32_t all = 0;                            // of every actor
  std::array<uint32_t, kFirstWarpgroup> of{};  // of each; warpgroups are known by their threads

  void join(const Knowledge& other, int threads) {
    all = std::max(all, other.all);
    for (int i = 0; i < threads; ++i) of[size_t(i)] = std::max(of[size_t(i)], other.of[size_t(i)]);
    for (size_t i = kFirstMbarrier; i < of.size(); ++i) of[i] = std::max(of[i], other.of[i]);
  }
};

}  // namespace emulator
