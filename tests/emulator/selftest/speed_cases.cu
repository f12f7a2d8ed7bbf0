// What the emulator is timed on: products as the kernels do them, on tensor cores and on plain cores.
#include "csat/tile.cuh"
#include "cuda_emulation.h"
#include "selftest/speed.h"

namespace emulator::selftest {

namespace {

constexpr int kWarps = 4, kDepth = 64, kColumns = 64, kPitch = kDepth + 8;

// out (rows, 64) = sum over `repeats` of a (rows, 64) b (64, 64)^T; 16 rows a warp, b in shared memory.
__global__ void tensor_product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* out, int repeats) {
  CSAT_DYN_SMEM(__nv_bfloat16, shared);
  __nv_bfloat16 *shared_b = shared, *shared_a = shared + kColumns * kPitch;
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32, row0 = (int(blockIdx.x) * kWarps + warp) * 16;
  const auto stage = [&](__nv_bfloat16* target, const __nv_bfloat16* source) {
    for (int i = t; i < 64 * kDepth / 8; i += kWarps * 32) {
      csat::cp_async16(target + i / 8 * kPitch + i % 8 * 8, source + i * 8);
    }
  };
  stage(shared_a, a + int64_t(blockIdx.x) * kWarps * 16 * kDepth);
  stage(shared_b, b);
  csat::cp_async_commit();
  csat::cp_async_wait<0>();
  __syncthreads();
  uint32_t rows[kDepth / 16][4];
  for (int k = 0; k < kDepth / 16; ++k) {
    csat::ldmatrix_x4(rows[k], shared_a + (warp * 16 + lane % 16) * kPitch + k * 16 + lane / 16 * 8);
  }
  float sums[kColumns / 8][4] = {};
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (int column = 0; column < kColumns / 8; column += 2) {
      for (int k = 0; k < kDepth / 16; ++k) {
        uint32_t columns[4];
        csat::ldmatrix_x4(columns,
                          shared_b + (column * 8 + lane % 8 + lane / 16 * 8) * kPitch + k * 16 + lane / 8 % 2 * 8);
        csat::mma_m16n8k16<__nv_bfloat16>(sums[column], rows[k], columns[0], columns[1]);
        csat::mma_m16n8k16<__nv_bfloat16>(sums[column + 1], rows[k], columns[2], columns[3]);
      }
    }
  }
  for (int column = 0; column < kColumns / 8; ++column) {
    for (int e = 0; e < 4; ++e) {
      out[(row0 + lane / 4 + e / 2 * 8) * kColumns + column * 8 + lane % 4 * 2 + e % 2] = sums[column][e];
    }
  }
}

// The same by the warp tiles of csat/tile.cuh in float32: 8 rows a warp, b (64, 64) from device memory.
__global__ void plain_product(const float* a, const float* b, float* out, int repeats) {
  CSAT_DYN_SMEM(float, shared);
  const int warp = csat::warp_id(), lane = csat::lane_id(), row0 = (int(blockIdx.x) * kWarps + warp) * 8;
  csat::load_rows(shared, kDepth, kWarps * 8, a + int64_t(blockIdx.x) * kWarps * 8 * kDepth, kDepth, 1, kWarps * 8,
                  kDepth);
  __syncthreads();
  for (int half = 0; half < kColumns; half += csat::limits::kMicroColumns) {
    csat::Accumulator sums = {};
    for (int repeat = 0; repeat < repeats; ++repeat) {
      csat::multiply(sums, shared + warp * 8 * kDepth, kDepth, b + half + lane, kColumns, kDepth);
    }
    for (int r = 0; r < 8; ++r) {
      out[(row0 + r) * kColumns + half + lane] = sums[r][0];
      out[(row0 + r) * kColumns + half + lane + 32] = sums[r][1];
    }
  }
}

}  // namespace

double run_tensor_product(int blocks, int repeats) {
  const size_t rows = size_t(blocks) * kWarps * 16;
  const auto* a = upload(std::vector<__nv_bfloat16>(rows * kDepth, __nv_bfloat16(1.0f)));
  const auto* b = upload(std::vector<__nv_bfloat16>(kColumns * kDepth, __nv_bfloat16(0.5f)));
  float* out = allocate<float>(rows * kColumns);
  CSAT_LAUNCH(tensor_product, dim3(unsigned(blocks)), dim3(kWarps * 32), 2 * 64 * kPitch * 2, nullptr, a, b, out,
              repeats);
  const bool right = download(out, rows * kColumns).back() == 0.5f * kDepth * float(repeats);
  return right ? 2.0 * double(rows) * kColumns * kDepth * repeats : 0;
}

double run_plain_product(int blocks, int repeats) {
  const size_t rows = size_t(blocks) * kWarps * 8;
  const float* a = upload(std::vector<float>(rows * kDepth, 1.0f));
  const float* b = upload(std::vector<float>(kColumns * kDepth, 0.5f));
  float* out = allocate<float>(rows * kColumns);
  CSAT_LAUNCH(plain_product, dim3(unsigned(blocks)), dim3(kWarps * 32), kWarps * 8 * kDepth * 4, nullptr, a, b, out,
              repeats);
  const bool right = download(out, rows * kColumns).back() == 0.5f * kDepth * float(repeats);
  return right ? 2.0 * double(rows) * kColumns * kDepth * repeats : 0;
}

}  // namespace emulator::selftest
