// decode alone on Hopper's warpgroup products (wgmma, sm_90a), for bf16 and fp16, R and Dv up to 64 or 128, P up to 64
// or 128, S and B tied or not: the layers of lista.cuh.
//
// A warpgroup takes a tile of 64 rows through all layers by itself: every iterate is a left operand in its registers,
// so that nothing is exchanged between layers, and a block's other warpgroups multiply while one shrinks. Blocks are
// persistent; each has a contiguous range of the tiles of all groups of rows that share weights, and loads those once a
// group.
//
// Data flow: S, B, psi -> shared under the 128-byte swizzle by cp.async. z of a tile -> the warpgroup's shared tile by
// one tensor copy (zeros past the last row and column), the next tile's on their way where there is room for two; B z
// has its left operand there, u = B z + S a and psi a in registers. c -> the place of z -> global in 16-byte pieces.
// One barrier of the warpgroup a tile, when z has been read: until then its rows before are stored, too.
//
// Budget of a row: 2 P R + 2 (T - 1) P P + 2 P Dv FLOP (the last where psi is not the identity), B z once where B is
// tied; z and c once through memory. Registers of a lane: P / 2 for B z, P / 2 for u (then Dv / 2 for c), P / 4 for the
// iterate; shared memory: limits::decode_wgmma_bytes. Limits: limits::plan_wgmma.
#pragma once
#include "csat/forward_mma.cuh"
#include "csat/warpgroup.cuh"

namespace csat {

struct DecodeWgmmaArgs {
  ForwardMmaArgs shapes;  // its pairs are the groups that share weights, its units their tiles
  RowBoxes z;             // of 64 rows
  int query_tiles;        // ceil(Nq / 64)
};

namespace rows_decode {

constexpr int kRows = limits::kWgmmaRows;

// Shared memory of a block; limits::decode_wgmma_bytes counts it.
template <typename T, int kD, int kP>
struct Layout {
  static constexpr int kGroups = limits::decode_wgmma_groups(kP), kThreads = 128 * kGroups;
  T* base;
  const DecodeWgmmaArgs& args;

  CSAT_DEVICE const DecoderWeights& decoder() const { return args.shapes.decoder; }
  CSAT_DEVICE int stages() const { return args.shapes.stages; }
  CSAT_DEVICE SwizzledTile<T, kP> S(int t) const { return {base + (decoder().s_layers == 1 ? 0 : t) * (kP * kP), kP}; }
  CSAT_DEVICE SwizzledTile<T, kD> B(int t) const {
    return {after_S() + (decoder().b_layers == 1 ? 0 : t) * (kP * kD), kP};
  }
  CSAT_DEVICE SwizzledTile<T, kP> psi() const { return {after_S() + decoder().b_layers * (kP * kD), kD}; }
  // A warpgroup's rows of z, then of c.
  CSAT_DEVICE SwizzledTile<T, kD> rows(int group, int stage) const {
    return {psi().data + kD * kP + (group * stages() + stage) * (kRows * kD), kRows};
  }
  CSAT_DEVICE uint64_t* arrived(int group, int stage) const {
    return reinterpret_cast<uint64_t*>(rows(kGroups, 0).data) + group * stages() + stage;
  }
  CSAT_DEVICE float* theta() const { return reinterpret_cast<float*>(arrived(kGroups, 0)); }
  CSAT_DEVICE float* step() const { return theta() + decoder().layers * kP; }

