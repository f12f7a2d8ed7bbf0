// The only file that holds PTX, intrinsics and compiler-specific syntax; kernels are written in the words below and in
// plain C++. The same kernel sources are compiled by g++ with -DCSAT_EMULATE: then "cuda_emulation.h" stands for the
// CUDA headers and for the three macros, and every CUDA thread runs on the CPU.
//
// Words: __global__, __launch_bounds__, threadIdx.x, blockIdx.x, __syncthreads(), dim3, float4 as in CUDA; CSAT_DEVICE,
// CSAT_DYN_SMEM, CSAT_LAUNCH; bf16, f16, to_float, from_float, pack2, pack2_magnitudes, unpack2; lane_id, warp_id,
// warpgroup_id, sync_warp, shfl_xor, warp_any, warp_sum, warp_max, quad_sum, quad_max, load4, exp_f32, exp2_approx,
// log2_approx, divide_approx, log_f32, sqrt_f32, positive_part, soft_threshold, soft_threshold_pack2; cp_async16,
// ldmatrix_x4, mma_m16n8k16, named_barrier_sync and their kin; of Hopper mbarrier_*, bulk_*, tensor_copy_*, wgmma_*,
// registers_*; on the host make_tensor_map, last_error, max_shared_bytes, compute_capability, multiprocessors.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef CSAT_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CSAT_DEVICE __device__ __forceinline__
// Declares `T* name`, the dynamic shared memory of the block, aligned as the pattern of the 128-byte swizzle is.
#define CSAT_DYN_SMEM(T, name)                                    \
  extern __shared__ __align__(1024) unsigned char name##_bytes[]; \
  T* name = reinterpret_cast<T*>(name##_bytes)
// Above 48 KiB a kernel has to ask for its shared memory: for all that there is, so that what a thread asks for never
// stands below what another is about to launch with. A refusal shows as the error of the launch itself.
#define CSAT_LAUNCH(kernel, grid, block, smem, stream, ...)                           \
  do {                                                                                \
    if ((smem) > 48 * 1024)                                                           \
      (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, \
                                 static_cast<int>(::csat::max_shared_bytes()));       \
    kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);    \
  } while (0)
#endif

namespace csat {

using bf16 = __nv_bfloat16;
using f16 = __half;

#ifndef CSAT_EMULATE
// ---- tensor cores and asynchronous copies (sm_80); emulation/tensor_core.h has the same words

// Instructions of Hopper alone are compiled for sm_90a; in code for other devices they trap, and nothing launches them.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define CSAT_SM90(...) asm volatile(__VA_ARGS__)
#else
#define CSAT_SM90(...) __trap()
#endif

// An address in shared memory as instructions take it; offsets are in bytes.
using SharedAddress = uint32_t;
CSAT_DEVICE SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}
// `x`, computed here: what follows from it is neither moved out of loops nor kept, which costs registers where there
// are none to spare.
CSAT_DEVICE int pinned(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// The same for an address: constant offsets from it are immediates of the instructions.
CSAT_DEVICE SharedAddress pinned_address(const void* p) {
  return static_cast<SharedAddress>(pinned(static_cast<int>(shared_address(p))));
}
// The same address, which the compiler then knows to be that of all lanes: descriptors of products that are made from
// it are computed once a warp.
template <typename T>
CSAT_DEVICE T* uniform_address(T* p) {
  return static_cast<T*>(__cvta_shared_to_generic(__shfl_sync(0xffffffffu, shared_address(p), 0)));
}

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
CSAT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
CSAT_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
CSAT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix_x4(r, shared_address(row)); }
CSAT_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  ldmatrix_x4_transposed(r, shared_address(row));
}

