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

const char* plan_mma(ForwardMmaPlan& plan, const AttendParams* attend, const DecodeParams* decode,
                     int64_t shared_limit) {
  const DType dtype = attend ? attend->q.dtype : decode->z.dtype;
  if (dtype == DType::f32) return "float32: the tensor cores take bf16 and fp16";
  int64_t feature = 0;
  if (attend) feature = attend->head_dim > attend->features ? attend->head_dim : attend->features;
  if (decode) {
    const Decoder& d = decode->decoder;
    for (int64_t n : {d.features, d.outputs}) feature = feature > n ? feature : n;
    for (const View* weight : {&d.S, &d.B, &d.psi})
      if (weight->dtype != DType::f32 && weight->dtype != dtype) return "decoder weights of another 16-bit dtype";
    plan.atoms = mma_atoms(d.coefficients);
    if (!plan.atoms) return "coefficient count P above 256";
    if (attend && plan.atoms > kFusedMmaAtoms) return "coefficient count P above 128 in the fused kernel";
  }
  plan.feature = mma_feature(feature);
  if (!plan.feature) return "D, R or Dv above 128";
  if (attend && decode && plan.feature > kFusedMmaFeature) return "D, R or Dv above 96 in the fused kernel";

  const int64_t weights = decode ? decoder_mma_bytes(decode->decoder, plan.feature, plan.atoms) : 0;
  if (!attend) {
    plan.stages = 1;
    plan.shared_bytes = weights + kMmaWarps * mma_tile_bytes(decode_mma_rows(plan.atoms), plan.feature);
    return plan.shared_bytes <= shared_limit ? nullptr : "the decoder's weights exceed the shared memory of a block";
  }
  if (attend->measurements == 0) return "no measurements";
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

const char* why_not(const AttendParams& p, int64_t shared_limit) {
  return first_of({check_attend(p), check_row(attend_row(p.measurements, p.head_dim, p.features), shared_limit)});
}

const char* why_not(const AttendBackwardParams& p, int64_t shared_limit) {
  const AttendParams& f = p.forward;
  return first_of({check_attend(f), check_row(query_backward_row(f.measurements, f.head_dim, f.features), shared_limit),
                   check_row(measurement_backward_row(f.head_dim, f.features), shared_limit)});
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

}  // namespace csat::limits