 private:
  CSAT_DEVICE T* after_S() const { return base + decoder().s_layers * (kP * kP); }
};

template <typename T, int kD, int kP>
CSAT_DEVICE void load_weights(const Layout<T, kD, kP>& to, int64_t head) {
  const DecoderWeights& w = to.decoder();
  const int thread = threadIdx.x, threads = to.kThreads;
  for (int t = 0; t < w.s_layers; ++t)
    load_rows_async(to.S(t), weight_rows<T>(w, w.S, head, t, w.coefficients, w.coefficients), kP, thread, threads);
  for (int t = 0; t < w.b_layers; ++t)
    load_rows_async(to.B(t), weight_rows<T>(w, w.B, head, t, w.coefficients, w.features), kP, thread, threads);
  if (w.synthesises())
    load_rows_async(to.psi(), weight_rows<T>(w, w.psi, head, 0, w.outputs, w.coefficients), kD, thread, threads);
  load_thresholds<kP>(to.theta(), to.step(), w, head, thread, threads);
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();
}

// A warpgroup and the tiles of a run that are its own.
template <typename T, int kD, int kP>
struct Tiles {
  const Layout<T, kD, kP>& s;
  int group, own, first, count;  // own: the warpgroup's number

  CSAT_DEVICE const ForwardMmaArgs& p() const { return s.args.shapes; }
  CSAT_DEVICE void barrier() const { named_barrier_sync(1 + own, 128); }
  CSAT_DEVICE RowTile rows_of(int i) const {
    const int tile = first + i, pair = tile / s.args.query_tiles, row = tile % s.args.query_tiles * kRows;
    const bool shared = s.decoder().heads == 1;
    const int64_t left = p().queries - row;
    return {shared ? pair / p().heads : pair, shared ? pair % p().heads : group, row,
            left < kRows ? static_cast<int>(left) : kRows};
  }
  // z of tile i on its way, by one thread, if there is such a tile.
  CSAT_DEVICE void request(int i, int stage) const {
    if (i >= count || threadIdx.x % 128 != 0) return;
    const RowTile rows = rows_of(i);
    uint64_t* arrived = s.arrived(own, stage);
    mbarrier_arrive_expect_bytes(arrived, kRows * kD * sizeof(T));
    s.args.z.copy(s.rows(own, stage), static_cast<int>(rows.batch), static_cast<int>(rows.head),
                  static_cast<int>(rows.first), arrived);
  }

  // u = B_t z.
  CSAT_DEVICE void measure(Sums<16, kP>& u, SwizzledTile<T, kD> z, int t) const {
    wgmma_fence(u.at[0]);
    start_product_transposed(u, z, 0, s.B(t));
    wgmma_commit();
    wgmma_wait<0>(u.at[0]);
  }
  // psi a_T of the rows that have arrived. `then` is called once the rows of the tile before have been stored.
  template <typename F>
  CSAT_DEVICE Operand<T, 16, kD> decode(SwizzledTile<T, kD> z, F then) const {
    const DecoderWeights& w = s.decoder();
    Operand<T, 16, kP> a = {};
    Sums<16, kP> bz;
    measure(bz, z, 0);
    barrier();
    then();
    if (w.layers > 0) next_iterate<true>(a, bz, s.theta(), s.step()[0]);
    const auto layer = [&](Sums<16, kP>& u, int t) {
      product_transposed(u, a, s.S(t), true);
      next_iterate<false>(a, u, s.theta() + t * kP, s.step()[t]);
    };
#pragma unroll 1
    for (int t = 1; t < w.layers - 1; ++t) {
      if (t < w.b_layers) measure(bz, z, t);
      Sums<16, kP> u = bz;
      layer(u, t);
    }
    if (w.layers > 1) {  // the last one needs no copy of B z
      if (w.layers == w.b_layers) measure(bz, z, w.layers - 1);
      layer(bz, w.layers - 1);
    }
    const Operand<T, 16, kD> c = synthesised<kD>(a, s.psi(), !w.synthesises());
    if (w.b_layers > 1) barrier();  // z has been read
    return c;
  }

