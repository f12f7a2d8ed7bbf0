// Bulk copies out of shared memory, in groups of a thread as those of cp.async are.
#pragma once

namespace emulator {

// The block has ended: what its threads have stored is in device memory.
void finish_bulk_stores();

}  // namespace emulator
