// Host side of decode's backward: wgmma, mma or SIMT, the first that limits.h has nothing against. The
// iterates of all rows would not fit anywhere for long inputs, so the rows go in chunks of at most
// limits::kWorkspaceCap bytes; the sums over rows are accumulated chunk by chunk, in order.
#include "csat/decode_backward_mma.h"
#include "csat/dispatch.h"
#include "csat/instances.h"
#include "csat/workspace.h"

namespace csat {
namespace {

using limits::ceil_div;
using limits::column_pad;
using limits::depth_pad;

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Sizes and launches of one backward; with a null base only sizes.
struct Plan {
  DecodeBackwardArgs args{};
  int64_t tiles = 0, chunk_tiles = 0;  // of a group: in all, and in one launch
  float* outer_parts = nullptr;

  int take(const DecodeBackwardParams& p, Carver& carver, void* stream) {
    const Decoder& d = p.forward.decoder;
    const int64_t P = d.coefficients, R = d.features, pitch = column_pad(P);
    args.rows = limits::row_tile(limits::decode_backward_row(P, R, d.outputs), shared_memory_limit());
    if (args.rows == 0) return kUnsupported;
    args.heads = p.forward.heads;
    args.queries = p.forward.queries;
    args.groups = d.heads;
    args.layers = static_cast<int>(d.layers);
    args.s_layers = static_cast<int>(d.s_layers);
    args.b_layers = static_cast<int>(d.b_layers);
    args.features = static_cast<int>(R);
    args.outputs = static_cast<int>(d.outputs);
    args.a_pitch = column_pad(P);
    args.z_depth = depth_pad(R);
    args.features_pitch = column_pad(R);
    args.outputs_pitch = column_pad(d.outputs);
    args.wide_pitch = static_cast<int>(larger(args.features_pitch, args.outputs_pitch));
    args.z = p.forward.z;
    args.dout = p.dout;
    args.dz = p.dz;
    const PackArgs S = operand(d.S, d.heads, d.s_layers, P, P), B = operand(d.B, d.heads, d.b_layers, P, R);
    CSAT_TRY(take_panel(args.S_t, carver, transposed(S), pitch, pitch, stream));
    CSAT_TRY(take_panel(args.B_t, carver, transposed(B), args.z_depth, pitch, stream));
    CSAT_TRY(take_panel(args.S, carver, S, pitch, pitch, stream));
    CSAT_TRY(take_panel(args.B, carver, B, pitch, args.features_pitch, stream));
    const PackArgs psi = operand(d.psi, d.heads, 1, d.outputs, P);
    if (d.psi.data) CSAT_TRY(take_panel(args.psi, carver, psi, args.outputs_pitch, pitch, stream));
    PackArgs theta = operand(d.theta, d.heads, 1, d.layers, P);
    theta.row_stride = d.theta.stride[1];
    CSAT_TRY(take_panel(args.theta, carver, theta, d.layers, pitch, stream));
    CSAT_TRY(take_panel(args.step, carver, operand(d.step, d.heads, 1, 1, d.layers), 1, d.layers, stream));

    tiles = p.forward.batch * (d.heads == 1 ? p.forward.heads : 1) * ceil_div(p.forward.queries, args.rows);
    const int64_t row_floats = (2 * d.layers + 1 + d.b_layers) * pitch + args.features_pitch + args.outputs_pitch;
    chunk_tiles = smaller(tiles, larger(1, limits::kWorkspaceCap / (d.heads * args.rows * row_floats * 4 + 1)));
    const int64_t rows = d.heads * chunk_tiles * args.rows;
    args.iterates = carver.take(rows * (d.layers + 1) * pitch);
    args.errors = carver.take(rows * d.layers * pitch);
    args.b_errors = carver.take(rows * d.b_layers * pitch);
    args.z_rows = carver.take(rows * args.features_pitch);
    args.dout_rows = carver.take(rows * args.outputs_pitch);
    args.theta_parts = carver.take(d.heads * chunk_tiles * d.layers * pitch);
    args.step_parts = carver.take(d.heads * chunk_tiles * d.layers);
    // The last chunk may be shorter: the split of its depth is another one, never with more parts than wanted.
    int64_t parts = 0;
    for (int64_t t : {chunk_tiles, chunk_tiles ? (tiles - 1) % chunk_tiles + 1 : 0})
      for (const OuterArgs& sum : {S_sum(d, t), B_sum(d, t), psi_sum(d, t)})
        parts = larger(parts, outer_workspace(sum.n0, sum.n1, sum.depth, sum.rows, sum.columns));
    outer_parts = carver.take<float>(parts / 4);
    return 0;
  }

