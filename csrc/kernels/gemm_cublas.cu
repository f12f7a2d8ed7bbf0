#include <cublas_v2.h>

#include "csat/gemm.h"

namespace csat {
namespace {

cudaDataType_t cuda_type(DType t) {
  return t == DType::f32 ? CUDA_R_32F : (t == DType::bf16 ? CUDA_R_16BF : CUDA_R_16F);
}

// While it lives, 16-bit products that cuBLAS splits along k are summed in float32: by default it may add such parts in
// the output's dtype. The handle belongs to this thread (torch keeps one a thread and device) and gets its mode back.
class Float32Sums {
 public:
  Float32Sums(cublasHandle_t handle, DType input) : handle_(input == DType::f32 ? nullptr : handle) {
    if (!handle_) return;
    status_ = cublasGetMathMode(handle_, &before_);
    constexpr int kMode = CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    if (status_ == CUBLAS_STATUS_SUCCESS) status_ = cublasSetMathMode(handle_, static_cast<cublasMath_t>(kMode));
  }
  Float32Sums(const Float32Sums&) = delete;
  Float32Sums& operator=(const Float32Sums&) = delete;
  ~Float32Sums() {
    if (handle_) (void)cublasSetMathMode(handle_, before_);
  }
  cublasStatus_t status() const { return status_; }

 private:
  cublasHandle_t handle_;
  cublasMath_t before_ = CUBLAS_DEFAULT_MATH;
  cublasStatus_t status_ = CUBLAS_STATUS_SUCCESS;
};

}  // namespace

// cuBLAS is column-major: a row-major c = a b is there c^T = b^T a^T, so a and b change places and nothing is
// transposed. float32 runs in full float32 unless the math mode of the handle (torch's allow_tf32) says otherwise.
int gemm(const GemmArgs& p, void* blas) {
  const auto handle = static_cast<cublasHandle_t>(blas);
  const Float32Sums sums(handle, p.input);
  if (sums.status() != CUBLAS_STATUS_SUCCESS) return kGemmError + static_cast<int>(sums.status());
  const float one = 1.f, zero = 0.f;
  const auto op = [](const GemmOperand& x) { return x.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  const cublasStatus_t status = cublasGemmStridedBatchedEx_64(
      handle, op(p.b), op(p.a), p.n, p.m, p.k, &one, p.b.data, cuda_type(p.input), p.b.pitch, p.b.batch, p.a.data,
      cuda_type(p.input), p.a.pitch, p.a.batch, &zero, p.c, cuda_type(p.output), p.c_pitch, p.c_batch, p.count,
      CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
  return status == CUBLAS_STATUS_SUCCESS ? 0 : kGemmError + static_cast<int>(status);
}

}  // namespace csat
