// matmul.h: the CPU backend's matrix products. Plans, allocates scratch, and runs on the process's thread pool.
#pragma once

#include <cstddef>
#include <span>

#include "linear/plan.h"
#include "linear/problem.h"

namespace mfa::cpu {

// The traits of the kernels that will run; throws as kernel_traits() of attention.h does, and std::runtime_error if
// there are none.
MatmulTraits matmul_traits();

// Weights that many products read are faster packed: panels of columns in the order in which tiles multiply them, no
// larger than the weights but for N rounded up to whole panels. packed_weight_bytes() is 0 where that does not exist
// (quantised weights). pack_weights() writes so many bytes, 64-byte aligned, from p.w, p.N, p.K and p.dtype alone;
// results have the same bits with them. The layout is that of the instruction set whose matmul_traits() are in force.
size_t packed_weight_bytes(const MatmulProblem& p);
void pack_weights(const MatmulProblem& p, void* packed);

// Computes every problem's `out`, the weights of all being of one kind. The problems must be valid: the caller's
// boundary has checked them. Throws std::bad_alloc if scratch cannot be had.
void matmul(std::span<const MatmulProblem> problems);

}  // namespace mfa::cpu
