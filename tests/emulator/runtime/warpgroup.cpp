// wgmma: collective over the 128 lanes of a warpgroup, asynchronous, reading shared memory through the asynchronous
// proxy.
#include "emulation/warpgroup.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "emulation/types.h"
#include "runtime/scheduler.h"
#include "runtime/shadow.h"

namespace emulator {

namespace {

constexpr int kRows = 64, kDepth = 16, kMaxColumns = 256, kSwizzleRow = 128, kAtomColumns = 64;

// Byte offset in shared memory of element (k, n) of B. The swizzle acts on the address bits themselves.
uint32_t element_offset(const WgmmaOperand& operand, int k, int n) {
  const auto field = [&](int shift) { return uint32_t(operand.b >> shift & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t offset = operand.transposed
                              ? start + uint32_t(n / kAtomColumns) * leading + uint32_t(k / 8) * stride +
                                    uint32_t(k % 8) * kSwizzleRow + uint32_t(n % kAtomColumns) * 2
                              : start + uint32_t(n / 8) * stride + uint32_t(n % 8) * kSwizzleRow + uint32_t(k) * 2;
  return offset ^ (offset >> 7 & 7) << 4;
}

// The product reads in the name of all four warps. Checked is one that the writer is not of: a warp is ordered after
// itself.
float element_of_b(const WgmmaOperand& operand, int k, int n) {
  const uint32_t offset = element_offset(operand, k, n);
  const unsigned char* p = dynamic_shared_memory() + offset;
  const Stamp write = offset + 2 <= memory_map.shared_bytes ? shadow_last_write(p) : 0;
  const int writer = clock_of(write) >= observer.block_start ? actor_of(write) : -1;
  impersonate(lane_of_running_warpgroup((writer + kWarpSize) % kWarpgroupSize));
  shadow_access(p, 2, Access::read, nullptr);
  if (offset + 2 > memory_map.shared_bytes) return 0;
  check_proxy_fence(p, 2, "wgmma reads", nullptr);
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return operand.bf16 ? bf16_value(bits) : f16_value(bits);
}

// One product of the oldest group; operands[l] is that of lane l.
void multiply(const std::array<const WgmmaOperand*, kWarpgroupSize>& operands) {
  static float a[kRows][kDepth], b[kDepth][kMaxColumns];
  const WgmmaOperand& first = *operands[0];
  ++report.counters.mma;
  for (int lane = 0; lane < kWarpgroupSize; ++lane) {
    const WgmmaOperand& operand = *operands[lane];
    if (operand.b != first.b || operand.columns != first.columns) {
      report.add(Fault::divergence, nullptr, format("wgmma: lane %d has another descriptor than lane 0", lane));
    }
    const int row = lane / 32 * 16 + lane % 32 / 4, k = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) {
        const auto bits = uint16_t(operand.a[size_t(i)] >> (16 * e));
        a[row + 8 * (i & 1)][k + e + 8 * (i >> 1)] = first.bf16 ? bf16_value(bits) : f16_value(bits);
      }
    }
  }
  for (int k = 0; k < kDepth; ++k) {
    for (int n = 0; n < first.columns; ++n) b[k][n] = element_of_b(first, k, n);
  }
  for (int lane = 0; lane < kWarpgroupSize; ++lane) {
    float* c = operands[lane]->c;
    for (int fragment = 0; fragment < first.columns / 8; ++fragment) {
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 32 * 16 + lane % 32 / 4 + 8 * (e / 2), n = fragment * 8 + lane % 4 * 2 + e % 2;
        float sum = 0;
        for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][n];
        c[fragment * 4 + e] += sum;
      }
    }
  }
}

void execute_oldest_group(uint32_t, void* const*) {
  const size_t products = running->products.front().size();
  for (size_t i = 0; i < products; ++i) {
    std::array<const WgmmaOperand*, kWarpgroupSize> operands;
    for (int lane = 0; lane < kWarpgroupSize; ++lane) {
      const Thread& thread = lane_of_running_warpgroup(lane);
      if (thread.products.empty() || thread.products.front().size() != products) {
        report.add(Fault::divergence, nullptr, format("wgmma: lane %d has committed another group than lane 0", lane));
        return;
      }
      operands[size_t(lane)] = &thread.products.front()[i];
    }
    multiply(operands);
  }
  for (int lane = 0; lane < kWarpgroupSize; ++lane) lane_of_running_warpgroup(lane).products.pop_front();
}

void meet(uint32_t, void* const*) {}

}  // namespace

void wgmma_issue(const WgmmaOperand& operand) {
  running->open_products.push_back(operand);
  warpgroup_collective("wgmma.mma_async", meet);
}

void wgmma_commit() {
  running->products.push_back(std::move(running->open_products));
  running->open_products.clear();
}

void wgmma_wait(int groups_left) {
  while (int(running->products.size()) > groups_left) {
    warpgroup_collective("wgmma.wait_group", execute_oldest_group);
  }
}

}  // namespace emulator
