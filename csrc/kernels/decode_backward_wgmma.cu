// Host side of decode's backward on wgmma: teams, parts, and where dpsi has a kernel of its own the chunks of rows that
// the workspace holds for it.
#include "csat/blocks.h"
#include "csat/decode_backward_mma.h"
#include "csat/decode_backward_wgmma.cuh"
#include "csat/decoder_weights.h"

namespace csat {
namespace {

using limits::ceil_div;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Sizes and launches of one backward; with a null base only sizes.
struct Plan {
  const DecodeBackwardParams& params;
  const Decoder& d;
  const int size;  // compile-time P, R and Dv
  const int64_t teams = 128 / size;
  const bool sums_psi = size == 64, keeps_rows = !sums_psi && params.forward.decoder.psi.data;
  DecodeBackwardWgmmaArgs args{};
  int64_t tiles = 0, chunk_tiles = 0;  // of a group: in all, and in one launch
  float* outer_parts = nullptr;

  explicit Plan(const DecodeBackwardParams& p)
      : params(p), d(p.forward.decoder), size(limits::decode_backward_wgmma_size(d)) {}

  int take(Carver& carver, void* stream) {
    args.heads = static_cast<int>(params.forward.heads);
    args.queries = params.forward.queries;
    args.query_tiles = static_cast<int>(ceil_div(args.queries, limits::kWgmmaRows));
    args.stages = limits::decode_backward_wgmma_stages(size, d.layers, shared_memory_limit());
    args.dz = params.dz;
    args.dz_vectors = has_vector_rows(params.dz) && d.features % 8 == 0;
    CSAT_TRY(take_rows(args.z, params.forward.z, d.features, carver, stream));
    CSAT_TRY(take_rows(args.dout, params.dout, d.outputs, carver, stream));
    CSAT_TRY(take_decoder(args.decoder, d, params.forward.z.dtype, carver, stream));
    tiles = params.forward.batch * (d.heads == 1 ? params.forward.heads : 1) * args.query_tiles;
    const int64_t row_bytes = keeps_rows ? 2 * 2 * size : 0;
    const int64_t most = limits::kWorkspaceCap / larger(1, d.heads * limits::kWgmmaRows * row_bytes);
    chunk_tiles = !keeps_rows ? tiles : smaller(tiles, larger(1, most));
    take_parts(carver);
    return 0;
  }

  int launch(int64_t first, void* stream) {
    args.first_tile = static_cast<int>(first);
    args.group_tiles = static_cast<int>(smaller(chunk_tiles, tiles - first));
    args.group_blocks = static_cast<int>(group_blocks(args.group_tiles));
    args.slots = static_cast<int>(args.group_blocks * teams);
    const int64_t blocks = d.heads * args.group_blocks;
    if (blocks > limits::kMaxBlocks) return kUnsupported;
    const int64_t bytes = limits::decode_backward_wgmma_bytes(size, d.layers, args.stages);
    const auto launch = [&](auto element) {
      using T = decltype(element);
      return size == 64 ? launch_decode_backward_wgmma<T, 64, 64>(args, blocks, bytes, stream)
                        : launch_decode_backward_wgmma<T, 128, 128>(args, blocks, bytes, stream);
    };
    CSAT_TRY(params.forward.z.dtype == DType::bf16 ? launch(bf16{}) : launch(f16{}));
    return add_parts(first > 0, stream);
  }

 private:
  int take_rows(RowBoxes& boxes, View rows, int64_t columns, Carver& carver, void* stream) {
    const DecodeParams& f = params.forward;
    CSAT_TRY(take_vector_rows(rows, carver, f.z.dtype, f.batch, f.heads, f.queries, columns, stream));
    if (carver.sizing()) return 0;
    const auto make = rows.dtype == DType::bf16 ? make_row_boxes<bf16> : make_row_boxes<f16>;
    return make(&boxes, rows, f.batch, f.heads, f.queries, columns, limits::kWgmmaRows);
  }

