#include "runtime/registers.h"

#include <algorithm>

#include "runtime/report.h"
#include "runtime/shadow.h"

namespace emulator {

void WatchedRegisters::take(const void* p, size_t bytes, bool accumulators, const void* where) {
  const auto begin = static_cast<const char*>(p);
  const auto is_this = [&](const Array& a) { return a.begin == begin && a.end == begin + bytes; };
  std::erase_if(arrays_, [&](const Array& a) { return a.overlaps(begin, bytes) && !is_this(a) && a.in_flight == 0; });
  auto array = std::find_if(arrays_.begin(), arrays_.end(), is_this);
  const bool known = array != arrays_.end();
  if (!known) {
    if (std::any_of(arrays_.begin(), arrays_.end(), [&](const Array& a) { return a.overlaps(begin, bytes); })) {
      report.add(Fault::in_flight_access, where,
                 format("wgmma of thread %d takes registers of another product in flight", observer.thread));
    }
    array = arrays_.insert(arrays_.end(), {begin, begin + bytes, accumulators, false, 0});
  }
  if (known ? array->touched && array->in_flight == 0 : !fenced_) {
    report.add(Fault::missing_fence, where,
               format("wgmma of thread %d takes %s touched since its last wgmma_fence", observer.thread,
                      accumulators ? "accumulators" : "registers of A"));
  }
  array->accumulators |= accumulators;
  ++array->in_flight;
}

void WatchedRegisters::give_back(const void* p) {
  for (Array& a : arrays_) {
    if (a.begin == p && a.in_flight > 0) --a.in_flight;
  }
  fenced_ = false;
}

void WatchedRegisters::fence() {
  for (Array& a : arrays_) a.touched = false;
  fenced_ = true;
}

void WatchedRegisters::touch(const void* p, size_t bytes, bool write, const void* where) {
  for (Array& a : arrays_) {
    if (!a.overlaps(static_cast<const char*>(p), bytes) || !(write || a.accumulators)) continue;
    a.touched = true;
    if (a.in_flight == 0 || report.count_again(Fault::in_flight_access, where)) continue;
    report.add(Fault::in_flight_access, where,
               format("thread %d %s %s of a product in flight", observer.thread, write ? "writes" : "reads",
                      a.accumulators ? "accumulators" : "registers of A"));
  }
}

void WatchedRegisters::clear() {
  arrays_.clear();
  fenced_ = false;
}

}  // namespace emulator
