// attend_causal and its backward: the kernels of forward.cuh and attend_backward.cuh over two stretches of columns, the
// measurements that a tile of queries sees and the tokens of its window, in one softmax.
//
//   attend_causal          z, lse of a tile of queries
//   query_backward         centre, shift and dq of a tile of queries
//   measurement_backward   dkc, dvc, dbias: 64 measurements against a chunk of the queries, from the first that sees
//   one token_backward         dk, dv: 64 tokens against the queries of the (w + 1) Bk + 64 tokens that see them
//
// Data flow: as there; a tile walks measurements 0 .. of its last query and tokens from the window of its first, each
// in stretches of 128, and scores outside of a row's own two ranges (window.h, kept in shared memory) are -inf. Budget
// of a query: that of attend for M = E + (w + 1) Bk, up to 128 columns more where a stretch begins and ends, and
// limits::kSeenFloats of shared memory. Limits: those of attend.
#pragma once
#include "csat/attend_backward.cuh"
#include "csat/forward.cuh"

namespace csat {

struct AttendCausalArgs {
  ForwardArgs measured, tokens;
  CausalTokens sight;  // k and v are those of the caller
};
struct AttendCausalBackwardArgs {
  AttendBackwardArgs measured, tokens;
  CausalTokens sight;
};

// What the rows of a tile see, in shared memory; rows that do not exist see nothing.
struct SeenRows {
  Range* tokens;
  int64_t* measurements;  // the end
  int rows;

