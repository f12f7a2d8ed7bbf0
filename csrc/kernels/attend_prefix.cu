// Host side of attend_prefix and its backward, which go over batch elements and key heads in parts.
#include "csat/attend_prefix_backward_mma.h"
#include "csat/attend_prefix_mma.h"
#include "csat/decode_pair.h"
#include "csat/dispatch.h"
#include "csat/instances.h"
#include "csat/prefix_parts.h"
#include "csat/prefix_scan.h"

namespace csat {
namespace {

using limits::ceil_div;
using limits::column_pad;
using limits::depth_pad;

// ---- sums and scans

int64_t chunks_of(const PrefixParams& p) { return ceil_div(p.tokens, limits::kPrefixChunk); }
int64_t phi_share(const PrefixParams& p) { return p.phi_heads == 1 ? p.state_heads : 1; }

// Stacks of `count` matrices, both sides padded to 64, and of single rows.
Panel take_matrices(Carver& carver, int64_t count, int64_t rows, int64_t columns) {
  const int64_t pitch = column_pad(columns), matrix = column_pad(rows) * pitch;
  return {carver.take(count * matrix), pitch, matrix};
}
Panel take_rows(Carver& carver, int64_t count, int64_t columns) {
  return {carver.take(count * column_pad(columns)), column_pad(columns), column_pad(columns)};
}
// A panel of `matrices` for each batch element, 0 where it is broadcast.
View view_of(const Panel& panel, int64_t matrices) {
  return {panel.data, DType::f32, {matrices * panel.matrix, panel.matrix, panel.pitch, 1}};
}
View transposed(View v) {
  const int64_t row = v.stride[2];
  v.stride[2] = v.stride[3];
  v.stride[3] = row;
  return v;
}

// A factor of the sums: (B, .., N, columns), of which head i reads head i / share.
struct Factor {
  View view;
  int64_t share, columns;
};

// target = sum of x^T y over the tokens of each chunk and the `heads` heads of a state head.
int sum_outer(const PrefixParams& p, const Factor& x, const Factor& y, int64_t heads, const Panel& target,
              void* stream) {
  const PrefixSumsArgs args{x.view,        y.view,       x.share,  y.share,   heads,     p.batch,
                            p.state_heads, chunks_of(p), p.tokens, x.columns, y.columns, target};
  const int64_t tiles = target.matrix / (limits::kMicroColumns * limits::kMicroColumns);
  const int64_t blocks = p.batch * p.state_heads * chunks_of(p) * tiles;
  if (blocks > limits::kMaxBlocks) return kUnsupported;
  return with_dtype(p.q.dtype, [&](auto element) {
    return launch_prefix_sums<decltype(element)>(
        args, blocks, 2 * limits::kOuterDepth * limits::kMicroColumns * int64_t(sizeof(float)), stream);
  });
}

int sum_columns(const PrefixParams& p, const View& x, int64_t share, int64_t heads, bool counts, const Panel& target,
                void* stream) {
  const int64_t blocks = ceil_div(target.pitch, limits::kThreads);
  const PrefixColumnSumsArgs args{x,      share,  heads,  p.state_heads, chunks_of(p), p.tokens, p.measurements,
                                  counts, p.keep, target, blocks};
  return prefix_column_sums(args, p.batch * p.state_heads * chunks_of(p), stream);
}

// Which way the chunks are walked, from what, and where the last step goes; data null: nowhere.
struct Scan {
  bool reverse;
  View start, end;
};

int scan(const PrefixParams& p, const Panel& sums, int64_t rows, int64_t columns, const Scan& way, void* stream,
         bool is_count = false) {
  return prefix_scan({sums, p.batch * p.state_heads, p.state_heads, chunks_of(p), way.reverse, way.start, way.end, rows,
                      columns, is_count ? 1 : p.state_heads, is_count ? 1 : columns},
                     stream);
}

// ---- what both passes take

// Tokens and states; with a null base only sizes.
struct TokenPlan {
  View k, v, phi;  // those of the caller or, under a mask, copies with zeros
  int64_t panel_tokens = 0;

