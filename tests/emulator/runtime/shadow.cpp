#include "runtime/shadow.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <new>
#include <span>
#include <string>

#include "runtime/emulator.h"

namespace emulator {

Observer observer;
MemoryMap memory_map;

namespace {

constexpr size_t kGap = size_t(64) << 20;          // stray accesses this far off are still recognised
constexpr size_t kSharedWindow = size_t(1) << 20;  // more than any device has
constexpr size_t kSharedAlignment = 1024;          // of the 128-byte swizzle's pattern

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

// By what the observer knows of single actors. A read by several lanes of a warp has to be ordered for each of them;
// one by the products of a warpgroup for one lane of each warp, for all lanes wait for the products together.
[[gnu::noinline]] bool ordered_singly(Stamp stamp) {
  const int actor = actor_of(stamp);
  const uint32_t clock = clock_of(stamp);
  if (clock > kMaxClock) return false;
  const auto known = [&](int other) { return other == observer.thread || clock <= observer.known->of[size_t(other)]; };
  const auto count = [&](int first, int end) {
    int n = 0;
    for (int thread = first; thread < end; ++thread) n += known(thread);
    return n;
  };
  if (actor >= kFirstWarpgroup) {
    const int first = (actor - kFirstWarpgroup) * kWarpgroupSize;
    bool all = true;
    for (int warp = first; warp < first + kWarpgroupSize; warp += kWarpSize) all &= count(warp, warp + kWarpSize) > 0;
    return all;
  }
  if (!(stamp & kFlag)) return known(actor);
  const int first = actor / kWarpSize * kWarpSize, end = std::min(first + kWarpSize, observer.threads);
  return count(first, end) == end - first;
}

// True if the stamped access happened before what `observer` does now. Only for stamps of the running block.
inline bool ordered(Stamp stamp) {
  return clock_of(stamp) <= observer.known->all || (stamp & (kActorMask | kFlag)) == Stamp(observer.thread)
             ? clock_of(stamp) <= kMaxClock
             : ordered_singly(stamp);
}

struct Site {
  bool shared;
  size_t offset;  // in its space, for messages
  Access access;
  const void* where;
};

const char* verb(Access access) {
  return access == Access::write ? "write" : access == Access::atomic ? "atomic update" : "read";
}

std::string place(const Site& site) {
  return format("%s of %s memory at %#zx by thread %d of block %u", verb(site.access),
                site.shared ? "shared" : "device", site.offset, observer.thread, observer.block);
}

// `detail` makes the rest of the message; it is asked once a place, however often the fault occurs.
template <typename Detail>
[[gnu::noinline]] void fault(Fault kind, const Site& site, Detail detail) {
  if (!report.count_again(kind, site.where)) report.add(kind, site.where, place(site) + detail());
}
[[gnu::noinline]] void fault(Fault kind, const Site& site, const char* detail = "") {
  if (!report.count_again(kind, site.where)) report.add(kind, site.where, place(site) + detail);
}

std::string other(const char* what, Stamp stamp) {
  const int actor = actor_of(stamp);
  const bool is_group = actor >= kFirstWarpgroup, is_copy = !is_group && actor >= kFirstMbarrier;
  const char* who = is_group ? "products of warpgroup" : is_copy ? "a copy that arrived at mbarrier" : "thread";
  return format(", %s by %s %d %s", what, who,
                actor - (is_group  ? kFirstWarpgroup
                         : is_copy ? kFirstMbarrier
                                   : 0),
                clock_of(stamp) == kInFlight ? "asynchronously, not waited for" : "with no barrier between");
}

// Reports what is wrong with the last write; false if the address is not accessible at all.
[[gnu::noinline]] bool judge_last_write(Stamp write, const Site& site) {
  const uint32_t clock = clock_of(write);
  if (clock == kInFlight) {
    fault(Fault::in_flight_access, site,
          [&] { return format(", into which a copy of thread %d is in flight", actor_of(write)); });
    return true;
  }
  if (clock == kMbarrier) {
    fault(Fault::mbarrier, site, ", which is an mbarrier");
    return true;
  }
  if (clock >= observer.block_start) {
    const bool both_atomic = site.access == Access::atomic && (write & kFlag);
    if (!both_atomic && !ordered(write & ~kFlag)) fault(Fault::race, site, [&] { return other("written", write); });
    return true;
  }
  if (site.shared) {
    if (site.access != Access::write) fault(Fault::uninitialised_read, site);
    return true;
  }
  if (clock == kRedZone) {
    fault(Fault::out_of_bounds, site, ", outside every allocation");
    return false;
  }
  if (clock == kUnwritten) {
    if (site.access != Access::write) fault(Fault::uninitialised_read, site);
  } else if (clock >= observer.launch_start && !(site.access == Access::atomic && (write & kFlag))) {
    fault(Fault::block_conflict, site, ", written by another block of this launch");
  }
  return true;
}

// Whether the last write leaves nothing to report: the common case, decided without a call.
template <Access access, bool shared>
inline bool last_write_is_fine(Stamp write) {
  const uint32_t clock = clock_of(write);
  if (clock >= observer.block_start) return ordered(write & ~kFlag);
  if (shared) return access == Access::write;
  return clock < observer.launch_start && clock >= (access == Access::write ? kUnwritten : kWrittenByHost);
}

[[gnu::noinline]] void judge_read(Stamp read, const Site& site) {
  if (clock_of(read) >= observer.block_start) {
    fault(Fault::race, site, [&] { return other("read", read); });
  } else {
    fault(Fault::block_conflict, site, ", read by another block of this launch");
  }
}

// Reads from before this block (shared) or launch (device memory) are of no concern to anyone.
template <bool shared>
inline bool forgotten(Stamp read) {
  return clock_of(read) < (shared ? observer.block_start : observer.launch_start);
}

inline bool settled(Stamp read) { return clock_of(read) >= observer.block_start && ordered(read); }

template <bool shared>
inline void record_read(Cell& cell, Stamp mine) {
  for (Stamp& slot : cell.read) {
    if (slot == mine) return;
    if (clock_of(slot) == observer.clock && actor_of(slot) / kWarpSize == observer.thread / kWarpSize) {
      slot |= kFlag;  // another lane of the same warp, in the same stretch
      return;
    }
    if (forgotten<shared>(slot) || settled(slot)) {
      slot = mine;
      return;
    }
  }
  cell.read[2] = mine;
}

template <Access access, bool shared>
inline void step(Cell& cell, Stamp mine, size_t offset, const void* where) {
  if (!last_write_is_fine<access, shared>(cell.write)) [[unlikely]] {
    if (!judge_last_write(cell.write, {shared, offset, access, where})) return;
  }
  if (access == Access::asynchronous_read) return;
  if (access == Access::read) return record_read<shared>(cell, mine);
  for (const Stamp read : cell.read) {
    if (!forgotten<shared>(read) && !settled(read)) [[unlikely]]
      judge_read(read, {shared, offset, access, where});
  }
  cell = Cell{access == Access::atomic ? mine | kFlag : mine, {}};
}

inline bool same(const Cell& a, const Cell& b) { return std::memcmp(&a, &b, sizeof(Cell)) == 0; }

// Steps the cells of one access. Neighbours mostly share their history, so what held for one is copied to the next.
template <Access access, bool shared>
void walk(Cell* cells, size_t offset, size_t bytes, const void* where) {
  const Stamp mine = make_stamp(observer.clock, observer.thread);
  Cell* cell = cells + offset / kGranule;
  Cell* const end = cells + (offset + bytes - 1) / kGranule + 1;
  const Cell before = *cell;
  step<access, shared>(*cell, mine, offset, where);
  const Cell after = *cell;
  for (++cell; cell != end; ++cell) {
    if (same(*cell, before)) [[likely]] {
      *cell = after;
    } else {
      step<access, shared>(*cell, mine, offset, where);
    }
  }
}

template <bool shared>
void walk(Access access, Cell* cells, size_t offset, size_t bytes, const void* where) {
  switch (access) {
    case Access::read:
      return walk<Access::read, shared>(cells, offset, bytes, where);
    case Access::write:
      return walk<Access::write, shared>(cells, offset, bytes, where);
    case Access::atomic:
      return walk<Access::atomic, shared>(cells, offset, bytes, where);
    case Access::asynchronous_read:
      return walk<Access::asynchronous_read, shared>(cells, offset, bytes, where);
  }
}

// The cells of [p, p + bytes); none where none are kept.
std::span<Cell> cells_of(const void* p, size_t bytes) {
  const auto address = static_cast<const unsigned char*>(p);
  const auto cells = [&](Cell* first, const unsigned char* start, size_t size) -> std::span<Cell> {
    const size_t offset = size_t(address - start);
    if (offset >= size || offset + bytes > size) return {};
    return {first + offset / kGranule, first + (offset + bytes - 1) / kGranule + 1};
  };
  if (const auto found = cells(memory_map.shared_cells, memory_map.shared, kSharedWindow); !found.empty()) return found;
  if (const auto found = cells(memory_map.device_cells, memory_map.device, kDeviceBytes); !found.empty()) return found;
  return cells(memory_map.static_shared_cells, memory_map.static_shared, memory_map.static_shared_bytes);
}

constexpr Stamp reading(int actor) { return make_stamp(kInFlight, actor); }

}  // namespace

void reserve_memory() {
  if (memory_map.reservation != nullptr) return;
  memory_map.reserved_bytes = 3 * kGap + kSharedWindow + kDeviceBytes;
  auto base = static_cast<unsigned char*>(reserve(memory_map.reserved_bytes + kSharedAlignment));
  base += (kSharedAlignment - reinterpret_cast<uintptr_t>(base) % kSharedAlignment) % kSharedAlignment;
  memory_map.reservation = base;
  memory_map.shared = base + kGap;
  memory_map.device = memory_map.shared + kSharedWindow + kGap;
  memory_map.shared_cells = static_cast<Cell*>(reserve(kSharedWindow / kGranule * sizeof(Cell)));
  memory_map.device_cells = static_cast<Cell*>(reserve(kDeviceBytes / kGranule * sizeof(Cell)));
}

bool in_shared_window(const void* p) {
  const auto address = static_cast<const unsigned char*>(p);
  return size_t(address - memory_map.shared) < kSharedWindow ||
         size_t(address - memory_map.static_shared) < memory_map.static_shared_bytes;
}

bool in_device_arena(const void* p) {
  return size_t(static_cast<const unsigned char*>(p) - memory_map.device) < kDeviceBytes;
}

bool shadow_access(const void* p, size_t bytes, Access access, const void* where) {
  const auto address = static_cast<const unsigned char*>(p);
  if (size_t(address - memory_map.reservation) < memory_map.reserved_bytes) [[likely]] {
    ++report.counters.accesses;
    size_t offset = size_t(address - memory_map.shared);
    if (offset < kSharedWindow && offset + bytes > memory_map.shared_bytes) {
      fault(Fault::out_of_bounds, {true, offset, access, where},
            [] { return format(", which has %zu bytes", memory_map.shared_bytes); });
    } else if (offset < kSharedWindow) {
      walk<true>(access, memory_map.shared_cells, offset, bytes, where);
    } else if (offset = size_t(address - memory_map.device); offset < kDeviceBytes) {
      walk<false>(access, memory_map.device_cells, offset, bytes, where);
    } else {
      fault(Fault::out_of_bounds, {address < memory_map.device, offset, access, where}, ", far outside");
    }
    return true;
  }
  const size_t offset = size_t(address - memory_map.static_shared);
  if (offset >= memory_map.static_shared_bytes) return false;
  walk<true>(access, memory_map.static_shared_cells, offset, bytes, where);
  return true;
}

bool shadow_ordered(Stamp stamp) { return ordered(stamp); }

void shadow_begin_write(const void* target, size_t bytes, const void* where) {
  shadow_access(target, bytes, Access::write, where);
  for (Cell& cell : cells_of(target, bytes)) cell.write = make_stamp(kInFlight, observer.thread);
}

void shadow_end_write(const void* target, size_t bytes, Stamp writer) {
  for (Cell& cell : cells_of(target, bytes)) cell = Cell{writer, {}};
}

// The first slot, because record_read() gives up the last.
void shadow_begin_read(const void* source, size_t bytes, int actor) {
  for (Cell& cell : cells_of(source, bytes)) {
    if (std::find(std::begin(cell.read), std::end(cell.read), reading(actor)) != std::end(cell.read)) continue;
    cell = Cell{cell.write, {reading(actor), cell.read[0], cell.read[1]}};
  }
}

void shadow_end_read(const void* source, size_t bytes, int actor, uint32_t clock) {
  for (Cell& cell : cells_of(source, bytes)) {
    std::replace(std::begin(cell.read), std::end(cell.read), reading(actor), make_stamp(clock, actor));
  }
}

Stamp shadow_last_write(const void* p) {
  const auto cells = cells_of(p, 1);
  return cells.empty() ? make_stamp(kRedZone, 0) : cells.front().write;
}

void shadow_mark_mbarrier(const void* p) {
  for (Cell& cell : cells_of(p, 8)) cell = Cell{make_stamp(kMbarrier, observer.thread), {}};
}

void shadow_mark(const void* device, size_t bytes, uint32_t clock) {
  if (bytes == 0) return;
  const size_t offset = size_t(static_cast<const unsigned char*>(device) - memory_map.device);
  const Cell mark{make_stamp(clock, 0), {}};
  for (size_t g = offset / kGranule; g <= (offset + bytes - 1) / kGranule; ++g) memory_map.device_cells[g] = mark;
}

size_t shadow_first_unwritten(const void* device, size_t bytes) {
  const size_t offset = size_t(static_cast<const unsigned char*>(device) - memory_map.device);
  for (size_t i = 0; i < bytes; i += kGranule) {
    if (clock_of(memory_map.device_cells[(offset + i) / kGranule].write) <= kUnwritten) return i;
  }
  return bytes;
}

void shadow_restart_clocks(size_t used) {
  for (size_t g = 0; g < used / kGranule; ++g) {
    Cell& cell = memory_map.device_cells[g];
    if (clock_of(cell.write) >= kFirstClock) cell.write = make_stamp(kWrittenByHost, 0);
    for (Stamp& read : cell.read) read = 0;
  }
  std::memset(memory_map.shared_cells, 0, kSharedWindow / kGranule * sizeof(Cell));
  if (memory_map.static_shared_bytes) {
    std::memset(memory_map.static_shared_cells, 0, (memory_map.static_shared_bytes / kGranule + 1) * sizeof(Cell));
  }
}

}  // namespace emulator
