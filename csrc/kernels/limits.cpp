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