  int take(PrefixArgs& args, const PrefixParams& p, Carver& carver, void* stream) {
    k = p.k, v = p.v, phi = p.phi;
    args.phi_batch = p.phi_batch;
    if (p.keep) {
      const auto masked = [&](View& x, int64_t heads, int64_t columns) {
        return take_vector_rows(x, carver, x.dtype, p.batch, heads, p.tokens, columns, stream, p.keep);
      };
      CSAT_TRY(masked(k, p.key_heads, p.head_dim));
      CSAT_TRY(masked(v, p.key_heads, p.features));
      CSAT_TRY(masked(phi, p.phi_heads, p.measurements));
      args.phi_batch = p.batch;
    }
    ForwardArgs& rows = args.rows;
    rows.heads = p.heads;
    rows.queries = p.tokens;
    rows.features = static_cast<int>(p.features);
    rows.z_pitch = column_pad(p.features);
    rows.z = p.z;
    rows.q = p.q;
    rows.lse = p.lse;
    rows.head_dim = static_cast<int>(p.head_dim);
    rows.q_pitch = depth_pad(p.head_dim);
    rows.measurement_tile = limits::measurement_tile(p.measurements);
    rows.scale = p.scale;
    args.chunks = chunks_of(p);
    args.state_heads = p.state_heads;
    args.key_heads = p.key_heads;
    args.phi_heads = p.phi_heads;
    args.keep = p.keep;
    args.is_signed = p.is_signed;
    panel_tokens = args.chunks * limits::kPrefixChunk;
    const int64_t columns = column_pad(p.measurements);
    const PackArgs of_phi = operand(phi, args.phi_batch, p.phi_heads, p.tokens, p.measurements);
    CSAT_TRY(take_panel(args.phi, carver, of_phi, panel_tokens, columns, stream));
    CSAT_TRY(take_panel(args.phi_t, carver, csat::transposed(of_phi), columns, panel_tokens, stream));
    CSAT_TRY(take_panel(args.keys_t, carver, csat::transposed(of_keys(p)), rows.q_pitch, panel_tokens, stream));
    const PackArgs bias{p.bias.data, p.bias.dtype,   p.batch, p.heads,          p.bias.stride[0], p.bias.stride[1],
                        1,           p.measurements, 0,       p.bias.stride[3], nullptr,          0,
                        0,           -INFINITY};
    CSAT_TRY(take_panel(rows.bias, carver, bias, 1, columns, stream));
    args.state_keys_t = take_matrices(carver, states(p), p.head_dim, p.measurements);
    args.masses = take_rows(carver, states(p), p.measurements);
    return 0;
  }
  PackArgs of_keys(const PrefixParams& p) const { return operand(k, p.batch, p.key_heads, p.tokens, p.head_dim); }
  PackArgs of_values(const PrefixParams& p) const { return operand(v, p.batch, p.key_heads, p.tokens, p.features); }
  static int64_t states(const PrefixParams& p) { return p.batch * p.state_heads * chunks_of(p); }

  Factor keys(const PrefixParams& p) const { return {k, p.state_heads / p.key_heads, p.head_dim}; }
  Factor values(const PrefixParams& p) const { return {v, p.state_heads / p.key_heads, p.features}; }
  Factor phis(const PrefixParams& p) const { return {phi, phi_share(p), p.measurements}; }

  // The masses before each chunk.
  int scan_masses(const PrefixArgs& args, const PrefixParams& p, const View& end, void* stream) const {
    const View of_phi = view_of(args.phi, args.phi_batch == 1 ? 0 : args.phi_heads);
    CSAT_TRY(sum_columns(p, of_phi, phi_share(p), 1, p.is_signed, args.masses, stream));
    return scan(p, args.masses, 1, p.measurements, {false, p.mass, end}, stream, p.is_signed);
  }
};

// ---- forward

struct ForwardPlan {
  PrefixArgs args{};
  TokenPlan tokens;

  int take(const PrefixParams& p, Carver& carver, void* stream) {
    CSAT_TRY(tokens.take(args, p, carver, stream));
    CSAT_TRY(take_panel(args.values, carver, tokens.of_values(p), tokens.panel_tokens, args.rows.z_pitch, stream));
    args.state_values = take_matrices(carver, TokenPlan::states(p), p.measurements, p.features);
    return 0;
  }

