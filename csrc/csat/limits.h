// The one table: tile sizes, shared-memory budgets and supported ranges of the CUDA kernels, and the functions that
// answer "does this run, and if not, why". Host and device code, no CUDA header.
//
//   quantity                     range            why
//   dtypes                       f32, bf16, f16   float64 belongs to the CPU
//   B, H, Nq, N, M               any              streamed; int64 offsets
//   D, R                         1 .. 1024        one row tile lives in shared memory
//   P, Dv                        1 .. 1024        three rows of P and one of max(R, Dv) in shared memory
//   tensor cores (mma)           bf16, f16        D, R, Dv <= 128, P <= 256 (fused <= 128), what is resident fits in
//                                                 shared memory (plan_mma, why_not_mma); anything else: SIMT kernels
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
constexpr int kMaskTile = 4;           // key masks that a block of renormalise_rows meets its row with
constexpr int kPrefixChunk = 64;       // tokens from one state of attend_prefix to the next
constexpr int kMaxFeature = 1024;      // D, R, P, Dv

constexpr int64_t kSharedPreferred = 72 * 1024;  // two blocks on an SM of 163 KiB, three on one of 227 KiB
constexpr int64_t kSharedOfBlock = 1024;         // what a multiprocessor keeps for each block beside its own
constexpr int64_t kTargetBlocks = 512;           // sums over rows are split until this many blocks run
constexpr int64_t kOuterBlocks = 256;            // the same on tensor cores
constexpr int kSignRows = 64;                    // rows of a block that multiplies by signs, 16 a warp
constexpr int kSignDepth = 32;                   // of its stages
constexpr int kSignColumns = 256;                // its columns with tensor cores; half without
constexpr int kSegmentColumns = 64;              // features of a warp that averages segments
constexpr int kSegmentPart = 64;                 // tokens of a segment that are worth a warp of their own
constexpr int kSegmentRun = 16;                  // tokens of a warp in the backward pass
constexpr int kHadamardThreads = 512;            // 32 groups of 32 tokens x 16 features
constexpr int kHadamardTokens = 1024;            // tokens of one fast transform: 32 x 32
constexpr int kHadamardColumns = 16;             // features of a block
constexpr int kHadamardRows = 512;               // its measurements, 16 a thread
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;
#ifdef CSAT_EMULATE  // small problems too go in chunks and splits
constexpr int64_t kWorkspaceCap = int64_t(512) << 10, kOuterSplitRows = 128, kProductDepth = 8;
constexpr int64_t kProductGain = 4, kSharedOperandBytes = int64_t(2) << 10;
#else
constexpr int64_t kWorkspaceCap =
    int64_t(256) << 20;  // bytes before decode_backward (its saved iterates) and attend_prefix go in parts
constexpr int64_t kOuterSplitRows = 1024;  // the least of a split on tensor cores, which writes 4 bytes an output
constexpr int64_t kProductDepth = 1024;    // the same of a dense product
constexpr int64_t kProductGain = 16, kSharedOperandBytes = int64_t(4) << 20;
#endif
constexpr int64_t kProductTiles = 128, kProductSide = 128;  // tiles of a dense product that fill a device

// What the kernels ask of a device: 10 major + minor, the shared memory that a block may have, and whether this library
// has code of sm_90a, without which the kernels on warpgroup products only trap.
struct Device {
  int capability = 0;
  int64_t shared_bytes = 0;
  bool wgmma_code = true;
};
Device current_device();

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

// Parts into which a dense product (m, k) (k, n) goes along k, one of `count` that a launch would do together.
//   tiles = ceil(m / 128) ceil(n / 128),  parts = min(ceil(128 / tiles), k / 1024), where that is 16 count at least.
// Together they take the time of one depth k while count * tiles fill a part of the device; one after the other in
// parts that fill it, count / parts of that, and what is won pays for the launches and the partial sums. On an H100,
// 256 x 65536 x 64 in 64 parts beside torch's batched product: 4 products gain 7 %, one loses 8 %, 16 take 2.4 times as
// long.
constexpr int64_t product_parts(int64_t m, int64_t n, int64_t k, int64_t count) {
  const int64_t tiles = ceil_div(m, kProductSide) * ceil_div(n, kProductSide);
  const int64_t wanted = ceil_div(kProductTiles, tiles), useful = k / kProductDepth;
  const int64_t parts = wanted < useful ? wanted : useful;
  return parts >= kProductGain * count ? parts : 1;
}

