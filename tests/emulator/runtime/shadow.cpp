#include "runtime/shadow.h"

#include <link.h>
#include <sys/mman.h>

#include <cstring>
#include <new>
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

// True if the stamped access happened before what `observer` does now. Only for stamps of the running block.
inline bool ordered(Stamp stamp) {
  const int thread = thread_of(stamp);
  if (thread == observer.thread && !(stamp & kFlag)) return true;
  const int warp = thread / kWarpSize;
  return clock_of(stamp) <= (warp == observer.warp ? observer.lanes_ordered : observer.learned[warp]);
}

struct Site {
  bool shared;
  size_t offset;  // in its space, for messages
  Access access;
  const void* where;
};

const char* verb(Access access) {
  return access == Access::read ? "read" : access == Access::write ? "write" : "atomic update";
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
  return format(", %s by thread %d with no barrier between", what, thread_of(stamp));
}

// Reports what is wrong with the last write; false if the address is not accessible at all.
[[gnu::noinline]] bool judge_last_write(Stamp write, const Site& site) {
  const uint32_t clock = clock_of(write);
  if (clock == kInFlight) {
    fault(Fault::in_flight_access, site,
          [&] { return format(", into which a copy of thread %d is in flight", thread_of(write)); });
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
  if (clock >= observer.block_start) return clock != kInFlight && ordered(write & ~kFlag);
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
    if (forgotten<shared>(slot) || settled(slot)) {
      slot = mine;
      return;
    }
    if (clock_of(slot) == observer.clock && thread_of(slot) / kWarpSize == observer.warp) {
      slot |= kFlag;  // another lane of the same warp, in the same stretch
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
  }
}

Cell* cells_of(const void* p, size_t& offset) {
  const auto address = static_cast<const unsigned char*>(p);
  offset = size_t(address - memory_map.shared);
  if (offset < kSharedWindow) return memory_map.shared_cells;
  offset = size_t(address - memory_map.device);
  if (offset < kDeviceBytes) return memory_map.device_cells;
  offset = size_t(address - memory_map.static_shared);
  return offset < memory_map.static_shared_bytes ? memory_map.static_shared_cells : nullptr;
}

Stamp last_write(const void* p) {
  size_t offset;
  const Cell* cells = cells_of(p, offset);
  return cells[offset / kGranule].write;
}

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
  size_t offset;
  Cell* cells = cells_of(p, offset);
  return cells != nullptr && cells != memory_map.device_cells;
}

void shadow_access(const void* p, size_t bytes, Access access, const void* where) {
  const auto address = static_cast<const unsigned char*>(p);
  if (size_t(address - memory_map.reservation) < memory_map.reserved_bytes) [[likely]] {
    ++report.counters.accesses;
    size_t offset = size_t(address - memory_map.shared);
    if (offset < kSharedWindow) {
      if (offset + bytes > memory_map.shared_bytes) {
        return fault(Fault::out_of_bounds, {true, offset, access, where},
                     [] { return format(", which has %zu bytes", memory_map.shared_bytes); });
      }
      return walk<true>(access, memory_map.shared_cells, offset, bytes, where);
    }
    offset = size_t(address - memory_map.device);
    if (offset < kDeviceBytes) return walk<false>(access, memory_map.device_cells, offset, bytes, where);
    return fault(Fault::out_of_bounds, {address < memory_map.device, offset, access, where}, ", far outside");
  }
  const size_t offset = size_t(address - memory_map.static_shared);
  if (offset < memory_map.static_shared_bytes) {
    walk<true>(access, memory_map.static_shared_cells, offset, bytes, where);
  }
}

void shadow_issue_copy(const void* target, size_t bytes, const void* where) {
  shadow_access(target, bytes, Access::write, where);
  size_t offset;
  Cell* cells = cells_of(target, offset);
  for (size_t i = 0; i < bytes; i += kGranule)
    cells[(offset + i) / kGranule].write = make_stamp(kInFlight, observer.thread);
}

void shadow_finish_copy(const void* target, size_t bytes) {
  size_t offset;
  Cell* cells = cells_of(target, offset);
  const Cell written{make_stamp(observer.clock, observer.thread), {}};
  for (size_t i = 0; i < bytes; i += kGranule) cells[(offset + i) / kGranule] = written;
}

int shadow_last_writer(const void* p) {
  return shadow_last_write_clock(p) < observer.block_start ? -1 : thread_of(last_write(p));
}

uint32_t shadow_last_write_clock(const void* p) { return clock_of(last_write(p)); }

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
