// The one table: tile sizes, shared-memory budgets and supported ranges of the CUDA kernels, and the functions that
// answer "does this run, and if not, why". Host and device code, no CUDA header.
//
//   quantity                     range            why
//   dtypes                       f32, bf16, f16   float64 belongs to the CPU
//   B, H, Nq, N, M               any              streamed; int64 offsets
//   D, R                         1 .. 1024        one row tile lives in shared memory
//   P, Dv                        1 .. 1024        three rows of P and one of max(R, Dv) in shared memory
//   tensor cores (mma)           bf16, f16        D, R, Dv <= 128, P <= 256 (fused <= 128), what is resident fits in
//                                                 shared memory (see plan_mma); anything else runs on the SIMT kernels
//   N, M of an implicit Phi      1 .. 2^31 - 2    int32 running counts, 32-bit Philox counters
//   blocks of one launch         < 2^31           one linear grid
//   shared memory of a block     of the device    163 KiB (sm_80) and 227 KiB (sm_90) hold every size above; 99 KiB
//                                                 (sm_86, sm_89): 3 P + max(R, Dv) <= 3164 and 2 D + R <= 3033,
//                                                 each rounded up to 64
#pragma once
#include <cstdint>
#include <initializer_list>

#include "csat/launch.h"

namespace csat::limits {

constexpr int kThreads = 128;  // a block: four warps
constexpr int kWarps = kThreads / 32;
constexpr int kMicroRows = 8;  // a warp computes 8 rows x 64 columns at a time, two columns a lane
constexpr int kMicroColumns = 64;
constexpr int kOuterRows = 16;         // the same for sums of outer products
constexpr int kMeasurementTile = 128;  // measurements whose scores one row tile holds at a time
constexpr int kOuterDepth = 32;        // rows staged at a time by the sums of outer products
constexpr int kMaxFeature = 1024;      // D, R, P, Dv

constexpr int64_t kSharedPreferred = 72 * 1024;        // two blocks on an SM of 163 KiB, three on one of 227 KiB
constexpr int64_t kWorkspaceCap = int64_t(256) << 20;  // bytes of saved iterates before decode_backward goes in chunks
constexpr int64_t kTargetBlocks = 512;                 // sums over rows are split until this many blocks run
constexpr int kSignRows = 64;                          // rows of a block that multiplies by signs, 16 a warp
constexpr int kSignDepth = 32;                         // of its stages
constexpr int kSignColumns = 256;                      // its columns with tensor cores; half without
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int depth_pad(int64_t n) { return static_cast<int>(round_up(n, 4)); }               // a contracted axis
constexpr int column_pad(int64_t n) { return static_cast<int>(round_up(n, kMicroColumns)); }  // an output axis

// Rows of a tile: the largest of 32, 16, 8 within the preferred budget, else 8 within the device's; 0 if none fits.
constexpr int row_tile(int64_t floats_per_row, int64_t shared_limit) {
  const int64_t preferred = kSharedPreferred < shared_limit ? kSharedPreferred : shared_limit;
  for (int rows : {32, 16, 8})
    if (rows * floats_per_row * 4 <= preferred) return rows;
  return 8 * floats_per_row * 4 <= shared_limit ? 8 : 0;
}

constexpr int measurement_tile(int64_t measurements) {
  return column_pad(measurements) < kMeasurementTile ? column_pad(measurements) : kMeasurementTile;
}

// Floats of shared memory a row, by kernel; each kernel carves exactly these (see its header).
constexpr int64_t attend_row(int64_t M, int64_t D, int64_t R) {
  return column_pad(R) + depth_pad(D) + measurement_tile(M) + 2;
}
constexpr int64_t decode_row(int64_t P, int64_t R) { return column_pad(R) + 3 * int64_t(column_pad(P)); }
constexpr int64_t attend_decode_row(const AttendParams& a, const DecodeParams& d) {
  const int64_t attend = attend_row(a.measurements, a.head_dim, a.features);
  const int64_t decode = decode_row(d.decoder.coefficients, a.features);
  return attend > decode ? attend : decode;
}
constexpr int64_t query_backward_row(int64_t M, int64_t D, int64_t R) {
  return depth_pad(D) + depth_pad(R) + column_pad(D) + measurement_tile(M) + 3 + 2 * (kMeasurementTile / kMicroColumns);
}
constexpr int64_t measurement_backward_row(int64_t D, int64_t R) {
  return column_pad(D) + column_pad(R) + 2 * kMicroColumns + 3;
}
constexpr int64_t decode_backward_row(int64_t P, int64_t R, int64_t Dv) {
  return (column_pad(R) > column_pad(Dv) ? column_pad(R) : column_pad(Dv)) + 3 * int64_t(column_pad(P)) + 4;
}

// ---- the tensor-core family: bf16 and fp16, D, R, Dv up to 128, P up to 256; compile-time sizes, padded with zeros

constexpr int kMmaWarps = 8, kMmaThreads = 32 * kMmaWarps;
constexpr int kMmaRows = 32;  // queries a warp: two row blocks share every right operand

// The compile-time size that holds n features or coefficients; 0: none does.
constexpr int smallest_of(std::initializer_list<int> sizes, int64_t n) {
  for (int size : sizes)
    if (n <= size) return size;
  return 0;
}
constexpr int mma_feature(int64_t n) { return smallest_of({32, 64, 80, 96, 128}, n); }
constexpr int mma_atoms(int64_t n) { return smallest_of({64, 128, 256}, n); }

// Measurements a warp scores at a time: with z (32 x D) they are its accumulators.
constexpr int mma_chunk(int feature) { return feature <= 32 ? 64 : 32; }
// A chunk in shared memory: keys, values, bias. A row is padded by 16 bytes (fragments.cuh).
constexpr int64_t mma_tile_bytes(int64_t rows, int64_t columns) { return rows * (columns + 8) * 2; }
constexpr int64_t mma_slot_bytes(int feature) {
  return 2 * mma_tile_bytes(mma_chunk(feature), feature) + mma_chunk(feature) * 4;
}
// Rows that go through the decoder's layers together: two iterates, z and a group of accumulators in registers.
constexpr int recover_rows(int feature, int atoms) { return atoms > 64 || feature > 96 ? 16 : 32; }
// Rows of a warp's tile in decode alone; of 256 coefficients only decode alone has the weights resident.
constexpr int decode_mma_rows(int atoms) { return atoms > 128 ? 16 : kMmaRows; }
constexpr int kFusedMmaAtoms = 128, kFusedMmaFeature = 96;  // z of 32 rows x 128 leaves no registers for more
constexpr int64_t decoder_mma_bytes(const Decoder& d, int feature, int atoms) {
  return d.s_layers * mma_tile_bytes(atoms, atoms) + d.b_layers * mma_tile_bytes(atoms, feature) +
         mma_tile_bytes(feature, atoms) + round_up((d.layers * atoms + d.layers) * 4, 16);
}

// How a forward launch uses the tensor cores: sizes, and what shared memory holds.
struct ForwardMmaPlan {
  int feature = 0, atoms = 0;  // compile-time sizes; atoms 0: no decoder
  int chunks = 0, slots = 0;   // of measurements; as many slots as chunks: resident
  int stages = 0;              // tiles of query rows a warp
  int64_t shared_bytes = 0;
};
// nullptr and a plan, or the reason why there is none. With both, attend and decode run as one kernel.
const char* plan_mma(ForwardMmaPlan& plan, const AttendParams* attend, const DecodeParams* decode,
                     int64_t shared_limit);

// nullptr if the op runs within `shared_limit` bytes a block, else the reason.
const char* why_not(const AttendParams& p, int64_t shared_limit);
const char* why_not(const AttendBackwardParams& p, int64_t shared_limit);
const char* why_not(const DecodeParams& p, int64_t shared_limit);
const char* why_not(const DecodeBackwardParams& p, int64_t shared_limit);
const char* why_not(const AttendParams& attend, const DecodeParams& decode, int64_t shared_limit);

}  // namespace csat::limits