// stmatrix (sm_90): the same the other way.
CSAT_DEVICE void stmatrix_x4(SharedAddress row, const uint32_t (&r)[4]) {
  CSAT_SM90("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
            "r"(r[2]), "r"(r[3]) : "memory");
}
CSAT_DEVICE void stmatrix_x4_transposed(SharedAddress row, const uint32_t (&r)[4]) {
  CSAT_SM90("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
            "r"(r[2]), "r"(r[3]) : "memory");
}
CSAT_DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4]) { stmatrix_x4(shared_address(row), r); }
CSAT_DEVICE void stmatrix_x4_transposed(void* row, const uint32_t (&r)[4]) {
  stmatrix_x4_transposed(shared_address(row), r);
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

// Rounded to the 10 bits of mantissa that tf32 products read, halves away from zero.
CSAT_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
// c (16, 8) += a (16, 8) b (8, 8), accumulated in float32 (PTX ISA, "Matrix Fragments for mma.m16n8k8"): lane l holds
// of a rows l / 4, l / 4 + 8 at column l % 4, then both at column l % 4 + 4; of b rows l % 4, l % 4 + 4 at column l
// / 4.
CSAT_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

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
// pack2 of max(low, 0) and max(high, 0), a NaN staying one, with the signs of low_sign and high_sign: three
// instructions.
template <typename T>
CSAT_DEVICE uint32_t pack2_magnitudes(float low, float high, float low_sign, float high_sign) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair | (__byte_perm(__float_as_uint(low_sign), __float_as_uint(high_sign), 0x7632) & 0x80008000u);
}

// bar.sync / bar.arrive: barrier `id` (1..15; 0 is __syncthreads) completes when `threads` threads have come.
CSAT_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
CSAT_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- mbarriers and bulk copies (sm_90); emulation/bulk_copy.h has the same words

// Fences what the threads have written to shared memory for the asynchronous proxy: bulk copies and wgmma. The writers
// fence, then a barrier tells who issues.
CSAT_DEVICE void fence_proxy_async() { CSAT_SM90("fence.proxy.async.shared::cta;" :: : "memory"); }

// An mbarrier is one 8-byte word of shared memory. Its phases are counted from 0; a phase is complete when `arrivals`
// threads have arrived and all bytes that they expected have come. One thread initialises it and fences; a barrier of
// the block follows.
CSAT_DEVICE void mbarrier_init(uint64_t* bar, int arrivals) {
  CSAT_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
CSAT_DEVICE void fence_mbarrier_init() { CSAT_SM90("fence.mbarrier_init.release.cluster;" :: : "memory"); }
CSAT_DEVICE void mbarrier_arrive(uint64_t* bar) {
  CSAT_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
// Arrives; the phase waits for `bytes` (below 2^20) bytes more.
CSAT_DEVICE void mbarrier_arrive_expect_bytes(uint64_t* bar, uint32_t bytes) {
  CSAT_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
// Returns once the phase of this parity is complete: 0 for phases 0, 2, ..; with 1 at once on a fresh mbarrier. What
// was done before the phase's arrivals, and its bytes, are then there to read. Every thread that relies on it waits.
CSAT_DEVICE void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  uint32_t complete = 0;
  while (complete == 0)
    CSAT_SM90("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(
                  complete) : "r"(shared_address(bar)),
              "r"(parity) : "memory");
}

// One thread copies `bytes` bytes, which arrive at `bar`. Addresses and size are multiples of 16.
CSAT_DEVICE void bulk_copy_to_shared(void* shared, const void* global, uint32_t bytes, uint64_t* bar) {
  CSAT_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                shared_address(shared)),
            "l"(global), "r"(bytes), "r"(shared_address(bar)) : "memory");
}
// The other way, in groups of the copying thread. After bulk_wait_read all but its last kGroupsLeft groups have read
// shared memory; what they wrote is there for the next kernel.
CSAT_DEVICE void bulk_copy_to_global(void* global, const void* shared, uint32_t bytes) {
  CSAT_SM90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
            "r"(bytes) : "memory");
}
CSAT_DEVICE void bulk_commit() { CSAT_SM90("cp.async.bulk.commit_group;" :: : "memory"); }
template <int kGroupsLeft>
CSAT_DEVICE void bulk_wait_read() {
  CSAT_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(kGroupsLeft) : "memory");
}

// A tensor that tensor_copy_* takes boxes of. A kernel takes it as `const __grid_constant__ TensorMap`.
using TensorMap = CUtensorMap;
template <typename T>
inline constexpr CUtensorMapDataType kTensorMapType = std::is_same_v<T, float>  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                                      : std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;

