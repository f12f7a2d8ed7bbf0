// The ensembles whose Phi is never in memory, as integers: the same draws and borders as philox.py (generator version
// 1) and measurements.py, for host and device code alike.
//
//   rademacher  sign(seed, layer, head, row j, token s) / sqrt(tokens kept)
//   srht        sign(.., row 0, token s) (-1)^popcount(i_j & s) / sqrt(tokens kept), i_j = step j + start mod 2^32
//   pool        overlap of [p_s, p_s + 1) with the segment [edge_j, edge_{j+1}) over the segment's length, p_s being
//   the
//               number of kept tokens before s
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

#ifdef __CUDACC__
#define CSAT_ANYWHERE __host__ __device__ __forceinline__
#else
// Inlined whatever the instruction set of the caller is: no copy for a larger one can be linked into a smaller.
#define CSAT_ANYWHERE inline __attribute__((always_inline))
#endif

namespace csat {

enum class Ensemble : int { rademacher = 0, srht = 1, pool = 2 };
inline std::optional<Ensemble> ensemble_named(std::string_view name) {
  if (name == "rademacher") return Ensemble::rademacher;
  if (name == "srht") return Ensemble::srht;
  if (name == "pool") return Ensemble::pool;
  return std::nullopt;
}
constexpr int64_t kMaxTokens = 0x7FFFFFFE;  // token numbers and running counts are int32

// ---- Philox4x32-10 with key = seed and counter = (position, row, head, layer)

struct RandomKey {
  uint32_t low, high;  // of the seed
  uint32_t head, layer;
};

struct RandomWords {
  uint32_t c[4];
};

constexpr uint32_t kPhiloxA = 0xD2511F53u, kPhiloxB = 0xCD9E8D57u, kWeylA = 0x9E3779B9u, kWeylB = 0xBB67AE85u;
constexpr uint32_t kMatrixRow = 0xFFFFFFFFu;  // counter row of draws that belong to a whole matrix

CSAT_ANYWHERE uint32_t high_word(uint64_t x) { return static_cast<uint32_t>(x >> 32); }
CSAT_ANYWHERE uint32_t low_word(uint64_t x) { return static_cast<uint32_t>(x); }

// Rounds first .. last of ten, counted from 0.
CSAT_ANYWHERE RandomWords philox_rounds(RandomWords w, const RandomKey& key, uint32_t first, uint32_t last) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (uint32_t i = first; i <= last; ++i) {
    const uint64_t a = uint64_t(kPhiloxA) * w.c[0], b = uint64_t(kPhiloxB) * w.c[2];
    w = {{high_word(b) ^ w.c[1] ^ (key.low + i * kWeylA), low_word(b), high_word(a) ^ w.c[3] ^ (key.high + i * kWeylB),
          low_word(a)}};
  }
  return w;
}
CSAT_ANYWHERE RandomWords philox(const RandomKey& key, uint32_t position, uint32_t row) {
  return philox_rounds({{position, row, key.head, key.layer}}, key, 0, 9);
}

