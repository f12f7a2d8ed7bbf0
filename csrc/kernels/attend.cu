// Host side of attend, decode and the fused forward, and of attend's backward: panels, workspace, launches.
#include "csat/attend_backward_mma.h"
#include "csat/attend_panels.h"
#include "csat/decode_pair.h"
#include "csat/dispatch.h"
#include "csat/forward_mma.h"
#include "csat/instances.h"

namespace csat {
namespace {

using limits::ceil_div;
using limits::column_pad;
using limits::depth_pad;

int take_decoder(ForwardArgs& args, const DecodeParams& p, Carver& carver, void* stream) {
  const Decoder& d = p.decoder;
  args.out = p.out;
  args.decoder_heads = d.heads;
  args.layers = static_cast<int>(d.layers);
  args.s_layers = static_cast<int>(d.s_layers);
  args.b_layers = static_cast<int>(d.b_layers);
  args.outputs = static_cast<int>(d.outputs);
  args.a_pitch = column_pad(d.coefficients);
  args.z_depth = depth_pad(d.features);
  args.output_columns = column_pad(d.outputs);
  const int64_t P = d.coefficients, pitch = args.a_pitch;
  CSAT_TRY(take_panel(args.S, carver, transposed(operand(d.S, d.heads, d.s_layers, P, P)), pitch, pitch, stream));
  CSAT_TRY(take_panel(args.B, carver, transposed(operand(d.B, d.heads, d.b_layers, P, d.features)), args.z_depth, pitch,
                      stream));
  PackArgs psi = operand(d.psi, d.heads, 1, d.outputs, P);
  if (d.psi.data) CSAT_TRY(take_panel(args.psi, carver, transposed(psi), pitch, args.output_columns, stream));
  PackArgs theta = operand(d.theta, d.heads, 1, d.layers, P);
  theta.row_stride = d.theta.stride[1];
  CSAT_TRY(take_panel(args.theta, carver, theta, d.layers, pitch, stream));
  PackArgs step = operand(d.step, d.heads, 1, 1, d.layers);
  return take_panel(args.step, carver, step, 1, d.layers, stream);
}

template <bool kAttend, bool kDecode>
int run_forward(ForwardArgs& args, int64_t batch, DType dtype, int64_t floats_per_row, void* stream) {
  args.rows = limits::row_tile(floats_per_row, shared_memory_limit());
  const int64_t blocks = batch * args.heads * ceil_div(args.queries, args.rows ? args.rows : 1);
  if (args.rows == 0 || blocks > limits::kMaxBlocks) return kUnsupported;
  if (blocks == 0) return 0;
  return with_dtype(dtype, [&](auto element) {
    return launch_forward<decltype(element), kAttend, kDecode>(args, blocks, args.rows * floats_per_row * 4, stream);
  });
}

// How the fused op runs: as one tensor-core kernel, as a pair of kernels of which one at least is on tensor cores, or
// as one SIMT kernel.
struct Fused {
  limits::ForwardMmaPlan plan;
  bool on_tensor_cores, as_pair;

  Fused(const AttendParams& attend, const DecodeParams& decode) {
    const limits::Device device = limits::current_device();
    on_tensor_cores = !limits::plan_forward(plan, &attend, &decode, device);
    as_pair = !on_tensor_cores &&
              !limits::can_run(limits::Kernel::attend_decode, limits::Family::pair, {attend, decode}, device);
  }
};

}  // namespace

int64_t attend_workspace(const AttendParams& p) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_forward(plan, &p, nullptr, limits::current_device()))
    return forward_mma_workspace(plan, &p, nullptr);
  Carver carver(nullptr);
  ForwardArgs args{};
  take_attend(args, p, p.measurements, carver, nullptr);
  return carver.used();
}

int attend_forward(const AttendParams& p, void* workspace, void* stream) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_forward(plan, &p, nullptr, limits::current_device()))
    return forward_mma(plan, &p, nullptr, workspace, stream);
  Carver carver(workspace);
  ForwardArgs args{};
  CSAT_TRY(take_attend(args, p, p.measurements, carver, stream));
  return run_forward<true, false>(args, p.batch, p.q.dtype, limits::attend_row(p.measurements, p.head_dim, p.features),
                                  stream);
}

