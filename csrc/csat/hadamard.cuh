// Projection by rows of a randomised Hadamard transform, and its transpose:
//
//   forward    y_j  = scale sum over kept s of (-1)^popcount(i_j & s) sign_s x_s
//   backward   dx_s = scale sign_s sum over j of (-1)^popcount(i_j & s) dy_j
//
// The Hadamard matrix over N tokens is a product: with s = 1024 u + v, (-1)^popcount(i & s) is that of (i / 1024, u)
// times that of (i mod 1024, v). Within each 1024 tokens a fast transform makes all its rows; across them only the rows
// that Phi has are summed. For m <= 1024 that is 10 additions and at most one more a token and feature, above it is
// 10 ceil(m / 512) + m / 1024: no workspace of the length of the tokens, no second pass over them.
//
// Data flow, forward: x -> registers (32 tokens of one feature a thread), sign, butterflies over the high 5 bits ->
// shared -> butterflies over the low 5 bits -> shared -> the block's 512 rows, summed in registers over its tokens.
// Backward: dy -> shared at row i_j mod 1024 -> the same butterflies -> sign -> dx. As i_j = start + step j with an odd
// step, rows j that share a place differ by multiples of 1024 and belong to one thread: no atomics.
//
// Budget of a block of 512 threads: 16 features, 70 KiB of shared memory (1024 x 16 floats, 16 of padding for every 32
// rows so that both halves of a warp hit different banks, and 1024 signs), 32 values in flight and 16 accumulators a
// thread (backward: 32).
#pragma once
#include "csat/implicit.cuh"

namespace csat {

constexpr int kHadamardTile = (limits::kHadamardTokens + limits::kHadamardTokens / 32) * limits::kHadamardColumns;
constexpr int kHadamardShared = kHadamardTile + limits::kHadamardTokens;  // floats

struct HadamardArgs {
  ImplicitArgs a;
  int64_t column_tiles, row_tiles;  // row_tiles: forward, of kHadamardRows measurements; backward, of tokens
};

// This thread's feature within the block's, and which of 32 such threads it is.
CSAT_DEVICE int hadamard_column() { return threadIdx.x % limits::kHadamardColumns; }
CSAT_DEVICE int hadamard_lane() { return threadIdx.x / limits::kHadamardColumns; }
static_assert(limits::kHadamardThreads == 32 * limits::kHadamardColumns && limits::kHadamardTokens == 32 * 32);

CSAT_DEVICE float& hadamard_entry(float* tile, int row) {
  return tile[(row + row / 32) * limits::kHadamardColumns + hadamard_column()];
}

// v = rows first, first + step, .. of this thread's column, and back.
CSAT_DEVICE void read_rows(float* tile, int first, int step, float (&v)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) v[i] = hadamard_entry(tile, first + step * i);
}
CSAT_DEVICE void write_rows(float* tile, int first, int step, const float (&v)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) hadamard_entry(tile, first + step * i) = v[i];
}

// v = H v, H (32, 32).
CSAT_DEVICE void butterflies(float (&v)[32]) {
#pragma unroll
  for (int half = 1; half < 32; half *= 2)
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (!(i & half)) {
        const float sum = v[i] + v[i + half], difference = v[i] - v[i + half];
        v[i] = sum;
        v[i + half] = difference;
      }
}

// Signs of tokens first .. first + 1023, 0 where a token is not read.
CSAT_DEVICE void draw_signs(float* signs, const RandomKey& key, const Places& places, int64_t first) {
#pragma unroll 1
  for (int i = threadIdx.x; i < limits::kHadamardTokens; i += limits::kHadamardThreads) {
    const int64_t s = first + i;
    const bool read = s < places.tokens && places.kept(s);
    signs[i] = !read ? 0.f : philox(key, static_cast<uint32_t>(s), 0).c[0] >> 31 ? -1.f : 1.f;
  }
}

