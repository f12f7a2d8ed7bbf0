// Times the emulator: FLOP/s of processor time with every access checked. Fails where a result is wrong or anything is
// reported, or, given a number, where the tensor-core product is slower than so many GFLOP/s.
#include "selftest/speed.h"

#include <cstdio>
#include <cstdlib>
#include <ctime>

using namespace emulator;

namespace {

double gflops(const char* name, double (*run)(int, int)) {
  reset();
  const std::clock_t start = std::clock();
  const double flops = run(8, 16);
  const double seconds = double(std::clock() - start) / CLOCKS_PER_SEC;
  const double rate = report.empty() ? flops / seconds / 1e9 : 0;
  std::printf("%-16s %6.2f GFLOP/s checked (%.0f MFLOP, %llu accesses, %llu mma, %llu ldmatrix)\n%s", name, rate,
              flops / 1e6, (unsigned long long)report.counters.accesses, (unsigned long long)report.counters.mma,
              (unsigned long long)report.counters.ldmatrix, report.text().c_str());
  return rate;
}

}  // namespace

int main(int count, char** arguments) {
  const double least = count > 1 ? std::atof(arguments[1]) : 0;
  const double tensor = gflops("tensor product", selftest::run_tensor_product);
  const double plain = gflops("plain product", selftest::run_plain_product);
  return tensor <= least || plain <= 0;
}
