// Host side of attend_causal and its backward: the panels of attend twice, for measurements and for tokens.
#include "csat/attend_causal_backward_mma.h"
#include "csat/attend_panels.h"
#include "csat/decode_pair.h"
#include "csat/dispatch.h"
#include "csat/forward_mma.h"
#include "csat/instances.h"

namespace csat {
namespace {

using limits::ceil_div;

// The tokens as measurements that stand for themselves.
int take_tokens(AttendParams& p, const CausalTokens& tokens, Carver& carver, void* stream) {
  p.kc = tokens.k;
  p.vc = tokens.v;
  p.bias = {};
  p.key_heads = tokens.heads;
  p.measurements = tokens.count;
  if (!tokens.keep) return 0;
  CausalTokens kept = tokens;
  CSAT_TRY(take_token_rows(kept, carver, p, stream));
  p.kc = kept.k;
  p.vc = kept.v;
  return 0;
}

int take(AttendCausalArgs& args, const AttendCausalParams& p, Carver& carver, void* stream) {
  const int64_t columns = limits::causal_columns(p.measured, p.tokens);
  AttendParams tokens = p.measured;
  args.sight = p.tokens;
  CSAT_TRY(take_tokens(tokens, p.tokens, carver, stream));
  CSAT_TRY(take_attend(args.measured, p.measured, columns, carver, stream));
  return take_attend(args.tokens, tokens, columns, carver, stream);
}

struct CausalBackwardPlan {
  AttendBackwardParams token_params{};
  BackwardPlan measured, tokens;

  int take(const AttendCausalBackwardParams& p, Carver& carver, void* stream) {
    const int64_t columns = limits::causal_columns(p.measured.forward, p.tokens);
    token_params = p.measured;
    token_params.dkc = p.dk;
    token_params.dvc = p.dv;
    token_params.dbias = {};
    CSAT_TRY(take_tokens(token_params.forward, p.tokens, carver, stream));
    CSAT_TRY(measured.take(p.measured, columns, limits::kSeenFloats, limits::kTargetBlocks, carver, stream));
    return tokens.take(token_params, columns, limits::kSeenFloats, 1, carver, stream);
  }
};

}  // namespace

int64_t attend_causal_workspace(const AttendCausalParams& p) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_causal_mma(plan, p, nullptr, shared_memory_limit()))
    return attend_causal_mma_workspace(plan, p, nullptr);
  Carver carver(nullptr);
  AttendCausalArgs args{};
  take(args, p, carver, nullptr);
  return carver.used();
}

int attend_causal_forward(const AttendCausalParams& p, void* workspace, void* stream) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_causal_mma(plan, p, nullptr, shared_memory_limit()))
    return attend_causal_mma(plan, p, nullptr, workspace, stream);
  Carver carver(workspace);
  AttendCausalArgs args{};
  CSAT_TRY(take(args, p, carver, stream));
  const AttendParams& m = p.measured;
  const int64_t floats = limits::attend_causal_row(limits::causal_columns(m, p.tokens), m.head_dim, m.features);
  const int rows = args.measured.rows = limits::row_tile(floats, shared_memory_limit());
  const int64_t blocks = m.batch * m.heads * ceil_div(m.queries, rows ? rows : 1);
  if (rows == 0 || blocks > limits::kMaxBlocks) return kUnsupported;
  if (blocks == 0) return 0;
  return with_dtype(m.q.dtype, [&](auto element) {
    return launch_attend_causal<decltype(element)>(args, blocks, rows * floats * 4, stream);
  });
}

int64_t attend_causal_decode_workspace(const AttendCausalParams& attend, const DecodeParams& decode) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_causal_mma(plan, attend, &decode, shared_memory_limit()))
    return attend_causal_mma_workspace(plan, attend, &decode);
  return DecodePair<AttendCausalParams>::workspace(attend, decode, attend_causal_workspace);
}

int attend_causal_decode_forward(const AttendCausalParams& attend, const DecodeParams& decode, void* workspace,
                                 void* stream) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_causal_mma(plan, attend, &decode, shared_memory_limit()))
    return attend_causal_mma(plan, attend, &decode, workspace, stream);
  return DecodePair<AttendCausalParams>::forward(attend, decode, attend_causal_forward, workspace, stream);
}

int64_t attend_causal_backward_workspace(const AttendCausalBackwardParams& p) {
  if (!limits::why_not_mma(p, shared_memory_limit())) return attend_causal_backward_mma_workspace(p);
  Carver carver(nullptr);
  CausalBackwardPlan().take(p, carver, nullptr);
  return carver.used();
}

int attend_causal_backward(const AttendCausalBackwardParams& p, void* workspace, void* stream) {
  if (!limits::why_not_mma(p, shared_memory_limit())) return attend_causal_backward_mma(p, workspace, stream);
  const AttendParams& f = p.measured.forward;
  Carver carver(workspace);
  CausalBackwardPlan plan;
  CSAT_TRY(plan.take(p, carver, stream));
  AttendCausalBackwardArgs args{plan.measured.args, plan.tokens.args, p.tokens};
  args.tokens.centre = args.measured.centre;
  args.tokens.shift = args.measured.shift;
  const int64_t query_blocks = f.batch * f.heads * ceil_div(f.queries, plan.measured.query_rows);
  const int64_t measurement_blocks = plan.measured.measurement_blocks(f),
                token_blocks = plan.tokens.measurement_blocks(f);
  if (query_blocks > limits::kMaxBlocks || measurement_blocks > limits::kMaxBlocks || token_blocks > limits::kMaxBlocks)
    return kUnsupported;
  const auto launch = [&](int rows, int64_t floats, int64_t blocks, auto kernel_of) {
    args.measured.rows = args.tokens.rows = rows;
    if (blocks == 0) return 0;
    return with_dtype(f.q.dtype,
                      [&](auto element) { return kernel_of(element)(args, blocks, rows * floats * 4, stream); });
  };
  const BackwardPlan& sizes = plan.measured;
  CSAT_TRY(launch(sizes.query_rows, sizes.query_floats, query_blocks,
                  [](auto element) { return launch_query_backward_causal<decltype(element)>; }));
  CSAT_TRY(launch(sizes.measurement_rows, sizes.measurement_floats, measurement_blocks,
                  [](auto element) { return launch_measurement_backward_causal<decltype(element)>; }));
  CSAT_TRY(launch(sizes.measurement_rows, sizes.measurement_floats, token_blocks,
                  [](auto element) { return launch_token_backward_causal<decltype(element)>; }));
  CSAT_TRY(plan.measured.reduce_measurements(p.measured, stream));
  return plan.tokens.reduce_measurements(plan.token_params, stream);
}

}  // namespace csat
