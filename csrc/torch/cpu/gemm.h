// Dense inner loops of the CPU kernels on padded scratch blocks, chosen once for the instruction set of the machine.
#pragma once

#include <cstdint>

#include "csat/ensembles.h"
#include "torch/cpu/block.h"

namespace csat::cpu {

// The inner loops of micro_kernels.inc; row lengths n are whole panels.
template <class R>
struct MicroKernels {
  void (*multiply_add)(int64_t m, int64_t n, int64_t k, const R* a, int64_t a_row, int64_t a_col, const R* b,
                       int64_t ldb, R* c, int64_t ldc);
  void (*exponentiate_row)(R* s, const R* bias, R scale, int64_t n, R* max, R* sum);
  void (*probability_row)(R* s, const R* bias, R scale, R lse, int64_t n);
  void (*threshold_row)(const R* a, const R* drive, const R* theta, R step, int64_t n, R* y, R* next);
  R (*threshold_backward_row)(const R* next, const R* y, R step, int64_t n, R* g, R* scaled, R* dtheta);
  void (*score_gradient_row)(const R* p, R scale, int64_t n, R* dp, R* dbias);
  void (*mean_weight_row)(R* s, const R* phi, const R* bias, R scale, int64_t n, R* g, R* max, R* sum);
  void (*mean_weight_gradient_row)(R* s, const R* phi, const R* bias, R scale, R lse, int64_t n, R* g, R* dw, R* dg,
                                   R* dbias);
  void (*signs)(const RandomKey& key, int64_t row, int64_t rows, int64_t position, int64_t n, R* out, int64_t ld);
};

// The table of this machine: AVX-512, AVX2 or the baseline, bounded by ATEN_CPU_CAPABILITY.
template <class R>
const MicroKernels<R>& micro_kernels();

const char* instruction_set();

// The left factor of a product, with any strides.
template <class R>
struct Left {
  const R* data;
  int64_t row, col;
};
template <class R>
Left<R> as_is(Block<R> block) {
  return {block.data, block.ld, 1};
}
template <class R>
Left<R> transposed(Block<R> block) {
  return {block.data, 1, block.ld};
}

// c (m, n) += a (m, k) b (k, n). Whole panels of columns are computed: those of b's padding are zero and so are c's.
template <class R>
void multiply_add(int64_t m, int64_t n, int64_t k, Left<R> a, Block<R> b, Block<R> c) {
  micro_kernels<R>().multiply_add(m, n, k, a.data, a.row, a.col, b.data, b.ld, c.data, c.ld);
}

template <class R>
void multiply(int64_t m, int64_t n, int64_t k, Left<R> a, Block<R> b, Block<R> c) {
  clear(c, m, n);
  multiply_add(m, n, k, a, b, c);
}

}  // namespace csat::cpu
