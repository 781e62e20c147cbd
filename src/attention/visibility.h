// visibility.h: which keys a query row sees. Causal, window and length limits of a row are one interval of keys, so
// that kernels compare a tile with two numbers a row; block lists, the neighbourhood and the boolean mask cut further
// inside it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/problem.h"

namespace mfa {

struct KeyRange {  // keys begin <= j < end; empty when end <= begin
  int32_t begin = 0, end = 0;
};

// The numbers of queries and keys of batch entry `b`.
[[gnu::always_inline]] inline int32_t query_count(const AttentionProblem& p, int32_t b) {
  return p.query_starts ? p.query_starts[b + 1] - p.query_starts[b] : p.Nq;
}
[[gnu::always_inline]] inline int32_t key_count(const AttentionProblem& p, int32_t b) {
  const int32_t most = p.key_starts ? p.key_starts[b + 1] - p.key_starts[b] : p.Nk;
  if (!p.kv_lengths) return most;
  const int32_t length = p.kv_lengths[b];
  return length < 0 ? 0 : length > most ? most : length;
}

// pos(i) - i: the queries are the last positions of the sequence, or start at 0 when there are fewer keys.
[[gnu::always_inline]] inline int32_t position_offset(const AttentionProblem& p, int32_t b) {
  const int32_t offset = key_count(p, b) - query_count(p, b);
  return offset > 0 ? offset : 0;
}

// The keys that the rows of batch entry `b` may see; what cuts inside of an interval is not applied.
class VisibleKeys {
 public:
  [[gnu::always_inline]] VisibleKeys(const AttentionProblem& p, int32_t b)
      : keys_(key_count(p, b)), offset_(position_offset(p, b)) {
    if (p.window_left >= 0) before_ = p.window_left;
    if (p.window_right >= 0) after_ = p.window_right;
    if (p.causal) after_ = std::min<int64_t>(after_, 0);
  }
  int32_t position(int32_t i) const { return i + offset_; }
  [[gnu::always_inline]] KeyRange of(int32_t i) const {
    const int64_t pos = int64_t{i} + offset_;
    const int64_t begin = std::max<int64_t>(pos - before_, 0), end = std::min<int64_t>(pos + after_ + 1, keys_);
    if (begin >= end) return {0, 0};
    return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
  }

 private:
  static constexpr int64_t kOpen = int64_t{1} << 40;
  int32_t keys_, offset_;
  int64_t before_ = kOpen, after_ = kOpen;  // keys on either side of the row's position
};
[[gnu::always_inline]] inline KeyRange visible_keys(const AttentionProblem& p, int32_t b, int32_t i) {
  return VisibleKeys(p, b).of(i);
}

// Whether the block lists show the tile of (i, j) to head `h`.
inline bool block_visible(const BlockListRef& lists, int32_t b, int32_t h, int32_t i, int32_t j) {
  const int64_t row = (b * lists.stride_b + h * lists.stride_h) * (lists.query_blocks + 1) + i / lists.block_q;
  const int32_t* first = lists.key_ids + lists.offsets[row];
  const int32_t* last = lists.key_ids + lists.offsets[row + 1];
  return std::binary_search(first, last, j / lists.block_k);
}

// Whether row `i` of head `h` of batch entry `b` sees key `j`; the boolean mask, bias and score floor are not applied.
inline bool sees(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j) {
  const KeyRange range = visible_keys(p, b, i);
  if (j < range.begin || j >= range.end) return false;
  if (p.blocks.offsets && !block_visible(p.blocks, b, h, i, j)) return false;
  return p.neighbourhood.axes == 0 || neighbours(p.neighbourhood, i, j);
}

}  // namespace mfa
