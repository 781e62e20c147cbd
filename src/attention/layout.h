// layout.h: where row i of head h of batch entry b lies, for batched, packed and paged tensors.
#pragma once

#include <cstdint>

#include "attention/problem.h"

namespace mfa {

// The rows of q (and of o, lse and their gradients) that come before those of batch entry `b`, when packed.
[[gnu::always_inline]] inline int64_t first_query(const AttentionProblem& p, int32_t b) {
  return p.query_starts ? p.query_starts[b] : 0;
}

// The element of a tensor shaped like q at channel 0 of (b, h, i).
[[gnu::always_inline]] inline int64_t query_element(const AttentionProblem& p, const int64_t (&stride)[3], int32_t b,
                                                    int32_t h, int64_t i) {
  const int64_t row = h * stride[1] + (first_query(p, b) + i) * stride[2];
  return p.query_starts ? row : row + b * stride[0];
}

// The element of a tensor shaped like k at channel 0 of (b, h, j): j must be a key that the batch entry has.
[[gnu::always_inline]] inline int64_t key_element(const AttentionProblem& p, const int64_t (&stride)[3], int32_t b,
                                                  int32_t h, int64_t j) {
  if (p.pages.table) {
    const int64_t page = p.pages.table[b * p.pages.table_stride + j / p.pages.page_size];
    return page * stride[0] + h * stride[1] + j % p.pages.page_size * stride[2];
  }
  if (p.key_starts) return h * stride[1] + (p.key_starts[b] + j) * stride[2];
  return b * stride[0] + h * stride[1] + j * stride[2];
}

// The index of (b, h, i) in lse and what is shaped like it: [B, Hq, Nq], or [Hq, packed_queries].
[[gnu::always_inline]] inline int64_t row_index(const AttentionProblem& p, int32_t b, int32_t h, int64_t i) {
  if (p.query_starts) return int64_t{h} * p.packed_queries + p.query_starts[b] + i;
  return (int64_t{b} * p.Hq + h) * p.Nq + i;
}

// The rows of lse.
inline int64_t row_count(const AttentionProblem& p) {
  return int64_t{p.Hq} * (p.query_starts ? p.packed_queries : int64_t{p.B} * p.Nq);
}

}  // namespace mfa
