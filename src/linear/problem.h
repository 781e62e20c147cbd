// problem.h: everything that defines one matrix product of a linear layer. Every entry point fills MatmulProblems; the
// CPU kernels and the reference compute from them.
//
//   out[r][n] = alpha * sum_k x[r][k] w[k][n] + beta * c[r][n],     r < M, n < N, k < K
//
// Sums are float32. The order of a sum depends on K and the kind of weights alone, so an element has the same bits
// whatever rows, tile or thread compute it. Terms are cut into blocks of kInnerBlock. The terms of a block are dealt to
// kChains chains, as many neighbours at a time as share a 32-bit word of a dense stored row (two bfloat16, eight codes
// of 4 bits; one where words hold no whole number of codes, and for float16). A chain is summed from zero in the order
// of k; the chains are added to the total one after the other. So a kernel may have columns in its lanes and walk one
// chain at a time, or chains in its lanes and walk weights in the order of memory.
//
// Sums with weights of 4 or 8 bits, stored transposed, and x of 16 bits are made of integers, which have no order. A
// group of a row of x, as the weights have groups, is s * q: s = 2^(e - 14), e being the exponent of its largest
// element, and q rounds x / s to the nearest integer, ties to even. Where more than half of the elements that are not
// zero are small, |x / s| < 2^7 in bfloat16 and 2^9 in float16, the rests x - s * q are 2^-15 * s * q', q' rounded
// likewise. With codes c and m = 2^(bits - 1) a group adds to the sum, in the order of the groups and first with s and
// q, then, if it has rests, with 2^-15 * s and q',
//   s * (scale * sum q * (c - m) + (bias + m * scale) * sum q),
// the sums over q exact and the rest fused multiply-adds in float32. A sum that is not finite is computed again term by
// term.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mfa {

// Terms of a sum whose chains are added before the next terms begin. Part of the numerical definition; a multiple of
// every group size of quantised weights.
inline constexpr int32_t kInnerBlock = 512;
inline constexpr int32_t kChains = 4;

// Rows of which element r lies at data + (offsets ? offsets[r] : r * stride), in elements; each row is dense.
struct RowsRef {
  const void* data = nullptr;
  int64_t stride = 0;
  const int64_t* offsets = nullptr;
  int64_t at(int64_t r) const { return offsets ? offsets[r] : r * stride; }
};

// Codes of MLX's affine quantisation: w = scale * code + bias, a scale and a bias for every `group_size` neighbours of
// a stored row. A row is a little-endian stream of codes of `bits` bits.
struct AffineRef {
  int32_t bits = 0;  // 2, 3, 4, 5, 6 or 8
  int32_t group_size = 0;
  const void* scales = nullptr;  // [stored rows, groups], dtype of the problem
  const void* biases = nullptr;
  int64_t scale_stride = 0;  // between stored rows, in elements
  int64_t bias_stride = 0;
};

// The matrix w [K, N], stored as it is or transposed; stored rows are dense.
struct WeightRef {
  const void* data = nullptr;  // elements, or 32-bit words of codes
  bool transposed = false;     // stored as [N, K]
  int64_t stride = 0;          // between stored rows, in elements or words
  AffineRef affine;            // bits = 0: dense elements
  // The same elements as cpu::pack_weights() writes them for the instruction set that will run, or null.
  const void* packed = nullptr;
  bool quantised() const { return affine.bits != 0; }
};

// The added term; stride 0 along an axis that it is broadcast over. Absent: data is null.
struct AddendRef {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

struct MatmulProblem {
  int64_t M = 0;
  int32_t N = 0, K = 0;
  DType dtype = DType::f32;  // of x, c, out, of dense weights and of scales and biases
  RowsRef x;                 // [M, K]
  WeightRef w;               // [K, N]
  AddendRef c;               // [M, N]
  float alpha = 1.f, beta = 1.f;
  void* out = nullptr;  // row r is dense at out + (out_offsets ? out_offsets[r] : r * N)
  const int64_t* out_offsets = nullptr;
  int64_t out_at(int64_t r) const { return out_offsets ? out_offsets[r] : r * N; }
};

// Whether groups are sums of integers.
inline bool sums_integers(const MatmulProblem& p) {
  return p.w.transposed && p.dtype != DType::f32 && (p.w.affine.bits == 4 || p.w.affine.bits == 8);
}

}  // namespace mfa