// On the host: 2 to 4 axes from the innermost, sizes and strides in elements; data and strides are multiples of 16
// bytes, the innermost axis has stride 1. Boxes are 128 bytes of the innermost axis by `box_rows` (to 256) of the next.
// Returns 0 or a cudaError_t. The driver's function is asked for at run time: nothing links libcuda.
template <typename T>
inline int make_tensor_map(TensorMap* map, const T* data, int rank, const int64_t* sizes, const int64_t* strides,
                           int box_rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
               : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  if (rank < 2 || rank > 4) return cudaErrorInvalidValue;
  // A thread that has done no CUDA work yet has no context, without which the driver refuses.
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  cuuint64_t size[4], pitch[3];
  cuuint32_t box[4] = {128 / sizeof(T), static_cast<cuuint32_t>(box_rows), 1, 1}, step[4] = {1, 1, 1, 1};
  for (int i = 0; i < rank; ++i) size[i] = static_cast<cuuint64_t>(sizes[i]);
  for (int i = 1; i < rank; ++i) pitch[i - 1] = static_cast<cuuint64_t>(strides[i]) * sizeof(T);
  const CUresult result = encode(map, kTensorMapType<T>, static_cast<cuuint32_t>(rank), const_cast<T*>(data), size,
                                 pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// One thread copies the box at coordinates c0 (innermost), c1, ..: rows of 128 bytes at a 1024-byte aligned place,
// their 16-byte pieces swizzled (piece p of row r lies at p ^ (r % 8)), zeros where the box leaves the tensor. All 128
// * box_rows bytes arrive at `bar`.
CSAT_DEVICE void tensor_copy_2d(void* shared, const TensorMap& map, int c0, int c1, uint64_t* bar) {
  CSAT_SM90(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(c0), "r"(c1), "r"(shared_address(bar)) : "memory");
}
CSAT_DEVICE void tensor_copy_3d(void* shared, const TensorMap& map, int c0, int c1, int c2, uint64_t* bar) {
  CSAT_SM90(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(bar)) : "memory");
}
CSAT_DEVICE void tensor_copy_4d(void* shared, const TensorMap& map, int c0, int c1, int c2, int c3, uint64_t* bar) {
  CSAT_SM90(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(bar)) : "memory");
}

