// What a running CUDA thread may ask of the emulator: who it is, where its shared memory lies, and to wait for others.
//
// This header is all that kernel code sees of the runtime (through cuda_emulation.h). The host side is emulator.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

inline constexpr int kWarpSize = 32, kWarpgroupSize = 128;
inline constexpr uint32_t kFullMask = 0xffffffffu;

// The index of the thread that runs now. A kernel cannot see them change, so the compiler need not ask twice.
[[gnu::const]] dim3 thread_index();
[[gnu::const]] dim3 block_index();
[[gnu::const]] dim3 block_dim();
[[gnu::const]] dim3 grid_dim();

// Start of the dynamic shared memory of the block that runs now (1024-byte aligned).
unsigned char* dynamic_shared_memory();

// Address of `p` in the shared window, as cvta.generic.to.shared gives it.
uint32_t shared_offset(const void* p);

// ---- synchronisation. `line` is the source line of the call: threads of one barrier must come from one line.
void block_barrier(int line);
// bar.sync / bar.arrive: barrier `id` (1..15; 0 is __syncthreads) completes when `threads` threads have arrived.
void named_barrier(int id, int threads, bool wait, int line);
// __syncthreads_count / _and / _or: the barrier, and how many of the threads held a true predicate.
int block_barrier_count(bool predicate, int line);

// A warp collective: blocks until every lane in `mask` has called it with the same function and mask; the last arrival
// runs `function` once. `operands[l]` is what lane l passed, null outside the mask.
using WarpFunction = void (*)(uint32_t mask, void* const* operands);
void warp_collective(const char* name, WarpFunction function, uint32_t mask, void* operand);

// The same over the four warps of a warpgroup (128 lanes); the operands are the function's own affair.
void warpgroup_collective(const char* name, WarpFunction function);

// __syncwarp: the only instruction that orders the memory accesses of the lanes of a warp.
void warp_barrier(uint32_t mask);

// ---- memory, as the instructions that the compiler cannot instrument see it
// Asynchronous copy of `bytes` (4, 8 or 16): reads `source`, writes `target` (shared) no earlier than its wait. The
// bytes from `valid` on are zero-filled and not read.
void async_copy(void* target, const void* source, int bytes, int valid);
void async_commit();
void async_wait(int groups_left);

void check_aligned(const void* p, size_t alignment, const char* what, const void* where);
// An atomic read-modify-write: ordered against other atomics, not against plain accesses.
void check_atomic(const void* p, size_t bytes);

// ---- mbarriers and bulk copies, which the asynchronous proxy carries out (PTX ISA, "mbarrier", "cp.async.bulk")
void mbarrier_init(uint64_t* mbarrier, int arrivals);
void fence_mbarrier_init();
// One arrival, and the bytes by which the phase shall wait longer.
void mbarrier_arrive(uint64_t* mbarrier, uint32_t expected_bytes);
// Until the phase of this parity is complete.
void mbarrier_wait(uint64_t* mbarrier, uint32_t parity, int line);

void bulk_copy_to_shared(void* shared, const void* global, uint32_t bytes, uint64_t* mbarrier);
void bulk_copy_to_global(void* global, const void* shared, uint32_t bytes);
void bulk_commit();
void bulk_wait_read(int groups_left);
struct TensorMap;
// The box at coordinates `at` (innermost first), with 128-byte swizzle.
void tensor_copy(void* shared, const TensorMap& map, int rank, const int* at, uint64_t* mbarrier);
// Between the generic proxy's writes and the asynchronous proxy's accesses.
void fence_proxy_async();

// Runs `body` once per CUDA thread of the grid. Returns cudaSuccess (0) or cudaErrorInvalidConfiguration (9).
int launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& body);
int last_error();

}  // namespace emulator
