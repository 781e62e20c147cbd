// unfused.h: attention as plain float32 steps that store the probabilities in the problem's dtype: the yardstick of the
// error rule, which allows a kernel twice the error of this.
#pragma once

#include <vector>

#include "attention/problem.h"

namespace mfa::testing {

// One result of the unfused steps, and how far from exact correct results may be when luck is bad: `unfused` errors of
// a result of few elements can be small by chance.
struct UnfusedResult {
  std::vector<float> values;
  double noise = 0;   // size of the terms that the largest element sums: float32 steps err by a few 2^-24 of it
  double spread = 0;  // standard deviation, for the worst element, of the error from rounding P and O to the dtype
};

struct Unfused {
  UnfusedResult o, dq, dk, dv, dbias, dsinks, dalibi_slopes;
  std::vector<float> lse;
  std::vector<float> probs;  // of float32 problems: others store them rounded
  double largest_score = 0;
};
Unfused run_unfused(const AttentionProblem& p, const TensorRef& d_o, const float* dlse);

}  // namespace mfa::testing