  void take_parts(Carver& carver) {
    const int64_t parts = d.heads * group_blocks(chunk_tiles) * teams, matrix = int64_t(size) * size;
    args.S_parts = carver.take(parts * matrix);
    args.B_parts = carver.take(parts * matrix);
    args.theta_parts = carver.take(parts * d.layers * size);
    args.step_parts = carver.take(parts * d.layers);
    if (!d.psi.data) return;
    if (sums_psi) {
      args.psi_parts = carver.take(parts * matrix);
      return;
    }
    args.iterates = carver.take<uint32_t>(d.heads * rows_words(chunk_tiles));
    args.dout_rows = carver.take<uint32_t>(d.heads * rows_words(chunk_tiles));
    int64_t bytes = 0;
    for (int64_t t : {chunk_tiles, (tiles - 1) % chunk_tiles + 1})
      bytes = larger(bytes, outer_blocks_workspace(psi_sum(t)));
    outer_parts = carver.take<float>(bytes / 4);
  }

  // Blocks of a group: as many as run at once, none without a tile.
  int64_t group_blocks(int64_t chunk) const {
    return smaller(ceil_div(chunk, teams), larger(1, multiprocessors() / d.heads));
  }
  int64_t rows_words(int64_t chunk) const { return chunk * (limits::kWgmmaRows / 16) * row_block_words(size); }

  int add(const float* parts, int64_t rows, int64_t columns, int64_t pitch, int64_t matrix, float* target, bool more,
          void* stream) const {
    const View to{target, DType::f32, {rows * columns, 0, columns, 1}};
    return reduce({parts, args.slots, args.slots * matrix, matrix, pitch, d.heads, 1, rows, columns, to, 1.f, more},
                  stream);
  }
  int add_parts(bool more, void* stream) {
    const int64_t P = d.coefficients, T = d.layers, matrix = int64_t(size) * size;
    CSAT_TRY(add(args.S_parts, P, P, size, matrix, params.dS, more, stream));
    CSAT_TRY(add(args.B_parts, P, d.features, size, matrix, params.dB, more, stream));
    CSAT_TRY(add(args.theta_parts, T, P, size, T * size, params.dtheta, more, stream));
    CSAT_TRY(add(args.step_parts, 1, T, T, T, params.dstep, more, stream));
    if (!d.psi.data) return 0;
    if (sums_psi) return add(args.psi_parts, d.outputs, P, size, matrix, params.dpsi, more, stream);
    BlockOuterArgs sum = psi_sum(args.group_tiles);
    sum.accumulate = more;
    return outer_blocks(sum, stream);
  }

  // dpsi += dc^T a_T over the rows of a launch.
  BlockOuterArgs psi_sum(int64_t chunk) const {
    BlockOuterArgs sum{};
    sum.dtype = params.forward.z.dtype;
    sum.x = args.dout_rows;
    sum.y = args.iterates;
    sum.x_group = sum.y_group = rows_words(chunk);
    sum.groups = d.heads;
    sum.members = 1;
    sum.row_blocks = chunk * (limits::kWgmmaRows / 16);
    sum.x_columns = sum.y_columns = size;
    sum.partial = outer_parts;
    sum.rows = d.outputs;
    sum.columns = d.coefficients;
    sum.target = {params.dpsi, DType::f32, {sum.rows * sum.columns, 0, sum.columns, 1}};
    return sum;
  }
};

}  // namespace

int64_t decode_backward_wgmma_workspace(const DecodeBackwardParams& p) {
  Carver carver(nullptr);
  Plan(p).take(carver, nullptr);
  return carver.used();
}

int decode_backward_wgmma(const DecodeBackwardParams& p, void* workspace, void* stream) {
  Carver carver(workspace);
  Plan plan(p);
  CSAT_TRY(plan.take(carver, stream));
  for (int64_t first = 0; first < plan.tiles; first += plan.chunk_tiles) CSAT_TRY(plan.launch(first, stream));
  return 0;
}

}  // namespace csat
