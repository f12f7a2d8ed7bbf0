// What the host asks about the device, the build and errors.
#include <string_view>

#include "csat/limits.h"
#include "csat/prims.cuh"

#define CSAT_TEXT_OF(x) #x
#define CSAT_TEXT(x) CSAT_TEXT_OF(x)
#ifndef CSAT_CUDA_ARCHS  // 80.90a, say: set by the build
#define CSAT_CUDA_ARCHS unknown
#endif
#ifdef __CUDACC_VER_MAJOR__
#define CSAT_COMPILER \
  "nvcc " CSAT_TEXT(__CUDACC_VER_MAJOR__) "." CSAT_TEXT(__CUDACC_VER_MINOR__) "." CSAT_TEXT(__CUDACC_VER_BUILD__)
#else
#define CSAT_COMPILER "the emulator's C++ compiler"
#endif

namespace csat {

namespace {

// Only nvcc builds lack it: the emulator, which names no architectures, runs every kernel.
constexpr std::string_view kArchs = CSAT_TEXT(CSAT_CUDA_ARCHS);
constexpr bool kWgmmaCode = kArchs == "unknown" || kArchs.find("90a") != std::string_view::npos;

}  // namespace

const char* build_info() { return "sm " CSAT_TEXT(CSAT_CUDA_ARCHS) ", " CSAT_COMPILER; }

int64_t shared_memory_limit() { return max_shared_bytes(); }

limits::Device limits::current_device() { return {compute_capability(), max_shared_bytes(), kWgmmaCode}; }

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
