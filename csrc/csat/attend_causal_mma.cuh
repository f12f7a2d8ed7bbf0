// attend_causal on tensor cores, bf16 and fp16: the chunk loop of forward_mma.cuh over two stretches of columns, and
// its epilogue, the decoder (lista.cuh), where both are fused.
//
//   s = scale q kc^T + bias, scale q k^T; online softmax over the chunks of both; z = softmax(s) (vc, v), lse
//   c = psi a_T of z rounded to T, so that the op equals attend_causal followed by decode bit for bit
//
// A block of eight warps owns runs of consecutive units of 32 queries and takes eight of them at a time through the
// chunks that any of them sees: measurements 0 .. of the last query, then tokens from the window of the first. A warp
// skips what none of its own rows sees, and puts -inf where only some do not (window.h; a row's ends stand in the
// warp's own shared memory).
//
// Data flow: kc, vc, bias, then k, v -> two shared slots (cp.async), one chunk ahead; q rows -> the warp's shared tile
// -> left operand; scores and z in accumulators -> shared tile -> global in 16-byte rows. Budget of a row: as attend
// for M = E + (w + 1) Bk, and a chunk or two more where stretches begin and end; limits::attend_causal_mma_bytes of
// shared memory; registers as forward_mma. Limits: limits::plan_causal_mma.
#pragma once
#include "csat/forward_mma.cuh"

namespace csat {

struct AttendCausalMmaArgs {
  ForwardMmaArgs rows;  // kc, vc, bias: the measurements
  CausalTokens tokens;  // k, v with vector rows
};

// Which columns the queries first .. last see, any of them; and where the chunks of tokens begin.
template <int kChunk>
struct SeenColumns {
  int measured_end, token_begin, token_end;
  CSAT_DEVICE SeenColumns(const CausalWindow& window, int64_t first, int64_t last)
      : measured_end(static_cast<int>(window.measurements_of(last).end)),
        token_begin(static_cast<int>(window.tokens_of(first).begin)),
        token_end(static_cast<int>(window.tokens_of(last).end)) {}
};

// The chunks of columns that some queries see, any of them: measurements, then tokens.
template <int kChunk>
struct SeenChunks {
  int measured, count, offset;  // chunk c holds columns c kChunk .., from `measured` on tokens (c + offset) kChunk ..

  CSAT_DEVICE explicit SeenChunks(const SeenColumns<kChunk>& all) {
    const int first_token = all.token_begin / kChunk;
    measured = (all.measured_end + kChunk - 1) / kChunk;
    count = measured + (all.token_end + kChunk - 1) / kChunk - first_token;
    offset = first_token - measured;
  }
  CSAT_DEVICE bool has_tokens(int c) const { return c >= measured; }
  CSAT_DEVICE int column(int c) const { return (c < measured ? c : c + offset) * kChunk; }
  // Is chunk c among what queries see whose columns are `own`?
  CSAT_DEVICE bool seen(const SeenColumns<kChunk>& own, int c) const {
    const int first = column(c);
    return c < measured ? first < own.measured_end : first < own.token_end && first + kChunk > own.token_begin;
  }
};

template <typename T, int kD>
CSAT_DEVICE void load_token_chunk(const Chunk<T, kD>& chunk, const CausalTokens& tokens, int64_t batch, int64_t head,
                                  int head_dim, int features, int64_t first) {
  constexpr int kRows = Chunk<T, kD>::kRows;
  const auto rows = [&](const View& v, int columns) {
    return GlobalRows<const T>{at<const T>(v, batch, head, 0), v.stride[2], tokens.count, columns};
  };
  load_rows_async(chunk.keys, rows(tokens.k, head_dim), first, kRows, threadIdx.x, limits::kMmaThreads);
  load_rows_async(chunk.values, rows(tokens.v, features), first, kRows, threadIdx.x, limits::kMmaThreads);
  if (threadIdx.x < kRows) {
    const int64_t s = first + threadIdx.x;
    const bool kept = s < tokens.count && (!tokens.keep || tokens.keep[batch * tokens.count + s]);
    chunk.bias[threadIdx.x] = kept ? 0.f : -INFINITY;
  }
}

// What each row of a warp sees, in its shared memory: the end of the measurements, the begin of the tokens.
struct SeenByRow {
  int *measured_end, *token_begin;
  int first_token;  // of row 0, whose tokens end behind it

