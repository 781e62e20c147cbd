// reference.h: the definition of a matrix product as plain loops in float64, for tests and benchmarks.
#pragma once

#include <vector>

#include "linear/problem.h"

namespace mfa {

// The weight w[k][n], widened; a quantised one is scale * code + bias without rounding.
double weight_at(const MatmulProblem& p, int32_t k, int32_t n);

// [M, N], not rounded.
std::vector<double> reference_matmul(const MatmulProblem& p);

}  // namespace mfa
