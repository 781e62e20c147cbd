// validate.h: checks of the numbers in a problem that come from outside and are used as addresses.
#pragma once

#include "attention/problem.h"

namespace mfa {

// Arrays of a problem whose values are not known yet, and whose pointers are null. What depends on them is not checked.
struct Unknown {
  bool query_starts = false, key_starts = false, kv_lengths = false, q_positions = false, k_positions = false;
};

// Throws std::invalid_argument, "[function] ...", unless the starts of packed sequences ascend from 0 to the packed
// rows and no sequence is longer than Nq or Nk says, lengths of paged sequences fit their tables, the table entries of
// keys that sequences have are pages of the pool, block lists name blocks in ascending order, and positions lie in the
// rotary tables. Reads the arrays that the problem points to, and no more than it needs of them. Bounds, not sizes of
// arrays, are checked: those are shapes that the caller knows.
void validate(const AttentionProblem& p, const char* function, const Unknown& unknown = {});

// Throws std::invalid_argument, "[function] ...", unless rows first .. first + count - 1 lie in rotary tables of so
// many positions; `what` has them in batch entry b.
void validate_positions(int64_t first, int32_t count, int32_t positions, int32_t b, const char* what,
                        const char* function);

// Throws std::invalid_argument, "[function] `name` ...", unless the `count` indices, `stride` elements apart, are in
// [0, rows).
void validate_indices(const int32_t* indices, int64_t stride, int32_t count, int32_t rows, const char* name,
                      const char* function);

}  // namespace mfa