  int run(const PrefixParams& p, void* stream) {
    CSAT_TRY(sum_outer(p, tokens.keys(p), tokens.phis(p), 1, args.state_keys_t, stream));
    CSAT_TRY(sum_outer(p, tokens.phis(p), tokens.values(p), 1, args.state_values, stream));
    const Scan keys{false, transposed(p.kc), transposed(p.kc_end)};
    CSAT_TRY(scan(p, args.state_keys_t, p.head_dim, p.measurements, keys, stream));
    CSAT_TRY(scan(p, args.state_values, p.measurements, p.features, {false, p.vc, p.vc_end}, stream));
    CSAT_TRY(tokens.scan_masses(args, p, p.mass_end, stream));
    const int64_t floats = limits::attend_prefix_row(p.measurements, p.head_dim, p.features);
    const int rows = args.rows.rows = limits::row_tile(floats, shared_memory_limit());
    const int64_t blocks = p.batch * p.heads * ceil_div(p.tokens, rows ? rows : 1);
    if (rows == 0 || blocks > limits::kMaxBlocks) return kUnsupported;
    return with_dtype(p.q.dtype, [&](auto element) {
      return launch_attend_prefix<decltype(element)>(args, blocks, rows * floats * 4, stream);
    });
  }
};

// ---- backward

// Gradients of the state behind each chunk.
struct StateGradients {
  Panel keys, keys_t, values, values_t, masses;  // (M, D), (D, M), (M, R), (R, M), (1, M)

  void take(const PrefixParams& p, Carver& carver) {
    const int64_t states = TokenPlan::states(p), M = p.measurements;
    keys = take_matrices(carver, states, M, p.head_dim);
    keys_t = take_matrices(carver, states, p.head_dim, M);
    values = take_matrices(carver, states, M, p.features);
    values_t = take_matrices(carver, states, p.features, M);
    masses = take_rows(carver, states, M);
  }
  int scan(const PrefixBackwardParams& p, void* stream) const {
    const PrefixParams& f = p.forward;
    const int64_t M = f.measurements, D = f.head_dim, R = f.features;
    CSAT_TRY(csat::scan(f, keys, M, D, {true, p.dkc_end, p.dkc}, stream));
    CSAT_TRY(csat::scan(f, keys_t, D, M, {true, transposed(p.dkc_end), {}}, stream));
    CSAT_TRY(csat::scan(f, values, M, R, {true, p.dvc_end, p.dvc}, stream));
    CSAT_TRY(csat::scan(f, values_t, R, M, {true, transposed(p.dvc_end), {}}, stream));
    return f.is_signed ? 0 : csat::scan(f, masses, 1, M, {true, p.dmass_end, p.dmass}, stream);
  }
};

struct BackwardPlan {
  PrefixBackwardArgs args{};
  TokenPlan tokens;
  StateGradients gradients;
  int rows = 0;
  int64_t floats = 0;

  int take(const PrefixBackwardParams& p, Carver& carver, void* stream) {
    const PrefixParams& f = p.forward;
    const int64_t pairs = f.batch * f.heads, states = TokenPlan::states(f), M = f.measurements;
    floats = limits::prefix_query_backward_row(M, f.head_dim, f.features);
    rows = limits::row_tile(floats, shared_memory_limit());
    if (rows == 0) return kUnsupported;
    CSAT_TRY(tokens.take(args.forward, f, carver, stream));
    args.forward.rows.rows = rows;
    args.dz = p.dz;
    args.dq = p.dq;
    args.dz_pitch = depth_pad(f.features);
    args.dq_pitch = column_pad(f.head_dim);
    CSAT_TRY(take_panel(args.keys, carver, tokens.of_keys(f), tokens.panel_tokens, args.dq_pitch, stream));
    const PackArgs values_t = csat::transposed(tokens.of_values(f));
    CSAT_TRY(take_panel(args.values_t, carver, values_t, args.dz_pitch, tokens.panel_tokens, stream));
    args.state_keys = take_matrices(carver, states, M, f.head_dim);
    args.state_values_t = take_matrices(carver, states, f.features, M);
    const auto of_queries = [&](int64_t pitch) {
      return Panel{carver.take(pairs * f.tokens * pitch), pitch, f.tokens * pitch};
    };
    for (Panel* triangle : {&args.query_keys, &args.value_grads, &args.key_weights, &args.value_weights})
      *triangle = of_queries(limits::kPrefixChunk);
    for (Panel* wide : {&args.weights, &args.score_grads, &args.mass_grads}) *wide = of_queries(column_pad(M));
    args.bias_parts = p.dbias.data ? carver.take(pairs * tiles(f) * column_pad(M)) : nullptr;
    gradients.take(f, carver);
    return 0;
  }
  int64_t tiles(const PrefixParams& f) const { return ceil_div(f.tokens, rows); }

