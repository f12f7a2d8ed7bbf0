// Argument checks of every csat op, shared by the CPU and the CUDA entry points.
//
// Each check_<op> validates shapes, dtypes and devices and returns the sizes the kernels need, so that no entry point
// derives a size a second time. A violated contract throws std::invalid_argument (ValueError in Python, RuntimeError
// from torch 2.15 on) that names the op, the argument, what came and what is accepted. Nothing here touches memory of a
// tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "csat/window.h"

namespace csat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Sizes, in the letters of docs/architecture.md.
struct ProjectSizes {
  int64_t B, Hx, Hp, Hout, Bp, M, N, D;
};
struct RowsSizes {
  int64_t B, Bp, Hp, M, N;
};
struct ImplicitSizes {
  int64_t B, Hx, Hp, Hout, N, A, M, D;  // A anchors, then M rows of the ensemble
};
struct AttendSizes {
  int64_t B, H, Hk, Nq, M, D, R;
  int64_t Bb, Hb;  // leading sizes of score_bias, each 1 or full; 0 without a bias
};
struct CausalSizes {
  AttendSizes measured;  // kc and vc; M is E
  AttendSizes tokens;    // k and v; M is N; a bias for each batch element where there is a key mask
  CausalWindow window;
};
struct PrefixSizes {
  int64_t B, H, Hk, Hs, N, M, D, R;  // Hs: heads of the state, max(Hk, Hp)
  int64_t Bp, Hp;                    // leading sizes of phi, each 1 or that of the batch, of the state
  int64_t Bb, Hb;                    // of score_bias, as above
};
struct DecodeSizes {
  int64_t B, H, Nq, Hd, T, Ts, Tb, P, R, Dv;
};

// New rows (B, H, N, columns) in the dtype of `like`, the heads of a token side by side.
inline Tensor new_token_rows(const Tensor& like, int64_t batch, int64_t heads, int64_t count, int64_t columns) {
  if (heads == 1 || count == 1) return torch::stable::new_empty(like, {batch, heads, count, columns});
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, count, heads, columns}), 1, 2);
}

// New rows (B, H, N, columns) for those of `like` (B, H, N, any), lying as they do there: the heads of a token side by
// side, as the projections of a layer leave them and read their gradients, so that the layer copies nothing on either
// side of attention; else contiguous. `new_rows` of _composite.py is the same rule for the fakes.
inline Tensor new_rows(const Tensor& like, int64_t columns) {
  const int64_t batch = like.size(0), heads = like.size(1), count = like.size(2);
  if (like.stride(1) < like.stride(2)) return new_token_rows(like, batch, heads, count, columns);
  return torch::stable::new_empty(like, {batch, heads, count, columns});
}

namespace detail {

template <class... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << "csat::" << op << ": ";
  (message << ... << args);
  throw std::invalid_argument(message.str());
}

inline std::string shape_string(const Tensor& t) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << (t.dim() == 1 ? ",)" : ")");
  return out.str();
}

