// matmul.h: the CPU backend's matrix products. Plans, allocates scratch, and runs on the process's thread pool.
#pragma once

#include <span>

#include "linear/plan.h"
#include "linear/problem.h"

namespace mfa::cpu {

// The traits of the kernels that will run; throws as kernel_traits() of attention.h does, and std::runtime_error if
// there are none.
MatmulTraits matmul_traits();

// Computes every problem's `out`. The problems must be valid: the caller's boundary has checked them. Throws
// std::bad_alloc if scratch cannot be had.
void matmul(std::span<const MatmulProblem> problems);

}  // namespace mfa::cpu
