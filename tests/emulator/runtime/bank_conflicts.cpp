#include "runtime/bank_conflicts.h"

#include <algorithm>
#include <array>
#include <map>
#include <utility>
#include <vector>

#include "runtime/report.h"
#include "runtime/scheduler.h"

namespace emulator {

namespace {
constexpr int kBanks = 32;
constexpr uint32_t kBankBytes = 4;
}  // namespace

int wavefronts(const uint32_t* offsets, int count, uint32_t bytes) {
  uint32_t words[kBanks][kBanks];  // the distinct words asked of each bank: at most one a lane
  int asked[kBanks] = {}, most = 1;
  for (int i = 0; i < count; ++i) {
    for (uint32_t word = offsets[i] / kBankBytes; word <= (offsets[i] + bytes - 1) / kBankBytes; ++word) {
      uint32_t* bank = words[word % kBanks];
      int& known = asked[word % kBanks];
      if (std::find(bank, bank + known, word) == bank + known) bank[known++] = word;
      most = std::max(most, known);
    }
  }
  return most;
}

void count_bank_conflicts(Thread* lanes, int count) {
  std::map<std::pair<const void*, int>, std::vector<SharedAccess>> instructions;
  for (int lane = 0; lane < count; ++lane) {
    std::map<const void*, int> executed;
    for (const SharedAccess& access : lanes[lane].shared_log) {
      instructions[{access.where, executed[access.where]++}].push_back(access);
    }
    lanes[lane].shared_log.clear();
  }
  for (const auto& [place, accesses] : instructions) {
    // 8-byte accesses go by half warps, 16-byte ones by quarter warps.
    const uint32_t bytes = accesses.front().bytes;
    const size_t lanes_a_phase = bytes <= kBankBytes ? 32 : 32 * kBankBytes / bytes;
    for (size_t i = 0; i < accesses.size(); i += lanes_a_phase) {
      const size_t n = std::min(lanes_a_phase, accesses.size() - i);
      std::array<uint32_t, 32> offsets;
      for (size_t j = 0; j < n; ++j) offsets[j] = accesses[i + j].offset;
      const int passes = wavefronts(offsets.data(), int(n), bytes);
      report.counters.shared_wavefronts += uint64_t(passes);
      report.counters.bank_conflicts += uint64_t(passes - 1);
    }
  }
}

}  // namespace emulator
