// Projection by random signs that are drawn where they are used, and its transpose:
//
//   forward    y_j  = scale sum over kept s of sign(j, s) x_s        rows j,      depth s
//   backward   dx_s = scale sum over j of sign(j, s) dy_j            rows tokens, depth (head of the group, j)
//
// Data flow: 32 of the depth x C columns of x (dy) -> shared; signs from Philox -> registers, as the left operand of
// mma.m16n8k16 (bf16, fp16), or -> shared for float32 FMA; sums in registers; scaled in float32 at the end. A block
// owns 64 rows (16 a warp) and C = 256 (float32: 128) columns, which are features of every batch element, and head,
// that one Phi head serves: a sign is drawn once for all of them, once a column tile.
//
// Budget of a sign: 14 multiplications of 32 x 32 bits and about 30 other integer operations (ensembles.h), against C
// multiply-adds; at C = 256 the integers, not the tensor cores, set the pace. Shared memory: two stages of 32 x 264
// elements of 16 bits (33 KiB), or one of 32 x 136 floats and 32 x 64 signs (25 KiB). 128 accumulators a lane (float32:
// 64). Long depths are split over blocks; implicit.cuh says where the parts go.
#pragma once
#include "csat/fragments.cuh"
#include "csat/implicit.cuh"

namespace csat {

template <typename T>
constexpr int kSignChunks = limits::kSignColumns / (sizeof(T) == 4 ? 16 : 8);            // of eight columns, a block
constexpr int64_t kSignStage = tile_elements(limits::kSignDepth, limits::kSignColumns);  // elements of 16 bits

struct SignArgs {
  ImplicitArgs a;
  int64_t row_tiles, column_tiles, chunks_per_pair, pairs;
  int64_t depth, split_depth;  // of one head; split_depth is a multiple of kSignDepth
  bool vectors;                // rows of x (dy) start at multiples of 16 bytes
};

// Where a block is. `owner` is the Phi head (forward) or the head of x (backward) whose rows it computes; with one Phi
// head it is 0 and the columns run over every head.
struct SignBlock {
  int64_t owner, split, row, chunk;
};
CSAT_DEVICE SignBlock sign_block(const SignArgs& s) {
  int64_t index = blockIdx.x;
  const int64_t chunk = index % s.column_tiles;
  index /= s.column_tiles;
  const int64_t row = index % s.row_tiles * limits::kSignRows;
  index /= s.row_tiles;
  return {index / s.a.splits, index % s.a.splits, row, chunk};
}

// Eight columns: features d .. d + 7 of batch element b and head h (of y forward, of x backward).
struct SignColumns {
  int64_t b, h, d;
  bool exist;
};
template <bool kForward>
CSAT_DEVICE SignColumns sign_columns(const SignArgs& s, const SignBlock& block, int64_t chunk) {
  const int64_t pair = chunk / s.chunks_per_pair, d = chunk % s.chunks_per_pair * 8;
  const int64_t heads = kForward ? s.a.heads : s.a.p.x_heads;
  if (s.a.p.phi_heads == 1) return {pair / heads, pair % heads, d, pair < s.pairs};
  return {pair, block.owner, d, pair < s.pairs};
}

// Entry k of the depth of these columns, or null: beyond the end, or a token that is not read.
template <typename T, bool kForward>
CSAT_DEVICE const T* sign_source(const SignArgs& s, const SignColumns& c, int64_t group_head, int64_t k) {
  const ImplicitArgs& a = s.a;
  if (!c.exist || k >= s.depth) return nullptr;
  if (!kForward)
    return at<const T>(a.p.y, c.b, c.h * (a.heads / a.p.x_heads) + group_head, a.p.anchor_rows + k) +
           c.d * a.p.y.stride[3];
  return places_of(a, c.b).kept(k) ? at<const T>(a.p.x, c.b, x_head_of(a, c.h), k) + c.d * a.p.x.stride[3] : nullptr;
}

// Depth k0 .. k0 + 31 of this thread's eight columns -> shared, zeros where there is nothing.
template <typename T, bool kForward>
CSAT_DEVICE void stage(const SignArgs& s, const SignColumns& c, int64_t group_head, int64_t k0, T* tile, int pitch) {
  constexpr int kChunks = kSignChunks<T>, kStep = limits::kThreads / kChunks;
  const View& v = kForward ? s.a.p.x : s.a.p.y;
  const int64_t left = s.a.p.head_dim - c.d;
  const int valid = left < 8 ? static_cast<int>(left) : 8;
  T* target = tile + threadIdx.x % kChunks * 8;
  for (int k = threadIdx.x / kChunks; k < limits::kSignDepth; k += kStep) {
    const T* source = sign_source<T, kForward>(s, c, group_head, k0 + k);
    if (sizeof(T) == 2 && s.vectors) {
      cp_async16_zfill(target + k * pitch, source ? source : static_cast<const T*>(v.data), source ? 2 * valid : 0);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        target[k * pitch + e] = source && e < valid ? source[e * v.stride[3]] : from_float<T>(0.f);
    }
  }
}

// Sign of entry (row of the block's product, depth k) of Phi.
template <bool kForward>
struct SignSource {
  RandomKey key;
  SignRow row[2];  // forward: of this lane's two rows
  SignPosition position[2];