  int64_t layer_stride(int64_t chunk) const { return chunk * args.rows * args.a_pitch; }

  OuterArgs S_sum(const Decoder& d, int64_t chunk) const {
    const int64_t layer = layer_stride(chunk), tied = d.s_layers == 1 ? d.layers : 1;
    return {args.errors,
            args.iterates,
            d.layers * layer,
            layer,
            args.a_pitch,
            (d.layers + 1) * layer,
            layer,
            args.a_pitch,
            d.heads,
            d.s_layers,
            tied * chunk * args.rows,
            d.coefficients,
            d.coefficients,
            outer_parts,
            nullptr,
            false};
  }
  OuterArgs B_sum(const Decoder& d, int64_t chunk) const {
    const int64_t layer = layer_stride(chunk), rows = chunk * args.rows;
    return {args.b_errors,
            args.z_rows,
            d.b_layers * layer,
            layer,
            args.a_pitch,
            rows * args.features_pitch,
            0,
            args.features_pitch,
            d.heads,
            d.b_layers,
            rows,
            d.coefficients,
            d.features,
            outer_parts,
            nullptr,
            false};
  }
  OuterArgs psi_sum(const Decoder& d, int64_t chunk) const {
    const int64_t layer = layer_stride(chunk), rows = chunk * args.rows;
    const float* last = args.iterates ? args.iterates + d.layers * layer : nullptr;
    return {args.dout_rows,
            last,
            rows * args.outputs_pitch,
            0,
            args.outputs_pitch,
            (d.layers + 1) * layer,
            0,
            args.a_pitch,
            d.heads,
            1,
            rows,
            d.outputs,
            d.coefficients,
            outer_parts,
            nullptr,
            false};
  }
};

int add_outer_sum(OuterArgs sum, float* target, bool accumulate, void* stream) {
  sum.target = target;
  sum.accumulate = accumulate;
  return outer(sum, stream);
}

}  // namespace

int64_t decode_backward_workspace(const DecodeBackwardParams& p) {
  if (!limits::why_not_wgmma(p, limits::current_device())) return decode_backward_wgmma_workspace(p);
  if (!limits::why_not_mma(p, shared_memory_limit())) return decode_backward_mma_workspace(p);
  Carver carver(nullptr);
  Plan().take(p, carver, nullptr);
  return carver.used();
}

int decode_backward(const DecodeBackwardParams& p, void* workspace, void* stream) {
  if (!limits::why_not_wgmma(p, limits::current_device())) return decode_backward_wgmma(p, workspace, stream);
  if (!limits::why_not_mma(p, shared_memory_limit())) return decode_backward_mma(p, workspace, stream);
  const Decoder& d = p.forward.decoder;
  Carver carver(workspace);
  Plan plan;
  CSAT_TRY(plan.take(p, carver, stream));
  DecodeBackwardArgs& args = plan.args;
  const int64_t T = d.layers, P = d.coefficients, pitch = args.a_pitch;
  int64_t first = 0;
  do {  // once even without rows: the sums are then zero
    const int64_t chunk = smaller(plan.chunk_tiles, plan.tiles - first);
    args.first_tile = first;
    args.group_tiles = chunk;
    const int64_t blocks = args.groups * chunk;
    if (blocks > limits::kMaxBlocks) return kUnsupported;
    if (blocks > 0) {
      const int64_t bytes = args.rows * limits::decode_backward_row(P, d.features, d.outputs) * 4;
      CSAT_TRY(with_dtype(p.forward.z.dtype, [&](auto element) {
        return launch_decode_backward<decltype(element)>(args, blocks, bytes, stream);
      }));
    }
    const bool more = first > 0;
    CSAT_TRY(add_outer_sum(plan.S_sum(d, chunk), p.dS, more, stream));
    CSAT_TRY(add_outer_sum(plan.B_sum(d, chunk), p.dB, more, stream));
    if (d.psi.data) CSAT_TRY(add_outer_sum(plan.psi_sum(d, chunk), p.dpsi, more, stream));
    const View theta{p.dtheta, DType::f32, {T * P, 0, P, 1}}, step{p.dstep, DType::f32, {T, 0, 0, 1}};
    CSAT_TRY(reduce({args.theta_parts, chunk, chunk * T * pitch, T * pitch, pitch, d.heads, 1, T, P, theta, 1.f, more},
                    stream));
    CSAT_TRY(reduce({args.step_parts, chunk, chunk * T, T, T, d.heads, 1, 1, T, step, 1.f, more}, stream));
    first += chunk;
  } while (first < plan.tiles);
  return 0;
}

}  // namespace csat
