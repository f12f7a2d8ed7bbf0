// The framework-free entry points of the CUDA backend: plain structs of pointers, sizes and strides in elements.
// No function allocates, synchronises with the host or reads device memory. Each takes a workspace of the size that its
// *_workspace function asks for (256-byte aligned, never null, contents irrelevant before and after), runs on `stream`
// (a cudaStream_t) and returns 0 or an error code that error_string() explains. What is supported is in limits.h.
#pragma once
#include <cstdint>

#include "csat/window.h"

namespace csat {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
constexpr int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

// A strided tensor of up to four axes; which axis of the view an axis takes stands where it is used. A broadcast axis
// has stride 0.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {0, 0, 0, 0};
};

// attend: Z = softmax(scale q kc^T + bias) vc and lse, the log-sum-exp of its rows. T = dtype of q, kc, vc, z.
struct AttendParams {
  View q;     // (B, H, Nq, D)
  View kc;    // (B, Hk, M, D); head h reads head h / (H / Hk)
  View vc;    // (B, Hk, M, R)
  View bias;  // (B, H, M) in axes 0, 1, 3 of the view; data null: no bias
  View z;     // (B, H, Nq, R); data null where attend_decode_forward need not return it
  View lse;   // (B, H, Nq) in axes 0, 1, 2 of the view, float32
  int64_t batch, heads, key_heads, queries, measurements, head_dim, features;  // B, H, Hk, Nq, M, D, R
  float scale;
};

struct AttendBackwardParams {
  AttendParams forward;  // z and lse are read
  View dz;               // (B, H, Nq, R), T
  View dq;               // (B, H, Nq, D), T
  View dkc;              // (B, Hk, M, D), T
  View dvc;              // (B, Hk, M, R), T
  View dbias;            // (B, H, M) in axes 0, 1, 3 of the view, float32; data null: not wanted
};

// attend_causal: one softmax over measurements and, exactly, the tokens of a window; who sees what is in window.h.
struct CausalTokens {
  View k;                     // (B, Hn, N, D); head h reads head h / (H / Hn)
  View v;                     // (B, Hn, N, R)
  const unsigned char* keep;  // (B, N) contiguous, or null: every token is kept; another is never read
  int64_t heads, count;       // Hn, N
  CausalWindow window;
};
struct AttendCausalParams {
  AttendParams measured;  // M is E
  CausalTokens tokens;
};
struct AttendCausalBackwardParams {
  AttendBackwardParams measured;
  CausalTokens tokens;
  View dk, dv;  // (B, Hn, N, D) and (B, Hn, N, R), T
};

// attend_prefix: attend over measurements of the tokens up to the query's own, from the state of those before. Hs is
// Hk, or the heads of a phi that has more.
struct PrefixParams {
  View q;                           // (B, H, N, D), T
  View k, v;                        // (B, Hk, N, D), (B, Hk, N, R), T; head h reads head h / (H / Hk)
  View phi;                         // (B, Hs, N, M), T or float32; a broadcast axis has stride 0
  View kc, vc, mass;                // (B, Hs, M, D), (B, Hs, M, R), (B, Hs, M) in axes 0, 1, 3 of the view, float32;
                                    // the mass of signed: (B) in axis 0, the number of tokens
  View bias;                        // (B, H, M) in axes 0, 1, 3 of the view; data null: no bias
  View z, lse;                      // (B, H, N, R), T; (B, H, N) in axes 0, 1, 2 of the view, float32; z without
                                    // data where attend_prefix_decode_forward need not return it
  View kc_end, vc_end, mass_end;    // like kc, vc, mass: the state behind the last token
  const unsigned char* keep;        // (B, N) contiguous, or null: every token is kept; another is never read
  int64_t batch, heads, key_heads;  // B, H, Hk
  int64_t state_heads, phi_batch, phi_heads;         // Hs; 1 or B, 1 or Hs: what phi is not broadcast over
  int64_t tokens, measurements, head_dim, features;  // N, M, D, R
  float scale;
  bool is_signed;
};
struct PrefixBackwardParams {
  PrefixParams forward;                  // z and the end are not read
  View dz, dkc_end, dvc_end, dmass_end;  // the last is not read where signed
  View dq, dk, dv, dphi;                 // like q, k, v; (B, Hs, N, M), float32
  View dkc, dvc, dmass;                  // like kc, vc, mass; the last is not written where signed
  View dbias;                            // (B, H, M) in axes 0, 1, 3 of the view, float32; data null: not wanted
};

