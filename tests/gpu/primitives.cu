// Every word of csat/prims.cuh at work on given numbers, a kernel a family: compiled by nvcc and, with -DCSAT_EMULATE,
// by g++. test_primitives.py compares the device, the emulator and the formulas.
//
// A kernel is one block that reads floats x and writes floats y; the table at the end says how many.
#include <cstdint>
#include <string>

#include "csat/prims.cuh"

#ifdef CSAT_EMULATE
#include "runtime/emulator.h"
#endif

namespace {

using namespace csat;

// ---- one thread

__global__ void elementwise(const float* x, float* y) {
  const int t = int(threadIdx.x), n = int(blockDim.x);
  const float v = x[t];
  const float2 b = unpack2<bf16>(pack2<bf16>(v, v / 3)), h = unpack2<f16>(pack2<f16>(v, v / 3));
  const float2 soft_b = unpack2<bf16>(soft_threshold_pack2<bf16>({v, -v / 3}, {0.5f, 0.1f}));
  const float2 soft_h = unpack2<f16>(pack2_magnitudes<f16>(v, 1 - v, -v, v));
  const float results[] = {to_float(from_float<bf16>(v)),
                           to_float(from_float<f16>(v)),
                           to_float(from_float<float>(v)),
                           b.x,
                           b.y,
                           h.x,
                           h.y,
                           exp_f32(v),
                           exp2_approx(v),
                           log2_approx(fabsf(v)),
                           log_f32(fabsf(v)),
                           sqrt_f32(fabsf(v)),
                           soft_threshold(v, 0.5f),
                           positive_part(v),
                           divide_approx(v, 3.f),
                           __uint_as_float(to_tf32(v)),
                           soft_b.x,
                           soft_b.y,
                           soft_h.x,
                           soft_h.y};
  for (int i = 0; i < 20; ++i) y[i * n + t] = results[i];
}

// ---- one warp

__global__ void warps(const float* x, float* y) {
  __shared__ float slots[64];
  const int t = int(threadIdx.x);
  const float4 four = load4(x + t / 4 * 4);
  slots[t] = x[t];
  sync_warp();
  const float results[] = {shfl_xor(x[t], 5), warp_sum(x[t]),
                           warp_max(x[t]),    quad_sum(x[t]),
                           quad_max(x[t]),    four.x + 2 * four.y + 3 * four.z + 4 * four.w,
                           slots[t ^ 3],      float(pinned(lane_id())),
                           float(warp_id()),  float(warp_any(x[t] > 2))};
  for (int i = 0; i < 10; ++i) y[i * 64 + t] = results[i];
}

// Two groups of copies; of the second, lane l copies l % 5 floats.
__global__ void async_copies(const float* x, float* y) {
  CSAT_DYN_SMEM(float, shared);
  const int lane = lane_id();
  cp_async16(shared + lane * 4, x + lane * 4);
  cp_async_commit();
  cp_async16_zfill(shared + 128 + lane * 4, x + 128 + lane * 4, lane % 5 * 4);
  cp_async_commit();
  cp_async_wait<1>();
  sync_warp();
  for (int i = lane; i < 128; i += 32) y[i] = shared[127 - i];
  cp_async_wait<0>();
  sync_warp();
  for (int i = lane; i < 128; i += 32) y[128 + i] = shared[255 - i];
}

// A tile (16, 16), rows of 24 elements, as registers of four matrices: rows l % 16, columns from l / 16 * 8 on.
__global__ void load_matrices(const float* x, float* y) {
  CSAT_DYN_SMEM(bf16, tile);
  const int lane = lane_id();
  for (int i = lane; i < 256; i += 32) tile[i / 16 * 24 + i % 16] = from_float<bf16>(x[i]);
  sync_warp();
  uint32_t plain[4], transposed[4], pinned_plain[4], pinned_transposed[4];
  const bf16* row = tile + lane % 16 * 24;
  const SharedAddress pinned_row = pinned_address(row);
  ldmatrix_x4(plain, row + lane / 16 * 8);
  ldmatrix_x4_transposed(transposed, row + lane / 16 * 8);
  ldmatrix_x4(pinned_plain, pinned_row + lane / 16 * 16);
  ldmatrix_x4_transposed(pinned_transposed, pinned_row + lane / 16 * 16);
  for (int i = 0; i < 4; ++i) {
    const uint32_t forms[] = {plain[i], transposed[i], pinned_plain[i], pinned_transposed[i]};
    for (int form = 0; form < 4; ++form) {
      const float2 pair = unpack2<bf16>(forms[form]);
      y[((form * 4 + i) * 32 + lane) * 2] = pair.x;
      y[((form * 4 + i) * 32 + lane) * 2 + 1] = pair.y;
    }
  }
}

// Registers of four matrices, x (4 matrices, 32 lanes, 2), to tiles (16, 16).
__global__ void store_matrices(const float* x, float* y) {
  CSAT_DYN_SMEM(f16, tile);
  const int lane = lane_id();
  uint32_t registers[4];
  for (int i = 0; i < 4; ++i) registers[i] = pack2<f16>(x[(i * 32 + lane) * 2], x[(i * 32 + lane) * 2 + 1]);
  stmatrix_x4(tile + lane % 16 * 24 + lane / 16 * 8, registers);
  stmatrix_x4_transposed(tile + (16 + lane % 16) * 24 + lane / 16 * 8, registers);
  sync_warp();
  for (int i = lane; i < 512; i += 32) y[i] = to_float(tile[i / 16 * 24 + i % 16]);
}

// y (16, 8) = 1 + a (16, 16) b (8, 16)^T.
template <typename T>
__global__ void warp_product(const float* x, float* y) {
  const int g = lane_id() / 4, t = lane_id() % 4 * 2;
  const auto pair = [&](int row, int column) { return pack2<T>(x[row * 16 + column], x[row * 16 + column + 1]); };
  const uint32_t a[4] = {pair(g, t), pair(g + 8, t), pair(g, t + 8), pair(g + 8, t + 8)};
  float c[4] = {1, 1, 1, 1};
  mma_m16n8k16<T>(c, a, pair(16 + g, t), pair(16 + g, t + 8));
  for (int e = 0; e < 4; ++e) y[(g + e / 2 * 8) * 8 + t + e % 2] = c[e];
}

// y (16, 8) = 1 + a (16, 8) b (8, 8)^T.
__global__ void warp_product_tf32(const float* x, float* y) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const auto at = [&](int row, int column) { return to_tf32(x[row * 8 + column]); };
  const uint32_t a[4] = {at(g, t), at(g + 8, t), at(g, t + 4), at(g + 8, t + 4)};
  float c[4] = {1, 1, 1, 1};
  mma_m16n8k8_tf32(c, a, at(16 + g, t), at(16 + g, t + 4));
  for (int e = 0; e < 4; ++e) y[(g + e / 2 * 8) * 8 + t * 2 + e % 2] = c[e];
}

