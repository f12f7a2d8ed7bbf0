// Host side of attend, decode and the fused forward, and of attend's backward: panels, workspace, launches.
#include "csat/attend_backward_mma.h"
#include "csat/dispatch.h"
#include "csat/forward_mma.h"
#include "csat/instances.h"
#include "csat/workspace.h"

namespace csat {
namespace {

using limits::ceil_div;
using limits::column_pad;
using limits::depth_pad;

int take_attend(ForwardArgs& args, const AttendParams& p, Carver& carver, void* stream) {
  args.heads = p.heads;
  args.queries = p.queries;
  args.features = static_cast<int>(p.features);
  args.z_pitch = column_pad(p.features);
  args.z = p.z;
  args.q = p.q;
  args.lse = p.lse;
  args.group = p.heads / p.key_heads;
  args.measurements = p.measurements;
  args.head_dim = static_cast<int>(p.head_dim);
  args.q_pitch = depth_pad(p.head_dim);
  args.measurement_tile = limits::measurement_tile(p.measurements);
  args.scale = p.scale;
  const int64_t columns = column_pad(p.measurements);
  const PackArgs keys = operand(p.kc, p.batch, p.key_heads, p.measurements, p.head_dim);
  const PackArgs values = operand(p.vc, p.batch, p.key_heads, p.measurements, p.features);
  CSAT_TRY(take_panel(args.keys, carver, transposed(keys), args.q_pitch, columns, stream));
  CSAT_TRY(take_panel(args.values, carver, values, columns, args.z_pitch, stream));
  return take_panel(args.bias, carver, bias_operand(p), 1, columns, stream);
}

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
  CSAT_TRY(take_panel(args.psi, carver, transposed(psi), pitch, args.output_columns, stream));
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

// Everything attend_backward needs from its workspace; with a null base only sizes.
struct BackwardPlan {
  AttendBackwardArgs args{};
  int query_rows = 0, measurement_rows = 0;

  int take(const AttendBackwardParams& p, Carver& carver, void* stream) {
    const AttendParams& f = p.forward;
    args.heads = f.heads;
    args.queries = f.queries;
    args.group = f.heads / f.key_heads;
    args.measurements = f.measurements;
    args.head_dim = static_cast<int>(f.head_dim);
    args.features = static_cast<int>(f.features);
    args.q = f.q;
    args.z = f.z;
    args.dz = p.dz;
    args.lse = f.lse;
    args.dq = p.dq;
    args.q_pitch = depth_pad(f.head_dim);
    args.dz_pitch = depth_pad(f.features);
    args.dq_pitch = column_pad(f.head_dim);
    args.measurement_tile = limits::measurement_tile(f.measurements);
    args.scale = f.scale;
    const int64_t limit = shared_memory_limit();
    query_rows = limits::row_tile(limits::query_backward_row(f.measurements, f.head_dim, f.features), limit);
    measurement_rows = limits::row_tile(limits::measurement_backward_row(f.head_dim, f.features), limit);
    if (query_rows == 0 || measurement_rows == 0) return kUnsupported;

    const int64_t columns = column_pad(f.measurements), pairs = f.batch * f.heads;
    const PackArgs keys = operand(f.kc, f.batch, f.key_heads, f.measurements, f.head_dim);
    const PackArgs values = operand(f.vc, f.batch, f.key_heads, f.measurements, f.features);
    CSAT_TRY(take_panel(args.keys_t, carver, transposed(keys), args.q_pitch, columns, stream));
    CSAT_TRY(take_panel(args.values_t, carver, transposed(values), args.dz_pitch, columns, stream));
    CSAT_TRY(take_panel(args.keys, carver, keys, columns, args.dq_pitch, stream));
    CSAT_TRY(take_panel(args.bias, carver, bias_operand(f), 1, columns, stream));
    args.centre = carver.take(pairs * f.queries);
    args.shift = carver.take(pairs * f.queries);
    const int64_t blocks = pairs * columns / limits::kMicroColumns;
    const int64_t tiles = ceil_div(f.queries, measurement_rows);
    int64_t chunks = blocks ? ceil_div(limits::kTargetBlocks, blocks) : 1;
    if (chunks > ceil_div(tiles, 8)) chunks = ceil_div(tiles, 8);
    args.chunk_queries = chunks ? ceil_div(tiles, chunks) * measurement_rows : 0;
    args.chunks = chunks ? ceil_div(f.queries, args.chunk_queries) : 0;
    args.key_parts = carver.take(pairs * args.chunks * columns * args.dq_pitch);
    args.value_parts = carver.take(pairs * args.chunks * columns * column_pad(f.features));
    args.bias_parts = p.dbias.data ? carver.take(pairs * args.chunks * columns) : nullptr;
    return 0;
  }
};

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

// The pair, with z in the workspace where the caller does not want it.
struct AttendDecodePair {
  AttendParams attend;
  DecodeParams decode;

