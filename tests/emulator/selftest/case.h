// A self test of the emulator: a small kernel, correct or with one fault planted, and what the report must say.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "runtime/emulator.h"

namespace emulator::selftest {

struct Case {
  std::string name;
  std::vector<Fault> expected;  // any of these, by the order of threads; none: an empty report and the right result
  std::function<bool()> run;    // launches the kernel; true if its result is right (ignored where a fault is expected)
};

std::vector<Case> block_cases();   // barriers, shared memory, warps
std::vector<Case> grid_cases();    // device memory, blocks, launches
std::vector<Case> tensor_cases();  // asynchronous copies, ldmatrix, mma.sync, named barriers
std::vector<Case> bulk_cases();    // mbarriers, bulk copies, tensor copies
std::vector<Case> wgmma_cases();   // warpgroup products

// Device memory filled from, and read back to, a vector.
template <typename T>
T* upload(const std::vector<T>& host) {
  T* device = static_cast<T*>(device_allocate(host.size() * sizeof(T)));
  copy_to_device(device, host.data(), host.size() * sizeof(T));
  return device;
}
template <typename T>
std::vector<T> download(const T* device, size_t count) {
  std::vector<T> host(count);
  copy_to_host(host.data(), device, count * sizeof(T));
  return host;
}
template <typename T>
T* allocate(size_t count) {
  return static_cast<T*>(device_allocate(count * sizeof(T)));
}

}  // namespace emulator::selftest
