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

constexpr int kMatrices = 4, kMatrixRows = 8, kRowBytes = 16;

// Rows of all matrices, checked in the name of the lane that gave each address, and their bank conflicts.
std::array<unsigned char*, kWarpSize> matrix_rows(void* const* operands, Access access, const char* name) {
  std::array<unsigned char*, kWarpSize> rows{};
  for (int lane = 0; lane < kMatrices * kMatrixRows; ++lane) {
    rows[lane] = static_cast<unsigned char*>(static_cast<MatrixOperand*>(operands[lane])->row);
    impersonate(lane_of_running_warp(lane));
    check_aligned(rows[lane], kRowBytes, name, nullptr);
    if (!in_shared_window(rows[lane])) {
      report.add(Fault::out_of_bounds, nullptr,
                 format("%s: lane %d gives an address outside shared memory", name, lane));
    }
    shadow_access(rows[lane], kRowBytes, access, nullptr);
  }
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    std::array<uint32_t, kMatrixRows> offsets;
    for (int i = 0; i < kMatrixRows; ++i) offsets[i] = shared_offset(rows[matrix * kMatrixRows + i]);
    const int passes = wavefronts(offsets.data(), kMatrixRows, kRowBytes);
    report.counters.shared_wavefronts += uint64_t(passes);
    report.counters.bank_conflicts += uint64_t(passes - 1);
  }
  ++report.counters.ldmatrix;
  return rows;
}

// Calls move(register half, element): register j of lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of
// matrix j, or of its column.
template <bool transposed, typename Move>
void move_matrices(void* const* operands, Access access, const char* name, Move move) {
  const auto rows = matrix_rows(operands, access, name);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    auto halves = reinterpret_cast<unsigned char*>(static_cast<MatrixOperand*>(operands[lane])->registers);
    for (int j = 0; j < kMatrices; ++j) {
      for (int e = 0; e < 2; ++e, halves += 2) {
        const int across = lane / 4, along = lane % 4 * 2 + e;
        move(halves, rows[j * kMatrixRows + (transposed ? along : across)] + (transposed ? across : along) * 2);
      }
    }
  }
}

void load(unsigned char* half, const unsigned char* element) { std::memcpy(half, element, 2); }
void store(const unsigned char* half, unsigned char* element) { std::memcpy(element, half, 2); }

}  // namespace

void ldmatrix(uint32_t, void* const* operands) { move_matrices<false>(operands, Access::read, "ldmatrix", load); }
void ldmatrix_transposed(uint32_t, void* const* operands) {
  move_matrices<true>(operands, Access::read, "ldmatrix.trans", load);
}
void stmatrix(uint32_t, void* const* operands) { move_matrices<false>(operands, Access::write, "stmatrix", store); }
void stmatrix_transposed(uint32_t, void* const* operands) {
  move_matrices<true>(operands, Access::write, "stmatrix.trans", store);
}

namespace {

// C (16, 8) += A B. Lane l holds of C, with g = l / 4 and t = 2 (l % 4), rows g, g + 8 and columns t, t + 1.
template <int depth>
void multiply(const float (&a)[16][depth], const float (&b)[depth][8], void* const* operands) {
  ++report.counters.mma;
  float sums[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* c = static_cast<const MmaOperand*>(operands[lane])->c;
    for (int e = 0; e < 4; ++e) c[e] += sums[lane / 4 + 8 * (e / 2)][lane % 4 * 2 + e % 2];
  }
}

// Of A the pairs at rows g, g + 8 and columns t, t + 8; of B those at rows t, t + 8 and column g.
template <float (*value)(uint16_t)>
void mma_m16n8k16(void* const* operands) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& operand = *static_cast<const MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][t + e + 8 * (i >> 1)] = value(uint16_t(operand.a[i] >> (16 * e)));
      for (int i = 0; i < 2; ++i) b[t + e + 8 * i][g] = value(uint16_t(operand.b[i] >> (16 * e)));
    }
  }
  multiply(a, b, operands);
}

float tf32_value(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

}  // namespace

void mma_m16n8k16_bf16(uint32_t, void* const* operands) { mma_m16n8k16<bf16_value>(operands); }
void mma_m16n8k16_f16(uint32_t, void* const* operands) { mma_m16n8k16<f16_value>(operands); }

// Single values: of A rows g, g + 8 and columns l % 4, l % 4 + 4; of B the same rows of k, column g.
void mma_m16n8k8_tf32(uint32_t, void* const* operands) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& operand = *static_cast<const MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][t + 4 * (i >> 1)] = tf32_value(operand.a[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = tf32_value(operand.b[i]);
  }
  multiply(a, b, operands);
}

}  // namespace emulator
