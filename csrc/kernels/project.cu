// The projection y = phi x and its backward: copies that cuBLAS needs (masked tokens zeroed, dtypes made equal, summed
// axes brought together), then one batched product for each output. Where those are too few to fill a device (one head
// of many tokens), each goes along its depth in parts, one batched product of them, whose float32 sums `reduce` adds in
// a fixed order: workspace parts * m * n * 4 bytes, at most 11 MiB, which the L2 cache holds.
#include "csat/gemm.h"
#include "csat/panel.h"
#include "csat/tokens.h"
#include "csat/workspace.h"

namespace csat {
namespace {

// A (batch, heads) grid of row-major matrices; head h of the product uses head h / group of the operand.
struct Stack {
  const void* data;
  int64_t pitch;
  bool transposed;
  int64_t batch, head;  // strides
  int64_t group = 1;
};

const void* offset(const void* p, int64_t elements, DType t) {
  return static_cast<const char*>(p) + elements * size_of(t);
}

struct BatchedProduct {
  Stack a, b;
  DType input;
  void* c;
  DType output;
  int64_t c_pitch, c_batch, c_head;
  int64_t m, n, k, batch, heads;
};

// How a product's batch is dealt to launches: one where the strides allow, else one per batch element or per head,
// whichever are fewer.
struct Deal {
  bool over_heads;
  int64_t calls, count;  // launches, and matrices in each
  explicit Deal(const BatchedProduct& p) {
    const bool grouped = p.a.group > 1 || p.b.group > 1;
    const bool flat = p.batch == 1 || (p.a.batch == p.heads * p.a.head && p.b.batch == p.heads * p.b.head &&
                                       p.c_batch == p.heads * p.c_head);
    over_heads = !grouped && (flat || p.batch < p.heads);
    calls = over_heads ? (flat ? 1 : p.batch) : p.heads;
    count = p.batch * p.heads / calls;
  }
};

// One launch, or one after the other for stretches of the rows of a left operand that all its products share.
int multiply_together(const BatchedProduct& p, const Deal& deal, void* blas) {
  const bool shared = deal.count > 1 && (deal.over_heads ? p.a.head : p.a.batch) == 0;
  const int64_t stretch = shared ? limits::product_rows(p.m, p.k) : p.m;
  const auto multiply = [&](int64_t i, int64_t row, int64_t rows) -> int {
    const auto operand = [&](const Stack& s, int64_t first) -> GemmOperand {
      const int64_t start = first + (deal.over_heads ? i * s.batch : i / s.group * s.head);
      return {offset(s.data, start, p.input), s.pitch, deal.over_heads ? s.head : s.batch, s.transposed};
    };
    const int64_t to = row * p.c_pitch + (deal.over_heads ? i * p.c_batch : i * p.c_head);
    void* c = const_cast<void*>(offset(p.c, to, p.output));
    return gemm({operand(p.a, row * (p.a.transposed ? 1 : p.a.pitch)), operand(p.b, 0), p.input, c, p.output, p.c_pitch,
                 deal.over_heads ? p.c_head : p.c_batch, rows, p.n, p.k, deal.count},
                blas);
  };
  for (int64_t i = 0; i < deal.calls; ++i)
    for (int64_t row = 0; row < p.m; row += stretch)
      CSAT_TRY(multiply(i, row, p.m - row < stretch ? p.m - row : stretch));
  return 0;
}

// One product of the batch in parts of the depth: those of equal depth together, then what is left.
int multiply_in_parts(const BatchedProduct& p, int64_t batch, int64_t head, int64_t parts, float* partial, void* blas,
                      void* stream) {
  constexpr int64_t kVector = 8;  // a part starts where 16-byte loads can
  const int64_t depth = limits::round_up(limits::ceil_div(p.k, parts), kVector), matrix = p.m * p.n;
  const int64_t equal = p.k / depth, rest = p.k % depth;
  const auto multiply = [&](int64_t first, int64_t k, int64_t count) -> int {
    const auto operand = [&](const Stack& s, bool along_columns) -> GemmOperand {
      const int64_t step = along_columns != s.transposed ? 1 : s.pitch;  // between neighbours along the depth
      const int64_t start = batch * s.batch + head / s.group * s.head + first * depth * step;
      return {offset(s.data, start, p.input), s.pitch, depth * step, s.transposed};
    };
    return gemm({operand(p.a, true), operand(p.b, false), p.input, partial + first * matrix, DType::f32, p.n, matrix,
                 p.m, p.n, k, count},
                blas);
  };
  CSAT_TRY(multiply(0, depth, equal));
  if (rest > 0) CSAT_TRY(multiply(equal, rest, 1));
  void* c = const_cast<void*>(offset(p.c, batch * p.c_batch + head * p.c_head, p.output));
  const View target{c, p.output, {0, 0, p.c_pitch, 1}};
  return reduce({partial, equal + (rest > 0), 0, matrix, p.n, 1, 1, p.m, p.n, target, 1.f, false}, stream);
}

int multiply(const BatchedProduct& p, Carver& carver, void* blas, void* stream) {
  if (p.m == 0 || p.n == 0 || p.batch == 0 || p.heads == 0) return 0;
  if (p.k == 0) {  // a sum of nothing
    const View c{p.c, p.output, {p.c_batch, p.c_head, p.c_pitch, 1}};
    return carver.sizing() ? 0 : reduce({nullptr, 0, 0, 0, 0, p.batch, p.heads, p.m, p.n, c, 1.f, false}, stream);
  }
  const Deal deal(p);
  const int64_t parts = limits::product_parts(p.m, p.n, p.k, deal.count);
  float* partial = parts > 1 ? carver.take(parts * p.m * p.n) : nullptr;
  if (carver.sizing()) return 0;
  if (parts == 1) return multiply_together(p, deal, blas);
  for (int64_t i = 0; i < p.batch * p.heads; ++i)
    CSAT_TRY(multiply_in_parts(p, i / p.heads, i % p.heads, parts, partial, blas, stream));
  return 0;
}

// Can cuBLAS read this (rows, columns) matrix where it lies? One axis contiguous, the other not overlapping.
bool readable(const View& v, int64_t rows, int64_t columns) {
  return (v.stride[3] == 1 && v.stride[2] >= columns) || (v.stride[2] == 1 && v.stride[3] >= rows);
}
Stack stack_of(const View& v, int64_t columns) {
  const bool plain = v.stride[3] == 1 && v.stride[2] >= columns;
  return {v.data, v.stride[plain ? 2 : 3], !plain, v.stride[0], v.stride[1]};
}

struct Shape {
  int64_t batch, heads, rows, columns;
  int64_t count() const { return batch * heads * rows * columns; }
};

// The projection's buffers; with a null base only sizes.
struct Operands {
  Carver& carver;
  void* stream;