int64_t decode_workspace(const DecodeParams& p) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_forward(plan, nullptr, &p, limits::current_device()))
    return forward_mma_workspace(plan, nullptr, &p);
  Carver carver(nullptr);
  ForwardArgs args{};
  take_decoder(args, p, carver, nullptr);
  return carver.used();
}

int decode_forward(const DecodeParams& p, void* workspace, void* stream) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_forward(plan, nullptr, &p, limits::current_device()))
    return forward_mma(plan, nullptr, &p, workspace, stream);
  Carver carver(workspace);
  ForwardArgs args{};
  CSAT_TRY(take_decoder(args, p, carver, stream));
  args.heads = p.heads;
  args.queries = p.queries;
  args.features = static_cast<int>(p.decoder.features);
  args.z_pitch = column_pad(p.decoder.features);
  args.z = p.z;
  return run_forward<false, true>(args, p.batch, p.z.dtype,
                                  limits::decode_row(p.decoder.coefficients, p.decoder.features), stream);
}

int64_t attend_decode_workspace(const AttendParams& attend, const DecodeParams& decode) {
  const Fused fused(attend, decode);
  if (fused.on_tensor_cores) return forward_mma_workspace(fused.plan, &attend, &decode);
  if (fused.as_pair) return DecodePair<AttendParams>::workspace(attend, decode, attend_workspace);
  Carver carver(nullptr);
  ForwardArgs args{};
  take_attend(args, attend, attend.measurements, carver, nullptr);
  take_decoder(args, decode, carver, nullptr);
  return carver.used();
}

int attend_decode_forward(const AttendParams& attend, const DecodeParams& decode, void* workspace, void* stream) {
  const Fused fused(attend, decode);
  if (fused.on_tensor_cores) return forward_mma(fused.plan, &attend, &decode, workspace, stream);
  if (fused.as_pair) return DecodePair<AttendParams>::forward(attend, decode, attend_forward, workspace, stream);
  Carver carver(workspace);
  ForwardArgs args{};
  CSAT_TRY(take_attend(args, attend, attend.measurements, carver, stream));
  CSAT_TRY(take_decoder(args, decode, carver, stream));
  return run_forward<true, true>(args, attend.batch, attend.q.dtype, limits::attend_decode_row(attend, decode), stream);
}

int64_t attend_backward_workspace(const AttendBackwardParams& p) {
  limits::AttendBackwardPlan sizes;
  if (!limits::plan_backward(sizes, p, limits::current_device())) return attend_backward_mma_workspace(sizes, p);
  Carver carver(nullptr);
  BackwardPlan().take(p, p.forward.measurements, 0, limits::kTargetBlocks, carver, nullptr);
  return carver.used();
}

int attend_backward(const AttendBackwardParams& p, void* workspace, void* stream) {
  limits::AttendBackwardPlan sizes;
  if (!limits::plan_backward(sizes, p, limits::current_device()))
    return attend_backward_mma(sizes, p, workspace, stream);
  const AttendParams& f = p.forward;
  Carver carver(workspace);
  BackwardPlan plan;
  CSAT_TRY(plan.take(p, p.forward.measurements, 0, limits::kTargetBlocks, carver, stream));
  AttendBackwardArgs& args = plan.args;
  const int64_t query_blocks = f.batch * f.heads * ceil_div(f.queries, plan.query_rows);
  const int64_t measurement_blocks = plan.measurement_blocks(f);
  if (query_blocks > limits::kMaxBlocks || measurement_blocks > limits::kMaxBlocks) return kUnsupported;
  if (query_blocks > 0) {
    args.rows = plan.query_rows;
    const int64_t bytes = args.rows * plan.query_floats * 4;
    CSAT_TRY(with_dtype(f.q.dtype, [&](auto element) {
      return launch_query_backward<decltype(element)>(args, query_blocks, bytes, stream);
    }));
  }
  if (measurement_blocks > 0) {
    args.rows = plan.measurement_rows;
    const int64_t bytes = args.rows * plan.measurement_floats * 4;
    CSAT_TRY(with_dtype(f.q.dtype, [&](auto element) {
      return launch_measurement_backward<decltype(element)>(args, measurement_blocks, bytes, stream);
    }));
  }
  return plan.reduce_measurements(p, stream);
}

}  // namespace csat
