#include "attention/validate.h"

#include <algorithm>

#include "attention/visibility.h"
#include "common/check.h"

namespace mfa {
namespace {

void check_starts(const int32_t* starts, int32_t B, int32_t rows, int32_t longest, const char* what, const char* name,
                  const char* function) {
  check(starts[0] == 0, function, name, " must begin with 0; got ", starts[0]);
  for (int32_t b = 0; b < B; ++b) {
    check(starts[b + 1] >= starts[b], function, name, " must not decrease; got ", starts[b + 1], " after ", starts[b]);
    const int64_t length = int64_t{starts[b + 1]} - starts[b];
    check(length <= longest, function, "no sequence may have more than ", longest, " ", what, "; got ", length,
          " in sequence ", b);
  }
  check(starts[B] == rows, function, name, " must end with the number of packed ", what, ", ", rows, "; got ",
        starts[B]);
}

void check_pages(const AttentionProblem& p, const char* function) {
  for (int32_t b = 0; b < p.B; ++b) {
    if (p.kv_lengths) {
      check(p.kv_lengths[b] >= 0 && p.kv_lengths[b] <= p.Nk, function, "seq_lens must be in [0, ", p.Nk,
            "], what the block table has room for; got ", p.kv_lengths[b], " for sequence ", b);
    }
    const int64_t keys = key_count(p, b);
    const int64_t used = keys > 0 ? (keys - 1) / p.pages.page_size + 1 : 0;  // the pages may be of 0 tokens
    const int32_t* row = p.pages.table + b * p.pages.table_stride;
    for (int64_t t = 0; t < used; ++t) {
      check(row[t] >= 0 && row[t] < p.pages.pages, function, "block_table must name pages in [0, ", p.pages.pages,
            ") for the keys that a sequence has; got ", row[t], " at entry ", t, " of sequence ", b);
    }
  }
}

void check_lists(const int64_t* offsets, const int32_t* ids, int64_t lists, int32_t rows, int32_t blocks, int64_t total,
                 const char* function) {
  check(offsets[0] == 0, function, "the offsets of block lists must begin with 0; got ", offsets[0]);
  for (int64_t list = 0; list < lists; ++list) {
    const int64_t* row = offsets + list * (rows + 1);
    for (int32_t r = 0; r < rows; ++r) {
      check(row[r] >= 0 && row[r] <= row[r + 1] && row[r + 1] <= total, function,
            "the offsets of block lists must ascend within [0, ", total, "]; got ", row[r], " before ", row[r + 1]);
      for (int64_t i = row[r]; i < row[r + 1]; ++i) {
        check(ids[i] >= 0 && ids[i] < blocks, function, "block lists must name blocks in [0, ", blocks, "); got ",
              ids[i]);
        check(i == row[r] || ids[i] > ids[i - 1], function, "block lists must ascend; got ", ids[i], " after ",
              ids[i - 1]);
      }
    }
  }
}

void check_positions(const AttentionProblem& p, const int32_t* positions, bool of_keys, const char* function) {
  for (int32_t b = 0; b < p.B; ++b) {
    const int32_t count = of_keys ? key_count(p, b) : query_count(p, b);
    validate_positions(positions ? positions[b] : 0, count, p.rope.positions, b, of_keys ? "keys" : "queries",
                       function);
  }
}

}  // namespace

void validate(const AttentionProblem& p, const char* function, const Unknown& unknown) {
  if (p.query_starts) check_starts(p.query_starts, p.B, p.packed_queries, p.Nq, "queries", "cu_seqlens_q", function);
  if (p.key_starts) check_starts(p.key_starts, p.B, p.packed_keys, p.Nk, "keys", "cu_seqlens_k", function);
  if (p.pages.table && !unknown.kv_lengths) check_pages(p, function);
  if (p.rope.rotary_dim > 0) {
    if (!unknown.query_starts && !unknown.q_positions) check_positions(p, p.rope.q_positions, false, function);
    const bool counts_keys = !unknown.key_starts && !unknown.kv_lengths;
    if (p.rope.rotates_k && counts_keys && !unknown.k_positions) check_positions(p, p.rope.k_positions, true, function);
  }
  if (p.blocks.offsets) {
    const BlockListRef& l = p.blocks;
    const int64_t lists = (l.stride_b ? (p.B - 1) * l.stride_b : 0) + (l.stride_h ? (p.Hq - 1) * l.stride_h : 0) + 1;
    check_lists(l.offsets, l.key_ids, lists, l.query_blocks, l.key_blocks, l.entries, function);
    check_lists(l.transposed_offsets, l.query_ids, lists, l.key_blocks, l.query_blocks, l.entries, function);
  }
}

void validate_positions(int64_t first, int32_t count, int32_t positions, int32_t b, const char* what,
                        const char* function) {
  check(first >= 0 && first + count <= positions, function, "the positions of ", what,
        " must lie in the rotary tables, [0, ", positions, "); got [", first, ", ", first + count, ") for sequence ",
        b);
}

void validate_indices(const int32_t* indices, int64_t stride, int32_t count, int32_t rows, const char* name,
                      const char* function) {
  for (int32_t i = 0; i < count; ++i) {
    const int32_t index = indices[i * stride];
    check(index >= 0 && index < rows, function, name, " must be in [0, ", rows, "); got ", index, " at entry ", i);
  }
}

}  // namespace mfa