  // Rows from `count` on see what the last one sees: nobody reads what they give.
  CSAT_DEVICE SeenByRow(int* shared, const CausalWindow& window, int64_t first, int64_t count)
      : measured_end(shared),
        token_begin(shared + limits::kMmaRows),
        first_token(static_cast<int>(window.first + first)) {
    const int64_t row = lane_id() < count ? lane_id() : count - 1;
    measured_end[lane_id()] = static_cast<int>(window.measurements_of(first + row).end);
    token_begin[lane_id()] = static_cast<int>(window.tokens_of(first + row).begin);
    sync_warp();
  }
};

// kP: coefficients; 0: no decoder.
template <typename T, int kD, int kP>
__global__ void __launch_bounds__(limits::kMmaThreads, 1) attend_causal_mma_kernel(AttendCausalMmaArgs p) {
  constexpr int kRows = limits::kMmaRows, kWarps = limits::kMmaWarps, kChunk = Chunk<T, kD>::kRows;
  static_assert(kRows == 32, "a lane writes what a row sees");
  CSAT_DYN_SMEM(T, shared);
  const DecoderTiles<T, kD, kP ? kP : 16> weights{shared, p.rows.decoder};
  T* slots = kP > 0 ? weights.end() : shared;
  T* tiles = slots + 2 * (limits::mma_slot_bytes(kD) / 2);
  const Tile<T, kD> tile{tiles + warp_id() * tile_elements(kRows, kD)};
  int* seen_by_row = reinterpret_cast<int*>(tiles + kWarps * tile_elements(kRows, kD)) + warp_id() * 2 * kRows;
  const CausalWindow& window = p.tokens.window;
  for_each_run(p.rows, [&](const UnitRun& run) {
    if constexpr (kP > 0) {
      __syncthreads();  // nobody decodes the run before
      load_decoder(weights, run.pair % p.rows.heads, limits::kMmaThreads);
    }
    const auto last_row = [&](int unit) {  // the last query of a unit, of the run's last one behind its end
      const int64_t end = int64_t(run.first + (unit < run.count ? unit + 1 : run.count)) * kRows;
      return (end < p.rows.queries ? end : p.rows.queries) - 1;
    };
    for (int group = 0; group < run.count; group += kWarps) {
      const int unit = group + warp_id();
      const bool active = unit < run.count;
      const int64_t first = int64_t(run.first + (active ? unit : group)) * kRows,
                    last = last_row(active ? unit : group);
      const SeenColumns<kChunk> all(window, int64_t(run.first + group) * kRows, last_row(group + kWarps - 1));
      const SeenColumns<kChunk> own(window, first, last);
      const SeenByRow by_row(seen_by_row, window, first, last - first + 1);
      const SeenChunks<kChunk> chunks(all);
      const auto slot = [&](int c) { return Chunk<T, kD>::at_slot(slots, c % 2); };
      const auto load = [&](int c) {
        if (!chunks.has_tokens(c)) {
          load_chunk(slot(c), p.rows, run.pair, chunks.column(c));
        } else if (c < chunks.count) {
          const int batch = run.pair / p.rows.heads, head = run.pair % p.rows.heads;
          load_token_chunk(slot(c), p.tokens, batch, head / (p.rows.heads / static_cast<int>(p.tokens.heads)),
                           p.rows.head_dim, p.rows.features, chunks.column(c));
        }
        cp_async_commit();
      };
      fetch_rows<kRows>(tile, p.rows, p.rows.q, p.rows.head_dim, run, unit);
      load(0);
      Queries<T, kD> q;
      UnitSums<T, kD> sums;
      for (int c = 0; c < chunks.count; ++c) {
        load(c + 1);
        cp_async_wait<1>();
        __syncthreads();
        if (active && c == 0) q = queries_in(tile);
        const int column = chunks.column(c);
        if (active && chunks.seen(own, c))
          sums.add(q, slot(c), p.rows.scale, [&](auto& s) {
            for_each(s, [&](float& x, int row, int j) {
              const bool seen = chunks.has_tokens(c)
                                    ? column + j >= by_row.token_begin[row] && column + j <= by_row.first_token + row
                                    : column + j < by_row.measured_end[row];
              if (!seen) x = -INFINITY;
            });
          });
        __syncthreads();  // everybody is done with the slot that comes next
      }
      if (active) finish_unit<kP>(p.rows, weights, run.pair, first, sums.softmax, sums.z, tile);
    }
    cp_async_wait<0>();
  });
}

template <typename T, int kD, int kP>
int launch_attend_causal_mma(const AttendCausalMmaArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = attend_causal_mma_kernel<T, kD, kP>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kMmaThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}

// csrc/kernels/instances/attend_causal_mma_<feature>.cu instantiate these; everything else refers to them. Above
// limits::kFusedMmaFeature there is no fused kernel.
#define CSAT_CAUSAL_MMA(prefix, T, kD, kP) \
  prefix template int launch_attend_causal_mma<T, kD, kP>(const AttendCausalMmaArgs&, int64_t, int64_t, void*);
#define CSAT_ALL_CAUSAL_MMA(prefix, T, kD) \
  CSAT_CAUSAL_MMA(prefix, T, kD, 0) CSAT_CAUSAL_MMA(prefix, T, kD, 64) CSAT_CAUSAL_MMA(prefix, T, kD, 128)

#ifndef CSAT_INSTANTIATE
#define CSAT_EXTERN_CAUSAL_MMA(T)    \
  CSAT_ALL_CAUSAL_MMA(extern, T, 32) \
  CSAT_ALL_CAUSAL_MMA(extern, T, 64) \
  CSAT_ALL_CAUSAL_MMA(extern, T, 80) CSAT_ALL_CAUSAL_MMA(extern, T, 96) CSAT_CAUSAL_MMA(extern, T, 128, 0)
CSAT_EXTERN_CAUSAL_MMA(bf16)
CSAT_EXTERN_CAUSAL_MMA(f16)
#undef CSAT_EXTERN_CAUSAL_MMA
#endif

#define CSAT_ATTEND_CAUSAL_MMA_INSTANCE(T, kD) CSAT_ATTEND_CAUSAL_MMA_INSTANCE_##kD(T)
#define CSAT_ATTEND_CAUSAL_MMA_INSTANCE_32(T) CSAT_ALL_CAUSAL_MMA(, T, 32)
#define CSAT_ATTEND_CAUSAL_MMA_INSTANCE_64(T) CSAT_ALL_CAUSAL_MMA(, T, 64)
#define CSAT_ATTEND_CAUSAL_MMA_INSTANCE_80(T) CSAT_ALL_CAUSAL_MMA(, T, 80)
#define CSAT_ATTEND_CAUSAL_MMA_INSTANCE_96(T) CSAT_ALL_CAUSAL_MMA(, T, 96)
#define CSAT_ATTEND_CAUSAL_MMA_INSTANCE_128(T) CSAT_CAUSAL_MMA(, T, 128, 0)

}  // namespace csat
