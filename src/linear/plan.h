// plan.h: how a matrix product is cut into tasks for the CPU kernels: pure functions of shapes, tested by tables.
#pragma once

#include <cstdint>

#include "linear/problem.h"

namespace mfa {

// What an instruction set offers to the planner.
struct MatmulTraits {
  int32_t lanes = 0;          // float32 lanes of a vector
  int32_t panel = 0;          // columns of a packed panel
  int32_t integer_panel = 0;  // the same where groups are sums of integers
  bool pairs = false;         // pairs of bfloat16 are multiplied
  bool operator==(const MatmulTraits&) const = default;
};

// Most rows of a direct product: weights [in, out], [out, in], dense [out, in] where vectors have 16 lanes, and [out,
// in] with sums of integers.
inline constexpr int32_t kDirectRows = 4;
inline constexpr int32_t kDirectRowsTransposed = 8;
inline constexpr int32_t kDirectRowsWide = 16;
inline constexpr int32_t kDirectRowsInteger = 4;

enum class MatmulKernel : uint8_t {
  empty,   // no output
  direct,  // few rows: weights are read once, straight into the products
  tiled,   // panels of weights are brought into the first cache and used by all rows of a task
};
const char* name_of(MatmulKernel kernel);

struct MatmulPlan {
  MatmulKernel kernel = MatmulKernel::empty;
  int32_t row_block = 0;     // rows of a task
  int32_t column_block = 0;  // columns of a task
  int64_t row_blocks = 0;
  int64_t column_blocks = 0;
  int64_t tasks = 0;  // row_blocks * column_blocks, the row block changing fastest
};
MatmulPlan plan_matmul(const MatmulProblem& p, const MatmulTraits& cpu, int threads);

// Bytes of the weights, as stored.
int64_t weight_bytes(const MatmulProblem& p);

// Seconds that one core of today needs, roughly: what decides whether to wake other threads.
double estimated_seconds(const MatmulProblem& p);

}  // namespace mfa