// ---- one block

// One warp hands three rows to the other through one slot; "full" is barrier 1, "empty" barrier 2.
__global__ void named_barriers(const float* x, float* y) {
  __shared__ float slot[32];
  const int lane = lane_id();
  for (int row = 0; row < 3; ++row) {
    if (warp_id() == 0) {
      if (row > 0) named_barrier_sync(2, 64);
      slot[lane] = x[row * 32 + lane];
      named_barrier_arrive(1, 64);
    } else {
      named_barrier_sync(1, 64);
      y[row * 32 + lane] = slot[31 - lane];
      if (row < 2) named_barrier_arrive(2, 64);
    }
  }
}

// ---- Hopper

// Every thread's number to thread t ^ 63, twice, by an mbarrier.
__global__ void mbarriers(const float* x, float* y) {
  __shared__ float slots[2][64];
  __shared__ uint64_t bar;
  const int t = int(threadIdx.x);
  if (t == 0) mbarrier_init(&bar, 64);
  __syncthreads();
  for (int round = 0; round < 2; ++round) {
    slots[round][t] = x[round * 64 + t];
    mbarrier_arrive(&bar);
    mbarrier_wait(&bar, round % 2);
    y[round * 64 + t] = slots[round][t ^ 63];
  }
}

// Eight rows of 64 through two buffers, doubled on their way back.
__global__ void bulk_copies(const float* x, float* y) {
  CSAT_DYN_SMEM(float, shared);
  __shared__ uint64_t full[2];
  const int t = int(threadIdx.x);
  const auto fetch = [&](int row) {
    mbarrier_arrive_expect_bytes(&full[row % 2], 256);
    bulk_copy_to_shared(shared + row % 2 * 64, x + row * 64, 256, &full[row % 2]);
  };
  if (t == 0) {
    mbarrier_init(&full[0], 1);
    mbarrier_init(&full[1], 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (t == 0) fetch(0);
  for (int row = 0; row < 8; ++row) {
    if (t == 0 && row > 0) bulk_wait_read<0>();
    if (t == 0 && row + 1 < 8) fetch(row + 1);
    mbarrier_wait(&full[row % 2], row / 2 % 2);
    shared[row % 2 * 64 + t] *= 2;
    fence_proxy_async();
    __syncthreads();
    if (t == 0) bulk_copy_to_global(y + row * 64, shared + row % 2 * 64, 256);
    if (t == 0) bulk_commit();
  }
  if (t == 0) bulk_wait_read<0>();
}

// A warpgroup gives registers to another.
__global__ void __launch_bounds__(256, 1) registers(const float* x, float* y) {
  const int t = int(threadIdx.x);
  if (warpgroup_id() == 0) {
    registers_decrease<24>();
    y[t] = x[t] + 1;
  } else {
    registers_increase<232>();
    y[t] = x[t] - 1;
  }
}

// The tensor is x as (2, 3, 21, 72) elements of T, its last axes of as many as `rank`.
constexpr int kSizes[] = {72, 21, 3, 2}, kElements = 72 * 21 * 3 * 2, kBoxRows = 16;

template <typename T>
__global__ void convert(const float* x, T* y) {
  for (int i = int(threadIdx.x); i < kElements; i += int(blockDim.x)) y[i] = from_float<T>(x[i]);
}

// y: what lies in shared memory, in its order there.
template <typename T, int rank>
__global__ void tensor_box(const __grid_constant__ TensorMap map, float* y) {
  CSAT_DYN_SMEM(T, shared);
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    mbarrier_init(&bar, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_bytes(&bar, kBoxRows * 128);
    if constexpr (rank == 2) tensor_copy_2d(shared, map, 40, -3, &bar);
    if constexpr (rank == 3) tensor_copy_3d(shared, map, 8, 12, 1, &bar);
    if constexpr (rank == 4) tensor_copy_4d(shared, map, -8, 5, 2, 1, &bar);
  }
  mbarrier_wait(&bar, 0);
  for (int i = int(threadIdx.x); i < kBoxRows * 128 / int(sizeof(T)); i += 128) y[i] = to_float(shared[i]);
}

// Element (row, column) of a matrix of `rows` rows: 64 columns a row of 128 swizzled bytes, the next 64 `rows` rows on.
template <typename T>
CSAT_DEVICE void stage(T* shared, const float* matrix, int rows, int columns) {
  for (int i = int(threadIdx.x); i < rows * columns; i += 128) {
    const int row = i / columns, column = i % columns;
    shared[(column / 64 * rows + row) * 64 + ((column % 64 / 8) ^ (row % 8)) * 8 + column % 8] =
        from_float<T>(matrix[i]);
  }
}

enum class Left { registers, rows, columns };  // A in registers; in shared memory by its rows, or by its columns
constexpr int kDepth = 128;

// y (64, N) = a b, with x the 64 * 128 elements of a, then those of b: (64, 128) or, by its columns, (128, 64); (N,
// 128) or, transposed, (128, N).
template <typename T, int columns, Left left, bool transposed>
__global__ void __launch_bounds__(128) warpgroup_product(const float* x, float* y) {
  CSAT_DYN_SMEM(T, shared_b);
  constexpr int a_rows = left == Left::columns ? kDepth : 64, b_rows = transposed ? kDepth : columns;
  T* shared_a = shared_b + columns * kDepth;
  const int t = int(threadIdx.x), lane = t % 32, row = t / 32 * 16 + lane / 4;
  stage(shared_b, x + 64 * kDepth, b_rows, columns * kDepth / b_rows);
  if constexpr (left != Left::registers) stage(shared_a, x, a_rows, 64 * kDepth / a_rows);
  fence_proxy_async();
  __syncthreads();
  float c[columns / 8][4];
  uint32_t a[kDepth / 16][4];
#pragma unroll
  for (int j = 0; j < columns / 8; ++j)
    for (int e = 0; e < 4; ++e) c[j][e] = 99;  // the first product starts from nothing
#pragma unroll
  for (int i = 0; i < kDepth / 4; ++i) {
    const float* pair = x + (row + 8 * (i % 2)) * kDepth + i / 4 * 16 + lane % 4 * 2 + 8 * (i % 4 / 2);
    a[i / 4][i % 4] = pack2<T>(pair[0], pair[1]);
  }
  const auto at = [](T* matrix, int rows, int k, bool by_k) {
    const uint64_t first = wgmma_descriptor(uniform_address(matrix), by_k ? uint32_t(rows) * 128 : 0, 1024);
    return wgmma_advance(first, by_k ? k * 128 : k / 64 * rows * 128 + k % 64 * 2);
  };
  wgmma_fence(c, a);
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    const uint64_t b = at(shared_b, b_rows, k, transposed);
    if constexpr (left == Left::registers) {
      wgmma_k16<T, transposed>(c, a[k / 16], b, k > 0);
    } else {
      constexpr bool by_columns = left == Left::columns;
      wgmma_k16_shared<T, by_columns, transposed>(c, at(shared_a, a_rows, k, by_columns), b, k > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>(c);
#pragma unroll
  for (int j = 0; j < columns / 8; ++j)
    for (int e = 0; e < 4; ++e) y[(row + e / 2 * 8) * columns + j * 8 + lane % 4 * 2 + e % 2] = c[j][e];
}

// ---- the host's side

std::string message;  // of the last run

#ifdef CSAT_EMULATE
void* allocate(size_t bytes) { return emulator::device_allocate(bytes); }
void upload(void* device, const void* host, size_t bytes) { emulator::copy_to_device(device, host, bytes); }
void download(void* host, const void* device, size_t bytes) { emulator::copy_to_host(host, device, bytes); }
void begin() { emulator::reset(); }
void end(int error) { message = emulator::report.text() + (error ? "launch failed" : ""); }
#else
void* allocate(size_t bytes) {
  void* p = nullptr;
  (void)cudaMalloc(&p, bytes);
  return p;
}
void upload(void* device, const void* host, size_t bytes) {
  (void)cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice);
}
void download(void* host, const void* device, size_t bytes) {
  (void)cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost);
}
void begin() { (void)cudaGetLastError(); }
void end(int error) {
  const cudaError_t last = error ? cudaError_t(error) : cudaDeviceSynchronize();
  message = last == cudaSuccess ? "" : cudaGetErrorString(last);
}
#endif

using Run = int(const float* x, float* y);

template <void (*kernel)(const float*, float*), int threads, int shared_bytes>
int launch(const float* x, float* y) {
  CSAT_LAUNCH(kernel, dim3(1), dim3(threads), shared_bytes, nullptr, x, y);
  return last_error();
}

template <typename T, int rank>
int launch_tensor_box(const float* x, float* y) {
  T* tensor = static_cast<T*>(allocate(kElements * sizeof(T)));
  CSAT_LAUNCH(convert<T>, dim3(1), dim3(128), 0, nullptr, x, tensor);
  int64_t sizes[rank], strides[rank], stride = 1;
  for (int i = 0; i < rank; ++i) {
    sizes[i] = kSizes[i];
    strides[i] = stride;
    stride *= kSizes[i];
  }
  TensorMap map;
  if (const int error = make_tensor_map(&map, tensor, rank, sizes, strides, kBoxRows)) return error;
  const auto kernel = tensor_box<T, rank>;
  CSAT_LAUNCH(kernel, dim3(1), dim3(128), kBoxRows * 128, nullptr, map, y);
  return last_error();
}

struct Case {
  const char* name;
  bool hopper;
  int inputs, outputs;
  Run* run;
};

template <typename T, int columns, Left left, bool transposed>
constexpr Case product(const char* name) {
  constexpr int shared_bytes = (columns + (left == Left::registers ? 0 : 64)) * kDepth * int(sizeof(T));
  return {name, true, (64 + columns) * kDepth, 64 * columns,
          launch<warpgroup_product<T, columns, left, transposed>, 128, shared_bytes>};
}

const Case cases[] = {
    {"elementwise", false, 256, 20 * 256, launch<elementwise, 256, 0>},
    {"warps", false, 64, 10 * 64, launch<warps, 64, 0>},
    {"async_copies", false, 256, 256, launch<async_copies, 32, 1024>},
    {"load_matrices", false, 256, 1024, launch<load_matrices, 32, 768>},
    {"warp_product bf16", false, 24 * 16, 128, launch<warp_product<bf16>, 32, 0>},
    {"warp_product f16", false, 24 * 16, 128, launch<warp_product<f16>, 32, 0>},
    {"warp_product_tf32", false, 24 * 8, 128, launch<warp_product_tf32, 32, 0>},
    {"named_barriers", false, 96, 96, launch<named_barriers, 64, 0>},
    {"store_matrices", true, 256, 512, launch<store_matrices, 32, 1536>},
    {"mbarriers", true, 128, 128, launch<mbarriers, 64, 0>},
    {"bulk_copies", true, 512, 512, launch<bulk_copies, 64, 512>},
    {"registers", true, 256, 256, launch<registers, 256, 0>},
    {"tensor_box bf16 2", true, kElements, kBoxRows * 64, launch_tensor_box<bf16, 2>},
    {"tensor_box f16 3", true, kElements, kBoxRows * 64, launch_tensor_box<f16, 3>},
    {"tensor_box float 4", true, kElements, kBoxRows * 32, launch_tensor_box<float, 4>},
    product<bf16, 16, Left::registers, false>("wgmma bf16 16 registers rows"),
    product<f16, 32, Left::registers, false>("wgmma f16 32 registers rows"),
    product<bf16, 64, Left::registers, false>("wgmma bf16 64 registers rows"),
    product<f16, 80, Left::registers, false>("wgmma f16 80 registers rows"),
    product<bf16, 96, Left::registers, false>("wgmma bf16 96 registers rows"),
    product<f16, 128, Left::registers, false>("wgmma f16 128 registers rows"),
    product<bf16, 256, Left::registers, false>("wgmma bf16 256 registers rows"),
    product<f16, 64, Left::registers, true>("wgmma f16 64 registers columns"),
    product<bf16, 128, Left::registers, true>("wgmma bf16 128 registers columns"),
    product<f16, 256, Left::registers, true>("wgmma f16 256 registers columns"),
    product<f16, 16, Left::rows, false>("wgmma f16 16 rows rows"),
    product<bf16, 32, Left::columns, false>("wgmma bf16 32 columns rows"),
    product<f16, 64, Left::columns, true>("wgmma f16 64 columns columns"),
    product<bf16, 80, Left::rows, false>("wgmma bf16 80 rows rows"),
    product<f16, 96, Left::columns, false>("wgmma f16 96 columns rows"),
    product<bf16, 128, Left::rows, true>("wgmma bf16 128 rows columns"),
    product<f16, 256, Left::rows, false>("wgmma f16 256 rows rows"),
};

}  // namespace

extern "C" {

// The name of case i and its numbers of floats, null past the last. `hopper`: it needs compute capability 9.0.
const char* csat_case(int i, int* hopper, int* inputs, int* outputs) {
  if (i < 0 || i >= int(sizeof cases / sizeof cases[0])) return nullptr;
  *hopper = cases[i].hopper;
  *inputs = cases[i].inputs;
  *outputs = cases[i].outputs;
  return cases[i].name;
}

// Returns what went wrong, or an empty text: of the emulator its report.
const char* csat_run_case(int i, const float* x, float* y) {
  const Case& chosen = cases[i];
  begin();
  auto* device_x = static_cast<float*>(allocate(size_t(chosen.inputs) * sizeof(float)));
  auto* device_y = static_cast<float*>(allocate(size_t(chosen.outputs) * sizeof(float)));
  upload(device_x, x, size_t(chosen.inputs) * sizeof(float));
  const int error = chosen.run(device_x, device_y);
  download(y, device_y, size_t(chosen.outputs) * sizeof(float));
  end(error);
  return message.c_str();
}

}  // extern "C"