template <typename T>
__global__ void __launch_bounds__(limits::kHadamardThreads) hadamard_forward_kernel(HadamardArgs s) {
  constexpr int kRows = limits::kHadamardRows / 32;  // of this thread
  const int lane = hadamard_lane();
  CSAT_DYN_SMEM(float, tile);
  float* signs = tile + kHadamardTile;
  const ImplicitArgs& a = s.a;
  const ImplicitParams& p = a.p;
  int64_t index = blockIdx.x;
  const int64_t d = index % s.column_tiles * limits::kHadamardColumns + hadamard_column();
  index /= s.column_tiles;
  const int64_t first_row = index % s.row_tiles * limits::kHadamardRows + lane;
  index /= s.row_tiles;
  const int64_t split = index % a.splits;
  index /= a.splits;
  const int64_t h = index % a.heads, b = index / a.heads;
  const Places places = places_of(a, b);
  const RandomKey key = key_of(a, phi_head_of(a, h));
  const HadamardRows rows = hadamard_rows(key);
  const int64_t blocks = (p.tokens + limits::kHadamardTokens - 1) / limits::kHadamardTokens;
  const int64_t part = (blocks + a.splits - 1) / a.splits * limits::kHadamardTokens;
  const int64_t end = (split + 1) * part < p.tokens ? (split + 1) * part : p.tokens;

  float sums[kRows] = {};
  for (int64_t token = split * part; token < end; token += limits::kHadamardTokens) {
    draw_signs(signs, key, places, token);
    __syncthreads();
    const T* source = at<const T>(p.x, b, x_head_of(a, h), token + lane) + d * p.x.stride[3];
    float v[32];
#pragma unroll
    for (int i = 0; i < 32; ++i, source += 32 * p.x.stride[2])
      v[i] = signs[lane + 32 * i] != 0.f && d < p.head_dim ? to_float(*source) : 0.f;
#pragma unroll
    for (int i = 0; i < 32; ++i) v[i] *= signs[lane + 32 * i];
    butterflies(v);
    write_rows(tile, lane, 32, v);
    __syncthreads();
    read_rows(tile, 32 * lane, 1, v);
    butterflies(v);
    write_rows(tile, 32 * lane, 1, v);
    __syncthreads();
    uint32_t row = rows(first_row);
#pragma unroll
    for (int r = 0; r < kRows; ++r, row += 32 * rows.step) {
      const float value = hadamard_entry(tile, row % limits::kHadamardTokens);
      sums[r] += parity(row & static_cast<uint32_t>(token)) ? -value : value;
    }
    __syncthreads();
  }
  if (d >= p.head_dim) return;
  const float scale = signed_scale(places);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t j = first_row + 32 * r;
    if (j < p.measurements) emit<T>(a, split, b, h, j, d, scale * sums[r]);
  }
}

template <typename T>
__global__ void __launch_bounds__(limits::kHadamardThreads) hadamard_backward_kernel(HadamardArgs s) {
  const int lane = hadamard_lane();
  CSAT_DYN_SMEM(float, tile);
  float* signs = tile + kHadamardTile;
  const ImplicitArgs& a = s.a;
  const ImplicitParams& p = a.p;
  int64_t index = blockIdx.x;
  const int64_t d = index % s.column_tiles * limits::kHadamardColumns + hadamard_column();
  index /= s.column_tiles;
  const int64_t token = index % s.row_tiles * limits::kHadamardTokens;
  index /= s.row_tiles;
  const int64_t hx = index % p.x_heads, b = index / p.x_heads, group = a.heads / p.x_heads;
  const Places places = places_of(a, b);

  float sums[32] = {};
  for (int64_t h = hx * group; h < (hx + 1) * group; ++h) {
    const RandomKey key = key_of(a, phi_head_of(a, h));
    const HadamardRows rows = hadamard_rows(key);
    draw_signs(signs, key, places, token);
#pragma unroll 4
    for (int row = lane; row < limits::kHadamardTokens; row += 32) hadamard_entry(tile, row) = 0.f;
    __syncthreads();
    if (d < p.head_dim)
#pragma unroll 1
      for (int64_t j = lane; j < p.measurements; j += 32) {
        const uint32_t row = rows(j);
        const float value = to_float(at<const T>(p.y, b, h, p.anchor_rows + j)[d * p.y.stride[3]]);
        float& place = hadamard_entry(tile, row % limits::kHadamardTokens);
        place += parity(row & static_cast<uint32_t>(token)) ? -value : value;
      }
    __syncthreads();
    float v[32];
    read_rows(tile, lane, 32, v);
    butterflies(v);
    write_rows(tile, lane, 32, v);
    __syncthreads();
    read_rows(tile, 32 * lane, 1, v);
    butterflies(v);
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i] += signs[32 * lane + i] * v[i];
    __syncthreads();
  }
  if (d >= p.head_dim) return;
  const float scale = signed_scale(places);
  T* target = at<T>(p.x, b, hx, token + 32 * lane) + d * p.x.stride[3];
#pragma unroll
  for (int i = 0; i < 32; ++i, target += p.x.stride[2])
    if (token + 32 * lane + i < p.tokens) *target = from_float<T>(scale * sums[i]);
}

}  // namespace csat
