// The one matrix product that is not ours: row-major, strided batches, float32 accumulation.
// csrc/kernels/gemm_cublas.cu gives it to cuBLAS; the emulated build links a loop with the same meaning.
#pragma once
#include "csat/launch.h"

namespace csat {

// A row-major matrix in memory; with `transposed` the product uses its transpose. `pitch` is the stride between rows,
// `batch` the stride between the matrices of a batch (0: shared).
struct GemmOperand {
  const void* data;
  int64_t pitch, batch;
  bool transposed;
};

// c (m, n) = a (m, k) b (k, n), `count` times; every size is at least 1 (libraries disagree on k = 0). a and b share a
// dtype; c has it too or is float32.
struct GemmArgs {
  GemmOperand a, b;
  DType input;
  void* c;
  DType output;
  int64_t c_pitch, c_batch;
  int64_t m, n, k, count;
};
// Returns 0 or kGemmError + the status of the library.
int gemm(const GemmArgs& p, void* blas);

}  // namespace csat
