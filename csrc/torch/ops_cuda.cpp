// torch.ops.csat.* on CUDA tensors: checks, allocations, the current stream; the kernels are csrc/csat/launch.h.
//
// A library of its own, on LibTorch's stable ABI: the CUDA shims live in libtorch_cuda, which a CPU-only torch lacks.
// Schemas are defined by _C. Nothing here synchronises with the device, so every op can be captured into a CUDA graph.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <string>
#include <tuple>

#include "csat/launch.h"
#include "csat/limits.h"
#include "torch/checks.h"

namespace csat::cuda {
namespace {

// Makes the tensor's device current and knows its stream.
class Device {
 public:
  Device(const char* op, const Tensor& t) : op_(op), index_(t.get_device_index()), guard_(index_) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  void* stream() const { return stream_; }
  void* blas() const {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
    return handle;
  }
  void supported(const char* reason) const {
    if (reason) detail::fail(op_, "not supported by the CUDA kernels: ", reason);
  }
  void done(int code) const {
    STD_TORCH_CHECK(code == 0, "csat::", op_, ": ", error_string(code), " (code ", code, ")");
  }

 private:
  const char* op_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes > 256 ? bytes : 256}, ScalarType::Byte);
}
Tensor nothing(const Tensor& like, ScalarType type) { return torch::stable::new_empty(like, {0}, type); }

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      return DType::f32;  // the checks let nothing else through
  }
}

// The view of a tensor whose axes are those of the four-axis view in `axes`; a leading axis of size 1 is broadcast.
View view_of(const Tensor& t, std::initializer_list<int> axes) {
  View view;
  view.data = t.data_ptr();
  view.dtype = dtype_of(t);
  int64_t i = 0;
  for (int axis : axes) {
    view.stride[axis] = axis < 2 && t.size(i) == 1 ? 0 : t.stride(i);
    ++i;
  }
  return view;
}
View view_of(const Tensor& t) { return view_of(t, {0, 1, 2, 3}); }

AttendParams attend_params(const AttendSizes& n, const Tensor& q, const Tensor& kc, const Tensor& vc,
                           const MaybeTensor& score_bias, double scale) {
  AttendParams p{};
  p.q = view_of(q);
  p.kc = view_of(kc);
  p.vc = view_of(vc);
  if (score_bias) p.bias = view_of(*score_bias, {0, 1, 3});
  p.batch = n.B;
  p.heads = n.H;
  p.key_heads = n.Hk;
  p.queries = n.Nq;
  p.measurements = n.M;
  p.head_dim = n.D;
  p.features = n.R;
  p.scale = static_cast<float>(scale);
  return p;
}

DecodeParams decode_params(const DecodeSizes& n, const Tensor& S, const Tensor& B, const Tensor& theta,
                           const MaybeTensor& psi, const Tensor& step) {
  DecodeParams p{};
  Decoder& d = p.decoder;
  d.S = view_of(S);
  d.B = view_of(B);
  d.theta = view_of(theta, {0, 1, 3});
  d.theta.stride[1] = theta.stride(1);
  if (psi) d.psi = view_of(*psi, {0, 2, 3});
  d.step = view_of(step, {0, 3});
  d.heads = n.Hd;
  d.layers = n.T;
  d.s_layers = n.Ts;
  d.b_layers = n.Tb;
  d.coefficients = n.P;
  d.features = n.R;
  d.outputs = n.Dv;
  p.batch = n.B;
  p.heads = n.H;
  p.queries = n.Nq;
  return p;
}

ProjectParams project_params(const ProjectSizes& n, const Tensor& x, const Tensor& phi, const MaybeTensor& keep) {
  ProjectParams p{};
  p.x = view_of(x);
  p.phi = view_of(phi);
  if (keep) p.keep = static_cast<const unsigned char*>(keep->data_ptr());
  p.batch = n.B;
  p.x_heads = n.Hx;
  p.phi_batch = n.Bp;
  p.phi_heads = n.Hp;
  p.tokens = n.N;
  p.measurements = n.M;
  p.head_dim = n.D;
  return p;
}

MaybeTensor contiguous(const MaybeTensor& t) { return t ? MaybeTensor(torch::stable::contiguous(*t)) : MaybeTensor(); }