  AttendDecodePair(const AttendParams& a, const DecodeParams& d, Carver& carver) : attend(a), decode(d) {
    if (!attend.z.data) {
      const int64_t pitch = limits::round_up(a.features, 8), head = a.queries * pitch;
      attend.z = {carver.take<char>(a.batch * a.heads * head * size_of(a.q.dtype)),
                  a.q.dtype,
                  {a.heads * head, head, pitch, 1}};
    }
    decode.z = attend.z;
  }
};

}  // namespace

int64_t attend_workspace(const AttendParams& p) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_forward(plan, &p, nullptr, limits::current_device()))
    return forward_mma_workspace(plan, &p, nullptr);
  Carver carver(nullptr);
  ForwardArgs args{};
  take_attend(args, p, carver, nullptr);
  return carver.used();
}

int attend_forward(const AttendParams& p, void* workspace, void* stream) {
  limits::ForwardMmaPlan plan;
  if (!limits::plan_forward(plan, &p, nullptr, limits::current_device()))
    return forward_mma(plan, &p, nullptr, workspace, stream);
  Carver carver(workspace);
  ForwardArgs args{};
  CSAT_TRY(take_attend(args, p, carver, stream));
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
  if (fused.as_pair) {
    Carver carver(nullptr);
    AttendDecodePair pair(attend, decode, carver);
    const int64_t first = attend_workspace(pair.attend), second = decode_workspace(pair.decode);
    return carver.used() + (first > second ? first : second);
  }
  Carver carver(nullptr);
  ForwardArgs args{};
  take_attend(args, attend, carver, nullptr);
  take_decoder(args, decode, carver, nullptr);
  return carver.used();
}

int attend_decode_forward(const AttendParams& attend, const DecodeParams& decode, void* workspace, void* stream) {
  const Fused fused(attend, decode);
  if (fused.on_tensor_cores) return forward_mma(fused.plan, &attend, &decode, workspace, stream);
  Carver carver(workspace);
  if (fused.as_pair) {
    const AttendDecodePair pair(attend, decode, carver);
    void* rest = static_cast<char*>(workspace) + carver.used();
    CSAT_TRY(attend_forward(pair.attend, rest, stream));
    return decode_forward(pair.decode, rest, stream);
  }
  ForwardArgs args{};
  CSAT_TRY(take_attend(args, attend, carver, stream));
  CSAT_TRY(take_decoder(args, decode, carver, stream));
  return run_forward<true, true>(args, attend.batch, attend.q.dtype, limits::attend_decode_row(attend, decode), stream);
}

int64_t attend_backward_workspace(const AttendBackwardParams& p) {
  limits::AttendBackwardPlan sizes;
  if (!limits::plan_backward(sizes, p, limits::current_device())) return attend_backward_mma_workspace(sizes, p);
  Carver carver(nullptr);
  BackwardPlan().take(p, carver, nullptr);
  return carver.used();
}

int attend_backward(const AttendBackwardParams& p, void* workspace, void* stream) {
  limits::AttendBackwardPlan sizes;
  if (!limits::plan_backward(sizes, p, limits::current_device()))
    return attend_backward_mma(sizes, p, workspace, stream);
  const AttendParams& f = p.forward;
  Carver carver(workspace);
  BackwardPlan plan;
  CSAT_TRY(plan.take(p, carver, stream));
  AttendBackwardArgs& args = plan.args;
  const int64_t pairs = f.batch * f.heads, columns = column_pad(f.measurements);
  const int64_t query_blocks = pairs * ceil_div(f.queries, plan.query_rows);
  const int64_t measurement_blocks = pairs * args.chunks * (columns / limits::kMicroColumns);
  if (query_blocks > limits::kMaxBlocks || measurement_blocks > limits::kMaxBlocks) return kUnsupported;
  if (query_blocks > 0) {
    args.rows = plan.query_rows;
    const int64_t bytes = args.rows * limits::query_backward_row(f.measurements, f.head_dim, f.features) * 4;
    CSAT_TRY(with_dtype(f.q.dtype, [&](auto element) {
      return launch_query_backward<decltype(element)>(args, query_blocks, bytes, stream);
    }));
  }
  if (measurement_blocks > 0) {
    args.rows = plan.measurement_rows;
    const int64_t bytes = args.rows * limits::measurement_backward_row(f.head_dim, f.features) * 4;
    CSAT_TRY(with_dtype(f.q.dtype, [&](auto element) {
      return launch_measurement_backward<decltype(element)>(args, measurement_blocks, bytes, stream);
    }));
  }
  const int64_t splits = args.group * args.chunks, d_pitch = args.dq_pitch, r_pitch = column_pad(f.features);
  CSAT_TRY(reduce({args.key_parts, splits, splits * columns * d_pitch, columns * d_pitch, d_pitch, f.batch, f.key_heads,
                   f.measurements, f.head_dim, p.dkc, f.scale, false},
                  stream));
  CSAT_TRY(reduce({args.value_parts, splits, splits * columns * r_pitch, columns * r_pitch, r_pitch, f.batch,
                   f.key_heads, f.measurements, f.features, p.dvc, 1.f, false},
                  stream));
  if (!p.dbias.data) return 0;
  return reduce({args.bias_parts, args.chunks, args.chunks * columns, columns, columns, f.batch, f.heads, 1,
                 f.measurements, p.dbias, 1.f, false},
                stream);
}

}  // namespace csat
