// What the host asks about the device and about errors.
#include "csat/gemm.h"
#include "csat/prims.cuh"

namespace csat {

int64_t shared_memory_limit() { return max_shared_bytes(); }

const char* error_string(int code) {
  if (code == 0) return "no error";
  if (code == kUnsupported) return "outside the supported range (csrc/csat/limits.h)";
  if (code >= kGemmError) return "cuBLAS refused the matrix product";
#ifdef CSAT_EMULATE
  return "launch refused";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}

}  // namespace csat
