// Host side of decode's backward on tensor cores. As on the SIMT side the rows go in chunks of at most
// limits::kWorkspaceCap bytes of iterates and errors, and the sums over rows are accumulated chunk by chunk, in order.
#include "csat/decode_backward_mma.cuh"
#include "csat/decode_backward_mma.h"
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
  DecodeBackwardMmaArgs args{};
  int atoms, feature, rows;            // compile-time sizes of the kernel
  int64_t tiles = 0, chunk_tiles = 0;  // of a group: in all, and in one launch
  int64_t chunk = 0;                   // tiles of the current launch
  float* outer_parts = nullptr;

  explicit Plan(const DecodeBackwardParams& p)
      : params(p),
        d(p.forward.decoder),
        atoms(limits::mma_atoms(d.coefficients)),
        feature(limits::decode_backward_feature(d.features, d.outputs)),
        rows(limits::decode_backward_rows(atoms, feature)) {}

  int take(Carver& carver, void* stream) {
    args.psi_apart = limits::decode_backward_bytes(atoms, feature, true) <= shared_memory_limit();
    args.heads = params.forward.heads;
    args.queries = params.forward.queries;
    args.z = params.forward.z;
    args.dout = params.dout;
    args.dz = params.dz;
    CSAT_TRY(take_weights(carver, stream));
    tiles = params.forward.batch * (d.heads == 1 ? params.forward.heads : 1) * ceil_div(params.forward.queries, rows);
    const int64_t row_bytes = (2 * d.layers * atoms + 2 * feature) * 2;
    chunk_tiles = smaller(tiles, larger(1, limits::kWorkspaceCap / (d.heads * rows * row_bytes)));
    take_rows(carver);
    return 0;
  }

  int take_weights(Carver& carver, void* stream) {
    CSAT_TRY(take_matrices(args.decoder, d, params.forward.z.dtype, carver, stream));
    CSAT_TRY(take_panel(args.decoder.theta, carver, theta_operand(d), d.layers, atoms, stream));
    return take_panel(args.decoder.step, carver, step_operand(d), 1, d.layers, stream);
  }

  void take_rows(Carver& carver) {
    const int64_t blocks = d.heads * chunk_tiles * rows / 16, parts = d.heads * slots(chunk_tiles);
    args.iterates = carver.take<uint32_t>(blocks * d.layers * row_block_words(atoms));
    args.errors = carver.take<uint32_t>(blocks * d.layers * row_block_words(atoms));
    args.z_rows = carver.take<uint32_t>(blocks * row_block_words(feature));
    args.dout_rows = carver.take<uint32_t>(blocks * row_block_words(feature));
    args.theta_parts = carver.take(parts * d.layers * atoms);
    args.step_parts = carver.take(parts * d.layers);
    // The last chunk may be shorter: its rows are split another way, never into more parts than wanted.
    int64_t bytes = 0;
    for (int64_t t : {chunk_tiles, chunk_tiles ? (tiles - 1) % chunk_tiles + 1 : 0}) {
      chunk = t;
      for (const BlockOuterArgs& sum : {S_sum(), B_sum(), psi_sum()})
        bytes = larger(bytes, outer_blocks_workspace(sum));
    }
    outer_parts = carver.take<float>(bytes / 4);
  }

  // Blocks of a group, and warps among theirs that have a tile: as many blocks as run at once, and no idle ones.
  int64_t group_blocks(int64_t chunk) const { return smaller(chunk, larger(1, ceil_div(multiprocessors(), d.heads))); }
  int64_t slots(int64_t chunk) const { return smaller(chunk, group_blocks(chunk) * limits::kMmaWarps); }

  int launch_rows(void* stream) {
    args.group_tiles = static_cast<int>(chunk);
    args.group_blocks = static_cast<int>(group_blocks(chunk));
    args.slots = static_cast<int>(slots(chunk));
    const int64_t blocks = d.heads * group_blocks(chunk);
    if (blocks == 0) return 0;
    if (blocks > limits::kMaxBlocks) return kUnsupported;
    const int64_t bytes = limits::decode_backward_bytes(atoms, feature, args.psi_apart);
    const auto launch = [&](auto element) {
      using T = decltype(element);
      switch (atoms + feature) {
        case 64 + 64:
          return launch_decode_backward_mma<T, 64, 64>(args, blocks, bytes, stream);
        case 64 + 128:
          return feature == 64 ? launch_decode_backward_mma<T, 128, 64>(args, blocks, bytes, stream)
                               : launch_decode_backward_mma<T, 64, 128>(args, blocks, bytes, stream);
        case 128 + 128:
          return launch_decode_backward_mma<T, 128, 128>(args, blocks, bytes, stream);
        case 256 + 64:
          return launch_decode_backward_mma<T, 256, 64>(args, blocks, bytes, stream);
        default:
          return launch_decode_backward_mma<T, 256, 128>(args, blocks, bytes, stream);
      }
    };
    return params.forward.z.dtype == DType::bf16 ? launch(bf16{}) : launch(f16{});
  }

  // dS_t = sum step_t e_t^T a_t over t = 1 ..: a_0 = 0.
  BlockOuterArgs S_sum() const {
    const int64_t layer = wide_layer(), own = d.s_layers * d.coefficients * d.coefficients;
    BlockOuterArgs sum = outer_sum(args.errors, args.iterates, atoms, atoms);
    sum.x_group = sum.y_group = d.layers * layer;
    sum.x_member = sum.y_member = layer;
    sum.members = d.layers - 1;
    sum.sum_members = d.s_layers == 1;
    if (args.errors) sum.x += layer, sum.scale += 1;
    sum.rows = sum.columns = d.coefficients;
    const int64_t skipped = d.s_layers == 1 ? 0 : d.coefficients * d.coefficients;
    sum.target = {params.dS ? params.dS + skipped : nullptr,
                  DType::f32,
                  {own, d.coefficients * d.coefficients, d.coefficients, 1}};
    return sum;
  }
  BlockOuterArgs B_sum() const {
    BlockOuterArgs sum = outer_sum(args.errors, args.z_rows, atoms, feature);
    sum.x_group = d.layers * wide_layer();
    sum.x_member = wide_layer();
    sum.y_group = narrow_layer();
    sum.members = d.layers;
    sum.sum_members = d.b_layers == 1;
    sum.rows = d.coefficients;
    sum.columns = d.features;
    const int64_t matrix = sum.rows * sum.columns;
    sum.target = {params.dB, DType::f32, {d.b_layers * matrix, matrix, sum.columns, 1}};
    return sum;
  }
  BlockOuterArgs psi_sum() const {
    BlockOuterArgs sum = outer_sum(args.dout_rows, args.iterates, feature, atoms);
    sum.x_group = narrow_layer();
    sum.y_group = d.layers * wide_layer();
    if (args.iterates) sum.y += (d.layers - 1) * wide_layer();
    sum.scale = nullptr;
    sum.members = 1;
    sum.rows = d.outputs;
    sum.columns = d.coefficients;
    sum.target = {params.dpsi, DType::f32, {sum.rows * sum.columns, 0, sum.columns, 1}};
    return sum;
  }

 private:
  int64_t wide_layer() const { return chunk * rows / 16 * row_block_words(atoms); }
  int64_t narrow_layer() const { return chunk * rows / 16 * row_block_words(feature); }
  BlockOuterArgs outer_sum(const uint32_t* x, const uint32_t* y, int x_columns, int y_columns) const {
    BlockOuterArgs sum{};
    sum.dtype = params.forward.z.dtype;
    sum.x = x;
    sum.y = y;
    sum.scale = args.decoder.step.data;
    sum.scale_group = args.decoder.step.matrix;
    sum.groups = d.heads;
    sum.row_blocks = chunk * rows / 16;
    sum.x_columns = x_columns;
    sum.y_columns = y_columns;
    sum.partial = outer_parts;
    return sum;
  }
};

