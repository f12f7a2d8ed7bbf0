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

constexpr size_t kGap = size_t(64) << 20;         // stray accesses this far off are still recognised
constexpr size_t kSharedWindow = size_t(1) << 20;  // more than any device has
constexpr size_t kSharedAlignment = 1024;          // of the 128-byte swizzle's pattern

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

// True if the stamped access happened before what `observer` does now. Only for stamps of the running block.
bool ordered(Stamp stamp) {
  const int thread = thread_of(stamp);
  if (thread == observer.thread && !(stamp & kFlag)) return true;
  const int warp = thread / 32;
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
  return format("%s of %s memory at %#zx by thread %d of block %u", verb(site.access), site.shared ? "shared" : "device",
                site.offset, observer.thread, observer.block);
}

[[gnu::noinline]] void fault(Fault kind, const Site& site, const std::string& detail = "") {
  report.add(kind, site.where, place(site) + detail);
}

std::string other(const char* what, Stamp stamp) {
  return format(", %s by thread %d with no barrier between", what, thread_of(stamp));
}

// Checks against the last write; false if the address is not accessible at all.
bool check_last_write(Stamp write, const Site& site) {
  const uint32_t clock = clock_of(write);
  if (clock == kInFlight) {
    fault(Fault::in_flight_access, site, format(", into which a copy of thread %d is in flight", thread_of(write)));
    return true;
  }
  if (clock >= observer.block_start) {
    const bool both_atomic = site.access == Access::atomic && (write & kFlag);
    if (!both_atomic && !ordered(write & ~kFlag)) fault(Fault::race, site, other("written", write));
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

void check_reads(const Cell& cell, const Site& site) {
  for (const Stamp read : cell.read) {
    const uint32_t clock = clock_of(read);
    if (clock < observer.launch_start) continue;
    if (clock >= observer.block_start) {
      if (!ordered(read)) fault(Fault::race, site, other("read", read));
    } else if (!site.shared) {
      fault(Fault::block_conflict, site, ", read by another block of this launch");
    }
  }
}

void record_read(Cell& cell, Stamp mine, bool shared) {
  const uint32_t alive = shared ? observer.block_start : observer.launch_start;
  for (Stamp& slot : cell.read) {
    const uint32_t clock = clock_of(slot);
    if (clock < alive || (clock >= observer.block_start && ordered(slot))) {
      slot = mine;
      return;
    }
    if (clock >= observer.block_start && thread_of(slot) / 32 == observer.warp) {  // another lane, same stretch
      slot = mine | kFlag;
      return;
    }
  }
  cell.read[2] = mine;
}

void step(Cell& cell, Stamp mine, const Site& site) {
  if (!check_last_write(cell.write, site)) return;
  if (site.access == Access::read) {
    record_read(cell, mine, site.shared);
  } else {
    check_reads(cell, site);
    cell = Cell{site.access == Access::atomic ? mine | kFlag : mine, {}};
  }
}

bool same(const Cell& a, const Cell& b) { return std::memcmp(&a, &b, sizeof(Cell)) == 0; }

// Steps the cells of one access. Neighbours mostly share their history, so what held for one is copied to the next.
void walk(Cell* cells, size_t offset, size_t bytes, Site site) {
  const Stamp mine = make_stamp(observer.clock, observer.thread);
  Cell* cell = cells + offset / kGranule;
  Cell* const end = cells + (offset + bytes - 1) / kGranule + 1;
  Cell before = *cell;
  step(*cell, mine, site);
  const Cell after = *cell;
  for (++cell; cell != end; ++cell) {
    if (same(*cell, before)) {
      *cell = after;
    } else {
      step(*cell, mine, site);
    }
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
      const Site site{true, offset, access, where};
      if (offset + bytes > memory_map.shared_bytes) {
        return fault(Fault::out_of_bounds, site, format(", which has %zu bytes", memory_map.shared_bytes));
      }
      return walk(memory_map.shared_cells, offset, bytes, site);
    }
    offset = size_t(address - memory_map.device);
    if (offset < kDeviceBytes) return walk(memory_map.device_cells, offset, bytes, {false, offset, access, where});
    return fault(Fault::out_of_bounds, {address < memory_map.device, offset, access, where}, ", far outside");
  }
  const size_t offset = size_t(address - memory_map.static_shared);
  if (offset < memory_map.static_shared_bytes) {
    walk(memory_map.static_shared_cells, offset, bytes, {true, offset, access, where});
  }
}

void shadow_issue_copy(const void* target, size_t bytes, const void* where) {
  shadow_access(target, bytes, Access::write, where);
  size_t offset;
  Cell* cells = cells_of(target, offset);
  for (size_t i = 0; i < bytes; i += kGranule) cells[(offset + i) / kGranule].write = make_stamp(kInFlight, observer.thread);
}

void shadow_finish_copy(const void* target, size_t bytes) {
  size_t offset;
  Cell* cells = cells_of(target, offset);
  const Cell written{make_stamp(observer.clock, observer.thread), {}};
  for (size_t i = 0; i < bytes; i += kGranule) cells[(offset + i) / kGranule] = written;
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