inline std::string device_string(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device:") + std::to_string(t.get_device_index());
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

// One tensor argument under its name: the subject of an error message.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;

  int64_t size(int64_t i) const { return tensor.size(i); }

  void dims(int64_t count, const char* letters) const {
    if (tensor.dim() != count)
      fail(op, name, " must have ", count, " dimensions ", letters, "; got shape ", shape_string(tensor));
  }
  // The size of one axis must be among `accepted`; `letters` describes the whole shape.
  void axis(int64_t i, std::initializer_list<int64_t> accepted, const char* letters) const {
    for (int64_t value : accepted)
      if (tensor.size(i) == value) return;
    std::ostringstream values;
    const char* separator = "";
    int64_t last = -1;
    for (int64_t value : accepted) {
      if (value != last) values << separator << value;
      last = value;
      separator = " or ";
    }
    fail(op, name, " must have shape ", letters, " with size ", values.str(), " on axis ", i, "; got shape ",
         shape_string(tensor));
  }
  void at_least_one(int64_t i, const char* letters) const {
    if (tensor.size(i) < 1)
      fail(op, name, " must have shape ", letters, " with size 1 or more on axis ", i, "; got shape ",
           shape_string(tensor));
  }
  void shape(std::initializer_list<int64_t> sizes, const char* letters) const {
    dims(static_cast<int64_t>(sizes.size()), letters);
    int64_t i = 0;
    for (int64_t size : sizes) axis(i++, {size}, letters);
  }

  // T of the contract: the dtype of q, k, v, x and z.
  void data_dtype() const {
    const ScalarType type = tensor.scalar_type();
    const bool is_double = type == ScalarType::Double;
    if (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
        (is_double && !tensor.is_cuda()))
      return;
    fail(op, name, " must be float32, bfloat16 or float16 (float64 on the CPU only); got ", dtype_name(type), " on ",
         device_string(tensor));
  }
  void dtype(ScalarType wanted, const char* why) const {
    if (tensor.scalar_type() != wanted)
      fail(op, name, " must be ", dtype_name(wanted), " ", why, "; got ", dtype_name(tensor.scalar_type()));
  }
  // A parameter is T or float32 (float64 where T is float64).
  void parameter_dtype(ScalarType data) const {
    const ScalarType type = tensor.scalar_type();
    if (type == data || type == ScalarType::Float) return;
    fail(op, name, " must be float32 or ", dtype_name(data), ", the dtype of the data; got ", dtype_name(type));
  }
  void same_device(const Argument& other) const {
    const bool same = tensor.is_cpu() == other.tensor.is_cpu() && tensor.is_cuda() == other.tensor.is_cuda() &&
                      (tensor.is_cpu() || tensor.get_device_index() == other.tensor.get_device_index());
    if (!same)
      fail(op, name, " must be on ", device_string(other.tensor), ", the device of ", other.name, "; got ",
           device_string(tensor));
  }
  void same_kind(const Argument& other) const {
    same_device(other);
    if (tensor.scalar_type() != other.tensor.scalar_type())
      fail(op, name, " must be ", dtype_name(other.tensor.scalar_type()), ", the dtype of ", other.name, "; got ",
           dtype_name(tensor.scalar_type()));
  }
};

inline void check_key_mask(const Argument& like, const std::optional<Tensor>& key_mask, int64_t batch, int64_t tokens) {
  if (!key_mask) return;
  const Argument mask{like.op, "key_mask", *key_mask};
  mask.shape({batch, tokens}, "(B, N)");
  mask.dtype(ScalarType::Bool, "(True = keep)");
  mask.same_device(like);
}

// `n` has the sizes B, H and M, and gets those of the bias.
template <class Sizes>
void check_score_bias(const Argument& q, const std::optional<Tensor>& score_bias, Sizes& n) {
  if (!score_bias) return;
  const Argument bias{q.op, "score_bias", *score_bias};
  constexpr const char* bias_shape = "(1 or B, 1 or H, M)";
  bias.dims(3, bias_shape);
  bias.axis(0, {1, n.B}, bias_shape);
  bias.axis(1, {1, n.H}, bias_shape);
  bias.axis(2, {n.M}, bias_shape);
  bias.same_device(q);
  bias.parameter_dtype(q.tensor.scalar_type());
  n.Bb = score_bias->size(0);
  n.Hb = score_bias->size(1);
}

inline void check_decoder(const char* op, const Argument& z, const Tensor& S, const Tensor& B, const Tensor& theta,
                          const MaybeTensor& psi, const Tensor& step, DecodeSizes& n) {
  const Argument S_arg{op, "S", S}, B_arg{op, "B", B}, theta_arg{op, "theta", theta}, step_arg{op, "step", step};
  constexpr const char *S_shape = "(Hd, 1 or T, P, P)", *B_shape = "(Hd, 1 or T, P, R)", *theta_shape = "(Hd, T, P)",
                       *psi_shape = "(Hd, Dv, P)", *step_shape = "(Hd, T)";
  theta_arg.dims(3, theta_shape);
  theta_arg.axis(0, {1, n.H}, theta_shape);
  theta_arg.at_least_one(1, theta_shape);
  n.Hd = theta.size(0);
  n.T = theta.size(1);
  n.P = theta.size(2);
  S_arg.dims(4, S_shape);
  S_arg.axis(0, {n.Hd}, S_shape);
  S_arg.axis(1, {1, n.T}, S_shape);
  S_arg.axis(2, {n.P}, S_shape);
  S_arg.axis(3, {n.P}, S_shape);
  B_arg.dims(4, B_shape);
  B_arg.axis(0, {n.Hd}, B_shape);
  B_arg.axis(1, {1, n.T}, B_shape);
  B_arg.axis(2, {n.P}, B_shape);
  B_arg.axis(3, {n.R}, B_shape);
  step_arg.shape({n.Hd, n.T}, step_shape);
  n.Ts = S.size(1);
  n.Tb = B.size(1);
  n.Dv = n.P;  // psi = I
  const auto check_parameter = [&](const Argument& parameter) {
    parameter.same_device(z);
    parameter.parameter_dtype(z.tensor.scalar_type());
  };
  for (const Argument* parameter : {&S_arg, &B_arg, &theta_arg, &step_arg}) check_parameter(*parameter);
  if (!psi) return;
  const Argument psi_arg{op, "psi", *psi};
  psi_arg.dims(3, psi_shape);
  psi_arg.axis(0, {n.Hd}, psi_shape);
  psi_arg.axis(2, {n.P}, psi_shape);
  check_parameter(psi_arg);
  n.Dv = psi->size(1);
}

}  // namespace detail

