// Keywords of CUDA C++, and where a thread finds its index and its shared memory.
#pragma once

#include "runtime/thread.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

// Blocks run one after another, on one host thread: thread-local storage is the one kind of static storage whose bounds
// the runtime can ask for (dl_iterate_phdr), so it stands for static shared memory and is shadowed like the dynamic
// kind.
#define __shared__ static thread_local

#define CSAT_DEVICE __forceinline__
#define CSAT_DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(::emulator::dynamic_shared_memory())
#define CSAT_LAUNCH(kernel, grid, block, smem, stream, ...) \
  ((void)(stream), (void)::emulator::launch(#kernel, grid, block, smem, [&] { kernel(__VA_ARGS__); }))

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_dim())
#define gridDim (::emulator::grid_dim())
inline constexpr int warpSize = ::emulator::kWarpSize;
