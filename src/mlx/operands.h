// operands.h: from evaluated MLX arrays to the operands of matrix products.
#pragma once

#include <optional>
#include <vector>

#include "linear/problem.h"
#include "mlx/array.h"
#include "mlx/stream.h"

namespace mfa {

namespace mx = mlx::core;

// The parameters of MLX's affine quantisation; bits = 0: dense weights.
struct Quantisation {
  int bits = 0;
  int group_size = 0;
  bool transpose = true;
  bool operator==(const Quantisation&) const = default;
};

// All axes but the last two.
mx::Shape batch_shape(const mx::array& x);

// Offsets in elements of the matrices of `x`, broadcast to `batch`, in row-major order.
std::vector<int64_t> matrix_offsets(const mx::array& x, const mx::Shape& batch);

// The stride with which all rows of `x`, broadcast to `shape` [..., rows, columns], can be walked as one axis, if there
// is one; 0 for a row that repeats.
std::optional<int64_t> row_stride(const mx::array& x, const mx::Shape& shape);

// Whether all matrices of `x` are one and the same.
bool is_single_matrix(const mx::array& x);

// `w` or, if neither of its last two axes is dense, a dense copy that lives until the stream's work has run.
mx::array readable_weights(const mx::array& w, mx::Stream stream);

// The first matrix of dense weights [..., K, N], as readable_weights() gives them.
WeightRef dense_weights(const mx::array& w);

// The first matrix of codes, all three arrays with a dense last axis.
WeightRef affine_weights(const mx::array& w, const mx::array& scales, const mx::array& biases, const Quantisation& q);

// The first matrix of the added term, which is broadcast to `out`.
AddendRef addend(const mx::array& c, const mx::Shape& out);

// `pointer` moved by `elements` of `itemsize` bytes.
inline const void* advance(const void* pointer, int64_t elements, size_t itemsize) {
  return static_cast<const char*>(pointer) + elements * static_cast<int64_t>(itemsize);
}

}  // namespace mfa
