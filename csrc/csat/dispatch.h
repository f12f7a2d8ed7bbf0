// From the dtype of a tensor to the type of a kernel.
#pragma once
#include "csat/launch.h"
#include "csat/prims.cuh"

namespace csat {

// Calls f with a value of the storage type of `dtype`.
template <typename F>
int with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
  return kUnsupported;
}

}  // namespace csat
