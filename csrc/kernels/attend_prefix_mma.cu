// Host side of attend_prefix_mma.cuh: grid, decoder, choice of the compiled instance; batch elements and key heads in
// parts (prefix_parts.h).
#include "csat/attend_prefix_mma.h"
#include "csat/decoder_weights.h"
#include "csat/prefix_parts.h"
#include "csat/prefix_states.h"

namespace csat {
namespace {

using limits::ceil_div;

struct FusedParams {
  PrefixParams attend;
  DecodeParams decode;
  bool decodes;

  const DecodeParams* decoder() const { return decodes ? &decode : nullptr; }
};

const PrefixParams& forward_of(const FusedParams& p) { return p.attend; }

FusedParams part_of(FusedParams p, const Part& part) {
  const int64_t first = part.key_head * (p.attend.heads / p.attend.key_heads);
  p.attend = part_of(p.attend, part);
  if (!p.decodes) return p;
  DecodeParams& d = p.decode;
  d.out = from(d.out, part.batch, first);
  d.batch = p.attend.batch;
  d.heads = p.attend.heads;
  if (d.decoder.heads == 1) return p;
  d.decoder.heads = d.heads;
  for (View* weight : {&d.decoder.S, &d.decoder.B, &d.decoder.theta, &d.decoder.psi, &d.decoder.step})
    *weight = from(*weight, first, 0);
  return p;
}

using Launch = int (*)(const PrefixMmaArgs&, int64_t, int64_t, void*);

template <typename T>
Launch instance(const limits::ForwardMmaPlan& plan) {
  if (plan.feature == 128)
    return plan.atoms == 0 ? launch_attend_prefix_mma<T, 128, 0> : launch_attend_prefix_mma<T, 128, 64>;
  if (plan.atoms == 0) return launch_attend_prefix_mma<T, 64, 0>;
  return plan.atoms == 64 ? launch_attend_prefix_mma<T, 64, 64> : launch_attend_prefix_mma<T, 64, 128>;
}

struct MmaPlan {
  PrefixStatesPlan states;

  int take(const FusedParams& f, Carver& carver, void* stream) {
    CSAT_TRY(states.take(f.attend, f.decoder(), carver, stream));
    if (!f.decodes) return 0;
    ForwardMmaArgs& rows = states.args.rows;
    rows.out = f.decode.out;
    rows.out_vectors = vector_stores(f.decode.out, f.decode.decoder.outputs);
    return take_decoder(rows.decoder, f.decode.decoder, f.attend.q.dtype, carver, stream);
  }

  int run(const FusedParams& f, void* stream) const {
    CSAT_TRY(states.run(f.attend, stream));
    const limits::ForwardMmaPlan& plan = states.plan;
    PrefixMmaArgs args = states.args;
    const int64_t units = int64_t(args.rows.pairs) * args.rows.units;
    const int64_t most = limits::prefix_mma_blocks(plan.feature, plan.atoms) * int64_t(multiprocessors());
    args.run = static_cast<int>(ceil_div(units, most));
    const Launch launch = f.attend.q.dtype == DType::bf16 ? instance<bf16>(plan) : instance<f16>(plan);
    return launch(args, ceil_div(units, args.run), plan.shared_bytes, stream);
  }
};

FusedParams fused(const PrefixParams& p, const DecodeParams* decode) {
  return {p, decode ? *decode : DecodeParams{}, decode != nullptr};
}

}  // namespace

int64_t attend_prefix_mma_workspace(const PrefixParams& p, const DecodeParams* decode) {
  const FusedParams f = fused(p, decode);
  return workspace_of<MmaPlan>(part_of(f, first_part<MmaPlan>(f)));
}

int attend_prefix_mma(const PrefixParams& p, const DecodeParams* decode, void* workspace, void* stream) {
  return run_in_parts<MmaPlan>(fused(p, decode), workspace, stream);
}

}  // namespace csat
