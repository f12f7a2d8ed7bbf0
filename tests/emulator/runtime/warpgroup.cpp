// wgmma: collective over the 128 lanes of a warpgroup, asynchronous, reading shared memory through the asynchronous
// proxy.
#include "emulation/warpgroup.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "runtime/scheduler.h"
#include "runtime/shadow.h"

namespace emulator {

namespace {

constexpr int kRows = 64, kDepth = 16, kMaxColumns = 256;
// The 128-byte swizzle: a pattern of 8 rows of 128 bytes, within which 16-byte pieces change places.
constexpr uint32_t kSwizzleRow = 128, kPattern = 1024, kRowElements = 64, kPieceBytes = 16;
constexpr int kPieceElements = 8;

// A descriptor's fields (PTX ISA, "Matrix Descriptor Format"), in bytes.
struct Descriptor {
  uint32_t start, leading, stride;
  explicit Descriptor(uint64_t bits) : start(field(bits, 0)), leading(field(bits, 16)), stride(field(bits, 32)) {}
  static uint32_t field(uint64_t bits, int shift) { return uint32_t(bits >> shift & 0x3fff) << 4; }
};

// Byte offset in shared memory of element (k, n); n is m where the matrix is A (PTX ISA, "Strides"). Rows of n: 8 rows
// are a pattern, `stride` from one to the next. Rows of k: 64 elements by 8 rows are a pattern, `stride` to the next
// along k, `leading` to the next along n. The swizzle acts on the address bits themselves.
uint32_t element_offset(const SharedMatrix& matrix, uint32_t k, uint32_t n) {
  const Descriptor d(matrix.descriptor);
  const uint32_t offset = matrix.transposed ? d.start + n / kRowElements * d.leading + k / 8 * d.stride +
                                                  k % 8 * kSwizzleRow + n % kRowElements * 2
                                            : d.start + n / 8 * d.stride + n % 8 * kSwizzleRow + k * 2;
  return offset ^ (offset >> 7 & 7) << 4;
}

// Calls f(p, k, n) for every 16-byte piece of the matrix: 8 elements from (k, n) on, along n if it is transposed.
template <typename F>
void each_piece(const SharedMatrix& matrix, int extent, F f) {
  const int steps[2] = {matrix.transposed ? 1 : kPieceElements, matrix.transposed ? kPieceElements : 1};
  for (int k = 0; k < kDepth; k += steps[0]) {
    for (int n = 0; n < extent; n += steps[1]) {
      f(dynamic_shared_memory() + element_offset(matrix, uint32_t(k), uint32_t(n)), k, n);
    }
  }
}

template <typename F>
void each_shared_piece(const WgmmaOperand& operand, F f) {
  if (operand.a == nullptr) each_piece(operand.shared_a, kRows, f);
  each_piece(operand.b, operand.columns, f);
}

bool inside_shared_memory(const unsigned char* p) {
  return size_t(p - dynamic_shared_memory()) + kPieceBytes <= memory_map.shared_bytes;
}

void check_descriptor(const SharedMatrix& matrix, int extent, const void* where) {
  const Descriptor d(matrix.descriptor);
  const uint32_t within = d.start % kPattern;
  const bool starts = matrix.transposed ? within == 0 : within < kSwizzleRow && within % (kDepth * 2) == 0;
  const bool wide = matrix.transposed && extent > int(kRowElements);
  if (starts && d.stride % kPattern == 0 && (!wide || d.leading % kPattern == 0)) return;
  report.add(Fault::misaligned, where,
             format("wgmma: matrix at %#x, leading %u, stride %u: patterns of the swizzle start at multiples of %u",
                    d.start, d.leading, d.stride, kPattern));
}

// The product reads in the name of all four warps: data must be ordered before a lane of each that has not written it.
void check_piece(const unsigned char* p, const void* where) {
  const int writer = actor_of(shadow_last_write(p));
  for (int warp = 0; warp < kWarpgroupSize; warp += kWarpSize) {
    Thread& last = lane_of_running_warpgroup(warp + kWarpSize - 1);
    impersonate(last.id == writer ? lane_of_running_warpgroup(warp) : last);
    shadow_access(p, kPieceBytes, Access::asynchronous_read, where);
  }
  check_proxy_fence(p, kPieceBytes, "wgmma reads", where);
}

int group_of(const Thread& thread) { return kFirstWarpgroup + thread.id / kWarpgroupSize; }

void mark_in_flight(const WgmmaOperand& operand) {
  each_shared_piece(operand, [](const unsigned char* p, int, int) {
    if (inside_shared_memory(p)) shadow_begin_read(p, kPieceBytes, group_of(*running));
  });
}

bool same_instruction(const WgmmaOperand& x, const WgmmaOperand& y) {
  const auto same = [](const SharedMatrix& p, const SharedMatrix& q) {
    return p.descriptor == q.descriptor && p.transposed == q.transposed;
  };
  return x.columns == y.columns && (x.a == nullptr) == (y.a == nullptr) && same(x.shared_a, y.shared_a) &&
         same(x.b, y.b) && x.bf16 == y.bf16 && x.accumulate == y.accumulate;
}

// The lanes have met: what the product reads must be there, and stays untouched from here to its wait.
void begin_product(uint32_t, void* const*) {
  const Product& first = lane_of_running_warpgroup(0).open_products.back();
  for (int lane = 1; lane < kWarpgroupSize; ++lane) {
    if (same_instruction(lane_of_running_warpgroup(lane).open_products.back().operand, first.operand)) continue;
    report.add(Fault::divergence, first.where, format("wgmma: lane %d has other operands than lane 0", lane));
  }
  if (first.operand.a == nullptr) check_descriptor(first.operand.shared_a, kRows, first.where);
  check_descriptor(first.operand.b, first.operand.columns, first.where);
  each_shared_piece(first.operand, [&](const unsigned char* p, int, int) { check_piece(p, first.where); });
  mark_in_flight(first.operand);
}

float value(bool bf16, uint16_t bits) { return bf16 ? bf16_value(bits) : f16_value(bits); }

// b[k][n] of a matrix in shared memory.
template <size_t columns>
void load_shared(float (&b)[kDepth][columns], const SharedMatrix& matrix, int extent, bool bf16) {
  each_piece(matrix, extent, [&](const unsigned char* p, int k, int n) {
    uint16_t bits[kPieceElements] = {};
    if (inside_shared_memory(p)) std::memcpy(bits, p, kPieceBytes);
    for (int i = 0; i < kPieceElements; ++i)
      b[matrix.transposed ? k : k + i][matrix.transposed ? n + i : n] = value(bf16, bits[i]);
  });
}

// a[k][m] of the lanes' registers.
void load_registers(float (&a)[kDepth][kRows], size_t product) {
  for (int lane = 0; lane < kWarpgroupSize; ++lane) {
    const Product& mine = lane_of_running_warpgroup(lane).products.front()[product];
    const int row = lane / 32 * 16 + lane % 32 / 4, k = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) {
        a[k + e + 8 * (i >> 1)][row + 8 * (i & 1)] = value(mine.operand.bf16, uint16_t(mine.a[size_t(i)] >> (16 * e)));
      }
    }
  }
}