  CSAT_DEVICE SignSource(const RandomKey& key, int64_t row0, int64_t row1) : key(key) {
    const uint32_t rows[2] = {static_cast<uint32_t>(row0), static_cast<uint32_t>(row1)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (kForward)
        row[i] = sign_row(key, rows[i]);
      else
        position[i] = sign_position(key, rows[i]);
    }
  }
  // The leading bits for both rows at depth k.
  CSAT_DEVICE void operator()(int64_t k, uint32_t (&word)[2]) const {
    if (kForward) {
      const SignPosition shared = sign_position(key, static_cast<uint32_t>(k));
      word[0] = sign_word(key, row[0], shared);
      word[1] = sign_word(key, row[1], shared);
    } else {
      const SignRow shared = sign_row(key, static_cast<uint32_t>(k));
      word[0] = sign_word(key, shared, position[0]);
      word[1] = sign_word(key, shared, position[1]);
    }
  }
};

// Columns of a row of the product -> y, or dx.
template <typename T, bool kForward>
CSAT_DEVICE void store_sum(const SignArgs& s, const SignBlock& block, const SignColumns& c, int64_t row, int64_t d,
                           float scale, float value) {
  const ImplicitParams& p = s.a.p;
  if (d >= p.head_dim) return;
  if (kForward) {
    if (row < p.measurements) emit<T>(s.a, block.split, c.b, c.h, row, d, scale * value);
  } else if (row < p.tokens) {
    at<T>(p.x, c.b, c.h, row)[d * p.x.stride[3]] = from_float<T>(places_of(s.a, c.b).kept(row) ? scale * value : 0.f);
  }
}

// Heads whose rows of Phi a block's depth runs over.
template <bool kForward>
CSAT_DEVICE int64_t sign_group(const SignArgs& s) {
  return kForward || s.a.p.phi_heads == 1 ? 1 : s.a.heads / s.a.p.x_heads;
}

// Tensor cores: signs stay in registers.
template <typename T, bool kForward>
__global__ void __launch_bounds__(limits::kThreads) signs_kernel(SignArgs s) {
  constexpr int kColumns = limits::kSignColumns, kDepth = limits::kSignDepth;
  CSAT_DYN_SMEM(T, shared);
  const SignBlock block = sign_block(s);
  const SignColumns mine =
      sign_columns<kForward>(s, block, block.chunk * kSignChunks<T> + threadIdx.x % kSignChunks<T>);
  const int64_t left = (s.pairs * s.chunks_per_pair - block.chunk * kSignChunks<T>)*8;
  const int columns = left < kColumns ? static_cast<int>(left) : kColumns;
  const int64_t row = block.row + warp_id() * 16 + lane_id() / 4;
  const int64_t begin = block.split * s.split_depth;
  const int64_t end = begin + s.split_depth < s.depth ? begin + s.split_depth : s.depth;
  const uint32_t ones = pack2<T>(1.f, 1.f);
  Sums<16, kColumns> sums = {};

  for (int64_t g = 0; g < sign_group<kForward>(s); ++g) {
    const int64_t group = s.a.heads / s.a.p.x_heads;
    const int64_t phi_head = s.a.p.phi_heads == 1 ? 0 : kForward ? block.owner : block.owner * group + g;
    const int64_t group_head = s.a.p.phi_heads == 1 ? 0 : g;
    const SignSource<kForward> signs(key_of(s.a, phi_head), row, row + 8);
    int turn = 0;
    stage<T, kForward>(s, mine, group_head, begin, shared, Tile<T, kColumns>::kPitch);
    cp_async_commit();
    for (int64_t k0 = begin; k0 < end; k0 += kDepth, turn ^= 1) {
      if (k0 + kDepth < end)
        stage<T, kForward>(s, mine, group_head, k0 + kDepth, shared + (turn ^ 1) * kSignStage,
                           Tile<T, kColumns>::kPitch);
      cp_async_commit();
      Operand<T, 16, kDepth> left_operand;
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t first = k0 + 16 * k + 8 * half + lane_id() % 4 * 2;
          uint32_t low[2], high[2];
          signs(first, low);
          signs(first + 1, high);
#pragma unroll
          for (int r = 0; r < 2; ++r)
            left_operand.at[0][k][2 * half + r] = ones | (high[r] & 0x80000000u) | (low[r] >> 31 << 15);
        }
      cp_async_wait<1>();
      __syncthreads();
      const Tile<T, kColumns> right_tile{shared + turn * kSignStage};
      const SharedAddress from = fragment::lane_of_blocks(right_tile);
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
        for (int j = 0; j < kColumns / 16; ++j) {
          if (16 * j >= columns) continue;  // the same for the whole block
          uint32_t right[4];
          ldmatrix_x4_transposed(right, from + fragment::block_offset(right_tile, k, j));
          fragment::multiply_block<T>(sums, j, left_operand.at, k, right);
        }
      __syncthreads();
    }
    cp_async_wait<0>();
  }

#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const SignColumns c = sign_columns<kForward>(s, block, block.chunk * kSignChunks<T> + j);
    if (!c.exist) continue;
    const float scale = signed_scale(places_of(s.a, c.b));
#pragma unroll
    for (int e = 0; e < 4; ++e)
      store_sum<T, kForward>(s, block, c, row + e / 2 * 8, c.d + lane_id() % 4 * 2 + e % 2, scale, sums.at[0][j][e]);
  }
}

