// attend, or one of its kin, and decode one after the other, with z in the workspace where the caller does not want it.
// Host code only.
#pragma once
#include "csat/launch.h"
#include "csat/workspace.h"

namespace csat {

template <typename Attend>
struct DecodePair {
  Attend attend;
  DecodeParams decode;

  DecodePair(const Attend& a, const DecodeParams& d, Carver& carver) : attend(a), decode(d) {
    decode.z = z_of(attend) = take_z_rows(a, carver);
  }

  static int64_t workspace(const Attend& a, const DecodeParams& d, int64_t (*attend_workspace)(const Attend&)) {
    Carver carver(nullptr);
    const DecodePair pair(a, d, carver);
    const int64_t first = attend_workspace(pair.attend), second = decode_workspace(pair.decode);
    return carver.used() + (first > second ? first : second);
  }

  static int forward(const Attend& a, const DecodeParams& d, int (*attend_forward)(const Attend&, void*, void*),
                     void* workspace, void* stream) {
    Carver carver(workspace);
    const DecodePair pair(a, d, carver);
    void* rest = static_cast<char*>(workspace) + carver.used();
    CSAT_TRY(attend_forward(pair.attend, rest, stream));
    return decode_forward(pair.decode, rest, stream);
  }

 private:
  static View& z_of(AttendParams& p) { return p.z; }
  static View& z_of(AttendCausalParams& p) { return p.measured.z; }
  static View& z_of(PrefixParams& p) { return p.z; }

  static View take_z_rows(const AttendParams& p, Carver& carver) { return take_rows(p, p.queries, carver); }
  static View take_z_rows(const AttendCausalParams& p, Carver& carver) { return take_z_rows(p.measured, carver); }
  static View take_z_rows(const PrefixParams& p, Carver& carver) { return take_rows(p, p.tokens, carver); }

  // z (B, H, rows, R) of the caller, or rows in the workspace.
  template <typename Params>
  static View take_rows(const Params& p, int64_t rows, Carver& carver) {
    if (p.z.data) return p.z;
    const int64_t pitch = limits::round_up(p.features, 8), head = rows * pitch;
    void* z = carver.take<char>(p.batch * p.heads * head * size_of(p.q.dtype));
    return {z, p.q.dtype, {p.heads * head, head, pitch, 1}};
  }
};

}  // namespace csat
