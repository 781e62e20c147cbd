// evaluate.h: from evaluated MLX arrays to the pointers and strides that the kernels take.
#pragma once

#include <vector>

#include "attention/problem.h"
#include "mlx/request.h"

namespace mfa {

// Gives `out` dense memory. Throws std::bad_alloc if there is none, naming nothing else.
void allocate(mx::array& out);

// `x` itself if its last axis is dense, else a dense copy of it that is made on `stream` and lives until the work
// dispatched there after it has run.
mx::array with_dense_last_axis(const mx::array& x, mx::Stream stream);

// `x` itself if all of it is dense in row-major order, else such a copy.
mx::array with_dense_rows(const mx::array& x, mx::Stream stream);

TensorRef tensor_ref(const mx::array& x);
MutableTensorRef mutable_tensor_ref(mx::array& x);

// A problem with its pointers. The seed's value is not known until the arrays before it in the stream are computed.
struct EvaluatedProblem {
  AttentionProblem problem;
  const uint32_t* seed = nullptr;

  // The problem with the seed read; call it where the work runs.
  AttentionProblem with_seed() const;
};

// `inputs` are those of the primitive, evaluated. With `dense_bias` a bias that repeats along an axis of an extent
// above 1 is copied, so that each of its elements has its own gradient.
EvaluatedProblem evaluate(const AttentionParams& params, const std::vector<mx::array>& inputs, mx::Stream stream,
                          bool dense_bias = false);

}  // namespace mfa
