// visibility.h: which keys a query row sees. Causal, window and length limits of a row are one interval of keys, so
// that kernels compare a tile with two numbers a row; the boolean mask cuts further inside it.
#pragma once

#include <cstdint>

#include "attention/problem.h"

namespace mfa {

struct KeyRange {  // keys begin <= j < end; empty when end <= begin
  int32_t begin = 0, end = 0;
};

// The number of keys of batch entry `b`.
[[gnu::always_inline]] inline int32_t key_count(const AttentionProblem& p, int32_t b) {
  if (!p.kv_lengths) return p.Nk;
  const int32_t length = p.kv_lengths[b];
  return length < 0 ? 0 : length > p.Nk ? p.Nk : length;
}

// pos(i) - i: the queries are the last Nq positions of the sequence, or start at 0 when there are fewer keys.
[[gnu::always_inline]] inline int32_t position_offset(const AttentionProblem& p, int32_t b) {
  const int32_t offset = key_count(p, b) - p.Nq;
  return offset > 0 ? offset : 0;
}

// The keys that row `i` of batch entry `b` may see; the boolean mask, if any, is not applied.
[[gnu::always_inline]] inline KeyRange visible_keys(const AttentionProblem& p, int32_t b, int32_t i) {
  const int64_t pos = int64_t{i} + position_offset(p, b);
  int64_t begin = 0, end = key_count(p, b);
  if (p.causal && pos + 1 < end) end = pos + 1;
  if (p.window_right >= 0 && pos + p.window_right + 1 < end) end = pos + p.window_right + 1;
  if (p.window_left >= 0 && pos - p.window_left > begin) begin = pos - p.window_left;
  if (begin >= end) return {0, 0};
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

}  // namespace mfa
