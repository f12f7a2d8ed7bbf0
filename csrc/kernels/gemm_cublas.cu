#include <cublas_v2.h>

#include "csat/gemm.h"

namespace csat {
namespace {

cudaDataType_t cuda_type(DType t) {
  return t == DType::f32 ? CUDA_R_32F : (t == DType::bf16 ? CUDA_R_16BF : CUDA_R_16F);
}
int64_t at_least_one(int64_t n) { return n > 0 ? n : 1; }

}  // namespace

// cuBLAS is column-major: a row-major c = a b is there c^T = b^T a^T, so a and b change places and nothing is
// transposed. float32 runs in full float32 unless the math mode of the handle (torch's allow_tf32) says otherwise.
int gemm(const GemmArgs& p, void* blas) {
  const float one = 1.f, zero = 0.f;
  const auto op = [](const GemmOperand& x) { return x.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  const cublasStatus_t status = cublasGemmStridedBatchedEx_64(
      static_cast<cublasHandle_t>(blas), op(p.b), op(p.a), p.n, p.m, p.k, &one, p.b.data, cuda_type(p.input),
      at_least_one(p.b.pitch), p.b.batch, p.a.data, cuda_type(p.input), at_least_one(p.a.pitch), p.a.batch, &zero, p.c,
      cuda_type(p.output), at_least_one(p.c_pitch), p.c_batch, p.count, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
  return status == CUBLAS_STATUS_SUCCESS ? 0 : kGemmError + static_cast<int>(status);
}

}  // namespace csat
