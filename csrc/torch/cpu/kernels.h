// The csat ops on CPU tensors; shapes and meaning in docs/architecture.md.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "torch/checks.h"

namespace csat::cpu {

Tensor project(const Tensor& x, const Tensor& phi, const MaybeTensor& key_mask);
std::tuple<Tensor, Tensor> project_backward(const Tensor& dy, const Tensor& x, const Tensor& phi,
                                            const MaybeTensor& key_mask, bool need_dx, bool need_dphi);

std::tuple<Tensor, Tensor> renormalise_rows(const Tensor& phi, const Tensor& key_mask);

// `ensemble` by value: the boxed call takes its arguments so.
Tensor project_implicit(const Tensor& x, const MaybeTensor& counts, const MaybeTensor& anchors, std::string ensemble,
                        int64_t rows, int64_t heads, int64_t seed, int64_t layer);
Tensor project_implicit_backward(const Tensor& dy, const MaybeTensor& counts, const MaybeTensor& anchors,
                                 std::string ensemble, int64_t heads, int64_t seed, int64_t layer, int64_t x_heads,
                                 int64_t tokens);

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& kc, const Tensor& vc, const MaybeTensor& score_bias,
                                  double scale);
std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(const Tensor& dz, const Tensor& q, const Tensor& kc,
                                                           const Tensor& vc, const MaybeTensor& score_bias,
                                                           const Tensor& z, const Tensor& lse, double scale);

std::tuple<Tensor, Tensor> attend_causal(const Tensor& q, const Tensor& kc, const Tensor& vc, const Tensor& k,
                                         const Tensor& v, const MaybeTensor& score_bias, const MaybeTensor& key_mask,
                                         double scale, int64_t block_size, int64_t window_blocks,
                                         int64_t measurements_per_block);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_causal_backward(
    const Tensor& dz, const Tensor& q, const Tensor& kc, const Tensor& vc, const Tensor& k, const Tensor& v,
    const MaybeTensor& score_bias, const MaybeTensor& key_mask, const Tensor& z, const Tensor& lse, double scale,
    int64_t block_size, int64_t window_blocks, int64_t measurements_per_block);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_prefix(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                 const Tensor& phi, const Tensor& kc, const Tensor& vc,
                                                                 const Tensor& mass, const MaybeTensor& score_bias,
                                                                 const MaybeTensor& key_mask, double scale,
                                                                 bool is_signed);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_prefix_backward(
    const Tensor& dz, const Tensor& dkc_end, const Tensor& dvc_end, const Tensor& dmass_end, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& phi, const Tensor& kc, const Tensor& vc, const Tensor& mass,
    const MaybeTensor& score_bias, const MaybeTensor& key_mask, const Tensor& lse, double scale, bool is_signed);

Tensor decode(const Tensor& z, const Tensor& S, const Tensor& B, const Tensor& theta, const MaybeTensor& psi,
              const Tensor& step);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> decode_backward(const Tensor& dc, const Tensor& z,
                                                                           const Tensor& S, const Tensor& B,
                                                                           const Tensor& theta, const MaybeTensor& psi,
                                                                           const Tensor& step);

std::tuple<Tensor, Tensor, Tensor> attend_decode(const Tensor& q, const Tensor& kc, const Tensor& vc,
                                                 const MaybeTensor& score_bias, double scale, const Tensor& S,
                                                 const Tensor& B, const Tensor& theta, const MaybeTensor& psi,
                                                 const Tensor& step, bool need_z);
std::tuple<Tensor, Tensor, Tensor> attend_causal_decode(const Tensor& q, const Tensor& kc, const Tensor& vc,
                                                        const Tensor& k, const Tensor& v, const MaybeTensor& score_bias,
                                                        const MaybeTensor& key_mask, double scale, int64_t block_size,
                                                        int64_t window_blocks, int64_t measurements_per_block,
                                                        const Tensor& S, const Tensor& B, const Tensor& theta,
                                                        const MaybeTensor& psi, const Tensor& step, bool need_z);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_prefix_decode(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& phi, const Tensor& kc, const Tensor& vc,
    const Tensor& mass, const MaybeTensor& score_bias, const MaybeTensor& key_mask, double scale, bool is_signed,
    const Tensor& S, const Tensor& B, const Tensor& theta, const MaybeTensor& psi, const Tensor& step, bool need_z);

}  // namespace csat::cpu
