#include "torch/cpu/gemm.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CSAT_MULTIVERSION 1
#else
#define CSAT_MULTIVERSION 0
#endif

namespace csat::cpu {
namespace {

namespace baseline {
#define CSAT_VECTOR_BYTES 16
#include "torch/cpu/micro_kernels.inc"
#undef CSAT_VECTOR_BYTES
}  // namespace baseline

#if CSAT_MULTIVERSION
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define CSAT_VECTOR_BYTES 32
#include "torch/cpu/micro_kernels.inc"
#undef CSAT_VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
namespace avx512 {
#define CSAT_VECTOR_BYTES 64
#include "torch/cpu/micro_kernels.inc"
#undef CSAT_VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options
#endif

enum class Isa { baseline, avx2, avx512 };

Isa detect() {
#if CSAT_MULTIVERSION
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// ATEN_CPU_CAPABILITY (default, avx2, avx512) bounds torch's own kernels, and these with them.
Isa bound() {
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  if (value && std::string_view(value) == "default") return Isa::baseline;
  if (value && std::string_view(value) == "avx2") return Isa::avx2;
  return Isa::avx512;
}

Isa isa() {
  static const Isa chosen = std::min(detect(), bound());
  return chosen;
}

}  // namespace

template <class R>
const MicroKernels<R>& micro_kernels() {
  static const MicroKernels<R> chosen = [] {
#if CSAT_MULTIVERSION
    if (isa() == Isa::avx512) return avx512::table<R>();
    if (isa() == Isa::avx2) return avx2::table<R>();
#endif
    return baseline::table<R>();
  }();
  return chosen;
}
template const MicroKernels<float>& micro_kernels<float>();
template const MicroKernels<double>& micro_kernels<double>();

const char* instruction_set() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace csat::cpu