// Registers that a thread of the running warpgroup may use (a multiple of 8, 24 to 256): those that producers give up,
// consumers take. The kernel needs __launch_bounds__ with both numbers, or the compiler ignores these.
template <int kRegisters>
CSAT_DEVICE void registers_increase() {
  CSAT_SM90("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
CSAT_DEVICE void registers_decrease() {
  CSAT_SM90("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- warpgroup products (sm_90a); emulation/warpgroup.h has the same words
//
// wgmma: the four warps of a warpgroup compute D (64, N) += A (64, 16) B (16, N) together, asynchronously. Each warp
// holds 16 rows of D as fragments of mma.m16n8k16, c[j] being columns 8 j to 8 j + 7, and of A, if A is in registers.
// What is in shared memory lies in rows of 128 bytes (64 elements) under the 128-byte swizzle, as tensor copies leave
// it, or piece p of row r written at p ^ (r % 8) and fenced by fence_proxy_async.
//
// The order of things: wgmma_fence, products, wgmma_commit, wgmma_wait. Until its wait nothing may touch a product's
// registers or write what it reads.

// Of a matrix in shared memory (PTX ISA, "Matrix Descriptor Format", "Strides"), in bytes. Rows of n (or m), their
// columns along k: `stride` from 8 rows to the next 8 (1024); the next 16 of k start 32 bytes on, the next 64 in
// another tile. Rows of k ("transposed"), their columns along n: `stride` from 8 rows to the next 8 (1024), `leading`
// from 64 columns to the next 64; the next 16 of k start 2048 bytes on.
CSAT_DEVICE uint64_t wgmma_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  constexpr uint64_t swizzle128 = uint64_t(1) << 62;
  const uint32_t low = (shared_address(start) & 0x3ffff) >> 4 | leading >> 4 << 16;
  return static_cast<uint32_t>(pinned(static_cast<int>(low))) | uint64_t(stride >> 4) << 32 | swizzle128;
}

// Keeps the compiler from moving accesses to these registers across this place: it does not know that products are
// asynchronous.
template <int kFragments>
CSAT_DEVICE void pin(float (&c)[kFragments][4]) {
#pragma unroll
  for (int i = 0; i < kFragments * 4; ++i) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
}
template <int kFragments>
CSAT_DEVICE void pin(uint32_t (&a)[kFragments][4]) {
#pragma unroll
  for (int i = 0; i < kFragments * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}
template <typename T, int kBlocks, int kFragments>
CSAT_DEVICE void pin(T (&x)[kBlocks][kFragments][4]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) pin(x[i]);
}

// Before the first product, and whenever the registers that the next product takes (name them) were touched.
template <typename... Registers>
CSAT_DEVICE void wgmma_fence(Registers&... registers) {
  (pin(registers), ...);
  CSAT_SM90("wgmma.fence.sync.aligned;" :: : "memory");
}
CSAT_DEVICE void wgmma_commit() { CSAT_SM90("wgmma.commit_group.sync.aligned;" :: : "memory"); }
// Until all but the last kGroupsLeft groups are done; their accumulators are to be named.
template <int kGroupsLeft, typename... Registers>
CSAT_DEVICE void wgmma_wait(Registers&... registers) {
  CSAT_SM90("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
  (pin(registers), ...);
}

// Operands of one product: accumulators as %0, %1, .., and as constraints.
#define CSAT_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CSAT_D16 CSAT_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CSAT_D32 CSAT_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CSAT_D40 CSAT_D32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define CSAT_D48 CSAT_D40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define CSAT_D64 CSAT_D48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CSAT_D128                                                                                                \
  CSAT_D64                                                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, "  \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "    \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, " \
  "%123, %124, %125, %126, %127"
#define CSAT_C1(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define CSAT_C2(j) CSAT_C1(j), CSAT_C1(j + 1)
#define CSAT_C4(j) CSAT_C2(j), CSAT_C2(j + 2)
#define CSAT_C8(j) CSAT_C4(j), CSAT_C4(j + 4)
#define CSAT_C16(j) CSAT_C8(j), CSAT_C8(j + 8)
// Columns, accumulators, and the numbers of the operands that follow those.
#define CSAT_EACH_WGMMA(PRODUCT)                                              \
  PRODUCT(16, CSAT_D8, (CSAT_C2(0)), 8, 9, 10, 11, 12, 13, 14)                \
  PRODUCT(32, CSAT_D16, (CSAT_C4(0)), 16, 17, 18, 19, 20, 21, 22)             \
  PRODUCT(64, CSAT_D32, (CSAT_C8(0)), 32, 33, 34, 35, 36, 37, 38)             \
  PRODUCT(80, CSAT_D40, (CSAT_C8(0), CSAT_C2(8)), 40, 41, 42, 43, 44, 45, 46) \
  PRODUCT(96, CSAT_D48, (CSAT_C8(0), CSAT_C4(8)), 48, 49, 50, 51, 52, 53, 54) \
  PRODUCT(128, CSAT_D64, (CSAT_C16(0)), 64, 65, 66, 67, 68, 69, 70)           \
  PRODUCT(256, CSAT_D128, (CSAT_C16(0), CSAT_C16(16)), 128, 129, 130, 131, 132, 133, 134)
#define CSAT_LIST(...) __VA_ARGS__
#define CSAT_WGMMA_OF_TYPE(N, T_, type, D, C, flag, operands, ...)                                                 \
  if constexpr (kFragments == N / 8 && std::is_same_v<T, T_>) {                                                    \
    CSAT_SM90("{ .reg .pred p; setp.ne.b32 p, %" #flag ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type \
              "." type " {" D "}, " operands "; }" : CSAT_LIST C : __VA_ARGS__);                                   \
  }
#define CSAT_WGMMA(N, D, C, flag, operands, ...)                         \
  CSAT_WGMMA_OF_TYPE(N, bf16, "bf16", D, C, flag, operands, __VA_ARGS__) \
  CSAT_WGMMA_OF_TYPE(N, f16, "f16", D, C, flag, operands, __VA_ARGS__)
#define CSAT_WGMMA_REGISTERS(N, D, C, a0, a1, a2, a3, right, flag, trans)                                          \
  CSAT_WGMMA(N, D, C, flag, "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #right ", p, 1, 1, %" #trans, "r"(a[0]), \
             "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}), "n"(int{kTransposed}))
#define CSAT_WGMMA_SHARED(N, D, C, left, right, flag, trans_a, trans_b, ...)                               \
  CSAT_WGMMA(N, D, C, flag, "%" #left ", %" #right ", p, 1, 1, %" #trans_a ", %" #trans_b, "l"(a), "l"(b), \
             "r"(int{accumulate}), "n"(int{kTransposedA}), "n"(int{kTransposedB}))

template <typename T, int kColumns, bool kTransposedB>
inline constexpr bool kWgmmaTakes = (std::is_same_v<T, bf16> || std::is_same_v<T, f16>) &&
                                    (kColumns == 16 || kColumns == 32 || kColumns == 64 || kColumns == 80 ||
                                     kColumns == 96 || kColumns == 128 || kColumns == 256) &&
                                    (!kTransposedB || kColumns % 64 == 0);

// c (64, N) += a (64, 16) b (16, N), or = where not `accumulate`, A in registers, N = 8 kFragments. Rows of b's memory
// are n, or k if it is transposed: then N is a multiple of 64.
template <typename T, bool kTransposed, int kFragments>
CSAT_DEVICE void wgmma_k16(float (&c)[kFragments][4], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
  static_assert(kWgmmaTakes<T, 8 * kFragments, kTransposed>, "add the number of columns to CSAT_EACH_WGMMA");
  CSAT_EACH_WGMMA(CSAT_WGMMA_REGISTERS)
}
// The same with A in shared memory, its rows m, or k if it is transposed.
template <typename T, bool kTransposedA, bool kTransposedB, int kFragments>
CSAT_DEVICE void wgmma_k16_shared(float (&c)[kFragments][4], uint64_t a, uint64_t b, bool accumulate = true) {
  static_assert(kWgmmaTakes<T, 8 * kFragments, kTransposedB>, "add the number of columns to CSAT_EACH_WGMMA");
  CSAT_EACH_WGMMA(CSAT_WGMMA_SHARED)
}

// a / b within 2 units in the last place, for b from 2^-126 to 2^126; 0 for larger ones.
CSAT_DEVICE float divide_approx(float a, float b) { return __fdividef(a, b); }
// 2^x, relative error below 2^-22 (PTX ISA, ex2.approx); 2^-inf = 0, and so is what would be subnormal.
CSAT_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The logarithm to base 2, absolute error below 2^-22 between 1 / 2 and 2, relative elsewhere (PTX ISA, lg2.approx); of
// 0 and of subnormal numbers -inf.
CSAT_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// max(x, 0), where a NaN stays a NaN.
CSAT_DEVICE float positive_part(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
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
// Which warpgroup this is; the compiler knows that all lanes of a warp agree, so products may depend on it.
CSAT_DEVICE int warpgroup_id() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0); }
CSAT_DEVICE float shfl_xor(float x, int lane_mask) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); }
CSAT_DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }
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

