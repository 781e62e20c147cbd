// marking.h: from ranges of tokens to the tiles that hold them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "mfa/block_rules.h"

namespace mfa {

struct TokenRange {
  int64_t first = 0, last = -1;  // both included
};

inline TokenRange query_tokens(const TileGrid& grid, int32_t r) {
  const int64_t first = int64_t{r} * grid.block_q;
  return {first, std::min<int64_t>(grid.Nq, first + grid.block_q) - 1};
}

inline TokenRange key_tokens(const TileGrid& grid, int32_t c) {
  const int64_t first = int64_t{c} * grid.block_k;
  return {first, std::min<int64_t>(grid.Nk, first + grid.block_k) - 1};
}

// Marks the key blocks that hold one of the tokens `first` to `last`; tokens that are no keys are left out.
inline void mark_tokens(const TileGrid& grid, int64_t first, int64_t last, uint8_t* row) {
  first = std::max<int64_t>(first, 0);
  last = std::min<int64_t>(last, grid.Nk - int64_t{1});
  if (first > last) return;
  const int64_t c = first / grid.block_k;
  std::memset(row + c, 1, last / grid.block_k - c + 1);
}

}  // namespace mfa
