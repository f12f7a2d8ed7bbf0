#include "csat/limits.h"

namespace csat::limits {
namespace {

const char* check_feature(int64_t n, const char* reason) { return n > kMaxFeature ? reason : nullptr; }

const char* check_row(int64_t floats, int64_t shared_limit) {
  return row_tile(floats, shared_limit) ? nullptr : "eight rows of this size exceed the shared memory of a block";
}

const char* first_of(std::initializer_list<const char*> reasons) {
  for (const char* reason : reasons)
    if (reason) return reason;
  return nullptr;
}

const char* check_attend(const AttendParams& p) {
  return first_of(
      {check_feature(p.head_dim, "head dimension D above 1024"),
       check_feature(p.features, "feature count R above 1024"),
       p.batch * p.heads * ceil_div(p.queries, kMicroRows) > kMaxBlocks ? "more than 2^31 row tiles" : nullptr});
}

const char* check_decoder(const DecodeParams& p) {
  return first_of(
      {check_feature(p.decoder.features, "feature count R above 1024"),
       check_feature(p.decoder.coefficients, "coefficient count P above 1024"),
       check_feature(p.decoder.outputs, "output size Dv above 1024"),
       p.batch * p.heads * ceil_div(p.queries, kMicroRows) > kMaxBlocks ? "more than 2^31 row tiles" : nullptr});
}

}  // namespace

namespace {

const char* check_dtypes(DType dtype, const Decoder* d) {
  if (dtype == DType::f32) return "float32: the tensor cores take bf16 and fp16";
  if (d)
    for (const View* weight : {&d->S, &d->B, &d->psi})
      if (weight->dtype != DType::f32 && weight->dtype != dtype) return "decoder weights of another 16-bit dtype";
  return nullptr;
}

// The device of wgmma, and sizes of rows that tensor copies bring: no tensor map has an axis of 0.
const char* check_wgmma(const Device& device, std::initializer_list<int64_t> row_sizes) {
  if (device.capability != kWgmmaCapability) return "wgmma belongs to compute capability 9.0";
  if (!device.wgmma_code) return "the library is built without code for sm_90a";
  for (int64_t n : row_sizes)
    if (n == 0) return "D, R or Dv is 0";
  return nullptr;
}

// The compile-time sizes of both tensor-core families; `feature_of` picks that of D, R and Dv.
const char* plan_sizes(ForwardMmaPlan& plan, const AttendParams* attend, const DecodeParams* decode,
                       int (*feature_of)(int64_t), const char* feature_reason) {
  const DType dtype = attend ? attend->q.dtype : decode->z.dtype;
  if (const char* reason = check_dtypes(dtype, decode ? &decode->decoder : nullptr)) return reason;
  int64_t feature = 0;
  if (attend) feature = attend->head_dim > attend->features ? attend->head_dim : attend->features;
  if (decode) {
    const Decoder& d = decode->decoder;
    for (int64_t n : {d.features, d.outputs}) feature = feature > n ? feature : n;
    plan.atoms = mma_atoms(d.coefficients);
    if (!plan.atoms) return "coefficient count P above 256";
    if (attend && plan.atoms > kFusedMmaAtoms) return "coefficient count P above 128 in the fused kernel";
  }
  plan.feature = feature_of(feature);
  if (!plan.feature) return feature_reason;
  const int64_t pairs = attend ? attend->batch * attend->heads : decode->batch * decode->heads;
  if (pairs > kMaxBlocks) return "more than 2^31 pairs of batch element and head";
  return attend && attend->measurements == 0 ? "no measurements" : nullptr;
}

}  // namespace

const char* plan_mma(ForwardMmaPlan& plan, const AttendParams* attend, const DecodeParams* decode,
                     int64_t shared_limit) {
  plan = {};
  if (const char* reason = plan_sizes(plan, attend, decode, mma_feature, "D, R or Dv above 128")) return reason;
  if (attend && decode && plan.feature > kFusedMmaFeature) return "D, R or Dv above 96 in the fused kernel";
  const int64_t weights = decode ? decoder_mma_bytes(decode->decoder, plan.feature, plan.atoms) : 0;
  if (!attend) {
    plan.stages = 1;
    plan.shared_bytes = weights + kMmaWarps * mma_tile_bytes(decode_mma_rows(plan.atoms), plan.feature);
    return plan.shared_bytes <= shared_limit ? nullptr : "the decoder's weights exceed the shared memory of a block";
  }
  const int64_t chunks = ceil_div(attend->measurements, mma_chunk(plan.feature));
  const int64_t rows = kMmaWarps * mma_tile_bytes(kMmaRows, plan.feature);
  // Resident with the next rows on their way, resident, streamed: the first that fits.
  const struct {
    int64_t slots;
    int stages;
  } choices[] = {{chunks, 2}, {chunks, 1}, {2, 1}};
  for (const auto& choice : choices) {
    plan.chunks = static_cast<int>(chunks);
    plan.slots = static_cast<int>(choice.slots);
    plan.stages = choice.stages;
    plan.shared_bytes = choice.slots * mma_slot_bytes(plan.feature) + weights + choice.stages * rows;
    if (plan.shared_bytes <= shared_limit) return nullptr;
  }
  return "two chunks of measurements and the decoder's weights exceed the shared memory of a block";
}

const char* plan_causal_mma(ForwardMmaPlan& plan, const AttendCausalParams& p, const DecodeParams* decode,
                            int64_t shared_limit) {
  plan = {};
  AttendParams of_tokens = p.measured;  // there may be no measurements
  of_tokens.measurements = p.tokens.count;
  const char* feature_reason = decode ? "D, R or Dv above 128" : "D or R above 128";
  if (const char* reason = plan_sizes(plan, &of_tokens, decode, mma_feature, feature_reason)) return reason;
  if (p.measured.measurements > kMaxTokens) return "more than 2^31 - 2 measurements";
  if (decode && plan.feature > kFusedMmaFeature) return "D, R or Dv above 96 in the fused kernel";
  plan.shared_bytes = attend_causal_mma_bytes(plan.feature);
  if (decode) plan.shared_bytes += decoder_mma_bytes(decode->decoder, plan.feature, plan.atoms);
  if (plan.shared_bytes <= shared_limit) return nullptr;
  return decode ? "two chunks of columns and the decoder's weights exceed the shared memory of a block"
                : "two chunks of columns exceed the shared memory of a block";
}

const char* plan_prefix_mma(ForwardMmaPlan& plan, const PrefixParams& p, const DecodeParams* decode,
                            int64_t shared_limit) {
  plan = {};
  AttendParams rows{};
  rows.q.dtype = p.q.dtype;
  rows.batch = p.batch;
  rows.heads = p.heads;
  rows.head_dim = p.head_dim;
  rows.features = p.features;
  rows.measurements = p.measurements;
  const char* feature_reason = decode ? "D, R or Dv above 128" : "D or R above 128";
  if (const char* reason = plan_sizes(plan, &rows, decode, prefix_mma_feature, feature_reason)) return reason;
  if (p.tokens == 0) return "no tokens";
  if (p.tokens > kMaxTokens) return "more than 2^31 - 2 tokens";
  if (decode && plan.atoms > prefix_mma_atoms_limit(plan.feature))
    return "coefficient count P above 64 in the fused kernel of D = 128";
  const int64_t chunks = ceil_div(p.tokens, kPrefixMmaChunk), states = p.batch * p.state_heads * chunks;
  const int64_t rows_of_state = ceil_div(p.measurements, kPrefixSumRows);
  if (states * rows_of_state > kMaxBlocks || p.batch * p.heads * chunks > kMaxBlocks ||
      p.batch * p.state_heads * rows_of_state * kPrefixSumRows * plan.feature / kThreads > kMaxBlocks)
    return "more than 2^31 blocks";
  plan.chunks = static_cast<int>(ceil_div(p.measurements, kPrefixStretch));
  const int64_t weights = decode ? decoder_mma_bytes(decode->decoder, plan.feature, plan.atoms) : 0;
  const auto bytes = [&](int slots) { return attend_prefix_mma_bytes(plan.feature, slots) + weights; };
  // Two slots where two blocks still share a multiprocessor, or where one slot would not let them; else one.
  const bool shares = prefix_mma_blocks(plan.feature, plan.atoms) == 2;
  const auto pair = [&](int slots) { return shares && 2 * bytes(slots) <= shared_limit - kSharedOfBlock; };
  plan.slots = (pair(2) || !pair(1)) && bytes(2) <= shared_limit ? 2 : 1;
  plan.shared_bytes = bytes(plan.slots);
  if (plan.shared_bytes <= shared_limit && prefix_sums_mma_bytes(plan.feature) <= shared_limit) return nullptr;
  return decode ? "a chunk of tokens and the decoder's weights exceed the shared memory of a block"
                : "a chunk of tokens exceeds the shared memory of a block";
}

const char* plan_wgmma(ForwardMmaPlan& plan, const AttendParams& attend, const DecodeParams* decode,
                       const Device& device) {
  plan = {};
  if (const char* reason =
          check_wgmma(device, {attend.head_dim, attend.features, decode ? decode->decoder.outputs : 1}))
    return reason;
  if (const char* reason =
          plan_sizes(plan, &attend, decode, wgmma_feature, "D, R and Dv neither up to 64 nor 97 to 128"))
    return reason;
  if (decode && plan.atoms > wgmma_atoms_limit(plan.feature)) return "coefficient count P above 64 with D = 128";
  if (attend.queries > kMaxBlocks) return "more than 2^31 queries";
  plan.wgmma = true;
  if (attend.measurements > kMaxTokens) return "more than 2^31 - 2 measurements";
  plan.chunks = static_cast<int>(ceil_div(attend.measurements, kWgmmaChunk));
  const int64_t weights = decode ? wgmma_decoder_bytes(decode->decoder, plan.feature, plan.atoms) : 0;
  const auto fits = [&](int slots) {
    plan.slots = slots;
    plan.shared_bytes = wgmma_attend_bytes(plan.chunks, slots, plan.feature, plan.atoms) + weights;
    return plan.shared_bytes <= device.shared_bytes;
  };
  // With three a warpgroup that is ahead of the first one finds its next chunk still on its way.
  if (fits(plan.chunks) || (!decode && (fits(kWgmmaRing) || fits(kWgmmaRing - 1)))) return nullptr;
  return decode ? "measurements and decoder exceed the shared memory of a block"
                : "the biases of the measurements exceed the shared memory of a block";
}

const char* plan_wgmma(ForwardMmaPlan& plan, const DecodeParams& decode, const Device& device) {
  plan = {};
  if (const char* reason = check_wgmma(device, {decode.decoder.features, decode.decoder.outputs})) return reason;
  if (const char* reason = plan_sizes(plan, nullptr, &decode, decode_wgmma_feature, "R or Dv above 128")) return reason;
  if (plan.atoms > kDecodeWgmmaAtoms) return "coefficient count P above 128";
  if (decode.batch * decode.heads * ceil_div(decode.queries, kWgmmaRows) > kMaxBlocks || decode.queries > kMaxBlocks)
    return "more than 2^31 tiles";
  plan.wgmma = true;
  for (int stages : {2, 1}) {
    plan.stages = stages;
    plan.shared_bytes = decode_wgmma_bytes(decode.decoder, plan.feature, plan.atoms, stages);
    if (plan.shared_bytes <= device.shared_bytes) return nullptr;
  }
  return "the decoder's weights exceed the shared memory of a block";
}

const char* plan_forward(ForwardMmaPlan& plan, const AttendParams* attend, const DecodeParams* decode,
                         const Device& device) {
  if (!(attend ? plan_wgmma(plan, *attend, decode, device) : plan_wgmma(plan, *decode, device))) return nullptr;
  return plan_mma(plan, attend, decode, device.shared_bytes);
}

const char* why_not_mma(const DecodeBackwardParams& p, int64_t shared_limit) {
  const Decoder& d = p.forward.decoder;
  const int atoms = mma_atoms(d.coefficients), feature = decode_backward_feature(d.features, d.outputs);
  if (const char* reason = check_dtypes(p.forward.z.dtype, &d)) return reason;
  if (!atoms) return "coefficient count P above 256";
  if (!feature) return "R or Dv above 128";
  return decode_backward_bytes(atoms, feature, false) <= shared_limit
             ? nullptr
             : "a layer's weights exceed the shared memory of a block";
}

const char* why_not_wgmma(const DecodeBackwardParams& p, const Device& device) {
  const Decoder& d = p.forward.decoder;
  const int size = decode_backward_wgmma_size(d);
  if (const char* reason = check_wgmma(device, {d.features, d.outputs})) return reason;
  if (const char* reason = check_dtypes(p.forward.z.dtype, &d)) return reason;
  if (!size) return "P, R or Dv above 128";
  if (d.layers > 1 && (d.s_layers > 1 || d.b_layers > 1)) return "S or B not tied over the layers";
  if (p.forward.batch * p.forward.heads * p.forward.queries == 0) return "no rows";
  if (p.forward.queries > kMaxBlocks) return "more than 2^31 queries";
  return decode_backward_wgmma_stages(size, d.layers, device.shared_bytes)
             ? nullptr
             : "the iterates of all layers exceed the shared memory of a block";
}

const char* why_not(const AttendParams& p, int64_t shared_limit) {
  return first_of({check_attend(p), check_row(attend_row(p.measurements, p.head_dim, p.features), shared_limit)});
}

const char* why_not(const AttendBackwardParams& p, int64_t shared_limit) {
  const AttendParams& f = p.forward;
  return first_of({check_attend(f), check_row(query_backward_row(f.measurements, f.head_dim, f.features), shared_limit),
                   check_row(measurement_backward_row(f.head_dim, f.features), shared_limit)});
}

const char* why_not(const AttendCausalParams& p, int64_t shared_limit) {
  const AttendParams& m = p.measured;
  const int64_t columns = causal_columns(m, p.tokens);
  return first_of({check_attend(m), check_row(attend_causal_row(columns, m.head_dim, m.features), shared_limit)});
}

const char* why_not(const AttendCausalBackwardParams& p, int64_t shared_limit) {
  const AttendParams& f = p.measured.forward;
  const int64_t columns = causal_columns(f, p.tokens);
  return first_of({check_attend(f),
                   check_row(query_backward_row(columns, f.head_dim, f.features) + kSeenFloats, shared_limit),
                   check_row(measurement_backward_row(f.head_dim, f.features) + kSeenFloats, shared_limit)});
}

namespace {

const char* check_prefix(const PrefixParams& p) {
  return first_of(
      {check_feature(p.head_dim, "head dimension D above 1024"),
       check_feature(p.features, "feature count R above 1024"),
       p.batch * p.heads * ceil_div(p.tokens, kMicroRows) > kMaxBlocks ? "more than 2^31 row tiles" : nullptr});
}

}  // namespace

const char* why_not(const PrefixParams& p, int64_t shared_limit) {
  return first_of(
      {check_prefix(p), check_row(attend_prefix_row(p.measurements, p.head_dim, p.features), shared_limit)});
}

const char* why_not(const PrefixBackwardParams& p, int64_t shared_limit) {
  const PrefixParams& f = p.forward;
  return first_of(
      {check_prefix(f), check_row(prefix_query_backward_row(f.measurements, f.head_dim, f.features), shared_limit)});
}

namespace {

const char* plan_backward_sizes(AttendBackwardPlan& plan, const AttendBackwardParams& p, int (*feature_of)(int64_t),
                                const char* feature_reason) {
  const AttendParams& f = p.forward;
  plan = {};
  plan.feature = feature_of(f.head_dim > f.features ? f.head_dim : f.features);
  if (const char* reason = check_dtypes(f.q.dtype, nullptr)) return reason;
  if (!plan.feature) return feature_reason;
  if (f.measurements == 0) return "no measurements";
  return p.dq.stride[3] != 1 ? "the rows of dq are not contiguous" : nullptr;
}

// What both families ask of a plan.
const char* check_plan(const AttendBackwardPlan& plan, const AttendBackwardParams& p, int64_t shared_limit) {
  const AttendParams& f = p.forward;
  const bool shift = plan.slabs > 1;
  const int64_t shift_bytes =
      plan.row_blocks > 0 ? backward_mean_wgmma_bytes(plan.feature) : backward_shift_mma_bytes(plan.feature);
  if (plan.warps == 0 || plan.shared_bytes > shared_limit || (shift && shift_bytes > shared_limit))
    return "the tiles of this size exceed the shared memory of a block";
  const int64_t pairs = f.batch * f.heads, rows = pairs * f.queries;
  if (pairs * ceil_div(f.queries, plan.queries) * plan.slabs > kMaxBlocks || f.queries > kMaxBlocks ||
      (shift && rows * ceil_div(f.head_dim, 32) > kMaxBlocks))
    return "more than 2^31 tiles";
  return nullptr;
}

}  // namespace

const char* plan_mma(AttendBackwardPlan& plan, const AttendBackwardParams& p, int64_t shared_limit) {
  if (const char* reason = plan_backward_sizes(plan, p, mma_feature, "head dimension D or feature count R above 128"))
    return reason;
  int64_t most = kMmaWarps;
  while (most > 0 && attend_backward_mma_bytes(most, plan.feature) > shared_limit) --most;
  const int64_t groups = ceil_div(p.forward.measurements, backward_warp_rows(plan.feature));
  plan.slabs = most ? ceil_div(groups, most) : 0;
  plan.warps = most ? ceil_div(groups, plan.slabs) : 0;
  plan.slab_rows = plan.warps * backward_warp_rows(plan.feature);
  plan.queries = kBackwardQueries;
  plan.shared_bytes = attend_backward_mma_bytes(plan.warps, plan.feature);
  return check_plan(plan, p, shared_limit);
}

const char* plan_wgmma(AttendBackwardPlan& plan, const AttendBackwardParams& p, const Device& device) {
  if (const char* reason = check_wgmma(device, {p.forward.head_dim, p.forward.features})) return reason;
  if (const char* reason = plan_backward_sizes(plan, p, wgmma_feature, "D and R neither up to 64 nor 97 to 128"))
    return reason;
  // Of 64 features slabs of 256 measurements where those of 128 would not be padded less.
  const int64_t M = p.forward.measurements;
  const bool wide = plan.feature == 64, full = round_up(M, 256) == round_up(M, 128);
  plan.row_blocks = wide && M > kWgmmaRows ? 2 : 1;
  plan.warps = M <= kWgmmaRows || (wide && !full) ? kMmaWarps / 2 : kMmaWarps;
  plan.slab_rows = plan.warps * 16 * plan.row_blocks;
  plan.slabs = ceil_div(M, plan.slab_rows);
  plan.queries = wgmma_backward_queries(plan.feature, plan.row_blocks);
  plan.shared_bytes = attend_backward_wgmma_bytes(plan.warps, plan.feature, plan.row_blocks);
  return check_plan(plan, p, device.shared_bytes);
}

const char* plan_backward(AttendBackwardPlan& plan, const AttendBackwardParams& p, const Device& device) {
  if (!plan_wgmma(plan, p, device)) return nullptr;
  return plan_mma(plan, p, device.shared_bytes);
}

const char* why_not_mma(const AttendCausalBackwardParams& p, int64_t shared_limit) {
  const AttendParams& f = p.measured.forward;
  const int feature = mma_feature(f.head_dim > f.features ? f.head_dim : f.features);
  if (const char* reason = check_dtypes(f.q.dtype, nullptr)) return reason;
  if (!feature) return "D or R above 128";
  if (f.measurements > kMaxTokens) return "more than 2^31 - 2 measurements";
  if (p.measured.dq.stride[3] != 1 || p.dk.stride[3] != 1 || p.dv.stride[3] != 1)
    return "the rows of dq, dk or dv are not contiguous";
  if (f.batch * f.heads * ceil_div(causal_columns(f, p.tokens) + f.queries, kMicroRows) > kMaxBlocks)
    return "more than 2^31 tiles";
  return causal_query_backward_bytes(feature) <= shared_limit && causal_column_backward_bytes(feature) <= shared_limit
             ? nullptr
             : "the tiles of this size exceed the shared memory of a block";
}

const char* why_not_mma(const PrefixBackwardParams& p, int64_t shared_limit) {
  ForwardMmaPlan plan;
  if (const char* reason = plan_prefix_mma(plan, p.forward, nullptr, shared_limit)) return reason;
  if (p.dq.stride[3] != 1 || p.dk.stride[3] != 1 || p.dv.stride[3] != 1)
    return "the rows of dq, dk or dv are not contiguous";
  const int64_t elements = p.forward.batch * p.forward.heads * round_up(p.forward.measurements, kPrefixSumRows) *
                           ceil_div(p.forward.tokens, kPrefixMmaChunk) * plan.feature;
  if (elements / kThreads > kMaxBlocks) return "more than 2^31 blocks";
  return prefix_query_backward_mma_bytes(plan.feature) <= shared_limit &&
                 prefix_token_backward_mma_bytes(plan.feature) <= shared_limit
             ? nullptr
             : "a chunk of tokens with its gradients exceeds the shared memory of a block";
}

const char* why_not(const DecodeParams& p, int64_t shared_limit) {
  return first_of({check_decoder(p), check_row(decode_row(p.decoder.coefficients, p.decoder.features), shared_limit)});
}

const char* why_not(const DecodeBackwardParams& p, int64_t shared_limit) {
  const Decoder& d = p.forward.decoder;
  return first_of(
      {check_decoder(p.forward), check_row(decode_backward_row(d.coefficients, d.features, d.outputs), shared_limit)});
}

const char* why_not(const AttendParams& attend, const DecodeParams& decode, int64_t shared_limit) {
  return first_of(
      {check_attend(attend), check_decoder(decode), check_row(attend_decode_row(attend, decode), shared_limit)});
}

const char* why_not(const AttendCausalParams& attend, const DecodeParams& decode, int64_t shared_limit) {
  return first_of({why_not(attend, shared_limit), why_not(decode, shared_limit)});
}

const char* why_not(const PrefixParams& attend, const DecodeParams& decode, int64_t shared_limit) {
  return first_of({why_not(attend, shared_limit), why_not(decode, shared_limit)});
}

namespace {

constexpr const char* kNoPair = "not a fused kernel";

bool is_causal(Kernel kernel) {
  return kernel == Kernel::attend_causal || kernel == Kernel::attend_causal_decode ||
         kernel == Kernel::attend_causal_backward;
}

bool is_prefix(Kernel kernel) {
  return kernel == Kernel::attend_prefix || kernel == Kernel::attend_prefix_decode ||
         kernel == Kernel::attend_prefix_backward;
}

PrefixParams prefix_of(const Problem& p) {
  const AttendParams& a = p.attend;
  PrefixParams prefix{};
  prefix.q.dtype = a.q.dtype;
  prefix.batch = a.batch;
  prefix.heads = a.heads;
  prefix.key_heads = prefix.state_heads = a.key_heads;
  prefix.tokens = a.queries;
  prefix.measurements = a.measurements;
  prefix.head_dim = a.head_dim;
  prefix.features = a.features;
  return prefix;
}

const char* can_pair(const Problem& p, const Device& device) {
  ForwardMmaPlan plan;
  DecodeParams decode = p.decode;
  decode.z.dtype = p.attend.q.dtype;
  const bool either = !plan_forward(plan, &p.attend, nullptr, device) || !plan_forward(plan, nullptr, &decode, device);
  return either ? nullptr : "neither attend nor decode alone runs on tensor cores";
}

const char* can_run_forward(Kernel kernel, Family family, const Problem& p, const Device& device) {
  const AttendParams* attend = kernel == Kernel::decode ? nullptr : &p.attend;
  const DecodeParams* decode = kernel == Kernel::attend ? nullptr : &p.decode;
  ForwardMmaPlan plan;
  switch (family) {
    case Family::wgmma:
      return attend ? plan_wgmma(plan, *attend, decode, device) : plan_wgmma(plan, *decode, device);
    case Family::mma:
      return plan_mma(plan, attend, decode, device.shared_bytes);
    case Family::pair:
      return kernel == Kernel::attend_decode ? can_pair(p, device) : kNoPair;
    default:
      if (kernel == Kernel::attend_decode) return why_not(p.attend, p.decode, device.shared_bytes);
      return attend ? why_not(p.attend, device.shared_bytes) : why_not(p.decode, device.shared_bytes);
  }
}

AttendBackwardParams backward_of(const AttendParams& forward) {
  AttendBackwardParams p{};
  p.forward = forward;
  p.dq.stride[3] = 1;
  return p;
}

const char* can_run_backward(Family family, const AttendBackwardParams& p, const Device& device) {
  AttendBackwardPlan plan;
  if (family == Family::wgmma) return plan_wgmma(plan, p, device);
  if (family == Family::pair) return kNoPair;
  return family == Family::mma ? plan_mma(plan, p, device.shared_bytes) : why_not(p, device.shared_bytes);
}

const char* can_run_backward(Family family, const DecodeBackwardParams& p, const Device& device) {
  if (family == Family::wgmma) return why_not_wgmma(p, device);
  if (family == Family::pair) return kNoPair;
  return family == Family::mma ? why_not_mma(p, device.shared_bytes) : why_not(p, device.shared_bytes);
}

AttendCausalBackwardParams causal_backward_of(const Problem& p) {
  AttendCausalBackwardParams backward{};
  backward.measured = backward_of(p.attend);
  backward.tokens = p.tokens;
  backward.dk.stride[3] = backward.dv.stride[3] = 1;
  return backward;
}

const char* can_run_causal(Kernel kernel, Family family, const Problem& p, const Device& device) {
  const int64_t limit = device.shared_bytes;
  if (family == Family::wgmma) return "no wgmma kernel of this op";
  if (kernel == Kernel::attend_causal_backward) {
    if (family == Family::pair) return kNoPair;
    const AttendCausalBackwardParams backward = causal_backward_of(p);
    return family == Family::mma ? why_not_mma(backward, limit) : why_not(backward, limit);
  }
  const AttendCausalParams causal{p.attend, p.tokens};
  const bool fused = kernel == Kernel::attend_causal_decode;
  ForwardMmaPlan plan;
  if (family == Family::mma) return plan_causal_mma(plan, causal, fused ? &p.decode : nullptr, limit);
  if (family == Family::pair) return fused ? why_not(causal, p.decode, limit) : kNoPair;
  return fused ? "no simt kernel of both: they are a pair" : why_not(causal, limit);
}

const char* can_run_prefix(Kernel kernel, Family family, const Problem& p, const Device& device) {
  const int64_t limit = device.shared_bytes;
  const PrefixParams prefix = prefix_of(p);
  if (family == Family::wgmma) return "no wgmma kernel of this op";
  if (kernel == Kernel::attend_prefix_backward) {
    if (family == Family::pair) return kNoPair;
    PrefixBackwardParams backward{};
    backward.forward = prefix;
    backward.dq.stride[3] = backward.dk.stride[3] = backward.dv.stride[3] = 1;
    return family == Family::mma ? why_not_mma(backward, limit) : why_not(backward, limit);
  }
  const bool fused = kernel == Kernel::attend_prefix_decode;
  ForwardMmaPlan plan;
  if (family == Family::mma) return plan_prefix_mma(plan, prefix, fused ? &p.decode : nullptr, limit);
  if (family == Family::pair) return fused ? why_not(prefix, p.decode, limit) : kNoPair;
  return fused ? "no simt kernel of both: they are a pair" : why_not(prefix, limit);
}

}  // namespace

const char* can_run(Kernel kernel, Family family, const Problem& p, const Device& device) {
  if (is_causal(kernel)) return can_run_causal(kernel, family, p, device);
  if (is_prefix(kernel)) return can_run_prefix(kernel, family, p, device);
  if (kernel == Kernel::attend_backward) return can_run_backward(family, backward_of(p.attend), device);
  if (kernel == Kernel::decode_backward) {
    DecodeBackwardParams backward{};
    backward.forward = p.decode;
    return can_run_backward(family, backward, device);
  }
  return can_run_forward(kernel, family, p, device);
}

namespace {

int64_t simt_bytes(std::initializer_list<int64_t> floats_per_row, int64_t shared_limit) {
  int64_t most = 0;
  for (int64_t floats : floats_per_row) {
    const int64_t bytes = row_tile(floats, shared_limit) * floats * 4;
    most = bytes > most ? bytes : most;
  }
  return most;
}

int64_t forward_bytes(Kernel kernel, Family family, const Problem& p, const Device& device) {
  const AttendParams& a = p.attend;
  const int64_t limit = device.shared_bytes, attend = attend_row(a.measurements, a.head_dim, a.features);
  if (family == Family::simt) {
    if (kernel == Kernel::attend_decode) return simt_bytes({attend_decode_row(a, p.decode)}, limit);
    return simt_bytes({kernel == Kernel::attend ? attend : decode_row(p.decode.decoder.coefficients, a.features)},
                      limit);
  }
  ForwardMmaPlan plan;
  const AttendParams* attended = kernel == Kernel::decode ? nullptr : &a;
  const DecodeParams* decode = kernel == Kernel::attend ? nullptr : &p.decode;
  if (family == Family::wgmma) attended ? plan_wgmma(plan, a, decode, device) : plan_wgmma(plan, p.decode, device);
  if (family == Family::mma) plan_mma(plan, attended, decode, limit);
  return plan.shared_bytes;
}

int64_t causal_bytes(Kernel kernel, Family family, const Problem& p, const Device& device) {
  const AttendParams& a = p.attend;
  const int64_t limit = device.shared_bytes, columns = causal_columns(a, p.tokens);
  if (kernel == Kernel::attend_causal_backward) {
    if (family == Family::simt)
      return simt_bytes({query_backward_row(columns, a.head_dim, a.features) + kSeenFloats,
                         measurement_backward_row(a.head_dim, a.features) + kSeenFloats},
                        limit);
    const int feature = mma_feature(a.head_dim > a.features ? a.head_dim : a.features);
    const int64_t of_queries = causal_query_backward_bytes(feature), of_columns = causal_column_backward_bytes(feature);
    return of_queries > of_columns ? of_queries : of_columns;
  }
  if (family == Family::simt) return simt_bytes({attend_causal_row(columns, a.head_dim, a.features)}, limit);
  ForwardMmaPlan plan;
  plan_causal_mma(plan, {a, p.tokens}, kernel == Kernel::attend_causal_decode ? &p.decode : nullptr, limit);
  return plan.shared_bytes;
}

int64_t prefix_bytes(Kernel kernel, Family family, const Problem& p, const Device& device) {
  const AttendParams& a = p.attend;
  const int64_t limit = device.shared_bytes;
  if (family == Family::simt) {
    const bool forward = kernel == Kernel::attend_prefix;
    return simt_bytes({forward ? attend_prefix_row(a.measurements, a.head_dim, a.features)
                               : prefix_query_backward_row(a.measurements, a.head_dim, a.features)},
                      limit);
  }
  ForwardMmaPlan plan;
  if (kernel == Kernel::attend_prefix_backward) {
    const int feature = prefix_mma_feature(a.head_dim > a.features ? a.head_dim : a.features);
    const int64_t of_queries = prefix_query_backward_mma_bytes(feature),
                  of_tokens = prefix_token_backward_mma_bytes(feature);
    return of_queries > of_tokens ? of_queries : of_tokens;
  }
  plan_prefix_mma(plan, prefix_of(p), kernel == Kernel::attend_prefix_decode ? &p.decode : nullptr, limit);
  return plan.shared_bytes;
}

}  // namespace

int64_t shared_bytes(Kernel kernel, Family family, const Problem& p, const Device& device) {
  if (can_run(kernel, family, p, device) || family == Family::pair) return 0;
  if (is_causal(kernel)) return causal_bytes(kernel, family, p, device);
  if (is_prefix(kernel)) return prefix_bytes(kernel, family, p, device);
  const int64_t M = p.attend.measurements, D = p.attend.head_dim, R = p.attend.features, limit = device.shared_bytes;
  const Decoder& d = p.decode.decoder;
  if (kernel == Kernel::attend_backward) {
    if (family == Family::simt) return simt_bytes({query_backward_row(M, D, R), measurement_backward_row(D, R)}, limit);
    AttendBackwardPlan plan;
    if (family == Family::wgmma) plan_wgmma(plan, backward_of(p.attend), device);
    if (family == Family::mma) plan_mma(plan, backward_of(p.attend), limit);
    return plan.shared_bytes;
  }
  if (kernel == Kernel::decode_backward) {
    if (family == Family::simt) return simt_bytes({decode_backward_row(d.coefficients, d.features, d.outputs)}, limit);
    if (family == Family::wgmma) {
      const int size = decode_backward_wgmma_size(d);
      return decode_backward_wgmma_bytes(size, d.layers, decode_backward_wgmma_stages(size, d.layers, limit));
    }
    const int atoms = mma_atoms(d.coefficients), feature = decode_backward_feature(d.features, d.outputs);
    const int64_t apart = decode_backward_bytes(atoms, feature, true);
    return apart <= limit ? apart : decode_backward_bytes(atoms, feature, false);
  }
  return forward_bytes(kernel, family, p, device);
}

}  // namespace csat::limits
