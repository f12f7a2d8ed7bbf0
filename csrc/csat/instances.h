// The launch templates that csrc/kernels/instances/<kernel>_<dtype>.cu instantiate; everything else only refers to
// them.
#pragma once
#include "csat/attend_backward.cuh"
#include "csat/attend_causal.cuh"
#include "csat/attend_prefix.cuh"
#include "csat/decode_backward.cuh"
#include "csat/forward.cuh"

namespace csat {

#define CSAT_FORWARD_INSTANCES(prefix, T)                                                          \
  prefix template int launch_forward<T, true, false>(const ForwardArgs&, int64_t, int64_t, void*); \
  prefix template int launch_forward<T, false, true>(const ForwardArgs&, int64_t, int64_t, void*); \
  prefix template int launch_forward<T, true, true>(const ForwardArgs&, int64_t, int64_t, void*);
#define CSAT_ATTEND_BACKWARD_INSTANCES(prefix, T)                                                   \
  prefix template int launch_query_backward<T>(const AttendBackwardArgs&, int64_t, int64_t, void*); \
  prefix template int launch_measurement_backward<T>(const AttendBackwardArgs&, int64_t, int64_t, void*);
#define CSAT_ATTEND_CAUSAL_INSTANCES(prefix, T)                                                                        \
  prefix template int launch_attend_causal<T>(const AttendCausalArgs&, int64_t, int64_t, void*);                       \
  prefix template int launch_query_backward_causal<T>(const AttendCausalBackwardArgs&, int64_t, int64_t, void*);       \
  prefix template int launch_measurement_backward_causal<T>(const AttendCausalBackwardArgs&, int64_t, int64_t, void*); \
  prefix template int launch_token_backward_causal<T>(const AttendCausalBackwardArgs&, int64_t, int64_t, void*);
#define CSAT_ATTEND_PREFIX_INSTANCES(prefix, T)                                                            \
  prefix template int launch_prefix_sums<T>(const PrefixSumsArgs&, int64_t, int64_t, void*);               \
  prefix template int launch_attend_prefix<T>(const PrefixArgs&, int64_t, int64_t, void*);                 \
  prefix template int launch_prefix_query_backward<T>(const PrefixBackwardArgs&, int64_t, int64_t, void*); \
  prefix template int launch_prefix_token_backward<T>(const PrefixTokenArgs&, int64_t, int64_t, void*);
#define CSAT_DECODE_BACKWARD_INSTANCES(prefix, T) \
  prefix template int launch_decode_backward<T>(const DecodeBackwardArgs&, int64_t, int64_t, void*);

#define CSAT_EXTERN(T)                      \
  CSAT_FORWARD_INSTANCES(extern, T)         \
  CSAT_ATTEND_BACKWARD_INSTANCES(extern, T) \
  CSAT_ATTEND_CAUSAL_INSTANCES(extern, T)   \
  CSAT_ATTEND_PREFIX_INSTANCES(extern, T)   \
  CSAT_DECODE_BACKWARD_INSTANCES(extern, T)
#ifndef CSAT_INSTANTIATE
CSAT_EXTERN(float)
CSAT_EXTERN(bf16)
CSAT_EXTERN(f16)
#endif

}  // namespace csat
