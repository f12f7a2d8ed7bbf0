// Runs the self tests: every planted fault must be flagged as what it is, every correct kernel must pass without an
// entry, in order and under shuffled lanes, warps and blocks. With an argument: only the cases whose name contains it.
#include <algorithm>
#include <cstdio>
#include <string>

#include "selftest/case.h"

using namespace emulator;
using emulator::selftest::Case;

namespace {

constexpr unsigned kSeeds[] = {0, 1, 2, 3};

bool flagged(const Case& test) {
  return std::any_of(test.expected.begin(), test.expected.end(), [](Fault fault) { return report.has(fault); });
}

std::string expectation(const Case& test) {
  std::string all;
  for (const Fault fault : test.expected) all += (all.empty() ? "" : " or ") + std::string(fault_name(fault));
  return all.empty() ? "clean" : all;
}

bool passes(const Case& test, unsigned seed) {
  reset();
  options = Options{};
  options.seed = seed;
  const bool right = test.run();
  const bool planted = !test.expected.empty();
  const bool ok = planted ? flagged(test) : right && report.empty() && report.counters.accesses > 0;
  if (!ok) {
    std::printf("FAIL %s, seed %u: expected %s, %s\n%s", test.name.c_str(), seed, expectation(test).c_str(),
                right ? "result right" : "result wrong", report.empty() ? "  (empty report)\n" : report.text().c_str());
  }
  return ok;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string filter = count > 1 ? arguments[1] : "";
  int faults = 0, clean = 0, failed = 0, silent = 0;
  for (const auto& cases : {selftest::block_cases(), selftest::grid_cases(), selftest::tensor_cases(),
                            selftest::bulk_cases(), selftest::wgmma_cases()}) {
    for (const Case& test : cases) {
      if (test.name.find(filter) == std::string::npos) continue;
      const bool planted = !test.expected.empty();
      ++(planted ? faults : clean);
      bool ok = true, right = true;
      for (const unsigned seed : kSeeds) ok &= passes(test, seed);
      if (planted) {  // would a comparison of results have seen it?
        reset();
        options = Options{};
        right = test.run();
        silent += right;
      }
      failed += !ok;
      std::printf("%s %-60s %s%s\n", ok ? "ok  " : "FAIL", test.name.c_str(), expectation(test).c_str(),
                  planted && right ? " (result right: only the emulator sees it)" : "");
    }
  }
  std::printf("%d planted faults (%d with right results), %d correct kernels, %d failed\n", faults, silent, clean,
              failed);
  return failed != 0;
}