// Rows of a left operand (m, k) in 16 bits that a batch shares, for one launch: the whole batch goes over them while
// they are in the L2 cache. All at once, each of its products would read all rows from memory.
constexpr int64_t product_rows(int64_t m, int64_t k) {
  int64_t rows = kSharedOperandBytes / (2 * k) / kProductSide * kProductSide;
  rows = rows > kProductDepth ? rows : kProductDepth;
  return rows < m ? rows : m;
}

constexpr int measurement_tile(int64_t measurements) {
  return column_pad(measurements) < kMeasurementTile ? column_pad(measurements) : kMeasurementTile;
}

// Floats of shared memory a row, by kernel; each kernel carves exactly these (see its header).
constexpr int64_t attend_row(int64_t M, int64_t D, int64_t R) {
  return column_pad(R) + depth_pad(D) + measurement_tile(M) + 2;
}
// What the rows of attend_causal see, beside the floats of attend: three 64-bit numbers.
constexpr int kSeenFloats = 6;
constexpr int64_t attend_causal_row(int64_t columns, int64_t D, int64_t R) {
  return attend_row(columns, D, R) + kSeenFloats;
}
// One softmax over measurements and tokens: the longer stretch sets the panels.
constexpr int64_t causal_columns(const AttendParams& measured, const CausalTokens& tokens) {
  return measured.measurements > tokens.count ? measured.measurements : tokens.count;
}
// Of attend_prefix beside the floats of attend: products with the tokens of the chunk, twice, and masses.
constexpr int64_t attend_prefix_row(int64_t M, int64_t D, int64_t R) {
  return attend_row(M, D, R) + 2 * kPrefixChunk + measurement_tile(M);
}
constexpr int64_t prefix_query_backward_row(int64_t M, int64_t D, int64_t R) {
  return column_pad(D) + depth_pad(R) + 2 * kPrefixChunk + 2 * measurement_tile(M) + 4;
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
// Two chunks, and of every warp its rows and the two ends of what each of them sees.
constexpr int64_t attend_causal_mma_bytes(int feature) {
  return 2 * mma_slot_bytes(feature) + kMmaWarps * (mma_tile_bytes(kMmaRows, feature) + 2 * kMmaRows * 4);
}
// attend_prefix: tokens from one state to the next, which a block of the forward owns; measurements of a block that
// sums states; of the forward the queries a warp, as registers allow, its warps, and the measurements that it scores at
// a time.
constexpr int kPrefixMmaChunk = 128, kPrefixSumRows = 64, kPrefixSumThreads = 128;
constexpr int prefix_mma_feature(int64_t n) { return smallest_of({64, 128}, n); }
constexpr int prefix_mma_rows(int feature, int atoms) { return feature <= 64 && atoms <= 64 ? 32 : 16; }
constexpr int prefix_mma_threads(int feature, int atoms) {
  return 32 * kPrefixMmaChunk / prefix_mma_rows(feature, atoms);
}
// Where shared memory lets them: 128 threads of 255 registers.
constexpr int prefix_mma_blocks(int feature, int atoms) { return prefix_mma_rows(feature, atoms) == 32 ? 2 : 1; }
constexpr int kPrefixStretch = 32;
// Keys and values of the state, phi of the chunk; biases and masses.
constexpr int64_t prefix_slot_bytes(int feature) {
  return 2 * mma_tile_bytes(kPrefixStretch, feature) + mma_tile_bytes(kPrefixMmaChunk, kPrefixStretch) +
         2 * kPrefixStretch * 4;
}
// q, k, v of the chunk, and the masses of signed rows.
constexpr int64_t attend_prefix_mma_bytes(int feature, int slots) {
  return 3 * mma_tile_bytes(kPrefixMmaChunk, feature) + slots * prefix_slot_bytes(feature) + kPrefixMmaChunk * 4;
}
constexpr int64_t prefix_sums_mma_bytes(int feature) {
  return 2 * (mma_tile_bytes(kPrefixMmaChunk, kPrefixSumRows) + mma_tile_bytes(kPrefixMmaChunk, feature));
}
// attend_prefix's backward: 16 queries or tokens a warp. What its products with 1 / g are multiplied by, so that fp16
// holds them: at most this.
constexpr int kPrefixGradientRows = 16, kPrefixGradientThreads = 32 * kPrefixMmaChunk / kPrefixGradientRows;
constexpr float kPrefixGradientFactor = 1024.f;
constexpr int kPrefixFloatsPitch = kPrefixStretch + 8;
// q, k, v, dz of the chunk; a slot; a and w of a stretch; dg of it and its sums over 16 rows, of dbias too; masses.
constexpr int64_t prefix_query_backward_mma_bytes(int feature) {
  return 4 * mma_tile_bytes(kPrefixMmaChunk, feature) + prefix_slot_bytes(feature) +
         2 * mma_tile_bytes(kPrefixMmaChunk, kPrefixStretch) +
         4 * (kPrefixMmaChunk * kPrefixFloatsPitch + 2 * 8 * kPrefixStretch + kPrefixMmaChunk + 8);
}
// q, k, v, dz; gradients of the state, phi, a and w of a stretch.
constexpr int64_t prefix_token_backward_mma_bytes(int feature) {
  return 4 * mma_tile_bytes(kPrefixMmaChunk, feature) + 2 * mma_tile_bytes(kPrefixStretch, feature) +
         3 * mma_tile_bytes(kPrefixMmaChunk, kPrefixStretch) + 4 * 8;
}
// nullptr if attend_prefix's backward runs on tensor cores within `shared_limit` bytes a block, else the reason.
const char* why_not_mma(const PrefixBackwardParams& p, int64_t shared_limit);
// The most coefficients that the fused kernel's shared memory holds.
constexpr int prefix_mma_atoms_limit(int feature) { return feature <= 64 ? 128 : 64; }
// Rows that go through the decoder's layers together: two iterates, z and a group of accumulators in registers.
constexpr int recover_rows(int feature, int atoms) { return atoms > 64 || feature > 96 ? 16 : 32; }
// Rows of a warp's tile in decode alone; of 256 coefficients only decode alone has the weights resident.
constexpr int decode_mma_rows(int atoms) { return atoms > 128 ? 16 : kMmaRows; }
constexpr int kFusedMmaAtoms = 128, kFusedMmaFeature = 96;  // z of 32 rows x 128 leaves no registers for more
constexpr int64_t decoder_mma_bytes(const Decoder& d, int feature, int atoms) {
  return d.s_layers * mma_tile_bytes(atoms, atoms) + d.b_layers * mma_tile_bytes(atoms, feature) +
         mma_tile_bytes(feature, atoms) + round_up((d.layers * atoms + d.layers) * 4, 16);
}

// ---- wgmma (sm_90a): D, R, Dv up to 64 or above 96 up to 128: between, padding would cost what wgmma wins
constexpr int kWgmmaCapability = 90, kWgmmaChunk = 64, kWgmmaRows = 64;
constexpr int kWgmmaRing = 4;  // the most chunks of the ring that measurements go through where not all of them fit
constexpr int wgmma_feature(int64_t n) { return n <= 64 ? 64 : (n > 96 && n <= 128 ? 128 : 0); }
// The most coefficients that the fused kernel's registers hold.
constexpr int wgmma_atoms_limit(int feature) { return feature == 64 ? 128 : 64; }
// Warpgroups of a block of the forward. Accumulators of a chunk and z, and the operands of both: four fit into 128
// registers a thread where neither a decoder nor a place in the ring needs more, else three into 168.
constexpr int wgmma_groups(int feature, int atoms, bool stream) {
  return feature == 64 && atoms <= 64 && !stream ? 4 : 3;
}
// Are queries kept as left operands, or read anew for every chunk?
constexpr bool wgmma_holds_queries(int feature) { return feature == 64; }
// Beside measurements and decoder: a tile of queries and one of results a warp, mbarriers.
constexpr int64_t wgmma_rows_bytes(int feature, int atoms, bool stream) {
  return wgmma_groups(feature, atoms, stream) * 4 * (2 * 16 * int64_t(feature) * 2 + 8) +
         8 * (stream ? 2 * kWgmmaRing : 1);
}
// The chunks of measurements that are there at a time, the biases of all of them, and those rows.
constexpr int64_t wgmma_attend_bytes(int chunks, int slots, int feature, int atoms) {
  return int64_t(kWgmmaChunk) * (slots * 4 * int64_t(feature) + 4 * int64_t(chunks)) +
         wgmma_rows_bytes(feature, atoms, slots < chunks);
}
constexpr int64_t wgmma_decoder_bytes(const Decoder& d, int feature, int atoms) {
  return 2 * (d.s_layers * atoms * atoms + (d.b_layers + 1) * int64_t(atoms) * feature) +
         4 * (d.layers * atoms + round_up(d.layers, 4));
}

// decode alone on wgmma: P padded to 64 or 128, R and Dv to one of both.
constexpr int decode_wgmma_feature(int64_t n) { return smallest_of({64, 128}, n); }
constexpr int kDecodeWgmmaAtoms = 128;
// Warpgroups of a block: B z, u and the iterate of 64 coefficients take 80 registers of 128 a thread, of 128
// coefficients 160 of 255.
constexpr int decode_wgmma_groups(int atoms) { return atoms == 64 ? 4 : 2; }
// The decoder; for each warpgroup tiles of rows with their mbarriers.
constexpr int64_t decode_wgmma_bytes(const Decoder& d, int feature, int atoms, int stages) {
  return wgmma_decoder_bytes(d, feature, atoms) +
         decode_wgmma_groups(atoms) * stages * (kWgmmaRows * int64_t(feature) * 2 + 8);
}

// How a forward launch uses the tensor cores: sizes, and what shared memory holds.
struct ForwardMmaPlan {
  bool wgmma = false;
  int feature = 0, atoms = 0;  // compile-time sizes; atoms 0: no decoder
  int chunks = 0, slots = 0;   // of measurements; as many slots as chunks: resident
  int stages = 0;              // tiles of query rows a warp; of rows of z a warpgroup, where decode alone is on wgmma
  int64_t shared_bytes = 0;
};
Device current_device();
// nullptr and a plan, or the reason why there is none. With both, attend and decode run as one kernel.
const char* plan_mma(ForwardMmaPlan& plan, const AttendParams* attend, const DecodeParams* decode,
                     int64_t shared_limit);
const char* plan_wgmma(ForwardMmaPlan& plan, const AttendParams& attend, const DecodeParams* decode,
                       const Device& device);
const char* plan_wgmma(ForwardMmaPlan& plan, const DecodeParams& decode, const Device& device);
// attend_causal, with `decode` fused; nullptr and a plan, or the reason why there is none.
const char* plan_causal_mma(ForwardMmaPlan& plan, const AttendCausalParams& p, const DecodeParams* decode,
                            int64_t shared_limit);
// attend_prefix, with `decode` fused; nullptr and a plan, or the reason why there is none.
const char* plan_prefix_mma(ForwardMmaPlan& plan, const PrefixParams& p, const DecodeParams* decode,
                            int64_t shared_limit);
// The first of both that has a plan; nullptr and the plan, or why mma has none.
const char* plan_forward(ForwardMmaPlan& plan, const AttendParams* attend, const DecodeParams* decode,
                         const Device& device);

// Attend's backward.
constexpr int kBackwardQueries = 32;      // a tile that a block walks
constexpr int64_t kBackwardChunk = 256;   // queries that are worth a block of their own
constexpr int kBackwardBlockBytes = 128;  // of addresses, alike for all threads of a block
constexpr int kBackwardShiftDepth = 32;   // measurements at a time where the shift has a kernel of its own
constexpr int kBackwardColumns = 64;      // to which a row of biases is padded: the most that a kernel takes at a time
// Measurements a warp: its dkc and dvc are 2 rows x feature / 32 registers, of at most 255.
constexpr int backward_warp_rows(int feature) { return feature <= 64 ? 32 : 16; }

constexpr int64_t attend_backward_mma_bytes(int64_t warps, int feature) {
  const int64_t rows = backward_warp_rows(feature);
  const int64_t of_queries =
      5 * mma_tile_bytes(kBackwardQueries, feature) + 6 * kBackwardQueries * 4 + kBackwardBlockBytes;
  const int64_t of_warp =
      2 * mma_tile_bytes(rows, feature) + mma_tile_bytes(rows, kBackwardQueries) + (rows + 3 * kBackwardQueries) * 4;
  return of_queries + warps * of_warp;
}
// On wgmma a warpgroup has `row_blocks` times 64 measurements: dkc and dvc of 64 x 64 leave registers for 64 queries.
constexpr int kWgmmaBackwardStages = 3;  // tiles of queries in shared memory
constexpr int wgmma_backward_queries(int feature, int row_blocks) { return feature == 64 && row_blocks == 1 ? 64 : 32; }
constexpr int kWgmmaBackwardBarrierBytes = 64;
constexpr int64_t attend_backward_wgmma_bytes(int64_t warps, int feature, int row_blocks) {
  const int64_t measurements = warps * 16 * row_blocks, queries = wgmma_backward_queries(feature, row_blocks);
  const int64_t matrices =
      2 * measurements * feature + queries * measurements + 2 * kWgmmaBackwardStages * queries * feature;
  const int64_t floats = measurements + (3 + 3 * warps) * queries;
  return 2 * matrices + mma_tile_bytes(queries, feature) + kBackwardBlockBytes + kWgmmaBackwardBarrierBytes +
         4 * floats;
}
// The mean gradient of the probabilities, which slabs need before: 128 queries a block, 64 measurements at a time.
constexpr int kWgmmaMeanDepth = 64, kWgmmaMeanStages = 2;
constexpr int64_t backward_mean_wgmma_bytes(int feature) {
  return 2 * (4 * kWgmmaRows + 2 * kWgmmaMeanStages * kWgmmaMeanDepth) * feature +
         4 * kWgmmaMeanStages * kWgmmaMeanDepth + kWgmmaBackwardBarrierBytes;
}
// Ranges of queries of a pair of batch element and head, where a device runs `slots` blocks at once: what finishes
// first, a block costing as much as kBackwardChunk queries beside its own.
constexpr int64_t wgmma_backward_chunks(int64_t pairs, int64_t queries, int64_t slots) {
  const int64_t most = ceil_div(queries, kBackwardChunk);
  int64_t best = 1, least = INT64_MAX;
  for (int64_t chunks = 1; chunks <= most && (chunks == 1 || pairs * chunks <= 8 * slots); ++chunks) {
    const int64_t cost = ceil_div(pairs * chunks, slots) * (ceil_div(queries, chunks) + kBackwardChunk);
    if (cost < least) least = cost, best = chunks;
  }
  return best;
}
// How attend's backward uses the tensor cores: sizes, and how the measurements are dealt to blocks.
struct AttendBackwardPlan {
  int feature = 0, row_blocks = 0;  // compile-time sizes; row_blocks 0: mma, not wgmma
  int64_t slabs = 0, warps = 0;     // a slab belongs to a block of as many warps
  int64_t slab_rows = 0;            // its measurements
  int queries = 0;                  // of a tile
  int64_t shared_bytes = 0;
};
constexpr int64_t backward_shift_mma_bytes(int feature) {
  const int64_t queries = kMmaWarps * 16;
  return 2 * mma_tile_bytes(queries, feature) + 4 * mma_tile_bytes(kBackwardShiftDepth, feature) +
         4 * (2 * kBackwardShiftDepth + 2 * queries);
}

// nullptr and a plan, or the reason why there is none.
const char* plan_mma(AttendBackwardPlan& plan, const AttendBackwardParams& p, int64_t shared_limit);
const char* plan_wgmma(AttendBackwardPlan& plan, const AttendBackwardParams& p, const Device& device);
// The first of both that has a plan; nullptr and the plan, or why mma has none.
const char* plan_backward(AttendBackwardPlan& plan, const AttendBackwardParams& p, const Device& device);

// attend_causal's backward. A block of dq has 16 queries a warp, kept with their dz, and two chunks of columns; one of
// the other gradients a slab of columns and two tiles of queries, so that two blocks share a multiprocessor.
constexpr int kCausalQueryRows = 16, kCausalSlabWarps = 4;
constexpr int causal_slab_rows(int feature) { return kCausalSlabWarps * backward_warp_rows(feature); }
// lse and centre of every query.
constexpr int64_t causal_query_backward_bytes(int feature) {
  return 2 * mma_slot_bytes(feature) +
         kMmaWarps * (2 * mma_tile_bytes(kCausalQueryRows, feature) + 2 * kCausalQueryRows * 4);
}
// lse, centre and shift of a query; bias and the ends of the queries that see it of a column.
constexpr int64_t causal_column_backward_bytes(int feature) {
  const int64_t rows = backward_warp_rows(feature);
  return 4 * mma_tile_bytes(kBackwardQueries, feature) + 6 * kBackwardQueries * 4 +
         kCausalSlabWarps * (2 * mma_tile_bytes(rows, feature) + 3 * rows * 4);
}
// nullptr if attend_causal's backward runs on tensor cores within `shared_limit` bytes a block, else the reason.
const char* why_not_mma(const AttendCausalBackwardParams& p, int64_t shared_limit);

// decode_backward on tensor cores. R and Dv share a size; two row blocks a warp where registers leave them room.
constexpr int decode_backward_feature(int64_t R, int64_t Dv) { return smallest_of({64, 128}, R > Dv ? R : Dv); }
constexpr int decode_backward_rows(int atoms, int feature) { return atoms <= 128 && feature <= 64 ? 32 : 16; }
// S_t, B_t and psi of one layer; psi lies in a place of its own or in that of B, which is then loaded again.
constexpr int64_t decode_backward_bytes(int atoms, int feature, bool psi_apart) {
  const int64_t B = mma_tile_bytes(atoms, feature), psi = mma_tile_bytes(feature, atoms);
  return mma_tile_bytes(atoms, atoms) + (psi_apart ? B + psi : (B > psi ? B : psi));
}
// nullptr if decode_backward runs on tensor cores within `shared_limit` bytes a block, else the reason.
const char* why_not_mma(const DecodeBackwardParams& p, int64_t shared_limit);

// The same on wgmma, S and B tied. A warpgroup has 64 rows and 64 coefficients; P, R and Dv share a size, 64 or 128.
constexpr int decode_backward_wgmma_size(const Decoder& d) {
  int64_t n = d.coefficients > d.features ? d.coefficients : d.features;
  return smallest_of({64, 128}, n > d.outputs ? n : d.outputs);
}
// Weights; for each team of warpgroups `stages` tiles of z and dc, the iterates (a_T only where dpsi is summed with the
// rows, for 64), es_t; thresholds and steps, their sums of every warp, mbarriers.
constexpr int64_t decode_backward_wgmma_bytes(int size, int64_t layers, int stages) {
  const int64_t teams = 128 / size, tile = int64_t(kWgmmaRows) * size;
  const int64_t tiles = 2 * stages + 2 * layers - (size == 64 ? 0 : 1);
  return 2 * (3 * size * size + teams * tiles * tile) + 4 * round_up(layers * (size + 1 + kMmaWarps * 65), 2) + 4 * 8;
}
// Tiles of z and dc that fit: 2, or 1; 0: none.
constexpr int decode_backward_wgmma_stages(int size, int64_t layers, int64_t shared_limit) {
  for (int stages : {2, 1})
    if (decode_backward_wgmma_bytes(size, layers, stages) <= shared_limit) return stages;
  return 0;
}
const char* why_not_wgmma(const DecodeBackwardParams& p, const Device& device);

// nullptr if the op runs within `shared_limit` bytes a block, else the reason.
const char* why_not(const AttendParams& p, int64_t shared_limit);
const char* why_not(const AttendBackwardParams& p, int64_t shared_limit);
const char* why_not(const AttendCausalParams& p, int64_t shared_limit);
const char* why_not(const AttendCausalBackwardParams& p, int64_t shared_limit);
const char* why_not(const PrefixParams& p, int64_t shared_limit);
const char* why_not(const PrefixBackwardParams& p, int64_t shared_limit);
const char* why_not(const DecodeParams& p, int64_t shared_limit);
const char* why_not(const DecodeBackwardParams& p, int64_t shared_limit);
const char* why_not(const AttendParams& attend, const DecodeParams& decode, int64_t shared_limit);
const char* why_not(const AttendCausalParams& attend, const DecodeParams& decode, int64_t shared_limit);
const char* why_not(const PrefixParams& attend, const DecodeParams& decode, int64_t shared_limit);

// ---- the question that dispatch and csat_ext.explain ask

enum class Kernel {
  attend,
  decode,
  attend_decode,
  attend_backward,
  decode_backward,
  attend_causal,
  attend_causal_decode,
  attend_causal_backward,
  attend_prefix,
  attend_prefix_decode,
  attend_prefix_backward
};
// In the order of preference. A pair is attend_decode as attend and decode, one of them at least on tensor cores, or
// attend_causal_decode (attend_prefix_decode) as attend_causal (attend_prefix) and decode, which have no simt kernel
// together.
enum class Family { wgmma, mma, pair, simt };

// What a kernel works on. decode.z.dtype is read for decode and decode_backward alone, tokens.count for attend_causal
// and what is made of it, pointers nowhere. The tokens of attend_prefix are its queries.
struct Problem {
  AttendParams attend;
  DecodeParams decode;
  CausalTokens tokens;
};

// nullptr if the kernel runs in this family on the device, else the reason.
const char* can_run(Kernel kernel, Family family, const Problem& p, const Device& device);
// Bytes of shared memory that a block of it then takes: of the larger kernel where there are two.
int64_t shared_bytes(Kernel kernel, Family family, const Problem& p, const Device& device);

}  // namespace csat::limits
