// Host side of the tensor-core forward: operands with vector rows, grid, choice of the compiled instance.
#include "csat/attend_causal_mma.cuh"
#include "csat/decode_wgmma.cuh"
#include "csat/decoder_weights.h"
#include "csat/forward_mma.cuh"
#include "csat/forward_mma.h"
#include "csat/forward_wgmma.cuh"
#include "csat/workspace.h"

namespace csat {
namespace {

using limits::ceil_div;

int take_attend(ForwardMmaArgs& args, const limits::ForwardMmaPlan& plan, const AttendParams& p, Carver& carver,
                void* stream) {
  const DType dtype = p.q.dtype;
  args.heads = static_cast<int>(p.heads);
  args.pairs = static_cast<int>(p.batch * p.heads);
  args.queries = p.queries;
  args.features = static_cast<int>(p.features);
  args.q = p.q;
  args.kc = p.kc;
  args.vc = p.vc;
  args.bias = p.bias;
  args.z = p.z;
  args.lse = p.lse;
  args.group = static_cast<int>(p.heads / p.key_heads);
  args.measurements = p.measurements;
  args.head_dim = static_cast<int>(p.head_dim);
  args.chunks = plan.chunks;
  args.slots = plan.slots;
  args.stages = plan.stages;
  args.scale = p.scale;
  args.z_vectors = vector_stores(p.z, p.features);
  const int64_t B = p.batch, H = p.heads, Hk = p.key_heads;
  CSAT_TRY(take_vector_rows(args.q, carver, dtype, B, H, p.queries, p.head_dim, stream));
  CSAT_TRY(take_vector_rows(args.kc, carver, dtype, B, Hk, p.measurements, p.head_dim, stream));
  CSAT_TRY(take_vector_rows(args.vc, carver, dtype, B, Hk, p.measurements, p.features, stream));
  return take_float_bias(args.bias, carver, B, H, p.measurements, stream);
}

int take_decoder(ForwardMmaArgs& args, const DecodeParams& p, DType dtype, Carver& carver, void* stream) {
  args.out = p.out;
  args.out_vectors = vector_stores(p.out, p.decoder.outputs);
  return take_decoder(args.decoder, p.decoder, dtype, carver, stream);
}

int take_rows(ForwardMmaArgs& args, const limits::ForwardMmaPlan& plan, const DecodeParams& p, Carver& carver,
              void* stream) {
  args.stages = plan.stages;
  args.heads = static_cast<int>(p.heads);
  args.pairs = static_cast<int>(p.batch * p.heads);
  args.queries = p.queries;
  args.features = static_cast<int>(p.decoder.features);
  args.z = p.z;
  return take_vector_rows(args.z, carver, p.z.dtype, p.batch, p.heads, p.queries, p.decoder.features, stream);
}

int take(ForwardMmaArgs& args, const limits::ForwardMmaPlan& plan, const AttendParams* attend,
         const DecodeParams* decode, Carver& carver, void* stream) {
  CSAT_TRY(attend ? take_attend(args, plan, *attend, carver, stream) : take_rows(args, plan, *decode, carver, stream));
  const int rows = plan.wgmma ? limits::kWgmmaRows : attend ? limits::kMmaRows : limits::decode_mma_rows(plan.atoms);
  args.units = static_cast<int>(ceil_div(args.queries, rows));
  return decode ? take_decoder(args, *decode, attend ? attend->q.dtype : decode->z.dtype, carver, stream) : 0;
}

using Launch = int (*)(const ForwardMmaArgs&, int64_t, int64_t, void*);

template <typename T, int kD>
Launch attend_instance(int atoms) {
  if (atoms == 0) return launch_forward_mma<T, kD, 0>;
  if constexpr (kD <= limits::kFusedMmaFeature)
    return atoms == 64 ? launch_forward_mma<T, kD, 64> : launch_forward_mma<T, kD, 128>;
  return nullptr;
}
template <typename T, int kD>
Launch decode_instance(int atoms) {
  if (atoms == 64) return launch_decode_mma<T, kD, 64>;
  return atoms == 128 ? launch_decode_mma<T, kD, 128> : launch_decode_mma<T, kD, 256>;
}
template <typename T>
Launch wgmma_instance(const limits::ForwardMmaPlan& plan) {
  const bool stream = plan.slots < plan.chunks;
  if (plan.feature == 64) {
    if (stream) return launch_forward_wgmma<T, 64, 0, true>;
    if (plan.atoms == 0) return launch_forward_wgmma<T, 64, 0, false>;
    return plan.atoms == 64 ? launch_forward_wgmma<T, 64, 64, false> : launch_forward_wgmma<T, 64, 128, false>;
  }
  if (stream) return launch_forward_wgmma<T, 128, 0, true>;
  return plan.atoms == 0 ? launch_forward_wgmma<T, 128, 0, false> : launch_forward_wgmma<T, 128, 64, false>;
}
template <typename T>
Launch decode_wgmma_instance(const limits::ForwardMmaPlan& plan) {
  if (plan.feature == 64) return plan.atoms == 64 ? launch_decode_wgmma<T, 64, 64> : launch_decode_wgmma<T, 64, 128>;
  return plan.atoms == 64 ? launch_decode_wgmma<T, 128, 64> : launch_decode_wgmma<T, 128, 128>;
}
template <typename T>
Launch instance(const limits::ForwardMmaPlan& plan, bool attend) {
  if (plan.wgmma) return attend ? wgmma_instance<T>(plan) : decode_wgmma_instance<T>(plan);
  switch (plan.feature) {
    case 32:
      return attend ? attend_instance<T, 32>(plan.atoms) : decode_instance<T, 32>(plan.atoms);
    case 64:
      return attend ? attend_instance<T, 64>(plan.atoms) : decode_instance<T, 64>(plan.atoms);
    case 80:
      return attend ? attend_instance<T, 80>(plan.atoms) : decode_instance<T, 80>(plan.atoms);
    case 96:
      return attend ? attend_instance<T, 96>(plan.atoms) : decode_instance<T, 96>(plan.atoms);
    default:
      return attend ? attend_instance<T, 128>(plan.atoms) : decode_instance<T, 128>(plan.atoms);
  }
}

int take(AttendCausalMmaArgs& args, const limits::ForwardMmaPlan& plan, const AttendCausalParams& p,
         const DecodeParams* decode, Carver& carver, void* stream) {
  CSAT_TRY(take(args.rows, plan, &p.measured, decode, carver, stream));
  args.tokens = p.tokens;
  return take_token_rows(args.tokens, carver, p.measured, stream);
}

using CausalLaunch = int (*)(const AttendCausalMmaArgs&, int64_t, int64_t, void*);

template <typename T, int kD>
CausalLaunch causal_instance(int atoms) {
  if (atoms == 0) return launch_attend_causal_mma<T, kD, 0>;
  if constexpr (kD <= limits::kFusedMmaFeature)
    return atoms == 64 ? launch_attend_causal_mma<T, kD, 64> : launch_attend_causal_mma<T, kD, 128>;
  return nullptr;
}
template <typename T>
CausalLaunch causal_instance(const limits::ForwardMmaPlan& plan) {
  switch (plan.feature) {
    case 32:
      return causal_instance<T, 32>(plan.atoms);
    case 64:
      return causal_instance<T, 64>(plan.atoms);
    case 80:
      return causal_instance<T, 80>(plan.atoms);
    case 96:
      return causal_instance<T, 96>(plan.atoms);
    default:
      return causal_instance<T, 128>(plan.atoms);
  }
}

}  // namespace

int64_t forward_mma_workspace(const limits::ForwardMmaPlan& plan, const AttendParams* attend,
                              const DecodeParams* decode) {
  Carver carver(nullptr);
  ForwardMmaArgs args{};
  take(args, plan, attend, decode, carver, nullptr);
  return carver.used();
}

int forward_mma(const limits::ForwardMmaPlan& plan, const AttendParams* attend, const DecodeParams* decode,
                void* workspace, void* stream) {
  Carver carver(workspace);
  ForwardMmaArgs args{};
  CSAT_TRY(take(args, plan, attend, decode, carver, stream));
  const int64_t units = int64_t(args.pairs) * args.units;
  if (units == 0) return 0;
  const DType dtype = attend ? attend->q.dtype : decode->z.dtype;
  const Launch launch = dtype == DType::bf16 ? instance<bf16>(plan, attend) : instance<f16>(plan, attend);
  const int64_t blocks = units < multiprocessors() ? units : multiprocessors();
  return launch(args, blocks, plan.shared_bytes, stream);
}

int64_t attend_causal_mma_workspace(const limits::ForwardMmaPlan& plan, const AttendCausalParams& p,
                                    const DecodeParams* decode) {
  Carver carver(nullptr);
  AttendCausalMmaArgs args{};
  take(args, plan, p, decode, carver, nullptr);
  return carver.used();
}

int attend_causal_mma(const limits::ForwardMmaPlan& plan, const AttendCausalParams& p, const DecodeParams* decode,
                      void* workspace, void* stream) {
  Carver carver(workspace);
  AttendCausalMmaArgs args{};
  CSAT_TRY(take(args, plan, p, decode, carver, stream));
  const int64_t units = int64_t(args.rows.pairs) * args.rows.units;
  if (units == 0) return 0;
  const CausalLaunch launch =
      p.measured.q.dtype == DType::bf16 ? causal_instance<bf16>(plan) : causal_instance<f16>(plan);
  return launch(args, units < multiprocessors() ? units : multiprocessors(), plan.shared_bytes, stream);
}

}  // namespace csat
