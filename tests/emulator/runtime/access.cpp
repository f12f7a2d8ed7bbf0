// How a kernel's accesses reach shadow memory: the compiler's sanitizer hooks, and the instructions it cannot see.
//
// Kernel files are compiled with -fsanitize=thread; instead of libtsan, the functions below are linked.
#include <cstring>
#include <utility>

#include "runtime/bank_conflicts.h"
#include "runtime/emulator.h"
#include "runtime/scheduler.h"
#include "runtime/shadow.h"

namespace emulator {

namespace {

inline void access(const void* p, size_t bytes, Access kind, const void* where) {
  if (!observer.running) return;
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) [[unlikely]] {
    report.add(Fault::misaligned, where, format("access of thread %d to %zu bytes", observer.thread, bytes));
  }
  if (options.count_bank_conflicts && in_shared_window(p)) {
    running->shared_log.push_back({where, shared_offset(p), uint32_t(bytes)});
  }
  if (!shadow_access(p, bytes, kind, where) && !running->registers.empty()) [[unlikely]] {
    running->registers.touch(p, bytes, kind == Access::write, where);
  }
}

void range_access(const void* p, size_t bytes, Access kind, const void* where) {
  if (bytes == 8 || bytes == 16) return access(p, bytes, kind, where);
  if (observer.running && !shadow_access(p, bytes, kind, where)) {
    running->registers.touch(p, bytes, kind == Access::write, where);
  }
}

void deliver(const std::vector<AsyncCopy>& group, const Thread& thread) {
  for (const AsyncCopy& copy : group) {
    std::memcpy(copy.target, copy.source, size_t(copy.valid));
    std::memset(static_cast<char*>(copy.target) + copy.valid, 0, size_t(copy.bytes - copy.valid));
    shadow_end_write(copy.target, size_t(copy.bytes), make_stamp(thread.clock, thread.id));
  }
}

}  // namespace

unsigned char* dynamic_shared_memory() { return memory_map.shared; }

uint32_t shared_offset(const void* p) {
  const auto address = static_cast<const unsigned char*>(p);
  // Static shared memory lies above the dynamic window; only differences matter there.
  const size_t offset = size_t(address - memory_map.static_shared);
  return uint32_t(offset < memory_map.static_shared_bytes ? offset + (1u << 20) : size_t(address - memory_map.shared));
}

void check_aligned(const void* p, size_t alignment, const char* what, const void* where) {
  if (reinterpret_cast<uintptr_t>(p) % alignment == 0) return;
  report.add(Fault::misaligned, where,
             format("%s of thread %d is not aligned to %zu bytes", what, observer.thread, alignment));
}

void check_atomic(const void* p, size_t bytes) { access(p, bytes, Access::atomic, __builtin_return_address(0)); }

// The target belongs to nobody until the wait that delivers the bytes: the latest that the hardware may be.
void async_copy(void* target, const void* source, int bytes, int valid) {
  const void* where = __builtin_return_address(0);
  check_aligned(target, size_t(bytes), "target of an asynchronous copy", where);
  check_aligned(source, size_t(bytes), "source of an asynchronous copy", where);
  if (!in_shared_window(target)) {
    report.add(Fault::out_of_bounds, where, "asynchronous copy: the target is not in shared memory");
    return;
  }
  if (valid > 0) shadow_access(source, size_t(valid), Access::read, where);
  shadow_begin_write(target, size_t(bytes), where);
  running->open.push_back({target, source, bytes, valid});
}

void async_commit() {
  running->pending.push_back(std::move(running->open));
  running->open.clear();
}

void async_wait(int groups_left) {
  auto& pending = running->pending;
  while (int(pending.size()) > groups_left) {
    deliver(pending.front(), *running);
    pending.erase(pending.begin());
  }
}

void finish_copies(Thread& thread) {
  for (const auto& group : thread.pending) deliver(group, thread);
  deliver(thread.open, thread);
}

}  // namespace emulator

// The compiler tells accesses that it cannot prove aligned from others; a device knows no such difference.
#define CSAT_ACCESS_HOOK(bytes)                                                       \
  void __tsan_read##bytes(void* p) {                                                  \
    emulator::access(p, bytes, emulator::Access::read, __builtin_return_address(0));  \
  }                                                                                   \
  void __tsan_write##bytes(void* p) {                                                 \
    emulator::access(p, bytes, emulator::Access::write, __builtin_return_address(0)); \
  }                                                                                   \
  void __tsan_unaligned_read##bytes(void* p) {                                        \
    emulator::access(p, bytes, emulator::Access::read, __builtin_return_address(0));  \
  }                                                                                   \
  void __tsan_unaligned_write##bytes(void* p) {                                       \
    emulator::access(p, bytes, emulator::Access::write, __builtin_return_address(0)); \
  }

extern "C" {
CSAT_ACCESS_HOOK(1)
CSAT_ACCESS_HOOK(2)
CSAT_ACCESS_HOOK(4)
CSAT_ACCESS_HOOK(8)
CSAT_ACCESS_HOOK(16)
// Accesses of a type that claims no alignment: the vectors of emulation/types.h, and structures copied as a whole. A
// device takes vectors of 8 and 16 bytes in one piece, at their natural alignment, and other sizes as smaller elements.
void __tsan_read_range(void* p, size_t bytes) {
  emulator::range_access(p, bytes, emulator::Access::read, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  emulator::range_access(p, bytes, emulator::Access::write, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
