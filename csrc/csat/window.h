// What each query of attend_causal sees, for host and device code alike.
//
// Query i is that of token t = first + i, of block c = t / Bk of the tokens at hand, whose first one opens a block. In
// one softmax it sees the measurements of all blocks before c - w, and tokens (c - w) Bk .. t. Both are ranges whose
// ends never fall from one query to the next.
#pragma once
#include "csat/ensembles.h"

namespace csat {

struct Range {
  int64_t begin, end;
};

struct CausalWindow {
  int64_t first, queries;         // N - Nq, Nq
  int64_t block_size, blocks;     // Bk, w
  int64_t earlier, measurements;  // E: how many lie before the first token; r: how many a block has

  // Blocks of these tokens that query i sees as measurements: the first ones.
  CSAT_ANYWHERE int64_t measured_blocks(int64_t i) const {
    const int64_t c = (first + i) / block_size - blocks;
    return c < 0 ? 0 : c;
  }
  CSAT_ANYWHERE Range measurements_of(int64_t i) const { return {0, earlier + measurements * measured_blocks(i)}; }
  CSAT_ANYWHERE Range tokens_of(int64_t i) const { return {measured_blocks(i) * block_size, first + i + 1}; }

  // The queries that see one of these measurements, of these tokens; an empty range has begin >= end.
  CSAT_ANYWHERE Range queries_of_measurements(Range m) const {
    if (m.begin < earlier) return {0, queries};
    const int64_t block = (m.begin - earlier) / measurements;
    return of_tokens((block + 1 + blocks) * block_size, first + queries);
  }
  CSAT_ANYWHERE Range queries_of_tokens(Range s) const {
    return of_tokens(s.begin, ((s.end - 1) / block_size + blocks + 1) * block_size);
  }

 private:
  CSAT_ANYWHERE Range of_tokens(int64_t begin, int64_t end) const {
    begin -= first, end -= first;
    return {begin < 0 ? 0 : begin, end < queries ? end : queries};
  }
};

}  // namespace csat
