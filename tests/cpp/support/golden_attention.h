// golden_attention.h: the cases of attention.json, for any implementation.
//
// Most are an AttentionProblem as they stand. The others are given an equal problem:
// - causal_fewer_keys_fully_masked_rows, window_2_1_query_offset_0, window_fewer_keys, sink_fully_masked_rows: their
//   query positions start at Nk - Nq < 0 or at 0, ours at max(0, Nk - Nq); a boolean mask states what is visible.
// - dropout, everything: their masks use Philox offsets 9 and 3, ours 0. Each query row is a problem of its own, with
//   values multiplied by that row's keep factors; visibility becomes a mask, ALiBi a part of the bias.
// ALiBi of the form -slope |pos - j| occurs with causal only, where it equals slope (j - pos).
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "attention/problem.h"

namespace mfa::testing {

struct Solution {
  std::vector<double> o, lse, dq, dk, dv, dbias, dsinks;
};
using Solver = std::function<Solution(const AttentionProblem&, const TensorRef& d_o, const float* dlse)>;

std::vector<std::string> golden_case_names();

// Solves the case `name` and compares every result with the golden one.
void check_golden_case(const std::string& name, const Solver& solve, double tolerance, double gradient_tolerance);

// Solves the parts of the merge section, merges them, and compares parts and whole.
void check_golden_merge(const Solver& solve, double tolerance);

}  // namespace mfa::testing