  int run(const PrefixBackwardParams& p, void* stream) {
    CSAT_TRY(run_states(p.forward, stream));
    CSAT_TRY(run_queries(p, stream));
    CSAT_TRY(sum_gradients(p, stream));
    CSAT_TRY(gradients.scan(p, stream));
    CSAT_TRY(run_tokens(p, stream));
    if (!p.dbias.data) return 0;
    const PrefixParams& f = p.forward;
    const int64_t columns = column_pad(f.measurements);
    return reduce({args.bias_parts, tiles(f), tiles(f) * columns, columns, columns, f.batch, f.heads, 1, f.measurements,
                   p.dbias, 1.f, false},
                  stream);
  }

 private:
  int run_states(const PrefixParams& f, void* stream) const {
    const PrefixArgs& a = args.forward;
    const int64_t M = f.measurements, D = f.head_dim, R = f.features;
    CSAT_TRY(sum_outer(f, tokens.keys(f), tokens.phis(f), 1, a.state_keys_t, stream));
    CSAT_TRY(sum_outer(f, tokens.phis(f), tokens.keys(f), 1, args.state_keys, stream));
    CSAT_TRY(sum_outer(f, tokens.values(f), tokens.phis(f), 1, args.state_values_t, stream));
    CSAT_TRY(scan(f, a.state_keys_t, D, M, {false, transposed(f.kc), {}}, stream));
    CSAT_TRY(scan(f, args.state_keys, M, D, {false, f.kc, {}}, stream));
    CSAT_TRY(scan(f, args.state_values_t, R, M, {false, transposed(f.vc), {}}, stream));
    return tokens.scan_masses(a, f, {}, stream);
  }

  int run_queries(const PrefixBackwardParams& p, void* stream) const {
    const PrefixParams& f = p.forward;
    const int64_t blocks = f.batch * f.heads * tiles(f);
    if (blocks > limits::kMaxBlocks) return kUnsupported;
    return with_dtype(f.q.dtype, [&](auto element) {
      return launch_prefix_query_backward<decltype(element)>(args, blocks, rows * floats * 4, stream);
    });
  }

  int sum_gradients(const PrefixBackwardParams& p, void* stream) const {
    const PrefixParams& f = p.forward;
    const int64_t group = f.heads / f.state_heads;
    const Factor q{f.q, 1, f.head_dim}, dz{p.dz, 1, f.features};
    const Factor a{view_of(args.score_grads, f.heads), 1, f.measurements};
    const Factor w{view_of(args.weights, f.heads), 1, f.measurements};
    CSAT_TRY(sum_outer(f, a, q, group, gradients.keys, stream));
    CSAT_TRY(sum_outer(f, q, a, group, gradients.keys_t, stream));
    CSAT_TRY(sum_outer(f, w, dz, group, gradients.values, stream));
    CSAT_TRY(sum_outer(f, dz, w, group, gradients.values_t, stream));
    if (f.is_signed) return 0;
    return sum_columns(f, view_of(args.mass_grads, f.heads), 1, group, false, gradients.masses, stream);
  }

