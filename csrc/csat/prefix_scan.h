// Launches of prefix_scan.cuh: from sums over the tokens of each chunk to the states between chunks.
#pragma once
#include "csat/launch.h"
#include "csat/tile.cuh"

namespace csat {

// target (1, M) of every (batch element, state head, chunk) = sum of x over its tokens and heads; counts: of 1 for each
// token that is kept.
struct PrefixColumnSumsArgs {
  View x;  // (B, .., N, columns), float32
  int64_t x_share, heads;
  int64_t state_heads, chunks, tokens, columns;  // columns: of x, zeros behind
  bool counts;
  const unsigned char* keep;
  Panel target;
  int64_t blocks;  // for each matrix
};
int prefix_column_sums(const PrefixColumnSumsArgs& p, int64_t matrices, void* stream);

// sums (state heads, chunks) of a matrix become what comes before each chunk, or behind it: an exclusive scan from
// `start`, an element a thread.
struct PrefixScanArgs {
  Panel sums;
  int64_t states, state_heads, chunks;
  bool reverse;
  View start, end;        // (B, state heads, rows, columns), float32; what the last step leaves; data null: not wanted
  int64_t rows, columns;  // of both
  int64_t end_heads, end_columns;  // of the end alone
};
int prefix_scan(const PrefixScanArgs& p, void* stream);

// Sums of keys or values (state heads, chunks)(rows, columns), unchanged, and what comes before each chunk as means.
struct PrefixMeanScanArgs {
  const float* sums;
  void* means;  // (state heads, chunks)(rows, columns), dtype
  DType dtype;
  Panel masses;    // before each chunk
  bool is_signed;  // the mass is a number of tokens, by whose root sums are divided
  int64_t states, state_heads, chunks;
  int64_t padded_rows, padded_columns;
  View start, end;        // (B, state heads, rows, columns), float32; of the end data null: not wanted
  int64_t rows, columns;  // of both
};
int prefix_mean_scan(const PrefixMeanScanArgs& p, void* stream);

}  // namespace csat