  CSAT_DEVICE SeenRows(float* shared, int rows)
      : tokens(reinterpret_cast<Range*>(shared)), measurements(reinterpret_cast<int64_t*>(tokens + rows)), rows(rows) {}
  CSAT_DEVICE void move_to(const CausalWindow& window, int64_t first, int valid) const {
    for (int r = threadIdx.x; r < rows; r += limits::kThreads) {
      tokens[r] = r < valid ? window.tokens_of(first + r) : Range{0, 0};
      measurements[r] = r < valid ? window.measurements_of(first + r).end : 0;
    }
  }
};

// The score of a row against a measurement, against a token; BiasedScore is their like in attend.
struct MeasurementScore {
  const CausalTokens& sight;
  SeenRows seen;
  float scale;
  const float* bias;
  CSAT_DEVICE void move_to(int64_t first, int valid) const { seen.move_to(sight.window, first, valid); }
  CSAT_DEVICE float operator()(int row, int64_t m, float product) const {
    return m < seen.measurements[row] ? scale * product + bias[m] : -INFINITY;
  }
};
struct TokenScore {
  const CausalTokens& sight;
  SeenRows seen;
  float scale;
  const unsigned char* keep;  // of the batch element
  CSAT_DEVICE TokenScore(const CausalTokens& sight, const SeenRows& seen, float scale, int64_t batch)
      : sight(sight), seen(seen), scale(scale), keep(sight.keep ? sight.keep + batch * sight.count : nullptr) {}
  CSAT_DEVICE void move_to(int64_t first, int valid) const { seen.move_to(sight.window, first, valid); }
  CSAT_DEVICE float operator()(int row, int64_t s, float product) const {
    const Range tokens = seen.tokens[row];
    const bool sees = tokens.begin <= s && s < tokens.end && (!keep || keep[s]);
    return sees ? scale * product : -INFINITY;
  }
};

// The columns of the panels that a tile walks, whole micro-tiles.
CSAT_DEVICE Range whole_columns(Range columns) {
  return {columns.begin / limits::kMicroColumns * limits::kMicroColumns,
          (columns.end + limits::kMicroColumns - 1) / limits::kMicroColumns * limits::kMicroColumns};
}
CSAT_DEVICE Range measured_columns(const CausalWindow& window, const RowTile& tile) {
  return whole_columns(window.measurements_of(tile.first + tile.valid - 1));
}
CSAT_DEVICE Range token_columns(const CausalWindow& window, const RowTile& tile) {
  return whole_columns({window.tokens_of(tile.first).begin, window.tokens_of(tile.first + tile.valid - 1).end});
}

// Four blocks an SM leave 128 registers a thread: left to itself ptxas takes 72 and spills.
template <typename T>
__global__ void __launch_bounds__(limits::kThreads, 4) attend_causal_kernel(AttendCausalArgs p) {
  CSAT_DYN_SMEM(float, shared);
  const ForwardArgs& measured = p.measured;
  const RowTile tile = row_tile_at(blockIdx.x, measured.heads, measured.queries, measured.rows);
  const int64_t pair = tile.batch * measured.heads + tile.head;
  const SoftmaxRows x(measured, shared, shared + measured.rows * measured.z_pitch);
  const SeenRows seen(x.end, measured.rows);
  seen.move_to(p.sight.window, tile.first, tile.valid);
  begin_softmax<T>(measured, tile, x);
  const Range far = measured_columns(p.sight.window, tile), near = token_columns(p.sight.window, tile);
  attend_columns(measured, x, measured.keys, measured.values, pair / measured.group, far.begin, far.end,
                 MeasurementScore{p.sight, seen, measured.scale, measured.bias.data + pair * measured.bias.matrix});
  attend_columns(measured, x, p.tokens.keys, p.tokens.values, pair / p.tokens.group, near.begin, near.end,
                 TokenScore(p.sight, seen, measured.scale, tile.batch));
  finish_softmax<T>(measured, tile, x);
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads) query_backward_causal_kernel(AttendCausalBackwardArgs p) {
  CSAT_DYN_SMEM(float, shared);
  const AttendBackwardArgs &measured = p.measured, &tokens = p.tokens;
  const QueryGradientRows x(measured, shared);
  const SeenRows seen(x.end, measured.rows);
  const RowTile tile = row_tile_at(blockIdx.x, measured.heads, measured.queries, measured.rows);
  const int64_t pair = tile.batch * measured.heads + tile.head;
  const GradientPanels of_far(measured.keys_t, measured.values_t, measured.keys, pair / measured.group);
  const GradientPanels of_near(tokens.keys_t, tokens.values_t, tokens.keys, pair / tokens.group);
  const Range far = measured_columns(p.sight.window, tile), near = token_columns(p.sight.window, tile);
  const MeasurementScore far_score{p.sight, seen, measured.scale, measured.bias.data + pair * measured.bias.matrix};
  const TokenScore near_score(p.sight, seen, measured.scale, tile.batch);
  seen.move_to(p.sight.window, tile.first, tile.valid);
  begin_query_gradients<T>(measured, tile, x);
  sum_score_gradients(measured, x, of_far, far.begin, far.end, far_score);
  sum_score_gradients(measured, x, of_near, near.begin, near.end, near_score);
  find_shift(measured, tile, x);
  add_query_gradients(measured, x, of_far, far.begin, far.end, far_score);
  add_query_gradients(measured, x, of_near, near.begin, near.end, near_score);
  store_query_gradients<T>(measured, tile, x);
}

// The queries begin .. end - 1 that also lie in `seen`; one of them where none does, whose gradients are the zeros that
// the block has to write.
CSAT_DEVICE Range seen_queries(int64_t begin, int64_t end, Range seen) {
  const Range both{begin > seen.begin ? begin : seen.begin, end < seen.end ? end : seen.end};
  return both.begin < both.end ? both : Range{begin, begin < end ? begin + 1 : end};
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads, 4) measurement_backward_causal_kernel(AttendCausalBackwardArgs p) {
  CSAT_DYN_SMEM(float, shared);
  const AttendBackwardArgs& a = p.measured;
  const MeasurementPlace place(a);
  const Range all = p.sight.window.queries_of_measurements({place.m0, place.m0 + limits::kMicroColumns});
  const Range queries = seen_queries(place.begin, place.end, all);
  const GradientPanels of(a.keys_t, a.values_t, a.keys, place.pair / a.group);
  const SeenRows seen(shared + a.rows * limits::measurement_backward_row(a.head_dim, a.features), a.rows);
  const MeasurementScore score{p.sight, seen, a.scale, a.bias.data + place.pair * a.bias.matrix};
  measurement_gradients<T>(a, shared, place.pair, of, place.m0, queries.begin, queries.end, score, place.parts);
}

template <typename T>
__global__ void __launch_bounds__(limits::kThreads, 4) token_backward_causal_kernel(AttendCausalBackwardArgs p) {
  CSAT_DYN_SMEM(float, shared);
  const AttendBackwardArgs& a = p.tokens;
  const MeasurementPlace place(a);
  const Range all = p.sight.window.queries_of_tokens({place.m0, place.m0 + limits::kMicroColumns});
  const Range queries = seen_queries(place.begin, place.end, all);
  const GradientPanels of(a.keys_t, a.values_t, a.keys, place.pair / a.group);
  const SeenRows seen(shared + a.rows * limits::measurement_backward_row(a.head_dim, a.features), a.rows);
  measurement_gradients<T>(a, shared, place.pair, of, place.m0, queries.begin, queries.end,
                           TokenScore(p.sight, seen, a.scale, place.pair / a.heads), place.parts);
}

template <typename T>
int launch_attend_causal(const AttendCausalArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  auto kernel = attend_causal_kernel<T>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), static_cast<size_t>(shared_bytes),
              stream, p);
  return last_error();
}
template <typename T>
int launch_query_backward_causal(const AttendCausalBackwardArgs& p, int64_t blocks, int64_t bytes, void* stream) {
  auto kernel = query_backward_causal_kernel<T>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), static_cast<size_t>(bytes), stream,
              p);
  return last_error();
}
template <typename T>
int launch_measurement_backward_causal(const AttendCausalBackwardArgs& p, int64_t blocks, int64_t bytes, void* stream) {
  auto kernel = measurement_backward_causal_kernel<T>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), static_cast<size_t>(bytes), stream,
              p);
  return last_error();
}
template <typename T>
int launch_token_backward_causal(const AttendCausalBackwardArgs& p, int64_t blocks, int64_t bytes, void* stream) {
  auto kernel = token_backward_causal_kernel<T>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(limits::kThreads), static_cast<size_t>(bytes), stream,
              p);
  return last_error();
}

}  // namespace csat
