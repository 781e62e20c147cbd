// reductions.h: what sampling a token takes of a row of logits: its log-sum-exp and the place of its largest.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mfa {

struct ReductionProblem {
  int64_t rows = 0, D = 0;
  DType dtype = DType::f32;
  const void* x = nullptr;  // [rows, D] dense, D > 0
  void* out = nullptr;      // [rows]
};

// out = log(sum exp x), in float32, rounded once to the dtype of x; the largest element if that is infinite. Runs on
// the process's thread pool. A row has the same bits whatever rows are computed with it.
void log_sum_exp(const ReductionProblem& p);

// out, uint32 = the first place of a NaN, else the first of the largest element.
void arg_max(const ReductionProblem& p);

}  // namespace mfa
