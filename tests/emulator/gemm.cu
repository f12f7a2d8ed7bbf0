// csat::gemm for the emulated build, in place of cuBLAS: one thread an element of c, so its operands are checked too.
#include "csat/gemm.h"
#include "csat/prims.cuh"

namespace csat {
namespace {

constexpr int kThreads = 128;

template <typename T, typename C>
__global__ void gemm_kernel(GemmArgs p) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.m * p.n) return;
  const int64_t row = index / p.n, column = index % p.n, batch = blockIdx.y;
  const auto element = [batch](const GemmOperand& x, int64_t r, int64_t c) {
    const int64_t offset = x.transposed ? c * x.pitch + r : r * x.pitch + c;
    return to_float(static_cast<const T*>(x.data)[batch * x.batch + offset]);
  };
  float sum = 0.f;
  for (int64_t k = 0; k < p.k; ++k) sum += element(p.a, row, k) * element(p.b, k, column);
  static_cast<C*>(p.c)[batch * p.c_batch + row * p.c_pitch + column] = from_float<C>(sum);
}

template <typename T, typename C>
int run(const GemmArgs& p) {
  const dim3 grid(unsigned((p.m * p.n + kThreads - 1) / kThreads), unsigned(p.count));
  auto kernel = gemm_kernel<T, C>;
  CSAT_LAUNCH(kernel, grid, dim3(kThreads), 0, nullptr, p);
  return last_error();
}

}  // namespace

int gemm(const GemmArgs& p, void*) {
  if (p.m < 1 || p.n < 1 || p.k < 1 || p.count < 1) return kUnsupported;  // the contract of gemm.h
  switch (p.input) {
    case DType::f32:
      return run<float, float>(p);
    case DType::bf16:
      return p.output == DType::f32 ? run<bf16, float>(p) : run<bf16, bf16>(p);
    case DType::f16:
      return p.output == DType::f32 ? run<f16, float>(p) : run<f16, f16>(p);
  }
  return kUnsupported;
}

}  // namespace csat
