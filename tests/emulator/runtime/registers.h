// Registers that warpgroup products use, which from their issue until wgmma_wait belong to the products: a kernel's
// local arrays, known by their addresses.
#pragma once

#include <cstddef>
#include <vector>

namespace emulator {

class WatchedRegisters {
 public:
  // A product takes these; accumulators it also writes.
  void take(const void* p, size_t bytes, bool accumulators, const void* where);
  void give_back(const void* p);
  void fence();
  // An access of the kernel to what may be such registers.
  void touch(const void* p, size_t bytes, bool write, const void* where);
  bool empty() const { return arrays_.empty(); }
  void clear();

 private:
  struct Array {
    const char *begin, *end;
    bool accumulators;
    bool touched;   // since the last fence
    int in_flight;  // products
    bool overlaps(const char* p, size_t bytes) const { return p < end && begin < p + bytes; }
  };
  std::vector<Array> arrays_;
  bool fenced_ = false;  // since the last wait
};

}  // namespace emulator