Tensor project(const Tensor& x, const Tensor& phi, const MaybeTensor& key_mask) {
  const ProjectSizes n = check_project("project", x, phi, key_mask);
  const Device device("project", x);
  const MaybeTensor keep = contiguous(key_mask);
  Tensor y = torch::stable::new_empty(x, {n.B, n.Hout, n.M, n.D});
  ProjectParams p = project_params(n, x, phi, keep);
  p.y = view_of(y);
  Tensor space = workspace(x, project_workspace(p));
  device.done(project_forward(p, space.data_ptr(), device.blas(), device.stream()));
  return y;
}

std::tuple<Tensor, Tensor> project_backward(const Tensor& dy, const Tensor& x, const Tensor& phi,
                                            const MaybeTensor& key_mask, bool need_dx, bool need_dphi) {
  const ProjectSizes n = check_project_backward("project_backward", dy, x, phi, key_mask);
  const Device device("project_backward", x);
  const MaybeTensor keep = contiguous(key_mask);
  Tensor dx = need_dx ? new_rows(x, n.D) : nothing(x, x.scalar_type());
  Tensor dphi = need_dphi ? torch::stable::new_empty(phi, {n.Bp, n.Hp, n.M, n.N}) : nothing(x, phi.scalar_type());
  ProjectBackwardParams p{};
  p.forward = project_params(n, x, phi, keep);
  p.dy = view_of(dy);
  if (need_dx) p.dx = view_of(dx);
  if (need_dphi) p.dphi = view_of(dphi);
  Tensor space = workspace(x, project_backward_workspace(p));
  device.done(project_backward(p, space.data_ptr(), device.blas(), device.stream()));
  return {dx, dphi};
}

std::tuple<Tensor, Tensor> renormalise_rows(const Tensor& phi, const Tensor& key_mask) {
  const RowsSizes n = check_renormalise_rows("renormalise_rows", phi, key_mask);
  const Device device("renormalise_rows", phi);
  const Tensor keep = torch::stable::contiguous(key_mask);
  Tensor factor = torch::stable::new_empty(phi, {n.B, n.Hp, n.M}, ScalarType::Float);
  Tensor mass = torch::stable::new_empty(phi, {n.B, n.Hp, n.M}, ScalarType::Float);
  RowsParams p{};
  p.phi = view_of(phi);
  p.keep = static_cast<const unsigned char*>(keep.data_ptr());
  p.factor = static_cast<float*>(factor.data_ptr());
  p.mass = static_cast<float*>(mass.data_ptr());
  p.batch = n.B;
  p.phi_batch = n.Bp;
  p.heads = n.Hp;
  p.measurements = n.M;
  p.tokens = n.N;
  device.done(csat::renormalise_rows(p, device.stream()));
  return {factor, mass};
}

ImplicitParams implicit_params(const ImplicitSizes& n, const MaybeTensor& counts, const MaybeTensor& anchors,
                               const std::string& ensemble, int64_t seed, int64_t layer) {
  ImplicitParams p{};
  if (counts) {
    p.counts = static_cast<const int32_t*>(counts->data_ptr());
    p.counts_batch = counts->size(0) == 1 ? 0 : n.N + 1;
  }
  if (n.A > 0) {
    p.anchors = static_cast<const int32_t*>(anchors->data_ptr());
    p.anchors_batch = anchors->size(0) == 1 ? 0 : n.A;
  }
  p.ensemble = *ensemble_named(ensemble);
  p.seed = static_cast<uint64_t>(seed);
  p.layer = layer;
  p.batch = n.B;
  p.x_heads = n.Hx;
  p.phi_heads = n.Hp;
  p.tokens = n.N;
  p.anchor_rows = n.A;
  p.measurements = n.M;
  p.head_dim = n.D;
  return p;
}

Tensor project_implicit(const Tensor& x, const MaybeTensor& counts, const MaybeTensor& anchors, std::string ensemble,
                        int64_t rows, int64_t heads, int64_t seed, int64_t layer) {
  const ImplicitSizes n = check_project_implicit("project_implicit", x, counts, anchors, ensemble, rows, heads, layer);
  const Device device("project_implicit", x);
  const MaybeTensor places = contiguous(counts), rows_of_anchors = contiguous(anchors);
  Tensor y = torch::stable::new_empty(x, {n.B, n.Hout, n.A + n.M, n.D});
  ImplicitParams p = implicit_params(n, places, rows_of_anchors, ensemble, seed, layer);
  p.x = view_of(x);
  p.y = view_of(y);
  Tensor space = workspace(x, project_implicit_workspace(p));
  device.done(project_implicit_forward(p, space.data_ptr(), device.stream()));
  return y;
}