// One product of the oldest group.
void multiply(size_t product) {
  static float a[kDepth][kRows], b[kDepth][kMaxColumns];
  const WgmmaOperand operand = lane_of_running_warpgroup(0).products.front()[product].operand;
  ++report.counters.mma;
  load_shared(b, operand.b, operand.columns, operand.bf16);
  if (operand.a == nullptr) {
    load_shared(a, operand.shared_a, kRows, operand.bf16);
  } else {
    load_registers(a, product);
  }
  for (int row = 0; row < kRows; ++row) {
    float sums[kMaxColumns] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < operand.columns; ++n) sums[n] += a[k][row] * b[k][n];
    }
    for (int quad = 0; quad < 4; ++quad) {
      const int lane = row / 16 * 32 + row % 8 * 4 + quad, half = row % 16 / 8;
      float* c = lane_of_running_warpgroup(lane).products.front()[product].operand.c;
      for (int fragment = 0; fragment < operand.columns / 8; ++fragment) {
        for (int e = 0; e < 2; ++e) {
          float& element = c[fragment * 4 + half * 2 + e];
          element = (operand.accumulate ? element : 0) + sums[fragment * 8 + quad * 2 + e];
        }
      }
    }
  }
}

// All lanes' clocks are the same here (align_clocks).
void end_product(const WgmmaOperand& operand, const Thread& thread) {
  each_shared_piece(operand, [&](const unsigned char* p, int, int) {
    if (inside_shared_memory(p)) shadow_end_read(p, kPieceBytes, group_of(thread), thread.clock);
  });
}

void execute_oldest_group(uint32_t, void* const*) {
  const size_t products = running->products.front().size();
  for (int lane = 0; lane < kWarpgroupSize; ++lane) {
    const Thread& thread = lane_of_running_warpgroup(lane);
    if (!thread.products.empty() && thread.products.front().size() == products) continue;
    report.add(Fault::divergence, nullptr, format("wgmma: lane %d has committed another group than lane 0", lane));
    return;
  }
  for (size_t i = 0; i < products; ++i) {
    multiply(i);
    end_product(running->products.front()[i].operand, *running);
  }
  for (int lane = 0; lane < kWarpgroupSize; ++lane) {
    Thread& thread = lane_of_running_warpgroup(lane);
    for (const Product& done : thread.products.front()) {
      thread.registers.give_back(done.operand.c);
      if (done.operand.a != nullptr) thread.registers.give_back(done.operand.a);
    }
    thread.products.pop_front();
  }
  // Products still in flight may read the same pieces.
  for (const auto& group : running->products) {
    for (const Product& product : group) mark_in_flight(product.operand);
  }
  for (const Product& product : running->open_products) mark_in_flight(product.operand);
}

}  // namespace

void wgmma_issue(const WgmmaOperand& operand) {
  const void* where = __builtin_return_address(0);
  Product product{operand, {}, where};
  running->registers.take(operand.c, size_t(operand.columns) * 2, true, where);
  if (operand.a != nullptr) {
    std::copy_n(operand.a, product.a.size(), product.a.begin());
    running->registers.take(operand.a, sizeof product.a, false, where);
  }
  running->open_products.push_back(product);
  warpgroup_collective("wgmma.mma_async", begin_product);
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

void finish_products(Thread& thread) {
  for (const auto& group : thread.products) {
    for (const Product& product : group) end_product(product.operand, thread);
  }
  for (const Product& product : thread.open_products) end_product(product.operand, thread);
}

void wgmma_fence() { running->registers.fence(); }

uint64_t wgmma_descriptor(const void* start, uint32_t leading, uint32_t stride) {
  const void* where = __builtin_return_address(0);
  check_aligned(start, kPieceBytes, "matrix of wgmma", where);
  const uint32_t offset = shared_offset(start);
  if (!in_shared_window(start) || offset >= 1u << 18) {
    report.add(Fault::out_of_bounds, where, "matrix of wgmma: not in dynamic shared memory");
  }
  constexpr uint64_t swizzle128 = uint64_t(1) << 62;
  return uint64_t((offset & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | swizzle128;
}

}  // namespace emulator
