// The host side of the emulator: device memory, options, launches. Tests and the Python backend use this.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/report.h"
#include "runtime/thread.h"

namespace emulator {

struct Options {
  unsigned seed = 0;                           // 0: lanes, warps and blocks in order; else shuffled
  size_t shared_bytes_per_block = 227 * 1024;  // of compute capability 9.0
  int compute_capability = 90;
  bool count_bank_conflicts = false;  // logs every shared access: three times slower
};
extern Options options;

inline constexpr size_t kDeviceBytes = size_t(512) << 20;

// Device memory, 256-byte aligned, with red zones around it, uninitialised.
void* device_allocate(size_t bytes);
size_t device_bytes_used();
void copy_to_device(void* device, const void* host, size_t bytes);
// Reports bytes that no thread has written.
void copy_to_host(void* host, const void* device, size_t bytes);
void device_fill(void* device, int value, size_t bytes);

// Frees all device memory and empties the report.
void reset();

}  // namespace emulator