  // The warp's 16 rows of c, through its rows of the tile.
  CSAT_DEVICE void store(int i, SwizzledTile<T, kD> tile, const Operand<T, 16, kD>& c) const {
    const int row = warp_id() % 4 * 16;
    const SwizzledTile<T, kD> own_rows{tile.data + row * 64, kRows};
    store_tile(own_rows, c);
    sync_warp();
    const RowTile rows = rows_of(i);
    const GlobalRows<T> all{at<T>(p().out, rows.batch, rows.head, rows.first), p().out.stride[2], rows.valid,
                            p().decoder.outputs};
    store_rows(all.from_row(row), own_rows, p().out_vectors);
    fence_proxy_async();
  }
};

}  // namespace rows_decode

template <typename T, int kD, int kP>
__global__ void __launch_bounds__(128 * limits::decode_wgmma_groups(kP), 1)
    decode_wgmma_kernel(const __grid_constant__ DecodeWgmmaArgs args) {
  using namespace rows_decode;
  using Shared = Layout<T, kD, kP>;
  CSAT_DYN_SMEM(T, memory);
  const Shared s{memory, args};
  const int own = warpgroup_id(), stages = s.stages();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kGroups * stages; ++i) mbarrier_init(s.arrived(0, i), 1);
    fence_mbarrier_init();
  }
  int turn = 0;  // tiles of this warpgroup so far
  for_each_run(args.shapes, [&](const UnitRun& run) {
    const Tiles<T, kD, kP> tiles{s, run.pair, own, run.first, run.count};
    __syncthreads();  // the mbarriers are made; nobody uses the weights or stores rows of the run before
    tiles.request(own, turn & (stages - 1));
    load_weights(s, run.pair);
    __syncthreads();
#pragma unroll 1
    for (int i = own; i < run.count; i += Shared::kGroups, ++turn) {
      const int stage = turn & (stages - 1);
      const SwizzledTile<T, kD> tile = s.rows(own, stage);
      mbarrier_wait(s.arrived(own, stage), turn >> (stages - 1) & 1);
      const Operand<T, 16, kD> c = tiles.decode(tile, [&] {
        if (stages == 2) tiles.request(i + Shared::kGroups, stage ^ 1);
      });
      tiles.store(i, tile, c);
      if (stages == 1) {
        tiles.barrier();
        tiles.request(i + Shared::kGroups, 0);
      }
    }
  });
}

template <typename T, int kD, int kP>
int launch_decode_wgmma(const ForwardMmaArgs& p, int64_t blocks, int64_t shared_bytes, void* stream) {
  DecodeWgmmaArgs args;
  args.shapes = p;
  args.shapes.pairs = static_cast<int>(p.decoder.heads);
  args.shapes.units = static_cast<int>(int64_t(p.pairs) * p.units / p.decoder.heads);
  args.query_tiles = p.units;
  const int error =
      make_row_boxes<T>(&args.z, p.z, p.pairs / p.heads, p.heads, p.queries, p.features, limits::kWgmmaRows);
  if (error) return error;
  auto kernel = decode_wgmma_kernel<T, kD, kP>;
  CSAT_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(128 * limits::decode_wgmma_groups(kP)),
              static_cast<size_t>(shared_bytes), stream, args);
  return last_error();
}

// csrc/kernels/instances/decode_wgmma_<feature>.cu instantiate these, for up to 64 and up to 128 coefficients.
#define CSAT_DECODE_WGMMA(prefix, T, kD)                                                              \
  prefix template int launch_decode_wgmma<T, kD, 64>(const ForwardMmaArgs&, int64_t, int64_t, void*); \
  prefix template int launch_decode_wgmma<T, kD, 128>(const ForwardMmaArgs&, int64_t, int64_t, void*);
#define CSAT_DECODE_WGMMA_INSTANCE(T, kD) CSAT_DECODE_WGMMA(, T, kD)
#ifndef CSAT_INSTANTIATE
CSAT_DECODE_WGMMA(extern, bf16, 64)
CSAT_DECODE_WGMMA(extern, bf16, 128)
CSAT_DECODE_WGMMA(extern, f16, 64)
CSAT_DECODE_WGMMA(extern, f16, 128)
#endif

}  // namespace csat
