#include "runtime/report.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace emulator {

Report report;

namespace {

// "symbol, object+offset": the offset is what `addr2line -Cfie object offset` takes.
std::string describe(const void* where) {
  Dl_info info;
  if (where == nullptr || dladdr(where, &info) == 0) return "";
  std::string symbol = info.dli_sname ? info.dli_sname : "";
  int status = 1;
  if (char* demangled = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status)) {
    symbol = demangled;
    std::free(demangled);
  }
  const auto offset = static_cast<const char*>(where) - static_cast<const char*>(info.dli_fbase);
  return format(" [%s%s%s+%#lx]", symbol.c_str(), symbol.empty() ? "" : ", ", info.dli_fname,
                static_cast<unsigned long>(offset));
}

}  // namespace

const char* fault_name(Fault fault) {
  switch (fault) {
    case Fault::race:
      return "race";
    case Fault::block_conflict:
      return "block conflict";
    case Fault::uninitialised_read:
      return "uninitialised read";
    case Fault::in_flight_access:
      return "access to bytes in flight";
    case Fault::out_of_bounds:
      return "out of bounds";
    case Fault::misaligned:
      return "misaligned";
    case Fault::divergence:
      return "divergence";
    case Fault::deadlock:
      return "deadlock";
    case Fault::budget:
      return "over budget";
    case Fault::missing_fence:
      return "missing fence";
    case Fault::missing_wait:
      return "missing wait";
    case Fault::mbarrier:
      return "misused mbarrier";
  }
  return "unknown";
}

bool Report::count_again(Fault fault, const void* where) {
  for (Entry& entry : entries_) {
    if (entry.fault == fault && entry.where == where && entry.kernel == kernel) {
      ++entry.count;
      return true;
    }
  }
  return false;
}

void Report::add(Fault fault, const void* where, std::string message) {
  if (!count_again(fault, where)) entries_.push_back({fault, kernel, std::move(message), where, 1});
}

bool Report::has(Fault fault) const {
  return std::any_of(entries_.begin(), entries_.end(), [fault](const Entry& entry) { return entry.fault == fault; });
}

std::string Report::text() const {
  std::string all;
  for (const Entry& entry : entries_) {
    all += format("%s in %s (%llu times): ", fault_name(entry.fault), entry.kernel.c_str(),
                  static_cast<unsigned long long>(entry.count));
    all += entry.message + describe(entry.where) + "\n";
  }
  return all;
}

void Report::clear() {
  entries_.clear();
  counters = Counters{};
}

std::string format(const char* pattern, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(buffer, sizeof buffer, pattern, arguments);
  va_end(arguments);
  return buffer;
}

}  // namespace emulator