// float32: the block's signs go through shared memory.
template <bool kForward>
__global__ void __launch_bounds__(limits::kThreads, 3) signs_f32_kernel(SignArgs s) {
  constexpr int kColumns = limits::kSignColumns / 2, kDepth = limits::kSignDepth, kRows = limits::kSignRows;
  constexpr int kPitch = kColumns + 8, kChunks = kSignChunks<float>;
  CSAT_DYN_SMEM(float, tile);
  float* sign_tile = tile + kDepth * kPitch;
  const SignBlock block = sign_block(s);
  const SignColumns mine = sign_columns<kForward>(s, block, block.chunk * kChunks + threadIdx.x % kChunks);
  const int64_t begin = block.split * s.split_depth;
  const int64_t end = begin + s.split_depth < s.depth ? begin + s.split_depth : s.depth;
  const int64_t first_row = block.row + lane_id();
  float sums[2][limits::kOuterRows][2] = {};

  for (int64_t g = 0; g < sign_group<kForward>(s); ++g) {
    const int64_t group = s.a.heads / s.a.p.x_heads;
    const int64_t phi_head = s.a.p.phi_heads == 1 ? 0 : kForward ? block.owner : block.owner * group + g;
    const int64_t group_head = s.a.p.phi_heads == 1 ? 0 : g;
    const SignSource<kForward> signs(key_of(s.a, phi_head), first_row, first_row + 32);
    for (int64_t k0 = begin; k0 < end; k0 += kDepth) {
      stage<float, kForward>(s, mine, group_head, k0, tile, kPitch);
      for (int k = warp_id(); k < kDepth; k += limits::kWarps) {
        uint32_t word[2];
        signs(k0 + k, word);
        sign_tile[k * kRows + lane_id()] = word[0] >> 31 ? -1.f : 1.f;
        sign_tile[k * kRows + 32 + lane_id()] = word[1] >> 31 ? -1.f : 1.f;
      }
      __syncthreads();
#pragma unroll
      for (int half = 0; half < 2; ++half)
        multiply_outer(sums[half], sign_tile + warp_id() * limits::kOuterRows, kRows, tile + half * 64 + lane_id(),
                       kPitch, kDepth);
      __syncthreads();
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = 32 * i + lane_id();
    const SignColumns c = sign_columns<kForward>(s, block, block.chunk * kChunks + column / 8);
    if (!c.exist) continue;
    const float scale = signed_scale(places_of(s.a, c.b));
#pragma unroll
    for (int r = 0; r < limits::kOuterRows; ++r)
      store_sum<float, kForward>(s, block, c, block.row + warp_id() * limits::kOuterRows + r, c.d + column % 8, scale,
                                 sums[i / 2][r][i % 2]);
  }
}

}  // namespace csat
