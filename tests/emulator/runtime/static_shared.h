// Static shared memory (`__shared__ T name[n]`), which g++ sees as thread-local variables.
#pragma once

#include <cstddef>

namespace emulator {

// Points the memory map at the thread-local block of the object that this runtime is linked into, for the calling
// thread.
void find_static_shared_memory();
// Bytes of it that the running launch has touched: its kernel's static shared memory, or less if it leaves some unused.
size_t static_shared_bytes_touched();

inline constexpr size_t kMaxStaticSharedBytes = 48 * 1024;  // the compiler's limit for __shared__ variables

}  // namespace emulator
