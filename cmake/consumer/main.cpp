// Asks the installed library what it supports. No GPU is needed for that.
#include <cstdio>

#include "csat/launch.h"
#include "csat/limits.h"

int main() {
  csat::AttendParams p{};
  p.q.dtype = p.kc.dtype = p.vc.dtype = p.z.dtype = csat::DType::bf16;
  p.batch = 2, p.heads = p.key_heads = 8, p.queries = 4096, p.measurements = 256, p.head_dim = p.features = 64;
  constexpr int64_t kSharedBytes = 163 * 1024;
  const char* reason = csat::limits::why_not(p, kSharedBytes);
  std::printf("attend: workspace %lld bytes, %s; code 0 means \"%s\"\n",
              static_cast<long long>(csat::attend_workspace(p)), reason ? reason : "supported", csat::error_string(0));
  if (reason != nullptr) return 1;
  p.head_dim = 1 << 20;
  reason = csat::limits::why_not(p, kSharedBytes);
  std::printf("head_dim %lld: %s\n", static_cast<long long>(p.head_dim), reason ? reason : "supported");
  return reason == nullptr;
}