// The dtype of lse, of accumulators and of parameter gradients.
inline ScalarType accumulate_dtype(ScalarType data) {
  return data == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ProjectSizes check_project(const char* op, const Tensor& x, const Tensor& phi, const MaybeTensor& key_mask) {
  const detail::Argument x_arg{op, "x", x}, phi_arg{op, "phi", phi};
  constexpr const char *x_shape = "(B, Hx, N, D)", *phi_shape = "(1 or B, Hp, M, N)";
  x_arg.dims(4, x_shape);
  x_arg.at_least_one(1, x_shape);
  x_arg.data_dtype();
  phi_arg.dims(4, phi_shape);
  phi_arg.axis(0, {1, x.size(0)}, phi_shape);
  phi_arg.axis(3, {x.size(2)}, phi_shape);
  phi_arg.same_device(x_arg);
  phi_arg.parameter_dtype(x.scalar_type());
  ProjectSizes n{};
  n.B = x.size(0);
  n.Hx = x.size(1);
  n.N = x.size(2);
  n.D = x.size(3);
  n.Bp = phi.size(0);
  n.Hp = phi.size(1);
  n.M = phi.size(2);
  if (n.Hp != 1 && (n.Hp < 1 || n.Hp % n.Hx != 0))
    detail::fail(op, "phi must have 1 head or a multiple of the ", n.Hx, " heads of x on axis 1; got shape ",
                 detail::shape_string(phi));
  n.Hout = n.Hp > n.Hx ? n.Hp : n.Hx;
  detail::check_key_mask(x_arg, key_mask, n.B, n.N);
  return n;
}

inline ProjectSizes check_project_backward(const char* op, const Tensor& dy, const Tensor& x, const Tensor& phi,
                                           const MaybeTensor& key_mask) {
  const ProjectSizes n = check_project(op, x, phi, key_mask);
  const detail::Argument dy_arg{op, "dy", dy};
  dy_arg.shape({n.B, n.Hout, n.M, n.D}, "(B, max(Hx, Hp), M, D)");
  dy_arg.same_kind({op, "x", x});
  return n;
}

inline RowsSizes check_renormalise_rows(const char* op, const Tensor& phi, const Tensor& key_mask) {
  const detail::Argument phi_arg{op, "phi", phi}, mask_arg{op, "key_mask", key_mask};
  constexpr const char* phi_shape = "(1 or B, Hp, M, N)";
  phi_arg.dims(4, phi_shape);
  phi_arg.data_dtype();
  mask_arg.dims(2, "(B, N)");
  const RowsSizes n{key_mask.size(0), phi.size(0), phi.size(1), phi.size(2), phi.size(3)};
  phi_arg.axis(0, {1, n.B}, phi_shape);
  detail::check_key_mask(phi_arg, key_mask, n.B, n.N);
  return n;
}

// What names the rows of an implicit Phi, and the head counts Hx of x and Hp of Phi that meet in Hout.
inline void check_ensemble(const char* op, const std::string& ensemble, int64_t rows, int64_t heads, int64_t x_heads,
                           int64_t tokens, int64_t layer) {
  if (!ensemble_named(ensemble)) detail::fail(op, "ensemble must be rademacher, srht or pool; got ", ensemble);
  if (rows < 1 || rows > kMaxTokens) detail::fail(op, "rows must be in [1, 2^31 - 2]; got ", rows);
  if (x_heads < 1) detail::fail(op, "x_heads must be at least 1; got ", x_heads);
  if (heads != 1 && (heads < 1 || heads % x_heads != 0))
    detail::fail(op, "heads must be 1 or a multiple of the ", x_heads, " heads of x; got ", heads);
  if (tokens < 0 || tokens > kMaxTokens) detail::fail(op, "x must have at most 2^31 - 2 tokens; got ", tokens);
  if (layer < 0 || layer >> 32) detail::fail(op, "layer must be in [0, 2^32); got ", layer);
}

inline void check_places(const detail::Argument& like, int64_t batch, int64_t tokens, const MaybeTensor& counts,
                         const MaybeTensor& anchors) {
  const auto check = [&](const char* name, const Tensor& t, const char* letters) {
    const detail::Argument argument{like.op, name, t};
    argument.dims(2, letters);
    argument.axis(0, {1, batch}, letters);
    argument.dtype(ScalarType::Int, "(token numbers)");
    argument.same_device(like);
    return argument;
  };
  if (counts) check("counts", *counts, "(1 or B, N + 1)").axis(1, {tokens + 1}, "(1 or B, N + 1)");
  if (anchors) check("anchors", *anchors, "(1 or B, A)");
}

inline ImplicitSizes check_project_implicit(const char* op, const Tensor& x, const MaybeTensor& counts,
                                            const MaybeTensor& anchors, const std::string& ensemble, int64_t rows,
                                            int64_t heads, int64_t layer) {
  const detail::Argument x_arg{op, "x", x};
  constexpr const char* x_shape = "(B, Hx, N, D)";
  x_arg.dims(4, x_shape);
  x_arg.at_least_one(1, x_shape);
  x_arg.data_dtype();
  check_ensemble(op, ensemble, rows, heads, x.size(1), x.size(2), layer);
  check_places(x_arg, x.size(0), x.size(2), counts, anchors);
  return {x.size(0), x.size(1), heads, heads > x.size(1) ? heads : x.size(1), x.size(2), anchors ? anchors->size(1) : 0,
          rows,      x.size(3)};
}

inline ImplicitSizes check_project_implicit_backward(const char* op, const Tensor& dy, const MaybeTensor& counts,
                                                     const MaybeTensor& anchors, const std::string& ensemble,
                                                     int64_t heads, int64_t layer, int64_t x_heads, int64_t tokens) {
  const detail::Argument dy_arg{op, "dy", dy};
  constexpr const char* dy_shape = "(B, max(Hx, heads), A + rows, D)";
  dy_arg.dims(4, dy_shape);
  dy_arg.data_dtype();
  check_places(dy_arg, dy.size(0), tokens, counts, anchors);
  const int64_t anchor_rows = anchors ? anchors->size(1) : 0;
  check_ensemble(op, ensemble, dy.size(2) - anchor_rows, heads, x_heads, tokens, layer);
  dy_arg.axis(1, {heads > x_heads ? heads : x_heads}, dy_shape);
  return {dy.size(0), x_heads, heads, dy.size(1), tokens, anchor_rows, dy.size(2) - anchor_rows, dy.size(3)};
}

inline AttendSizes check_attend(const char* op, const Tensor& q, const Tensor& kc, const Tensor& vc,
                                const MaybeTensor& score_bias, double scale) {
  const detail::Argument q_arg{op, "q", q}, kc_arg{op, "kc", kc}, vc_arg{op, "vc", vc};
  constexpr const char *q_shape = "(B, H, Nq, D)", *kc_shape = "(B, Hk, M, D)", *vc_shape = "(B, Hk, M, R)";
  q_arg.dims(4, q_shape);
  q_arg.at_least_one(1, q_shape);
  q_arg.data_dtype();
  kc_arg.dims(4, kc_shape);
  kc_arg.axis(0, {q.size(0)}, kc_shape);
  kc_arg.axis(3, {q.size(3)}, kc_shape);
  kc_arg.same_kind(q_arg);
  vc_arg.dims(4, vc_shape);
  vc_arg.axis(0, {kc.size(0)}, vc_shape);
  vc_arg.axis(1, {kc.size(1)}, vc_shape);
  vc_arg.axis(2, {kc.size(2)}, vc_shape);
  vc_arg.same_kind(q_arg);
  AttendSizes n{};
  n.B = q.size(0);
  n.H = q.size(1);
  n.Nq = q.size(2);
  n.D = q.size(3);
  n.Hk = kc.size(1);
  n.M = kc.size(2);
  n.R = vc.size(3);
  if (n.Hk < 1 || n.H % n.Hk != 0)
    detail::fail(op, "kc must have a number of heads that divides the ", n.H, " heads of q; got shape ",
                 detail::shape_string(kc));
  detail::check_score_bias(q_arg, score_bias, n);
  if (!std::isfinite(scale)) detail::fail(op, "scale must be finite; got ", scale);
  return n;
}

inline AttendSizes check_attend_backward(const char* op, const Tensor& dz, const Tensor& q, const Tensor& kc,
                                         const Tensor& vc, const MaybeTensor& score_bias, const Tensor& z,
                                         const Tensor& lse, double scale) {
  const AttendSizes n = check_attend(op, q, kc, vc, score_bias, scale);
  const detail::Argument q_arg{op, "q", q}, dz_arg{op, "dz", dz}, z_arg{op, "z", z}, lse_arg{op, "lse", lse};
  dz_arg.shape({n.B, n.H, n.Nq, n.R}, "(B, H, Nq, R)");
  dz_arg.same_kind(q_arg);
  z_arg.shape({n.B, n.H, n.Nq, n.R}, "(B, H, Nq, R)");
  z_arg.same_kind(q_arg);
  lse_arg.shape({n.B, n.H, n.Nq}, "(B, H, Nq)");
  lse_arg.same_device(q_arg);
  lse_arg.dtype(accumulate_dtype(q.scalar_type()), "(the accumulation dtype)");
  return n;
}

// The arguments of attend_causal that are no tensors.
struct CausalNumbers {
  double scale;
  int64_t block_size, window_blocks, measurements_per_block;
};

inline CausalSizes check_attend_causal(const char* op, const Tensor& q, const Tensor& kc, const Tensor& vc,
                                       const Tensor& k, const Tensor& v, const MaybeTensor& score_bias,
                                       const MaybeTensor& key_mask, const CausalNumbers& numbers) {
  CausalSizes n{};
  n.measured = check_attend(op, q, kc, vc, score_bias, numbers.scale);
  const detail::Argument q_arg{op, "q", q}, k_arg{op, "k", k}, v_arg{op, "v", v};
  constexpr const char *k_shape = "(B, Hn, N, D)", *v_shape = "(B, Hn, N, R)";
  k_arg.dims(4, k_shape);
  k_arg.axis(0, {q.size(0)}, k_shape);
  k_arg.axis(3, {q.size(3)}, k_shape);
  k_arg.same_kind(q_arg);
  v_arg.shape({k.size(0), k.size(1), k.size(2), vc.size(3)}, v_shape);
  v_arg.same_kind(q_arg);
  n.tokens = {n.measured.B, n.measured.H, k.size(1), n.measured.Nq, k.size(2), n.measured.D, n.measured.R, 0, 0};
  const int64_t N = k.size(2), r = numbers.measurements_per_block;
  if (k.size(1) < 1 || n.tokens.H % k.size(1) != 0)
    detail::fail(op, "k must have a number of heads that divides the ", n.tokens.H, " heads of q; got shape ",
                 detail::shape_string(k));
  if (n.tokens.Nq > N || N > kMaxTokens)
    detail::fail(op, "k must have a token for each of the ", n.tokens.Nq, " queries and at most 2^31 - 2; got shape ",
                 detail::shape_string(k));
  detail::check_key_mask(q_arg, key_mask, n.tokens.B, N);
  if (key_mask) {
    n.tokens.Bb = n.tokens.B;
    n.tokens.Hb = 1;
  }
  const auto at_least = [&](const char* name, int64_t value, int64_t least) {
    if (value < least || value > kMaxTokens) detail::fail(op, name, " must be in [", least, ", 2^31 - 2]; got ", value);
  };
  at_least("block_size", numbers.block_size, 1);
  at_least("window_blocks", numbers.window_blocks, 0);
  at_least("measurements_per_block", r, 1);
  const int64_t past = N / numbers.block_size - numbers.window_blocks, count = past > 0 ? past : 0;
  if (n.measured.M < r * count)
    detail::fail(op, "kc must have ", r, " measurements for each of the ", count,
                 " blocks that left the window, and those of earlier tokens before them; got shape ",
                 detail::shape_string(kc));
  n.window = {N - n.tokens.Nq, n.tokens.Nq, numbers.block_size, numbers.window_blocks, n.measured.M - r * count, r};
  return n;
}

inline CausalSizes check_attend_causal_backward(const char* op, const Tensor& dz, const Tensor& q, const Tensor& kc,
                                                const Tensor& vc, const Tensor& k, const Tensor& v,
                                                const MaybeTensor& score_bias, const MaybeTensor& key_mask,
                                                const Tensor& z, const Tensor& lse, const CausalNumbers& numbers) {
  check_attend_backward(op, dz, q, kc, vc, score_bias, z, lse, numbers.scale);
  return check_attend_causal(op, q, kc, vc, k, v, score_bias, key_mask, numbers);
}

// The arguments of attend_prefix.
struct PrefixInputs {
  const Tensor &q, &k, &v, &phi, &kc, &vc, &mass;
  const std::optional<Tensor>&score_bias, &key_mask;
  double scale;
  bool is_signed;
};

inline void check_prefix_state(const char* op, const PrefixInputs& in, const PrefixSizes& n) {
  const detail::Argument q{op, "q", in.q}, kc{op, "kc", in.kc}, vc{op, "vc", in.vc}, mass{op, "mass", in.mass};
  kc.shape({n.B, n.Hs, n.M, n.D}, "(B, max(Hk, Hp), M, D)");
  vc.shape({n.B, n.Hs, n.M, n.R}, "(B, max(Hk, Hp), M, R)");
  if (in.is_signed)
    mass.shape({n.B, 1, 1}, "(B, 1, 1)");
  else
    mass.shape({n.B, n.Hs, n.M}, "(B, max(Hk, Hp), M)");
  for (const detail::Argument* sum : {&kc, &vc, &mass}) {
    sum->same_device(q);
    sum->dtype(accumulate_dtype(in.q.scalar_type()), "(the accumulation dtype)");
  }
}

inline PrefixSizes check_attend_prefix(const char* op, const PrefixInputs& in) {
  const detail::Argument q{op, "q", in.q}, k{op, "k", in.k}, v{op, "v", in.v}, phi{op, "phi", in.phi};
  constexpr const char *q_shape = "(B, H, N, D)", *k_shape = "(B, Hk, N, D)", *v_shape = "(B, Hk, N, R)",
                       *phi_shape = "(1 or B, Hp, N, M)";
  q.dims(4, q_shape);
  q.at_least_one(1, q_shape);
  q.data_dtype();
  PrefixSizes n{};
  n.B = q.size(0), n.H = q.size(1), n.N = q.size(2), n.D = q.size(3);
  k.dims(4, k_shape);
  k.at_least_one(1, k_shape);
  n.Hk = k.size(1);
  k.shape({n.B, n.Hk, n.N, n.D}, k_shape);
  k.same_kind(q);
  v.dims(4, v_shape);
  n.R = v.size(3);
  v.shape({n.B, n.Hk, n.N, n.R}, v_shape);
  v.same_kind(q);
  phi.dims(4, phi_shape);
  phi.axis(0, {1, n.B}, phi_shape);
  phi.at_least_one(1, phi_shape);
  phi.axis(2, {n.N}, phi_shape);
  phi.same_device(q);
  phi.parameter_dtype(in.q.scalar_type());
  n.Bp = phi.size(0), n.Hp = phi.size(1), n.M = phi.size(3);
  n.Hs = n.Hp > n.Hk ? n.Hp : n.Hk;
  if (n.H % n.Hk != 0)
    detail::fail(op, "k must have a number of heads that divides the ", n.H, " heads of q; got shape ",
                 detail::shape_string(in.k));
  if (n.Hp != 1 && (n.Hp % n.Hk != 0 || n.H % n.Hp != 0))
    detail::fail(op, "phi must have 1 head or a multiple of the ", n.Hk, " heads of k that divides the ", n.H,
                 " heads of q; got shape ", detail::shape_string(in.phi));
  check_prefix_state(op, in, n);
  detail::check_score_bias(q, in.score_bias, n);
  detail::check_key_mask(q, in.key_mask, n.B, n.N);
  if (!std::isfinite(in.scale)) detail::fail(op, "scale must be finite; got ", in.scale);
  return n;
}

// The gradients of what attend_prefix returns, and the log-sum-exp that it returned.
struct PrefixGradients {
  const Tensor &dz, &dkc, &dvc, &dmass, &lse;
};

inline PrefixSizes check_attend_prefix_backward(const char* op, const PrefixInputs& in, const PrefixGradients& of) {
  const PrefixSizes n = check_attend_prefix(op, in);
  const detail::Argument q{op, "q", in.q}, dz{op, "dz", of.dz}, lse{op, "lse", of.lse};
  dz.shape({n.B, n.H, n.N, n.R}, "(B, H, N, R)");
  dz.same_kind(q);
  lse.shape({n.B, n.H, n.N}, "(B, H, N)");
  lse.same_device(q);
  lse.dtype(accumulate_dtype(in.q.scalar_type()), "(the accumulation dtype)");
  const detail::Argument dkc{op, "dkc_end", of.dkc}, dvc{op, "dvc_end", of.dvc}, dmass{op, "dmass_end", of.dmass};
  dkc.shape({n.B, n.Hs, n.M, n.D}, "(B, max(Hk, Hp), M, D)");
  dkc.same_kind({op, "kc", in.kc});
  dvc.shape({n.B, n.Hs, n.M, n.R}, "(B, max(Hk, Hp), M, R)");
  dvc.same_kind({op, "vc", in.vc});
  dmass.shape({n.B, in.mass.size(1), in.mass.size(2)}, "of mass");
  dmass.same_kind({op, "mass", in.mass});
  return n;
}

inline DecodeSizes check_decode(const char* op, const Tensor& z, const Tensor& S, const Tensor& B, const Tensor& theta,
                                const MaybeTensor& psi, const Tensor& step) {
  const detail::Argument z_arg{op, "z", z};
  constexpr const char* z_shape = "(B, H, Nq, R)";
  z_arg.dims(4, z_shape);
  z_arg.at_least_one(1, z_shape);
  z_arg.data_dtype();
  DecodeSizes n{};
  n.B = z.size(0);
  n.H = z.size(1);
  n.Nq = z.size(2);
  n.R = z.size(3);
  detail::check_decoder(op, z_arg, S, B, theta, psi, step, n);
  return n;
}

inline DecodeSizes check_decode_backward(const char* op, const Tensor& dc, const Tensor& z, const Tensor& S,
                                         const Tensor& B, const Tensor& theta, const MaybeTensor& psi,
                                         const Tensor& step) {
  const DecodeSizes n = check_decode(op, z, S, B, theta, psi, step);
  const detail::Argument dc_arg{op, "dc", dc};
  dc_arg.shape({n.B, n.H, n.Nq, n.Dv}, "(B, H, Nq, Dv)");
  dc_arg.same_kind({op, "z", z});
  return n;
}

// The decoder's part of attend_decode; z is the output of attend and exists only inside the kernel.
inline DecodeSizes check_attend_decode(const char* op, const AttendSizes& attend, const Tensor& q, const Tensor& S,
                                       const Tensor& B, const Tensor& theta, const MaybeTensor& psi,
                                       const Tensor& step) {
  DecodeSizes n{};
  n.B = attend.B;
  n.H = attend.H;
  n.Nq = attend.Nq;
  n.R = attend.R;
  detail::check_decoder(op, {op, "q", q}, S, B, theta, psi, step, n);
  return n;
}

inline DecodeSizes check_attend_decode(const char* op, const PrefixSizes& n, const Tensor& q, const Tensor& S,
                                       const Tensor& B, const Tensor& theta, const MaybeTensor& psi,
                                       const Tensor& step) {
  return check_attend_decode(op, AttendSizes{n.B, n.H, n.Hk, n.N, n.M, n.D, n.R, 0, 0}, q, S, B, theta, psi, step);
}

}  // namespace csat