  int run_tokens(const PrefixBackwardParams& p, void* stream) const {
    const PrefixParams& f = p.forward;
    const PrefixArgs& a = args.forward;
    const int64_t states = f.state_heads * a.chunks;
    PrefixTokenArgs t{};
    t.q = f.q;
    t.dz = p.dz;
    t.query_keys = view_of(args.query_keys, f.heads);
    t.value_grads = view_of(args.value_grads, f.heads);
    t.key_weights = view_of(args.key_weights, f.heads);
    t.value_weights = view_of(args.value_weights, f.heads);
    t.weights = view_of(args.weights, f.heads);
    t.score_grads = view_of(args.score_grads, f.heads);
    t.mass_grads = view_of(args.mass_grads, f.heads);
    t.phi_t = view_of(a.phi_t, a.phi_batch == 1 ? 0 : a.phi_heads);
    t.keys_t = view_of(a.keys_t, f.key_heads);
    t.values_t = view_of(args.values_t, f.key_heads);
    t.state_keys = view_of(gradients.keys, states);
    t.state_keys_t = view_of(gradients.keys_t, states);
    t.state_values = view_of(gradients.values, states);
    t.state_values_t = view_of(gradients.values_t, states);
    t.masses = view_of(gradients.masses, states);
    t.dk = p.dk;
    t.dv = p.dv;
    t.dphi = p.dphi;
    t.keep = f.keep;
    t.heads = f.heads;
    t.state_heads = f.state_heads;
    t.key_heads = f.key_heads;
    t.phi_heads = f.phi_heads;
    t.chunks = a.chunks;
    t.tokens = f.tokens;
    t.measurements = f.measurements;
    t.head_dim = static_cast<int>(f.head_dim);
    t.features = static_cast<int>(f.features);
    t.is_signed = f.is_signed;
    constexpr int64_t kSide = limits::kMicroColumns;
    const int64_t of_phi = f.state_heads / f.key_heads * ceil_div(f.measurements, kSide);
    const int64_t tiles_of_chunk = ceil_div(f.head_dim, kSide) + ceil_div(f.features, kSide) + of_phi;
    const int64_t blocks = f.batch * f.key_heads * a.chunks * tiles_of_chunk;
    if (blocks > limits::kMaxBlocks) return kUnsupported;
    return with_dtype(f.q.dtype, [&](auto element) {
      return launch_prefix_token_backward<decltype(element)>(t, blocks, 4 * kSide * kSide, stream);
    });
  }
};

}  // namespace

int64_t attend_prefix_workspace(const PrefixParams& p) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_prefix_mma(plan, p, nullptr, shared_memory_limit())) return attend_prefix_mma_workspace(p, nullptr);
  return workspace_of<ForwardPlan>(part_of(p, first_part<ForwardPlan>(p)));
}

int attend_prefix_forward(const PrefixParams& p, void* workspace, void* stream) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_prefix_mma(plan, p, nullptr, shared_memory_limit()))
    return attend_prefix_mma(p, nullptr, workspace, stream);
  return run_in_parts<ForwardPlan>(p, workspace, stream);
}

int64_t attend_prefix_decode_workspace(const PrefixParams& attend, const DecodeParams& decode) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_prefix_mma(plan, attend, &decode, shared_memory_limit()))
    return attend_prefix_mma_workspace(attend, &decode);
  return DecodePair<PrefixParams>::workspace(attend, decode, attend_prefix_workspace);
}

int attend_prefix_decode_forward(const PrefixParams& attend, const DecodeParams& decode, void* workspace,
                                 void* stream) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_prefix_mma(plan, attend, &decode, shared_memory_limit()))
    return attend_prefix_mma(attend, &decode, workspace, stream);
  return DecodePair<PrefixParams>::forward(attend, decode, attend_prefix_forward, workspace, stream);
}

int64_t attend_prefix_backward_workspace(const PrefixBackwardParams& p) {
  if (!limits::why_not_mma(p, shared_memory_limit())) return attend_prefix_backward_mma_workspace(p);
  return workspace_of<BackwardPlan>(part_of(p, first_part<BackwardPlan>(p)));
}

int attend_prefix_backward(const PrefixBackwardParams& p, void* workspace, void* stream) {
  if (!limits::why_not_mma(p, shared_memory_limit())) return attend_prefix_backward_mma(p, workspace, stream);
  return run_in_parts<BackwardPlan>(p, workspace, stream);
}

}  // namespace csat
