// mbarriers of the running block, and the bytes that bulk copies bring to them.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "runtime/thread.h"

namespace emulator {

// Bytes on their way into shared memory. Swizzled: 16-byte pieces of every 1024 bytes permuted as TMA and wgmma do.
struct Landing {
  unsigned char* target;
  std::vector<unsigned char> bytes;
  bool swizzled;
};

// Sends the bytes off; they arrive when nothing else can go on (deliver_bytes), the latest that the hardware may be.
void send(Landing landing, uint64_t* mbarrier, const void* where);

// Delivers bytes that release a waiting thread. False if no thread waits for bytes that are on their way.
bool deliver_bytes(std::mt19937& random);

// What threads wait for, of every mbarrier with waiting threads.
std::string awaited_at_mbarriers();

}  // namespace emulator
