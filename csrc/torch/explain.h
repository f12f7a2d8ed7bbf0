// csat_ext._C.can_run: the limits of the CUDA kernels for a problem that need not exist, on a device that need not be
// there.
#pragma once
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "csat/limits.h"

namespace csat {

using ProblemSizes = std::unordered_map<std::string, int64_t>;

template <typename Value>
Value named(const char* argument, const std::string& name,
            std::initializer_list<std::pair<const char*, Value>> values) {
  std::string accepted;
  for (const auto& [known, value] : values) {
    if (name == known) return value;
    accepted += std::string(accepted.empty() ? "" : ", ") + known;
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " + accepted + "; got '" + name + "'");
}

inline DType dtype_named(const char* argument, const std::string& name) {
  return named<DType>(argument, name, {{"float32", DType::f32}, {"bfloat16", DType::bf16}, {"float16", DType::f16}});
}

// Sizes by their letters in launch.h: B, H, Hk, Nq, M, D, R, of the tokens of attend_causal Hn, N, and of a decoder Hd,
// T, Ts, Tb, P, Dv. What is absent is 1.
inline limits::Problem problem_of(const ProblemSizes& sizes, DType dtype, DType weights) {
  const auto size = [&](const char* letter) {
    const auto found = sizes.find(letter);
    return found == sizes.end() ? int64_t(1) : found->second;
  };
  limits::Problem p{};
  p.attend.q.dtype = p.decode.z.dtype = dtype;
  p.attend.batch = p.decode.batch = size("B");
  p.attend.heads = p.decode.heads = size("H");
  p.attend.key_heads = size("Hk");
  p.attend.queries = p.decode.queries = size("Nq");
  p.attend.measurements = size("M");
  p.attend.head_dim = size("D");
  p.attend.features = size("R");
  p.tokens.heads = size("Hn");
  p.tokens.count = size("N");
  Decoder& d = p.decode.decoder;
  d.S.dtype = d.B.dtype = d.psi.dtype = weights;
  d.heads = size("Hd");
  d.layers = size("T");
  d.s_layers = size("Ts");
  d.b_layers = size("Tb");
  d.coefficients = size("P");
  d.features = size("R");
  d.outputs = size("Dv");
  return p;
}

// Why it does not run, or nothing, and the shared memory that a block of it takes.
inline std::pair<std::optional<std::string>, int64_t> can_run(const std::string& kernel, const std::string& family,
                                                              const ProblemSizes& sizes, const std::string& dtype,
                                                              const std::string& weights, int capability,
                                                              int64_t shared_bytes, bool wgmma_code) {
  using limits::Family, limits::Kernel;
  const Kernel which = named<Kernel>("kernel", kernel,
                                     {{"attend", Kernel::attend},
                                      {"decode", Kernel::decode},
                                      {"attend_decode", Kernel::attend_decode},
                                      {"attend_backward", Kernel::attend_backward},
                                      {"decode_backward", Kernel::decode_backward},
                                      {"attend_causal", Kernel::attend_causal},
                                      {"attend_causal_decode", Kernel::attend_causal_decode},
                                      {"attend_causal_backward", Kernel::attend_causal_backward},
                                      {"attend_prefix", Kernel::attend_prefix},
                                      {"attend_prefix_decode", Kernel::attend_prefix_decode},
                                      {"attend_prefix_backward", Kernel::attend_prefix_backward}});
  const Family of =
      named<Family>("family", family,
                    {{"wgmma", Family::wgmma}, {"mma", Family::mma}, {"pair", Family::pair}, {"simt", Family::simt}});
  const limits::Problem problem = problem_of(sizes, dtype_named("dtype", dtype), dtype_named("weights", weights));
  const limits::Device device{capability, shared_bytes, wgmma_code};
  const char* reason = limits::can_run(which, of, problem, device);
  return {reason ? std::optional<std::string>(reason) : std::nullopt, limits::shared_bytes(which, of, problem, device)};
}

}  // namespace csat
