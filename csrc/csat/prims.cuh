// The only file that holds PTX, intrinsics and compiler-specific syntax; kernels are written in the words below and in
// plain C++. The same kernel sources are compiled by g++ with -DCSAT_EMULATE: then "cuda_emulation.h" stands for the
// CUDA headers and for the three macros, and every CUDA thread runs on the CPU.
//
// Words: __global__, __launch_bounds__, threadIdx.x, blockIdx.x, __syncthreads(), dim3, float4 as in CUDA; CSAT_DEVICE,
// CSAT_DYN_SMEM, CSAT_LAUNCH; bf16, f16, to_float, from_float, pack2, unpack2; lane_id, warp_id, sync_warp, shfl_xor,
// warp_sum, warp_max, quad_sum, quad_max, load4, exp_f32, exp2_approx, log_f32, soft_threshold; cp_async16,
// ldmatrix_x4, mma_m16n8k16, named_barrier_sync and their kin; last_error, max_shared_bytes, multiprocessors on the
// host.
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

#ifndef CSAT_EMULATE
// ---- tensor cores and asynchronous copies (sm_80); emulation/tensor_core.h has the same words

CSAT_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// cp.async.cg: 16 bytes past L1 into shared memory, both addresses 16-byte aligned.
CSAT_DEVICE void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// Copies `valid` bytes (0..16) and fills up with zeros; with 0 the source is not read.
CSAT_DEVICE void cp_async16_zfill(void* shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
               : "memory");
}
CSAT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
CSAT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// ldmatrix: lane l gives the address of row l % 8 of matrix l / 8 (8 x 8 elements of 16 bits); register i of lane l
// holds elements 2 (l % 4), 2 (l % 4) + 1 of row l / 4 of matrix i, or of its column when transposed.
CSAT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
CSAT_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8), accumulated in float32 (PTX ISA, "Matrix Fragments for mma.m16n8k16").
template <typename T>
CSAT_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define CSAT_MMA_M16N8K16(T, type)                                                                    \
  template <>                                                                                         \
  CSAT_DEVICE void mma_m16n8k16<T>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                               \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                     \
  }
CSAT_MMA_M16N8K16(bf16, "bf16")
CSAT_MMA_M16N8K16(f16, "f16")
#undef CSAT_MMA_M16N8K16

// Two floats rounded to one register, the first in the low half.
template <typename T>
CSAT_DEVICE uint32_t pack2(float low, float high);
template <>
CSAT_DEVICE uint32_t pack2<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
CSAT_DEVICE uint32_t pack2<f16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <typename T>
CSAT_DEVICE float2 unpack2(uint32_t pair);
template <>
CSAT_DEVICE float2 unpack2<bf16>(uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}
template <>
CSAT_DEVICE float2 unpack2<f16>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// bar.sync / bar.arrive: barrier `id` (1..15; 0 is __syncthreads) completes when `threads` threads have come.
CSAT_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
CSAT_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 2^x, relative error below 2^-22 (PTX ISA, ex2.approx); 2^-inf = 0.
CSAT_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

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

CSAT_DEVICE int lane_id() { return threadIdx.x % 32; }
CSAT_DEVICE int warp_id() { return threadIdx.x / 32; }
CSAT_DEVICE float shfl_xor(float x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }
// Orders the shared-memory accesses of a warp's lanes.
CSAT_DEVICE void sync_warp() { __syncwarp(); }

CSAT_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shfl_xor(x, mask);
  return x;
}
// Over the four lanes that share a row of an mma accumulator.
CSAT_DEVICE float quad_sum(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}
CSAT_DEVICE float quad_max(float x) {
  x = fmaxf(x, shfl_xor(x, 1));
  return fmaxf(x, shfl_xor(x, 2));
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

inline int64_t multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

}  // namespace csat
