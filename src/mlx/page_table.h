// page_table.h: what the entry points over pools of pages share.
#pragma once

#include "mfa/paged.h"
#include "mlx/sources.h"
#include "mlx/stream.h"

namespace mfa {

// Table and lengths as the primitives take them, int32 with one row for each sequence.
struct CheckedTable {
  mx::array table, lengths;
};

// Checks ranks, counts and dtypes, and follows cache_batch_idx. Throws std::invalid_argument.
CheckedTable make_table(const PageTable& table, const char* function, mx::Stream s);

// That `k` and `v` are pools of one dtype that attention takes, and that q can be cast to it.
void check_pools(const mx::array& q, const mx::array& k, const mx::array& v, const char* function);

// That pages of a pool of rank 4 hold tokens.
void check_page_size(const mx::array& pool, const char* function);

// `lengths` beside those of the sources must not be given.
void check_no_lengths(const AttentionOptions& options, const char* function);

}  // namespace mfa
