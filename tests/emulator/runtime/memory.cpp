// Device memory: a bump allocator over the arena, freed as a whole by reset().
#include <cstring>
#include <new>

#include "emulation/runtime_api.h"
#include "runtime/emulator.h"
#include "runtime/shadow.h"

namespace emulator {

Options options;

namespace {
constexpr size_t kAlignment = 256, kZone = 4096;  // red zone: at least this many bytes between two allocations
size_t used = 0;
}  // namespace

size_t device_bytes_used() { return used; }

void* device_allocate(size_t bytes) {
  reserve_memory();
  const size_t start = (used + kZone + kAlignment - 1) / kAlignment * kAlignment;
  if (start + bytes + kZone > kDeviceBytes) throw std::bad_alloc();
  used = start + bytes;
  void* p = memory_map.device + start;
  shadow_mark(p, bytes, kUnwritten);
  return p;
}

void copy_to_device(void* device, const void* host, size_t bytes) {
  if (bytes == 0) return;
  std::memcpy(device, host, bytes);
  shadow_mark(device, bytes, kWrittenByHost);
}

void copy_to_host(void* host, const void* device, size_t bytes) {
  if (bytes == 0) return;
  const size_t hole = shadow_first_unwritten(device, bytes);
  if (hole < bytes)
    report.add(Fault::uninitialised_read, nullptr, format("output byte %zu of %zu never written", hole, bytes));
  std::memcpy(host, device, bytes);
}

void device_fill(void* device, int value, size_t bytes) {
  if (bytes == 0) return;
  std::memset(device, value, bytes);
  shadow_mark(device, bytes, kWrittenByHost);
}

void reset() {
  reserve_memory();
  if (used > 0) shadow_mark(memory_map.device, used + kZone, kRedZone);
  used = 0;
  report.clear();
}

}  // namespace emulator

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  emulator::device_fill(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulator::options.compute_capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulator::options.compute_capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(emulator::options.shared_bytes_per_block);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
