// linear.h: matrix products of linear layers on MLX arrays, dense and quantised.
//
//   out[..., m, n] = alpha * sum_k x[..., m, k] w[..., k, n] + beta * c[..., m, n]
//
// On the CPU they run this library's kernels: sums are float32 and rounded once, to the dtype of the result, and a row
// of the result has the same bits whatever rows travel with it and however many threads compute it. Weights of any
// strides are read in place, a transposed view too; x and c may be strided and broadcast. On a GPU stream these are
// MLX's own operations. Lazy; support vjp, jvp, vmap and compile.
//
// Each throws std::invalid_argument, before anything is allocated, if shapes or dtypes are not as said here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "mfa/api.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace mfa {

// x [..., M, K] @ w [..., K, N]; leading axes broadcast. A one-dimensional operand is a row (x) or a column (w), and
// its axis is absent from the result. float32, float16 and bfloat16, promoted as MLX promotes them.
MFA_API mlx::core::array matmul(const mlx::core::array& x, const mlx::core::array& w, mlx::core::StreamOrDevice s = {});

// The same with the added term: c broadcasts to the shape of the result and is not read if beta is 0.
MFA_API mlx::core::array addmm(const mlx::core::array& c, const mlx::core::array& x, const mlx::core::array& w,
                               float alpha = 1.f, float beta = 1.f, mlx::core::StreamOrDevice s = {});

// x [..., M, K] by weights in MLX's affine quantisation: w uint32 [..., N, K * bits / 32] if `transpose`, else
// [..., K, N * bits / 32]; scales and biases [..., rows of w, groups]. bits is 2, 3, 4, 5, 6 or 8; group_size is 32, 64
// or 128. Codes are read where they lie; a weight is scale * code + bias, not rounded to the dtype except by processors
// that multiply bfloat16 pairs, and then not with 4 and 8 bits if `transpose`. Those, with x of 16 bits, are summed as
// integers: docs/linear.md. Differentiable in x, scales and biases.
MFA_API mlx::core::array quantized_matmul(const mlx::core::array& x, const mlx::core::array& w,
                                          const mlx::core::array& scales, const mlx::core::array& biases,
                                          bool transpose = true, int group_size = 64, int bits = 4,
                                          mlx::core::StreamOrDevice s = {});

// Products of matrices that are picked by flat indices into the leading axes of x and w: the result has the shape of
// the broadcast indices and then [M, N]. Indices are of any integer dtype; absent ones count through the leading axes.
// An index outside them is std::invalid_argument if its value is known, else an error when the array is evaluated,
// which then holds NaN. Products that share a matrix of w are computed together.
MFA_API mlx::core::array gather_mm(const mlx::core::array& x, const mlx::core::array& w,
                                   const std::optional<mlx::core::array>& lhs_indices = std::nullopt,
                                   const std::optional<mlx::core::array>& rhs_indices = std::nullopt,
                                   mlx::core::StreamOrDevice s = {});
MFA_API mlx::core::array gather_qmm(const mlx::core::array& x, const mlx::core::array& w,
                                    const mlx::core::array& scales, const mlx::core::array& biases,
                                    const std::optional<mlx::core::array>& lhs_indices = std::nullopt,
                                    const std::optional<mlx::core::array>& rhs_indices = std::nullopt,
                                    bool transpose = true, int group_size = 64, int bits = 4,
                                    mlx::core::StreamOrDevice s = {});

// Whether the calls above would run this library's kernels, and be faster so than MLX's operation: what the hooks of
// the Python package ask before they take a call of MLX. Never throws for bad arguments: MLX's own operation reports
// them.
MFA_API bool routes_matmul(const mlx::core::array& x, const mlx::core::array& w,
                           const std::optional<mlx::core::array>& c, mlx::core::StreamOrDevice s = {});
MFA_API bool routes_quantized_matmul(const mlx::core::array& x, const mlx::core::array& w,
                                     const mlx::core::array& scales, const std::optional<mlx::core::array>& biases,
                                     bool transpose, int group_size, int bits, mlx::core::StreamOrDevice s = {});
MFA_API bool routes_gather(const mlx::core::array& x, const mlx::core::array& w,
                           const std::optional<mlx::core::array>& scales, const std::optional<mlx::core::array>& biases,
                           const std::optional<mlx::core::array>& lhs_indices,
                           const std::optional<mlx::core::array>& rhs_indices, bool transpose, int group_size, int bits,
                           mlx::core::StreamOrDevice s = {});

// Dense weights of matmul() and addmm() that are multiplied from again, by more than four rows and with unchanged
// contents, are packed once in the order in which the kernels read them, and the copy is kept: results have the same
// bits, sooner. Copies are dropped when the array is gone (noticed by later products and by packed_weights(), its
// memory with it), and the least recently used ones to stay within the limit. Default: MFA_PACKED_WEIGHTS_MB megabytes,
// else 512; 0 keeps none. While a copy is kept MLX does not write into the array's memory; a program that does so
// itself, behind MLX's back, must set the limit to 0 and back.
struct PackedWeights {
  size_t arrays = 0;  // copies kept
  size_t bytes = 0;   // their size
  size_t limit_bytes = 0;
};
MFA_API PackedWeights packed_weights();
// Returns the limit that was in force.
MFA_API size_t set_packed_weights_limit(size_t bytes);

// Products by kind that this library's kernels were given since the process started: graphs built, not evaluations.
struct LinearCounters {
  uint64_t matmul = 0;  // with and without an added term
  uint64_t quantized_matmul = 0;
  uint64_t gather_mm = 0;
  uint64_t gather_qmm = 0;
};
MFA_API LinearCounters linear_counters();

}  // namespace mfa