// The descriptor of a matrix that starts `bytes` (a multiple of 16) further on: one addition to its low half.
CSAT_DEVICE uint64_t wgmma_advance(uint64_t descriptor, int bytes) {
  return (descriptor >> 32 << 32) | (static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes / 16));
}

// Natural logarithms outside kernels, powers of two inside, where exp2_approx is one instruction.
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kSmallestNormal = 0x1p-126f;

// Full precision: nothing here is compiled with fast-math.
CSAT_DEVICE float exp_f32(float x) { return expf(x); }
CSAT_DEVICE float log_f32(float x) { return logf(x); }
CSAT_DEVICE float sqrt_f32(float x) { return sqrtf(x); }

// soft(u, theta) = sign(u) max(|u| - theta, 0); a NaN in either stays a NaN. Zero has the sign of u.
CSAT_DEVICE float soft_threshold(float u, float theta) { return copysignf(positive_part(fabsf(u) - theta), u); }
// pack2 of two of them, bit for bit but for the sign of a NaN.
template <typename T>
CSAT_DEVICE uint32_t soft_threshold_pack2(float2 u, float2 theta) {
  return pack2_magnitudes<T>(fabsf(u.x) - theta.x, fabsf(u.y) - theta.y, u.x, u.y);
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

// 10 major + minor of the current device; 0 if there is none.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return 0;
  return 10 * major + minor;
}
inline int64_t multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

}  // namespace csat
