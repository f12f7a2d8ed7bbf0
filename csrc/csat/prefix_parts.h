// How attend_prefix goes over batch elements and key heads in parts, so that its workspace stays within
// limits::kWorkspaceCap or that of one key head. Host code only.
#pragma once
#include "csat/workspace.h"

namespace csat {

struct Part {
  int64_t batch, key_head;  // the first ones
  int64_t batches, key_heads;
};

inline View from(View v, int64_t batch, int64_t head) {
  const int64_t offset = batch * v.stride[0] + head * v.stride[1];
  if (v.data) v.data = static_cast<char*>(v.data) + offset * size_of(v.dtype);
  return v;
}

inline PrefixParams part_of(PrefixParams p, const Part& part) {
  const int64_t heads = p.heads / p.key_heads, state_heads = p.state_heads / p.key_heads;
  for (View* of_query : {&p.q, &p.bias, &p.z, &p.lse}) *of_query = from(*of_query, part.batch, part.key_head * heads);
  for (View* of_key : {&p.k, &p.v}) *of_key = from(*of_key, part.batch, part.key_head);
  for (View* of_state : {&p.phi, &p.kc, &p.vc, &p.mass, &p.kc_end, &p.vc_end, &p.mass_end})
    *of_state = from(*of_state, part.batch, part.key_head * state_heads);
  if (p.keep) p.keep += part.batch * p.tokens;
  p.batch = part.batches;
  p.key_heads = part.key_heads;
  p.heads = part.key_heads * heads;
  p.state_heads = part.key_heads * state_heads;
  if (p.phi_batch > 1) p.phi_batch = part.batches;
  if (p.phi_heads > 1) p.phi_heads = p.state_heads;
  return p;
}
inline PrefixBackwardParams part_of(PrefixBackwardParams p, const Part& part) {
  const int64_t heads = p.forward.heads / p.forward.key_heads;
  const int64_t state_heads = p.forward.state_heads / p.forward.key_heads;
  for (View* of_query : {&p.dz, &p.dq, &p.dbias}) *of_query = from(*of_query, part.batch, part.key_head * heads);
  for (View* of_key : {&p.dk, &p.dv}) *of_key = from(*of_key, part.batch, part.key_head);
  for (View* of_state : {&p.dkc_end, &p.dvc_end, &p.dmass_end, &p.dphi, &p.dkc, &p.dvc, &p.dmass})
    *of_state = from(*of_state, part.batch, part.key_head * state_heads);
  p.forward = part_of(p.forward, part);
  return p;
}

inline const PrefixParams& forward_of(const PrefixParams& p) { return p; }
inline const PrefixParams& forward_of(const PrefixBackwardParams& p) { return p.forward; }

template <typename Plan, typename Params>
int64_t workspace_of(const Params& p) {
  Carver carver(nullptr);
  Plan().take(p, carver, nullptr);
  return carver.used();
}

// The first part: as many batch elements as the cap allows, else as many key heads of one.
template <typename Plan, typename Params>
Part first_part(const Params& p) {
  const PrefixParams& f = forward_of(p);
  const auto at_most = [](int64_t bytes, int64_t all) {
    const int64_t fit = bytes ? limits::kWorkspaceCap / bytes : all;
    return fit < 1 ? 1 : (fit < all ? fit : all);
  };
  const int64_t element = workspace_of<Plan>(part_of(p, {0, 0, 1, f.key_heads}));
  if (element <= limits::kWorkspaceCap) return {0, 0, at_most(element, f.batch), f.key_heads};
  return {0, 0, 1, at_most(workspace_of<Plan>(part_of(p, {0, 0, 1, 1})), f.key_heads)};
}

template <typename Plan, typename Params>
int run_in_parts(const Params& p, void* workspace, void* stream) {
  const PrefixParams& f = forward_of(p);
  const Part step = first_part<Plan>(p);
  Part part = step;
  for (part.batch = 0; part.batch < f.batch; part.batch += step.batches)
    for (part.key_head = 0; part.key_head < f.key_heads; part.key_head += step.key_heads) {
      part.batches = f.batch - part.batch < step.batches ? f.batch - part.batch : step.batches;
      part.key_heads = f.key_heads - part.key_head < step.key_heads ? f.key_heads - part.key_head : step.key_heads;
      const Params own = part_of(p, part);
      Carver carver(workspace);
      Plan plan;
      CSAT_TRY(plan.take(own, carver, stream));
      CSAT_TRY(plan.run(own, stream));
    }
  return 0;
}

}  // namespace csat