int add_outer_sum(BlockOuterArgs sum, bool accumulate, void* stream) {
  sum.accumulate = accumulate;
  return outer_blocks(sum, stream);
}

// dS_0 = 0 where S is untied: the sums begin with layer 1.
int zero_first_layer(const Decoder& d, float* dS, void* stream) {
  const int64_t P = d.coefficients;
  if (d.s_layers == 1) return 0;
  return reduce({nullptr, 0, 0, 0, 0, d.heads, 1, P, P, {dS, DType::f32, {d.s_layers * P * P, 0, P, 1}}, 1.f, false},
                stream);
}

}  // namespace

int64_t decode_backward_mma_workspace(const DecodeBackwardParams& p) {
  Carver carver(nullptr);
  Plan(p).take(carver, nullptr);
  return carver.used();
}

int decode_backward_mma(const DecodeBackwardParams& p, void* workspace, void* stream) {
  const Decoder& d = p.forward.decoder;
  const int64_t T = d.layers, P = d.coefficients;
  Carver carver(workspace);
  Plan plan(p);
  CSAT_TRY(plan.take(carver, stream));
  CSAT_TRY(zero_first_layer(d, p.dS, stream));
  int64_t first = 0;
  do {  // once even without rows: the sums are then zero
    plan.chunk = smaller(plan.chunk_tiles, plan.tiles - first);
    plan.args.first_tile = first;
    CSAT_TRY(plan.launch_rows(stream));
    const bool more = first > 0;
    CSAT_TRY(add_outer_sum(plan.S_sum(), more, stream));
    CSAT_TRY(add_outer_sum(plan.B_sum(), more, stream));
    if (d.psi.data) CSAT_TRY(add_outer_sum(plan.psi_sum(), more, stream));
    const int64_t slots = plan.slots(plan.chunk), atoms = plan.atoms;
    const View theta{p.dtheta, DType::f32, {T * P, 0, P, 1}}, step{p.dstep, DType::f32, {T, 0, 0, 1}};
    CSAT_TRY(
        reduce({plan.args.theta_parts, slots, slots * T * atoms, T * atoms, atoms, d.heads, 1, T, P, theta, 1.f, more},
               stream));
    CSAT_TRY(reduce({plan.args.step_parts, slots, slots * T, T, T, d.heads, 1, 1, T, step, 1.f, more}, stream));
    first += plan.chunk;
  } while (first < plan.tiles);
  return 0;
}

}  // namespace csat
