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
  double largest_score = 0;
  // Standard deviation of the error of a score whose terms a float32 chain adds in order, for rows of the largest
  // norms: the partial sums walk to the score at random, so it is half an ulp of |q| |k| / sqrt(2). It counts above D =
  // 256.
  double score_deviation = 0;
};
Unfused run_unfused(const AttentionProblem& p, const TensorRef& d_o, const float* dlse);

}  // namespace mfa::testing