  // A copy of `v` with the given target strides, masked tokens zeroed.
  int copy(View& v, const Shape& s, DType dtype, const int64_t (&stride)[4], const unsigned char* keep) {
    View target{carver.take<char>(s.count() * size_of(dtype)), dtype, {stride[0], stride[1], stride[2], stride[3]}};
    const View source = v;
    v = target;
    return carver.sizing() ? 0 : copy_tokens({source, target, keep, s.batch, s.heads, s.rows, s.columns}, stream);
  }
  // `v` itself if the product can read it as it lies, else a contiguous copy.
  int settle(View& v, const Shape& s, DType dtype, const unsigned char* keep, bool force = false) {
    if (!keep && !force && v.dtype == dtype && readable(v, s.rows, s.columns)) return 0;
    const int64_t stride[4] = {s.heads * s.rows * s.columns, s.rows * s.columns, s.columns, 1};
    return copy(v, s, dtype, stride, keep);
  }
  // phi: a broadcast batch keeps its stride of 0.
  int settle_phi(View& phi, const ProjectParams& p, bool force) {
    CSAT_TRY(settle(phi, {p.phi_batch, p.phi_heads, p.measurements, p.tokens}, p.x.dtype, nullptr, force));
    if (p.phi_batch == 1) phi.stride[0] = 0;
    if (p.phi_heads == 1) phi.stride[1] = 0;
    return 0;
  }
};

int64_t heads_out(const ProjectParams& p) { return p.phi_heads > p.x_heads ? p.phi_heads : p.x_heads; }

int forward(const ProjectParams& p, Carver& carver, void* blas, void* stream) {
  Operands operands{carver, stream};
  View x = p.x, phi = p.phi;
  CSAT_TRY(operands.settle(x, {p.batch, p.x_heads, p.tokens, p.head_dim}, p.x.dtype, p.keep));
  CSAT_TRY(operands.settle_phi(phi, p, false));
  const int64_t H = heads_out(p), M = p.measurements, D = p.head_dim;
  Stack a = stack_of(phi, p.tokens), b = stack_of(x, D);
  b.group = H / p.x_heads;
  return multiply({a, b, p.x.dtype, p.y.data, p.y.dtype, D, H * M * D, M * D, M, D, p.tokens, p.batch, H}, carver, blas,
                  stream);
}

// dx[hx] = sum over the heads of its group of phi_h^T dy_h: one product whose depth is (head in group, m).
int backward_x(const ProjectBackwardParams& p, Carver& carver, void* blas, void* stream) {
  const ProjectParams& f = p.forward;
  const int64_t H = heads_out(f), M = f.measurements, N = f.tokens, D = f.head_dim, group = H / f.x_heads;
  Operands operands{carver, stream};
  View phi = f.phi, dy = p.dy;
  CSAT_TRY(operands.settle_phi(phi, f, group > 1));
  CSAT_TRY(operands.settle(dy, {f.batch, H, M, D}, f.x.dtype, nullptr, group > 1));
  Stack a = stack_of(phi, N), b = stack_of(dy, D);
  a.transposed = !a.transposed;
  a.head *= group;
  b.head *= group;
  CSAT_TRY(multiply({a, b, f.x.dtype, p.dx.data, f.x.dtype, p.dx.stride[2], p.dx.stride[0], p.dx.stride[1], N, D,
                     group * M, f.batch, f.x_heads},
                    carver, blas, stream));
  if (carver.sizing() || !f.keep) return 0;
  return zero_tokens({View{}, p.dx, f.keep, f.batch, f.x_heads, N, D}, stream);
}

// dphi = dy x^T summed over what phi was broadcast over: those axes join the features as the depth of one product.
int backward_phi(const ProjectBackwardParams& p, Carver& carver, void* blas, void* stream) {
  const ProjectParams& f = p.forward;
  const int64_t H = heads_out(f), M = f.measurements, N = f.tokens, D = f.head_dim;
  const bool sum_batch = f.phi_batch == 1 && f.batch != 1, sum_heads = f.phi_heads == 1 && H > 1;
  const int64_t batch = sum_batch ? 1 : f.batch, heads = sum_heads ? 1 : H, x_heads = sum_heads ? 1 : f.x_heads;
  const int64_t depth = (sum_batch ? f.batch : 1) * (sum_heads ? H : 1) * D;
  Operands operands{carver, stream};
  // (batch, heads, rows, [summed batch] [summed heads] D). An empty batch is a sum of nothing: depth 0, dphi = 0.
  const auto join = [&](View& v, int64_t all_heads, int64_t outer_heads, int64_t rows,
                        const unsigned char* keep) -> int {
    const Shape shape{f.batch, all_heads, rows, D};
    if (depth == D && !sum_batch && !sum_heads) return operands.settle(v, shape, f.x.dtype, keep);
    const int64_t stride[4] = {sum_batch ? (sum_heads ? H : 1) * D : outer_heads * rows * depth,
                               sum_heads ? D : rows * depth, depth, 1};
    CSAT_TRY(operands.copy(v, shape, f.x.dtype, stride, keep));
    v.stride[0] = outer_heads * rows * depth;
    v.stride[1] = rows * depth;
    return 0;
  };
  View dy = p.dy, x = f.x;
  CSAT_TRY(join(dy, H, heads, M, nullptr));
  CSAT_TRY(join(x, f.x_heads, x_heads, N, f.keep));
  Stack a = stack_of(dy, depth), b = stack_of(x, depth);
  b.transposed = !b.transposed;
  b.group = heads / x_heads;
  return multiply({a, b, f.x.dtype, p.dphi.data, p.dphi.dtype, N, heads * M * N, M * N, M, N, depth, batch, heads},
                  carver, blas, stream);
}

}  // namespace

int64_t project_workspace(const ProjectParams& p) {
  Carver carver(nullptr);
  forward(p, carver, nullptr, nullptr);
  return carver.used();
}

int project_forward(const ProjectParams& p, void* workspace, void* blas, void* stream) {
  Carver carver(workspace);
  return forward(p, carver, blas, stream);
}

int64_t project_backward_workspace(const ProjectBackwardParams& p) {
  // dx and dphi follow each other on the stream and share the space.
  Carver for_x(nullptr), for_phi(nullptr);
  if (p.dx.data) backward_x(p, for_x, nullptr, nullptr);
  if (p.dphi.data) backward_phi(p, for_phi, nullptr, nullptr);
  return for_x.used() > for_phi.used() ? for_x.used() : for_phi.used();
}

int project_backward(const ProjectBackwardParams& p, void* workspace, void* blas, void* stream) {
  Carver for_x(workspace), for_phi(workspace);
  if (p.dx.data) CSAT_TRY(backward_x(p, for_x, blas, stream));
  if (p.dphi.data) CSAT_TRY(backward_phi(p, for_phi, blas, stream));
  return 0;
}

}  // namespace csat
