// The C interface of the emulated library, for backend.py (ctypes): device memory, the report, and the kernels' own
// launch functions of csrc/csat/launch.h, under C names and with the structures as they are.
#include <cstdint>
#include <cstring>
#include <new>
#include <string>

#include "csat/launch.h"
#include "runtime/emulator.h"

extern "C" {

// Frees device memory, empties the report, sets the order of lanes, warps and blocks, and the device: 10 major + minor
// and the shared memory of a block.
void csat_reset(unsigned seed, int count_bank_conflicts, int compute_capability, int64_t shared_bytes) {
  emulator::reset();
  emulator::options.compute_capability = compute_capability;
  emulator::options.shared_bytes_per_block = size_t(shared_bytes);
  emulator::options.seed = seed;
  emulator::options.count_bank_conflicts = count_bank_conflicts != 0;
}

// Null if device memory (emulator::kDeviceBytes) is used up.
void* csat_allocate(int64_t bytes) {
  try {
    return emulator::device_allocate(size_t(bytes));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void csat_to_device(void* device, const void* host, int64_t bytes) {
  emulator::copy_to_device(device, host, size_t(bytes));
}
void csat_to_host(void* host, const void* device, int64_t bytes) {
  emulator::copy_to_host(host, device, size_t(bytes));
}

// The report as text, empty if nothing was found. Valid until the next call.
const char* csat_report() {
  static std::string text;
  text = emulator::report.text();
  return text.c_str();
}
void csat_counters(emulator::Counters* counters) { *counters = emulator::report.counters; }

const char* csat_error_string(int code) { return csat::error_string(code); }

// sizeof of a structure of launch.h, for the mirror in backend.py; 0 for an unknown name.
int64_t csat_sizeof(const char* name) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("View")) return sizeof(csat::View);
  if (is("AttendParams")) return sizeof(csat::AttendParams);
  if (is("AttendBackwardParams")) return sizeof(csat::AttendBackwardParams);
  if (is("AttendCausalParams")) return sizeof(csat::AttendCausalParams);
  if (is("AttendCausalBackwardParams")) return sizeof(csat::AttendCausalBackwardParams);
  if (is("PrefixParams")) return sizeof(csat::PrefixParams);
  if (is("PrefixBackwardParams")) return sizeof(csat::PrefixBackwardParams);
  if (is("Decoder")) return sizeof(csat::Decoder);
  if (is("DecodeParams")) return sizeof(csat::DecodeParams);
  if (is("DecodeBackwardParams")) return sizeof(csat::DecodeBackwardParams);
  if (is("ProjectParams")) return sizeof(csat::ProjectParams);
  if (is("ProjectBackwardParams")) return sizeof(csat::ProjectBackwardParams);
  if (is("RowsParams")) return sizeof(csat::RowsParams);
  if (is("ImplicitParams")) return sizeof(csat::ImplicitParams);
  if (is("Counters")) return sizeof(emulator::Counters);
  return 0;
}

#define CSAT_EXPORT(name, Params)                                                               \
  int64_t csat_##name##_workspace(const csat::Params* p) { return csat::name##_workspace(*p); } \
  int csat_##name(const csat::Params* p, void* workspace)

CSAT_EXPORT(attend, AttendParams) { return csat::attend_forward(*p, workspace, nullptr); }
CSAT_EXPORT(attend_backward, AttendBackwardParams) { return csat::attend_backward(*p, workspace, nullptr); }
CSAT_EXPORT(attend_causal, AttendCausalParams) { return csat::attend_causal_forward(*p, workspace, nullptr); }
CSAT_EXPORT(attend_causal_backward, AttendCausalBackwardParams) {
  return csat::attend_causal_backward(*p, workspace, nullptr);
}
CSAT_EXPORT(attend_prefix, PrefixParams) { return csat::attend_prefix_forward(*p, workspace, nullptr); }
CSAT_EXPORT(attend_prefix_backward, PrefixBackwardParams) {
  return csat::attend_prefix_backward(*p, workspace, nullptr);
}
CSAT_EXPORT(decode, DecodeParams) { return csat::decode_forward(*p, workspace, nullptr); }
CSAT_EXPORT(decode_backward, DecodeBackwardParams) { return csat::decode_backward(*p, workspace, nullptr); }
CSAT_EXPORT(project, ProjectParams) { return csat::project_forward(*p, workspace, nullptr, nullptr); }
CSAT_EXPORT(project_backward, ProjectBackwardParams) { return csat::project_backward(*p, workspace, nullptr, nullptr); }
CSAT_EXPORT(project_implicit, ImplicitParams) { return csat::project_implicit_forward(*p, workspace, nullptr); }
CSAT_EXPORT(project_implicit_backward, ImplicitParams) {
  return csat::project_implicit_backward(*p, workspace, nullptr);
}

int64_t csat_renormalise_rows_workspace(const csat::RowsParams*) { return 0; }
int csat_renormalise_rows(const csat::RowsParams* p, void*) { return csat::renormalise_rows(*p, nullptr); }

int64_t csat_attend_decode_workspace(const csat::AttendParams* attend, const csat::DecodeParams* decode) {
  return csat::attend_decode_workspace(*attend, *decode);
}
int csat_attend_decode(const csat::AttendParams* attend, const csat::DecodeParams* decode, void* workspace) {
  return csat::attend_decode_forward(*attend, *decode, workspace, nullptr);
}

int64_t csat_attend_causal_decode_workspace(const csat::AttendCausalParams* attend, const csat::DecodeParams* decode) {
  return csat::attend_causal_decode_workspace(*attend, *decode);
}
int csat_attend_causal_decode(const csat::AttendCausalParams* attend, const csat::DecodeParams* decode,
                              void* workspace) {
  return csat::attend_causal_decode_forward(*attend, *decode, workspace, nullptr);
}

int64_t csat_attend_prefix_decode_workspace(const csat::PrefixParams* attend, const csat::DecodeParams* decode) {
  return csat::attend_prefix_decode_workspace(*attend, *decode);
}
int csat_attend_prefix_decode(const csat::PrefixParams* attend, const csat::DecodeParams* decode, void* workspace) {
  return csat::attend_prefix_decode_forward(*attend, *decode, workspace, nullptr);
}

}  // extern "C"
