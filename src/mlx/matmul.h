// matmul.h: the product of two arrays, with or without an added term, as an MLX primitive on a CPU stream.
#pragma once

#include <utility>
#include <vector>

#include "mlx/operands.h"
#include "mlx/primitives.h"

namespace mfa {

// Inputs: x [..., M, K], w [..., K, N] and, if `has_c`, c that broadcasts to the result; one dtype. Output: [..., M,
// N].
class Matmul : public mx::UnaryPrimitive {
 public:
  Matmul(mx::Stream stream, float alpha, float beta, bool has_c)
      : UnaryPrimitive(stream), alpha_(alpha), beta_(beta), has_c_(has_c) {}

  static mx::array make(mx::Stream stream, std::vector<mx::array> inputs, float alpha = 1.f, float beta = 1.f);

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "MfaMatmul"; }
  bool is_equivalent(const Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  float alpha_, beta_;
  bool has_c_;
};

// Inputs: x [..., M, K], w, scales and biases as quantized_matmul() takes them, of one dtype. Output: [..., M, N].
class QuantizedMatmul : public mx::UnaryPrimitive {
 public:
  QuantizedMatmul(mx::Stream stream, const Quantisation& q) : UnaryPrimitive(stream), q_(q) {}

  static mx::array make(mx::Stream stream, std::vector<mx::array> inputs, const Quantisation& q);

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "MfaQuantizedMatmul"; }
  bool is_equivalent(const Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  Quantisation q_;
};

// Inputs: x, w [, scales, biases], lhs_indices, rhs_indices, the latter two of integers and of one shape. Output:
// [indices..., M, N]. Dense if q.bits is 0.
class GatherMatmul : public mx::UnaryPrimitive {
 public:
  GatherMatmul(mx::Stream stream, const Quantisation& q) : UnaryPrimitive(stream), q_(q) {}

  static mx::array make(mx::Stream stream, std::vector<mx::array> inputs, const Quantisation& q);

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  const char* name() const override { return q_.bits ? "MfaGatherQMM" : "MfaGatherMM"; }
  bool is_equivalent(const Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  Quantisation q_;
};

}  // namespace mfa