// The learned decoder: u_t = a_t + step_t (S_t a_t + B_t z - a_t), a_{t+1} = soft(u_t, theta_t), a_0 = 0, c = psi a_T.
// Every weight has a dtype of its own; `heads` is 1 (shared) or H.
struct Decoder {
  View S;      // (Hd, Ts, P, P), Ts is 1 or T
  View B;      // (Hd, Tb, P, R), Tb is 1 or T
  View theta;  // (Hd, T, P) in axes 0, 1, 3 of the view
  View psi;    // (Hd, Dv, P) in axes 0, 2, 3 of the view; data null: the identity, Dv = P
  View step;   // (Hd, T) in axes 0, 3 of the view
  int64_t heads, layers, s_layers, b_layers, coefficients, features, outputs;  // Hd, T, Ts, Tb, P, R, Dv
};

struct DecodeParams {
  Decoder decoder;
  View z;                         // (B, H, Nq, R), T
  View out;                       // (B, H, Nq, Dv), T
  int64_t batch, heads, queries;  // B, H, Nq
};

struct DecodeBackwardParams {
  DecodeParams forward;                    // out is not read
  View dout;                               // (B, H, Nq, Dv), T
  View dz;                                 // (B, H, Nq, R), T
  float *dS, *dB, *dtheta, *dpsi, *dstep;  // contiguous, in the weights' shapes; dpsi null as psi
};

// project: y = phi x over the tokens; head h of y reads head h / (H / Hx) of x and head h (or 0) of phi.
// A token whose `keep` is false is never read.
struct ProjectParams {
  View x;                     // (B, Hx, N, D), T
  View phi;                   // (1 or B, Hp, M, N), T or float32; a broadcast batch has stride 0
  const unsigned char* keep;  // (B, N) contiguous, or null: every token is kept
  View y;                     // (B, H, M, D) contiguous, T
  int64_t batch, x_heads, phi_batch, phi_heads, tokens, measurements, head_dim;  // B, Hx, 1 or B, Hp, N, M, D
};

struct ProjectBackwardParams {
  ProjectParams forward;  // y is not read
  View dy;                // (B, H, M, D), T
  View dx;                // (B, Hx, N, D), its rows contiguous, T; data null: not wanted
  View dphi;              // (1 or B, Hp, M, N) contiguous, dtype of phi; data null: not wanted
};

// renormalise_rows: what the key mask of a batch element makes of every row of Phi. A row without entries below 0
// averages: mass = sum over kept s of phi_js, factor = sum over all s of phi_js / mass. Another has mass 0 and factor
// sqrt(N / kept tokens). Where no kept token has an entry other than 0, factor and mass are 0.
struct RowsParams {
  View phi;                                               // (1 or B, Hp, M, N); a broadcast batch has stride 0
  const unsigned char* keep;                              // (B, N) contiguous
  float *factor, *mass;                                   // (B, Hp, M) contiguous
  int64_t batch, phi_batch, heads, measurements, tokens;  // B, 1 or B, Hp, M, N
};

