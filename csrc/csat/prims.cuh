// The only file that holds PTX, intrinsics and compiler-specific syntax; kernels are written in the words below and in
// plain C++. The same kernel sources are compiled by g++ with -DCSAT_EMULATE: then "cuda_emulation.h" stands for the
// CUDA headers and for the three macros, and every CUDA thread runs on the CPU.
//
// Words: __global__, __launch_bounds__, threadIdx.x, blockIdx.x, __syncthreads(), dim3, float4 as in CUDA; CSAT_DEVICE,
// CSAT_DYN_SMEM, CSAT_LAUNCH; bf16, f16, to_float, from_float; sync_warp, shfl_xor, warp_sum, warp_max, load4, exp_f32,
// log_f32, soft_threshold; last_error and max_shared_bytes on the host.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef CSAT_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CSAT_DEVICE __device__ __forceinline__
// Declares `T* name`, the dynamic shared memory of the block.
#define CSAT_DYN_SMEM(T, name)                                  \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* name = reinterpret_cast<T*>(name##_bytes)
// Above 48 KiB a kernel has to ask for its shared memory; a refusal shows as the error of the launch itself.
#define CSAT_LAUNCH(kernel, grid, block, smem, stream, ...)                                                    \
  do {                                                                                                         \
    if ((smem) > 48 * 1024)                                                                                    \
      (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)); \
    kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);                             \
  } while (0)
#endif

namespace csat {

using bf16 = __nv_bfloat16;
using f16 = __half;

CSAT_DEVICE float to_float(float x) { return x; }
CSAT_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
CSAT_DEVICE float to_float(f16 x) { return __half2float(x); }

// Round to nearest even.
template <typename T>
CSAT_DEVICE T from_float(float x);
template <>
CSAT_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
CSAT_DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
CSAT_DEVICE f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

CSAT_DEVICE float shfl_xor(float x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }
// Orders the shared-memory accesses of a warp's lanes.
CSAT_DEVICE void sync_warp() { __syncwarp(); }

CSAT_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shfl_xor(x, mask);
  return x;
}
CSAT_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shfl_xor(x, mask));
  return x;
}

// Four consecutive floats from a 16-byte aligned address.
CSAT_DEVICE float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Full precision: nothing here is compiled with fast-math.
CSAT_DEVICE float exp_f32(float x) { return expf(x); }
CSAT_DEVICE float log_f32(float x) { return logf(x); }

// soft(u, theta) = sign(u) max(|u| - theta, 0); a NaN in either stays a NaN.
CSAT_DEVICE float soft_threshold(float u, float theta) {
  const float magnitude = fabsf(u) - theta;
  return magnitude <= 0.f ? 0.f : copysignf(magnitude, u);
}

// 0, or the cudaError_t of the launch before.
inline int last_error() { return static_cast<int>(cudaGetLastError()); }

// Dynamic shared memory that one block may ask for on the current device.
inline int64_t max_shared_bytes() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 48 * 1024;
  return bytes;
}

}  // namespace csat