Tensor project_implicit_backward(const Tensor& dy, const MaybeTensor& counts, const MaybeTensor& anchors,
                                 std::string ensemble, int64_t heads, int64_t seed, int64_t layer, int64_t x_heads,
                                 int64_t tokens) {
  const ImplicitSizes n = check_project_implicit_backward("project_implicit_backward", dy, counts, anchors, ensemble,
                                                          heads, layer, x_heads, tokens);
  const Device device("project_implicit_backward", dy);
  const MaybeTensor places = contiguous(counts), rows_of_anchors = contiguous(anchors);
  Tensor dx = new_token_rows(dy, n.B, n.Hx, n.N, n.D);
  ImplicitParams p = implicit_params(n, places, rows_of_anchors, ensemble, seed, layer);
  p.x = view_of(dx);
  p.y = view_of(dy);
  Tensor space = workspace(dy, project_implicit_backward_workspace(p));
  device.done(csat::project_implicit_backward(p, space.data_ptr(), device.stream()));
  return dx;
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& kc, const Tensor& vc, const MaybeTensor& score_bias,
                                  double scale) {
  const AttendSizes n = check_attend("attend", q, kc, vc, score_bias, scale);
  const Device device("attend", q);
  Tensor z = new_rows(q, n.R);
  Tensor lse = torch::stable::new_empty(q, {n.B, n.H, n.Nq}, ScalarType::Float);
  AttendParams p = attend_params(n, q, kc, vc, score_bias, scale);
  p.z = view_of(z);
  p.lse = view_of(lse, {0, 1, 2});
  device.supported(limits::why_not(p, shared_memory_limit()));
  Tensor space = workspace(q, attend_workspace(p));
  device.done(attend_forward(p, space.data_ptr(), device.stream()));
  return {z, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(const Tensor& dz, const Tensor& q, const Tensor& kc,
                                                           const Tensor& vc, const MaybeTensor& score_bias,
                                                           const Tensor& z, const Tensor& lse, double scale) {
  const AttendSizes n = check_attend_backward("attend_backward", dz, q, kc, vc, score_bias, z, lse, scale);
  const Device device("attend_backward", q);
  Tensor dq = new_rows(q, n.D);
  Tensor dkc = torch::stable::new_empty(kc, {n.B, n.Hk, n.M, n.D});
  Tensor dvc = torch::stable::new_empty(vc, {n.B, n.Hk, n.M, n.R});
  Tensor dbias =
      score_bias ? torch::stable::new_empty(q, {n.B, n.H, n.M}, ScalarType::Float) : nothing(q, ScalarType::Float);
  AttendBackwardParams p{};
  p.forward = attend_params(n, q, kc, vc, score_bias, scale);
  p.forward.z = view_of(z);
  p.forward.lse = view_of(lse, {0, 1, 2});
  p.dz = view_of(dz);
  p.dq = view_of(dq);
  p.dkc = view_of(dkc);
  p.dvc = view_of(dvc);
  if (score_bias) p.dbias = view_of(dbias, {0, 1, 3});
  device.supported(limits::why_not(p, shared_memory_limit()));
  Tensor space = workspace(q, attend_backward_workspace(p));
  device.done(csat::attend_backward(p, space.data_ptr(), device.stream()));
  return {dq, dkc, dvc, dbias};
}

CausalTokens causal_tokens(const CausalSizes& n, const Tensor& k, const Tensor& v, const MaybeTensor& keep) {
  CausalTokens tokens{};
  tokens.k = view_of(k);
  tokens.v = view_of(v);
  if (keep) tokens.keep = static_cast<const unsigned char*>(keep->data_ptr());
  tokens.heads = n.tokens.Hk;
  tokens.count = n.tokens.M;
  tokens.window = n.window;
  return tokens;
}

std::tuple<Tensor, Tensor> attend_causal(const Tensor& q, const Tensor& kc, const Tensor& vc, const Tensor& k,
                                         const Tensor& v, const MaybeTensor& score_bias, const MaybeTensor& key_mask,
                                         double scale, int64_t block_size, int64_t window_blocks,
                                         int64_t measurements_per_block) {
  const CausalSizes sizes = check_attend_causal("attend_causal", q, kc, vc, k, v, score_bias, key_mask,
                                                {scale, block_size, window_blocks, measurements_per_block});
  const AttendSizes& n = sizes.measured;
  const Device device("attend_causal", q);
  const MaybeTensor keep = contiguous(key_mask);
  Tensor z = new_rows(q, n.R);
  Tensor lse = torch::stable::new_empty(q, {n.B, n.H, n.Nq}, ScalarType::Float);
  AttendCausalParams p{attend_params(n, q, kc, vc, score_bias, scale), causal_tokens(sizes, k, v, keep)};
  p.measured.z = view_of(z);
  p.measured.lse = view_of(lse, {0, 1, 2});
  device.supported(limits::why_not(p, shared_memory_limit()));
  Tensor space = workspace(q, attend_causal_workspace(p));
  device.done(attend_causal_forward(p, space.data_ptr(), device.stream()));
  return {z, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_causal_backward(
    const Tensor& dz, const Tensor& q, const Tensor& kc, const Tensor& vc, const Tensor& k, const Tensor& v,
    const MaybeTensor& score_bias, const MaybeTensor& key_mask, const Tensor& z, const Tensor& lse, double scale,
    int64_t block_size, int64_t window_blocks, int64_t measurements_per_block) {
  const CausalSizes sizes =
      check_attend_causal_backward("attend_causal_backward", dz, q, kc, vc, k, v, score_bias, key_mask, z, lse,
                                   {scale, block_size, window_blocks, measurements_per_block});
  const AttendSizes &n = sizes.measured, &t = sizes.tokens;
  const Device device("attend_causal_backward", q);
  const MaybeTensor keep = contiguous(key_mask);
  const auto gradient = [&](const AttendSizes& of, int64_t columns) {
    return torch::stable::new_empty(q, {of.B, of.Hk, of.M, columns});
  };
  Tensor dq = new_rows(q, n.D);
  Tensor dkc = gradient(n, n.D), dvc = gradient(n, n.R), dk = new_rows(k, t.D), dv = new_rows(v, t.R);
  Tensor dbias =
      score_bias ? torch::stable::new_empty(q, {n.B, n.H, n.M}, ScalarType::Float) : nothing(q, ScalarType::Float);
  AttendCausalBackwardParams p{};
  AttendBackwardParams& measured = p.measured;
  measured.forward = attend_params(n, q, kc, vc, score_bias, scale);
  measured.forward.z = view_of(z);
  measured.forward.lse = view_of(lse, {0, 1, 2});
  measured.dz = view_of(dz);
  measured.dq = view_of(dq);
  measured.dkc = view_of(dkc);
  measured.dvc = view_of(dvc);
  if (score_bias) measured.dbias = view_of(dbias, {0, 1, 3});
  p.tokens = causal_tokens(sizes, k, v, keep);
  p.dk = view_of(dk);
  p.dv = view_of(dv);
  device.supported(limits::why_not(p, shared_memory_limit()));
  Tensor space = workspace(q, attend_causal_backward_workspace(p));
  device.done(csat::attend_causal_backward(p, space.data_ptr(), device.stream()));
  return {dq, dkc, dvc, dk, dv, dbias};
}

// A mass (B, Hs, M), or the number of tokens (B, 1, 1).
View mass_view(const Tensor& mass, bool is_signed) {
  View view = view_of(mass, {0, 1, 3});
  if (is_signed) view.stride[3] = 0;
  return view;
}

PrefixParams prefix_params(const PrefixSizes& n, const PrefixInputs& in, const MaybeTensor& keep) {
  PrefixParams p{};
  p.q = view_of(in.q);
  p.k = view_of(in.k);
  p.v = view_of(in.v);
  p.phi = view_of(in.phi);
  p.kc = view_of(in.kc);
  p.vc = view_of(in.vc);
  p.mass = mass_view(in.mass, in.is_signed);
  if (in.score_bias) p.bias = view_of(*in.score_bias, {0, 1, 3});
  if (keep) p.keep = static_cast<const unsigned char*>(keep->data_ptr());
  p.batch = n.B;
  p.heads = n.H;
  p.key_heads = n.Hk;
  p.state_heads = n.Hs;
  p.phi_batch = n.Bp;
  p.phi_heads = n.Hp;
  p.tokens = n.N;
  p.measurements = n.M;
  p.head_dim = n.D;
  p.features = n.R;
  p.scale = static_cast<float>(in.scale);
  p.is_signed = in.is_signed;
  return p;
}

// The log-sum-exp and the state behind the last token, for the kernel to write.
struct PrefixEnds {
  Tensor lse, kc, vc, mass;
};

PrefixEnds prefix_ends(PrefixParams& p, const PrefixSizes& n, const PrefixInputs& in) {
  PrefixEnds ends{torch::stable::new_empty(in.q, {n.B, n.H, n.N}, ScalarType::Float),
                  torch::stable::new_empty(in.kc, {n.B, n.Hs, n.M, n.D}),
                  torch::stable::new_empty(in.vc, {n.B, n.Hs, n.M, n.R}),
                  torch::stable::new_empty(in.mass, {n.B, in.mass.size(1), in.mass.size(2)})};
  p.lse = view_of(ends.lse, {0, 1, 2});
  p.kc_end = view_of(ends.kc);
  p.vc_end = view_of(ends.vc);
  p.mass_end = mass_view(ends.mass, in.is_signed);
  return ends;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_prefix(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                 const Tensor& phi, const Tensor& kc, const Tensor& vc,
                                                                 const Tensor& mass, const MaybeTensor& score_bias,
                                                                 const MaybeTensor& key_mask, double scale,
                                                                 bool is_signed) {
  const PrefixInputs in{q, k, v, phi, kc, vc, mass, score_bias, key_mask, scale, is_signed};
  const PrefixSizes n = check_attend_prefix("attend_prefix", in);
  const Device device("attend_prefix", q);
  const MaybeTensor keep = contiguous(key_mask);
  Tensor z = new_rows(q, n.R);
  PrefixParams p = prefix_params(n, in, keep);
  p.z = view_of(z);
  const PrefixEnds ends = prefix_ends(p, n, in);
  device.supported(limits::why_not(p, shared_memory_limit()));
  Tensor space = workspace(q, attend_prefix_workspace(p));
  device.done(attend_prefix_forward(p, space.data_ptr(), device.stream()));
  return {z, ends.lse, ends.kc, ends.vc, ends.mass};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_prefix_backward(
    const Tensor& dz, const Tensor& dkc_end, const Tensor& dvc_end, const Tensor& dmass_end, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& phi, const Tensor& kc, const Tensor& vc, const Tensor& mass,
    const MaybeTensor& score_bias, const MaybeTensor& key_mask, const Tensor& lse, double scale, bool is_signed) {
  const PrefixInputs in{q, k, v, phi, kc, vc, mass, score_bias, key_mask, scale, is_signed};
  const PrefixSizes n =
      check_attend_prefix_backward("attend_prefix_backward", in, {dz, dkc_end, dvc_end, dmass_end, lse});
  const Device device("attend_prefix_backward", q);
  const MaybeTensor keep = contiguous(key_mask);
  const auto floats = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(q, sizes, ScalarType::Float);
  };
  Tensor dq = new_rows(q, n.D);
  Tensor dk = new_rows(k, n.D), dv = new_rows(v, n.R);
  Tensor dphi = floats({n.B, n.Hs, n.N, n.M}), dkc = floats({n.B, n.Hs, n.M, n.D}), dvc = floats({n.B, n.Hs, n.M, n.R});
  Tensor dmass = is_signed ? floats({0}) : floats({n.B, n.Hs, n.M});
  Tensor dbias = score_bias ? floats({n.B, n.H, n.M}) : floats({0});
  PrefixBackwardParams p{};
  p.forward = prefix_params(n, in, keep);
  p.forward.lse = view_of(lse, {0, 1, 2});
  p.dz = view_of(dz);
  p.dkc_end = view_of(dkc_end);
  p.dvc_end = view_of(dvc_end);
  p.dmass_end = mass_view(dmass_end, is_signed);
  p.dq = view_of(dq);
  p.dk = view_of(dk);
  p.dv = view_of(dv);
  p.dphi = view_of(dphi);
  p.dkc = view_of(dkc);
  p.dvc = view_of(dvc);
  if (!is_signed) p.dmass = view_of(dmass, {0, 1, 3});
  if (score_bias) p.dbias = view_of(dbias, {0, 1, 3});
  device.supported(limits::why_not(p, shared_memory_limit()));
  Tensor space = workspace(q, attend_prefix_backward_workspace(p));
  device.done(csat::attend_prefix_backward(p, space.data_ptr(), device.stream()));
  return {dq, dk, dv, dphi, dkc, dvc, dmass, dbias};
}

Tensor decode(const Tensor& z, const Tensor& S, const Tensor& B, const Tensor& theta, const MaybeTensor& psi,
              const Tensor& step) {
  const DecodeSizes n = check_decode("decode", z, S, B, theta, psi, step);
  const Device device("decode", z);
  Tensor out = new_rows(z, n.Dv);
  DecodeParams p = decode_params(n, S, B, theta, psi, step);
  p.z = view_of(z);
  p.out = view_of(out);
  device.supported(limits::why_not(p, shared_memory_limit()));
  Tensor space = workspace(z, decode_workspace(p));
  device.done(decode_forward(p, space.data_ptr(), device.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> decode_backward(const Tensor& dc, const Tensor& z,
                                                                           const Tensor& S, const Tensor& B,
                                                                           const Tensor& theta, const MaybeTensor& psi,
                                                                           const Tensor& step) {
  const DecodeSizes n = check_decode_backward("decode_backward", dc, z, S, B, theta, psi, step);
  const Device device("decode_backward", z);
  const auto gradient = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(z, sizes, ScalarType::Float);
  };
  Tensor dz = new_rows(z, n.R);
  Tensor dS = gradient({n.Hd, n.Ts, n.P, n.P}), dB = gradient({n.Hd, n.Tb, n.P, n.R});
  Tensor dtheta = gradient({n.Hd, n.T, n.P}), dstep = gradient({n.Hd, n.T});
  Tensor dpsi = psi ? gradient({n.Hd, n.Dv, n.P}) : nothing(z, ScalarType::Float);
  DecodeBackwardParams p{};
  p.forward = decode_params(n, S, B, theta, psi, step);
  p.forward.z = view_of(z);
  p.dout = view_of(dc);
  p.dz = view_of(dz);
  const auto floats = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  p.dS = floats(dS);
  p.dB = floats(dB);
  p.dtheta = floats(dtheta);
  if (psi) p.dpsi = floats(dpsi);
  p.dstep = floats(dstep);
  device.supported(limits::why_not(p, shared_memory_limit()));
  Tensor space = workspace(z, decode_backward_workspace(p));
  device.done(csat::decode_backward(p, space.data_ptr(), device.stream()));
  return {dz, dS, dB, dtheta, dpsi, dstep};
}

std::tuple<Tensor, Tensor, Tensor> attend_decode(const Tensor& q, const Tensor& kc, const Tensor& vc,
                                                 const MaybeTensor& score_bias, double scale, const Tensor& S,
                                                 const Tensor& B, const Tensor& theta, const MaybeTensor& psi,
                                                 const Tensor& step, bool need_z) {
  const AttendSizes n = check_attend("attend_decode", q, kc, vc, score_bias, scale);
  const DecodeSizes d = check_attend_decode("attend_decode", n, q, S, B, theta, psi, step);
  const Device device("attend_decode", q);
  Tensor out = new_rows(q, d.Dv);
  Tensor z = need_z ? new_rows(q, n.R) : nothing(q, q.scalar_type());
  Tensor lse = torch::stable::new_empty(q, {n.B, n.H, n.Nq}, ScalarType::Float);
  AttendParams a = attend_params(n, q, kc, vc, score_bias, scale);
  if (need_z) a.z = view_of(z);
  a.lse = view_of(lse, {0, 1, 2});
  DecodeParams p = decode_params(d, S, B, theta, psi, step);
  p.out = view_of(out);
  device.supported(limits::why_not(a, p, shared_memory_limit()));
  Tensor space = workspace(q, attend_decode_workspace(a, p));
  device.done(attend_decode_forward(a, p, space.data_ptr(), device.stream()));
  return {out, z, lse};
}

std::tuple<Tensor, Tensor, Tensor> attend_causal_decode(const Tensor& q, const Tensor& kc, const Tensor& vc,
                                                        const Tensor& k, const Tensor& v, const MaybeTensor& score_bias,
                                                        const MaybeTensor& key_mask, double scale, int64_t block_size,
                                                        int64_t window_blocks, int64_t measurements_per_block,
                                                        const Tensor& S, const Tensor& B, const Tensor& theta,
                                                        const MaybeTensor& psi, const Tensor& step, bool need_z) {
  const CausalSizes sizes = check_attend_causal("attend_causal_decode", q, kc, vc, k, v, score_bias, key_mask,
                                                {scale, block_size, window_blocks, measurements_per_block});
  const AttendSizes& n = sizes.measured;
  const DecodeSizes d = check_attend_decode("attend_causal_decode", n, q, S, B, theta, psi, step);
  const Device device("attend_causal_decode", q);
  const MaybeTensor keep = contiguous(key_mask);
  Tensor out = new_rows(q, d.Dv);
  Tensor z = need_z ? new_rows(q, n.R) : nothing(q, q.scalar_type());
  Tensor lse = torch::stable::new_empty(q, {n.B, n.H, n.Nq}, ScalarType::Float);
  AttendCausalParams a{attend_params(n, q, kc, vc, score_bias, scale), causal_tokens(sizes, k, v, keep)};
  if (need_z) a.measured.z = view_of(z);
  a.measured.lse = view_of(lse, {0, 1, 2});
  DecodeParams p = decode_params(d, S, B, theta, psi, step);
  p.out = view_of(out);
  device.supported(limits::why_not(a, p, shared_memory_limit()));
  Tensor space = workspace(q, attend_causal_decode_workspace(a, p));
  device.done(attend_causal_decode_forward(a, p, space.data_ptr(), device.stream()));
  return {out, z, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_prefix_decode(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi, const Tensor& kc, const Tensor& vc,
    const Tensor& mass, const MaybeTensor& score_bias, const MaybeTensor& key_mask, double scale, bool is_signed,
    const Tensor& S, const Tensor& B, const Tensor& theta, const MaybeTensor& psi, const Tensor& step, bool need_z) {
  const PrefixInputs in{q, k, v, phi, kc, vc, mass, score_bias, key_mask, scale, is_signed};
  const PrefixSizes n = check_attend_prefix("attend_prefix_decode", in);
  const DecodeSizes d = check_attend_decode("attend_prefix_decode", n, q, S, B, theta, psi, step);
  const Device device("attend_prefix_decode", q);
  const MaybeTensor keep = contiguous(key_mask);
  Tensor out = new_rows(q, d.Dv);
  Tensor z = need_z ? new_rows(q, n.R) : nothing(q, q.scalar_type());
  PrefixParams a = prefix_params(n, in, keep);
  if (need_z) a.z = view_of(z);
  const PrefixEnds ends = prefix_ends(a, n, in);
  DecodeParams p = decode_params(d, S, B, theta, psi, step);
  p.out = view_of(out);
  device.supported(limits::why_not(a, p, shared_memory_limit()));
  Tensor space = workspace(q, attend_prefix_decode_workspace(a, p));
  device.done(attend_prefix_decode_forward(a, p, space.data_ptr(), device.stream()));
  return {out, z, ends.lse, ends.kc, ends.vc, ends.mass};
}

std::string cuda_build_info() {
#ifdef NDEBUG
  return std::string(build_info()) + ", release build";
#else
  return std::string(build_info()) + ", debug build";
#endif
}

STABLE_TORCH_LIBRARY_FRAGMENT(csat, library) { library.def("cuda_build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(csat, CompositeExplicitAutograd, library) {
  library.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
}

STABLE_TORCH_LIBRARY_IMPL(csat, CUDA, library) {
  library.impl("project", TORCH_BOX(&project));
  library.impl("project_backward", TORCH_BOX(&project_backward));
  library.impl("renormalise_rows", TORCH_BOX(&renormalise_rows));
  library.impl("project_implicit", TORCH_BOX(&project_implicit));
  library.impl("project_implicit_backward", TORCH_BOX(&project_implicit_backward));
  library.impl("attend", TORCH_BOX(&attend));
  library.impl("attend_backward", TORCH_BOX(&attend_backward));
  library.impl("attend_causal", TORCH_BOX(&attend_causal));
  library.impl("attend_causal_backward", TORCH_BOX(&attend_causal_backward));
  library.impl("attend_prefix", TORCH_BOX(&attend_prefix));
  library.impl("attend_prefix_backward", TORCH_BOX(&attend_prefix_backward));
  library.impl("decode", TORCH_BOX(&decode));
  library.impl("decode_backward", TORCH_BOX(&decode_backward));
  library.impl("attend_decode", TORCH_BOX(&attend_decode));
  library.impl("attend_causal_decode", TORCH_BOX(&attend_causal_decode));
  library.impl("attend_prefix_decode", TORCH_BOX(&attend_prefix_decode));
}

}  // namespace
}  // namespace csat::cuda