// project_implicit: y = Phi x, Phi never in memory (ensembles.h); its first rows are one-hot at the anchors, -1 for an
// empty row. Token s is measured by the others where counts[s + 1] > counts[s], and is then number counts[s] of them.
struct ImplicitParams {
  View x;                               // (B, Hx, N, D), T; backward: dx, contiguous
  View y;                               // (B, H, A + M, D), T, contiguous; backward: dy
  const int32_t* counts;                // (1 or B, N + 1) contiguous, or null: every token is measured
  const int32_t* anchors;               // (1 or B, A) contiguous, or null where A = 0
  int64_t counts_batch, anchors_batch;  // strides over the batch, 0 where shared
  Ensemble ensemble;
  uint64_t seed;
  int64_t layer;
  int64_t batch, x_heads, phi_heads, tokens, anchor_rows, measurements, head_dim;  // B, Hx, Hp, N, A, M, D
};

int64_t attend_workspace(const AttendParams& p);
int attend_forward(const AttendParams& p, void* workspace, void* stream);

int64_t attend_backward_workspace(const AttendBackwardParams& p);
int attend_backward(const AttendBackwardParams& p, void* workspace, void* stream);

int64_t attend_causal_workspace(const AttendCausalParams& p);
int attend_causal_forward(const AttendCausalParams& p, void* workspace, void* stream);

int64_t attend_causal_backward_workspace(const AttendCausalBackwardParams& p);
int attend_causal_backward(const AttendCausalBackwardParams& p, void* workspace, void* stream);

int64_t attend_prefix_workspace(const PrefixParams& p);
int attend_prefix_forward(const PrefixParams& p, void* workspace, void* stream);

int64_t attend_prefix_backward_workspace(const PrefixBackwardParams& p);
int attend_prefix_backward(const PrefixBackwardParams& p, void* workspace, void* stream);

int64_t decode_workspace(const DecodeParams& p);
int decode_forward(const DecodeParams& p, void* workspace, void* stream);

int64_t decode_backward_workspace(const DecodeBackwardParams& p);
int decode_backward(const DecodeBackwardParams& p, void* workspace, void* stream);

// attend and decode in one kernel: `decode.z` is ignored, z never leaves shared memory unless attend.z is set.
int64_t attend_decode_workspace(const AttendParams& attend, const DecodeParams& decode);
int attend_decode_forward(const AttendParams& attend, const DecodeParams& decode, void* workspace, void* stream);

// attend_causal and decode, in one kernel where limits::plan_causal_mma has a plan for both; decode.z and z as above.
int64_t attend_causal_decode_workspace(const AttendCausalParams& attend, const DecodeParams& decode);
int attend_causal_decode_forward(const AttendCausalParams& attend, const DecodeParams& decode, void* workspace,
                                 void* stream);

// attend_prefix and decode, in one kernel where limits::plan_prefix_mma has a plan for both; decode.z and z as above.
int64_t attend_prefix_decode_workspace(const PrefixParams& attend, const DecodeParams& decode);
int attend_prefix_decode_forward(const PrefixParams& attend, const DecodeParams& decode, void* workspace, void* stream);

// `blas` is a cublasHandle_t bound to `stream` (see gemm.h).
int64_t project_workspace(const ProjectParams& p);
int project_forward(const ProjectParams& p, void* workspace, void* blas, void* stream);

int64_t project_backward_workspace(const ProjectBackwardParams& p);
int project_backward(const ProjectBackwardParams& p, void* workspace, void* blas, void* stream);

int renormalise_rows(const RowsParams& p, void* stream);

int64_t project_implicit_workspace(const ImplicitParams& p);
int project_implicit_forward(const ImplicitParams& p, void* workspace, void* stream);

int64_t project_implicit_backward_workspace(const ImplicitParams& p);
int project_implicit_backward(const ImplicitParams& p, void* workspace, void* stream);

// Return codes beside 0 and those of the CUDA runtime.
constexpr int kUnsupported = -1;   // outside limits.h; limits::why_not says what
constexpr int kGemmError = 10000;  // plus the status of the matrix library

// Dynamic shared memory that a block may use on the current device, in bytes.
int64_t shared_memory_limit();

// The architectures that these kernels were compiled for, and the compiler, in one line.
const char* build_info();

// What a return code means; never null.
const char* error_string(int code);

}  // namespace csat
