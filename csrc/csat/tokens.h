// Launches of tokens.cuh.
#pragma once
#include "csat/launch.h"

namespace csat {

struct TokenArgs {
  View source, target;        // (batch, heads, tokens, features); a source without data means zero_tokens
  const unsigned char* keep;  // (batch, tokens) contiguous, or null
  int64_t batch, heads, tokens, features;
};
int copy_tokens(const TokenArgs& p, void* stream);
int zero_tokens(const TokenArgs& p, void* stream);

}  // namespace csat
