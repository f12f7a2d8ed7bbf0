// What the warp collectives compute, for all lanes at once. Fragment layouts: PTX ISA, "Warp Level Matrix
// Instructions".
#include <array>
#include <bit>
#include <cstring>

#include "emulation/intrinsics.h"
#include "emulation/tensor_core.h"
#include "runtime/bank_conflicts.h"
#include "runtime/scheduler.h"
#include "runtime/shadow.h"

namespace emulator {

void shuffle(uint32_t mask, void* const* operands) {
  std::array<uint64_t, kWarpSize> values{};
  const auto& first = *static_cast<const ShuffleOperand*>(operands[std::countr_zero(mask)]);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto& operand = *static_cast<const ShuffleOperand*>(operands[lane]);
    values[lane] = operand.value;
    // Every lane of an exchange has the same lane mask: other lanes have come from another shuffle.
    if (operand.kind != first.kind || operand.width != first.width ||
        (operand.kind == Shuffle::exchange && operand.argument != first.argument)) {
      report.add(Fault::divergence, nullptr,
                 format("lane %d is in another shuffle than the first lane of mask %08x", lane, mask));
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto& operand = *static_cast<ShuffleOperand*>(operands[lane]);
    const int segment = lane & ~(operand.width - 1), last = segment + operand.width - 1;
    int source = lane;
    switch (operand.kind) {
      case Shuffle::exchange:
        source = lane ^ operand.argument;
        break;
      case Shuffle::index:
        source = segment + (operand.argument & (operand.width - 1));
        break;
      case Shuffle::up:
        source = lane - operand.argument;
        break;
      case Shuffle::down:
        source = lane + operand.argument;
        break;
    }
    if (source < segment || source > last) source = lane;  // out of the segment: the lane's own value
    if (!(mask >> source & 1)) {
      report.add(Fault::divergence, nullptr,
                 format("shuffle: lane %d reads lane %d, which takes no part", lane, source));
      operand.result = 0x7ff8dead7fc0deadull;  // NaN as float, as double
    } else {
      operand.result = values[source];
    }
  }
}

void ballot(uint32_t mask, void* const* operands) {
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) votes |= uint32_t(static_cast<VoteOperand*>(operands[lane])->predicate) << lane;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) static_cast<VoteOperand*>(operands[lane])->result = votes;
  }
}

namespace {

constexpr int kMatrixRows = 8, kRowBytes = 16;

// Rows of all matrices, checked in the name of the lane that gave each address, and their bank conflicts.
std::array<const unsigned char*, kWarpSize> matrix_rows(void* const* operands, int matrices) {
  std::array<const unsigned char*, kWarpSize> rows{};
  for (int lane = 0; lane < matrices * kMatrixRows; ++lane) {
    rows[lane] = static_cast<const unsigned char*>(static_cast<LdmatrixOperand*>(operands[lane])->row);
    impersonate(lane_of_running_warp(lane));
    check_aligned(rows[lane], kRowBytes, "ldmatrix row");
    if (!in_shared_window(rows[lane])) {
      report.add(Fault::out_of_bounds, nullptr,
                 format("ldmatrix: lane %d gives an address outside shared memory", lane));
    }
    shadow_access(rows[lane], kRowBytes, Access::read, nullptr);
  }
  for (int matrix = 0; matrix < matrices; ++matrix) {
    std::array<uint32_t, kMatrixRows> offsets;
    for (int i = 0; i < kMatrixRows; ++i) offsets[i] = shared_offset(rows[matrix * kMatrixRows + i]);
    const int passes = wavefronts(offsets.data(), kMatrixRows, kRowBytes);
    report.counters.shared_wavefronts += uint64_t(passes);
    report.counters.bank_conflicts += uint64_t(passes - 1);
  }
  ++report.counters.ldmatrix;
  return rows;
}

}  // namespace

void ldmatrix(uint32_t, void* const* operands) {
  const int matrices = static_cast<LdmatrixOperand*>(operands[0])->matrices;
  const auto rows = matrix_rows(operands, matrices);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    uint32_t* result = static_cast<LdmatrixOperand*>(operands[lane])->result;
    for (int j = 0; j < matrices; ++j) std::memcpy(&result[j], rows[j * 8 + lane / 4] + lane % 4 * 4, 4);
  }
}

void ldmatrix_transposed(uint32_t, void* const* operands) {
  const int matrices = static_cast<LdmatrixOperand*>(operands[0])->matrices;
  const auto rows = matrix_rows(operands, matrices);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    uint32_t* result = static_cast<LdmatrixOperand*>(operands[lane])->result;
    for (int j = 0; j < matrices; ++j) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) std::memcpy(&pair[e], rows[j * 8 + lane % 4 * 2 + e] + lane / 4 * 2, 2);
      std::memcpy(&result[j], pair, 4);
    }
  }
}

namespace {

// C (16, 8) += A (16, 16) B (16, 8). Lane l holds, with g = l / 4 and t = 2 (l % 4): of A the pairs at rows g, g + 8
// and columns t, t + 8; of B those at rows t, t + 8 and column g; of C those at rows g, g + 8 and column t.
template <float (*value)(uint16_t)>
void mma_m16n8k16(void* const* operands) {
  ++report.counters.mma;
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& operand = *static_cast<const MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][t + e + 8 * (i >> 1)] = value(uint16_t(operand.a[i] >> (16 * e)));
      for (int i = 0; i < 2; ++i) b[t + e + 8 * i][g] = value(uint16_t(operand.b[i] >> (16 * e)));
      for (int i = 0; i < 2; ++i) c[g + 8 * i][t + e] = operand.c[2 * i + e];
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < 8; ++column) c[row][column] += sum[column];
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* out = static_cast<const MmaOperand*>(operands[lane])->c;
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < 2; ++e) out[2 * i + e] = c[g + 8 * i][t + e];
    }
  }
}

}  // namespace

void mma_m16n8k16_bf16(uint32_t, void* const* operands) { mma_m16n8k16<bf16_value>(operands); }
void mma_m16n8k16_f16(uint32_t, void* const* operands) { mma_m16n8k16<f16_value>(operands); }

}  // namespace emulator