// The sign of entry (row, position): negative where the leading bit of word 0 is set. The first three rounds fall into
// a part of the row and one of the position, which a matrix of signs needs once a row and once a column: 14
// multiplications an entry are left of 20.
struct SignRow {
  uint32_t high, low;  // of A times word 0 after round 0
};
struct SignPosition {
  uint32_t low, c1, high2, low2;  // word 3 after round 0, word 1 after round 1, A times word 0 after round 1
};
CSAT_ANYWHERE SignRow sign_row(const RandomKey& key, uint32_t row) {
  const uint64_t a = uint64_t(kPhiloxA) * (high_word(uint64_t(kPhiloxB) * key.head) ^ row ^ key.low);
  return {high_word(a), low_word(a)};
}
CSAT_ANYWHERE SignPosition sign_position(const RandomKey& key, uint32_t position) {
  const uint64_t a = uint64_t(kPhiloxA) * position;
  const uint32_t c2 = high_word(a) ^ key.layer ^ key.high;
  const uint64_t b = uint64_t(kPhiloxB) * c2;
  const uint64_t next =
      uint64_t(kPhiloxA) * (high_word(b) ^ low_word(uint64_t(kPhiloxB) * key.head) ^ (key.low + kWeylA));
  return {low_word(a), low_word(b), high_word(next), low_word(next)};
}
// The leading bit is the sign.
CSAT_ANYWHERE uint32_t sign_word(const RandomKey& key, const SignRow& r, const SignPosition& p) {
  const uint64_t b = uint64_t(kPhiloxB) * (r.high ^ p.low ^ (key.high + kWeylB));
  const RandomWords after_round_2 = {
      {high_word(b) ^ p.c1 ^ (key.low + 2 * kWeylA), low_word(b), p.high2 ^ r.low ^ (key.high + 2 * kWeylB), p.low2}};
  return philox_rounds(after_round_2, key, 3, 9).c[0];
}

// ---- which tokens are measured

// Token s of one sequence is kept where counts[s + 1] > counts[s], and its place is then counts[s]; without counts
// every token is kept.
struct Places {
  const int32_t* counts;
  int64_t tokens;

  CSAT_ANYWHERE int64_t before(int64_t s) const { return counts ? counts[s] : s; }
  CSAT_ANYWHERE bool kept(int64_t s) const { return !counts || counts[s + 1] > counts[s]; }
  CSAT_ANYWHERE int64_t total() const { return before(tokens); }
  // The token at place p, `tokens` if there is none.
  CSAT_ANYWHERE int64_t token_at(int64_t p) const {
    if (!counts) return p < tokens ? p : tokens;
    int64_t low = 0, high = tokens;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (counts[middle + 1] > p)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }
};

// ---- SRHT

// Row j of the transform is row start + step j of the Hadamard matrix, modulo its size.
struct HadamardRows {
  uint32_t start, step;
  CSAT_ANYWHERE uint32_t operator()(int64_t j) const { return start + step * static_cast<uint32_t>(j); }
};
CSAT_ANYWHERE HadamardRows hadamard_rows(const RandomKey& key) {
  const RandomWords w = philox(key, 0, kMatrixRow);
  return {w.c[0], w.c[1] | 1};
}
CSAT_ANYWHERE uint32_t parity(uint32_t x) {
  x ^= x >> 16;
  x ^= x >> 8;
  x ^= x >> 4;
  x ^= x >> 2;
  return (x ^ x >> 1) & 1;
}

// ---- pool

// The m segments that divide `extent` places between them, in units of 1 / (2 heads m) of a place: the inner borders of
// head h are shifted by (2 h + 1 - heads) / (2 heads) segments (by 0 where there is one head).
struct Segments {
  int64_t count, heads, head, extent;

  CSAT_ANYWHERE int64_t unit() const { return 2 * heads * count; }
  CSAT_ANYWHERE int64_t edge(int64_t j) const {
    return (2 * heads * j + (j > 0 && j < count ? 2 * head + 1 - heads : 0)) * extent;
  }
  // The first segment that place p has a part in; extent > p.
  CSAT_ANYWHERE int64_t at(int64_t p) const {
    const int64_t position = p * unit();
    int64_t j = extent > 0 ? position / extent / (2 * heads) : 0;
    j = j < 0 ? 0 : j > count - 1 ? count - 1 : j;  // whatever stands in the counts, a segment
    while (j > 0 && edge(j) > position) --j;
    while (j < count - 1 && edge(j + 1) <= position) ++j;
    return j;
  }
  // How much of place p lies in segment j.
  CSAT_ANYWHERE int64_t overlap(int64_t p, int64_t j) const {
    const int64_t low = edge(j), high = edge(j + 1), left = p * unit(), right = left + unit();
    const int64_t length = (right < high ? right : high) - (left > low ? left : low);
    return length > 0 ? length : 0;
  }
};

}  // namespace csat
